//! What is attached without a daemon: containers get errors then, and never what is the host's.

use std::{process::Output, time::Duration};

use anyhow::{Context as _, Result, ensure};
use metadata_proxy_tests::{
    host::{Container, ContainerSpec, Network, TestHost, program},
    imds::HOST_ROLE,
    stage::{self, Stage, daemon_options, role_arn},
};

const ROLES: &str = "http://169.254.169.254/latest/meta-data/iam/security-credentials/";
const NETWORKS: [(&str, Network); 2] = [("bridge", Network::Default), ("host", Network::Host)];

async fn containers(host: &TestHost) -> Result<Vec<Container>> {
    let mut containers = Vec::new();
    for (name, network) in NETWORKS {
        let spec = ContainerSpec::on_host(name, ["sleep", "600"]).network(network);
        containers.push(host.run(spec.label("metadata-proxy.role", &role_arn(name))).await?);
    }
    Ok(containers)
}

/// What a container reads there, or curl's exit status.
async fn asks(container: &Container) -> Result<std::result::Result<String, i64>> {
    let finished = container.exec(["curl", "-s", "--max-time", "9", ROLES]).await?;
    Ok(if finished.exit_code == 0 { Ok(finished.stdout) } else { Err(finished.exit_code) })
}

fn attach(host: &TestHost) -> Result<Output> {
    let mut command = host.command(program()?);
    command.arg("attach").arg("--cgroup").arg(host.machine().inner_cgroup());
    command.output().context("run attach")
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_get_errors_until_the_daemon_comes() -> Result<()> {
    let host = TestHost::start().await?;
    let imds = stage::start_imds(&host)?;
    let containers = containers(&host).await?;
    // Or the rest proves nothing.
    ensure!(asks(&containers[0]).await? == Ok(HOST_ROLE.to_owned()), "the service is not there");
    imds.clear();

    for _ in 0..2 {
        let output = attach(&host)?;
        ensure!(output.status.success(), "{output:?}");
        for container in &containers {
            let answer = asks(container).await?;
            ensure!(answer.is_err(), "{} was answered {answer:?}", container.name());
        }
    }
    ensure!(imds.requests().is_empty(), "{:?}", imds.requests());
    let own = host.command("curl").args(["-s", "--max-time", "5", ROLES]).output()?;
    ensure!(own.stdout == HOST_ROLE.as_bytes(), "a host process was answered {own:?}");

    let _sts = stage::start_sts(&host)?;
    let mut daemon = host.daemon(daemon_options())?;
    daemon.wait_ready(Duration::from_secs(20)).await?;
    for container in &containers {
        ensure!(asks(container).await? == Ok(container.name().to_owned()), "{} is not served", container.name());
    }
    // Beside a daemon it changes nothing.
    let output = attach(&host)?;
    ensure!(output.status.success(), "{output:?}");
    for container in &containers {
        ensure!(asks(container).await? == Ok(container.name().to_owned()), "{} is no longer served", container.name());
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_keeps_the_real_service_keeps_it_when_attached_beside_the_daemon() -> Result<()> {
    let stage = Stage::configured(daemon_options(), "[exempt]\ncontainers = ['bridge']\n").await?;
    let containers = containers(&stage).await?;
    let before = asks(&containers[0]).await?;
    ensure!(attach(&stage)?.status.success());
    let after = asks(&containers[0]).await?;
    ensure!((before, after) == (Ok(HOST_ROLE.to_owned()), Ok(HOST_ROLE.to_owned())));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wrong_configuration_leaves_containers_with_errors() -> Result<()> {
    let host = TestHost::start().await?;
    let imds = stage::start_imds(&host)?;
    let containers = containers(&host).await?;
    for text in ["default-rol = 'x'\n", "[limits]\nconnections = 'x'\n", "no toml at all"] {
        let mut daemon = host.daemon(stage::with_config(&host, daemon_options(), text)?)?;
        let status = daemon.wait(Duration::from_secs(10)).await?;
        let log = daemon.log()?;
        ensure!(
            status.code() == Some(64) && log.contains("until it is right, containers get errors"),
            "{status} {log}"
        );
    }
    for container in &containers {
        let answer = asks(container).await?;
        ensure!(answer.is_err(), "{} was answered {answer:?}", container.name());
    }
    ensure!(imds.requests().is_empty(), "{:?}", imds.requests());

    let _sts = stage::start_sts(&host)?;
    let mut daemon = host.daemon(daemon_options())?;
    daemon.wait_ready(Duration::from_secs(20)).await?;
    ensure!(asks(&containers[0]).await?.is_ok(), "the right configuration does not serve");
    Ok(())
}

/// As amazon-ec2-metadata-mock is used: its clients on the host connect from the very address that they connect to.
#[tokio::test(flavor = "multi_thread")]
async fn a_stand_in_on_the_hosts_own_loopback_answers_the_host_and_no_container() -> Result<()> {
    let host = TestHost::start().await?;
    let containers = containers(&host).await?;
    let root = host.directory().join("stand-in");
    std::fs::create_dir_all(root.join("latest"))?;
    std::fs::write(root.join("latest/index.html"), "stand-in")?;
    let serve = |address: &str| {
        let mut server = host.command("busybox");
        server.args(["httpd", "-f", "-p", address, "-h"]).arg(&root);
        server.spawn().context("start a server")
    };
    let (mut four, mut six) = (serve("169.254.169.254:80")?, serve("[fd00:ec2::254]:80")?);
    let output = attach(&host)?;
    ensure!(output.status.success(), "{output:?}");
    for address in ["169.254.169.254", "[fd00:ec2::254]"] {
        let url = format!("http://{address}/latest/");
        let mut curl = host.command("curl");
        curl.args(["-s", "--retry", "20", "--retry-delay", "1", "--retry-connrefused", "--max-time", "20", &url]);
        let own = curl.output()?;
        ensure!(own.stdout == b"stand-in", "the host, of {address}: {own:?}");
        for container in &containers {
            let finished = container.exec(["curl", "-s", "--max-time", "6", &url]).await?;
            ensure!(finished.exit_code != 0, "{} reached {address}: {finished:?}", container.name());
        }
    }
    for server in [&mut four, &mut six] {
        server.kill()?;
        server.wait()?;
    }
    Ok(())
}

/// Or the first at boot and the last at removal would pin elsewhere than the daemon does.
#[tokio::test(flavor = "multi_thread")]
async fn attach_and_detach_go_where_the_configuration_file_says() -> Result<()> {
    let host = TestHost::start().await?;
    let file = host.directory().join("config.toml");
    let bpffs = host.directory().join("bpf");
    std::fs::create_dir(&bpffs)?;
    let bpffs = bpffs.display().to_string();
    let call = |arguments: &[&str], text: &str| -> Result<String> {
        std::fs::write(&file, text)?;
        let output = host.command(program()?).args(arguments).env("METADATA_PROXY_CONFIG", &file).output()?;
        ensure!(output.status.success(), "{output:?}");
        Ok(String::from_utf8(output.stderr)?)
    };
    let cgroup = host.machine().inner_cgroup().display().to_string();
    let attach = ["attach", "--cgroup", &cgroup];

    let elsewhere = format!("bpffs = '{bpffs}'\ndefault-rol = 'x'\n");
    call(&attach, &elsewhere)?;
    let removed = call(&["detach"], &elsewhere)?;
    ensure!(removed.contains(&format!("removed {bpffs}/metadata-proxy/v")), "{removed}");

    let log = call(&attach, "no toml at all")?;
    ensure!(log.contains(" WARN ") && log.contains(&file.display().to_string()), "{log}");
    let removed = call(&["detach"], "no toml at all")?;
    ensure!(removed.contains("looking in /sys/fs/bpf") && removed.contains("removed /sys/fs/bpf/"), "{removed}");
    Ok(())
}
