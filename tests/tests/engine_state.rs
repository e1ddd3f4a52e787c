//! What an engine says of a container, and what the container is: where the two differ.

use anyhow::{Result, ensure};
use bollard::models::ContainerCreateBody;
use metadata_proxy_tests::{
    host::{BUSYBOX, ContainerSpec, Network, SLOW_RUNTIME},
    stage::{Stage, role_arn},
};

const ROLE: &str = "metadata-proxy.role";

#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_takes_long_to_start_is_no_stranger() -> Result<()> {
    // From its first moment on, each answer on a line.
    const ASK: &str = "for n in 1 2 3 4 5 6 7 8; do curl -s --max-time 20 -o /dev/null -w '%{http_code}\\n' \
        http://169.254.169.254/latest/meta-data/iam/security-credentials/; done; sleep 2; \
        curl -s --max-time 20 http://169.254.169.254/latest/meta-data/iam/security-credentials/";
    let stage = Stage::start().await?;
    for (name, network) in [("slow", Network::Default), ("slow-host", Network::Host)] {
        let mut spec = ContainerSpec::on_host(name, ["/usr/bin/sh", "-c", ASK]).label(ROLE, &role_arn(name));
        spec.host_config.runtime = Some(SLOW_RUNTIME.to_owned());
        let said = stage.run(spec.network(network)).await?.wait().await?.success()?;
        let answers: Vec<_> = said.lines().collect();
        let expected = |answer: &&str| ["200", "503", name].contains(answer);
        ensure!(answers.last() == Some(&name) && answers.iter().all(expected), "{answers:?}\n{}", stage.daemon.log()?);
    }
    stage.assert_no_leak()
}

/// As with whatever starts a container's process before the engine says that it runs.
#[tokio::test(flavor = "multi_thread")]
async fn a_process_of_a_container_that_is_not_said_to_run_is_told_to_try_again_and_no_stranger() -> Result<()> {
    const ASK: &str = "curl -s --max-time 10 -o /dev/null -w '%{http_code}' \
        http://169.254.169.254/latest/meta-data/iam/security-credentials/";
    let stage = Stage::start().await?;
    let body = ContainerCreateBody {
        image: Some(BUSYBOX.to_owned()),
        cmd: Some(vec!["true".to_owned()]),
        ..Default::default()
    };
    let id = stage.docker().create_container(None, body).await?.id;
    let cgroup = format!("/sys/fs/cgroup/{}/containers/{id}", stage.host.machine().name());
    let ask = || -> Result<String> {
        let script = format!("mkdir -p {cgroup} && echo $$ > {cgroup}/cgroup.procs && exec {ASK}");
        let output = stage.command("timeout").args(["12", "sh", "-c", &script]).output()?;
        Ok(String::from_utf8(output.stdout)?)
    };
    ensure!(ask()? == "503", "it was answered {}", ask()?);
    stage.docker().remove_container(&id, None).await?;
    ensure!(ask()? == "404", "without its container it was answered {}", ask()?);
    ensure!(stage.command("rmdir").arg(&cgroup).status()?.success(), "rmdir");
    stage.assert_no_leak()
}
