//! The host's boot: nothing is pinned, and the engine starts containers by itself.

use std::{fs, os::unix::net::UnixDatagram, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, ensure};
use bollard::models::{HostConfig, RestartPolicy, RestartPolicyNameEnum};
use metadata_proxy_tests::{
    host::{ContainerSpec, Network, TestHost},
    imds::Fault,
    stage::{self, daemon_options, role_arn},
};

/// A container that the engine starts by itself, and that asks from its first moment on.
async fn lasting(host: &TestHost, name: &str, network: Network) -> Result<PathBuf> {
    let directory = host.directory().join(name);
    fs::create_dir(&directory)?;
    let script = "while :; do curl -s --max-time 9 -w ' %{http_code}\\n' \
                  http://169.254.169.254/latest/meta-data/iam/security-credentials/ >> /tmp/answers; sleep 0.02; done";
    let policy = RestartPolicy { name: Some(RestartPolicyNameEnum::ALWAYS), ..RestartPolicy::default() };
    let mut spec = ContainerSpec::on_host(name, ["/usr/bin/sh", "-c", script])
        .label("metadata-proxy.role", &role_arn(name))
        .bind(format!("{}:/tmp", directory.display()))
        .network(network);
    spec.host_config = HostConfig { restart_policy: Some(policy), ..HostConfig::default() };
    host.run(spec).await?;
    Ok(directory.join("answers"))
}

async fn until(what: &str, file: &PathBuf, found: impl Fn(&str) -> bool) -> Result<String> {
    for _ in 0..1000 {
        let text = fs::read_to_string(file).unwrap_or_default();
        if found(&text) {
            return Ok(text);
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    anyhow::bail!("never {what}: {}", fs::read_to_string(file).unwrap_or_default())
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_that_the_engine_starts_at_boot_never_reach_the_real_service() -> Result<()> {
    let host = TestHost::start().await?;
    let (imds, _sts) = (stage::start_imds(&host)?, stage::start_sts(&host)?);
    let mut answers = Vec::new();
    for (name, network) in [("early", Network::Default), ("early-host", Network::Host), ("early-none", Network::None)] {
        answers.push((name, lasting(&host, name, network).await?));
    }
    // Without the daemon they do, or the rest proves nothing.
    for (name, file) in &answers[..2] {
        until(&format!("{name} reaches the real service"), file, |text| text.contains(" 200")).await?;
    }
    host.engine().stop().await?;
    imds.clear();
    answers.iter().try_for_each(|(_, file)| fs::remove_file(file))?;

    // The order that the unit gives: the engine starts when the daemon says that it is attached.
    let notify = host.directory().join("notify");
    let systemd = UnixDatagram::bind(&notify)?;
    systemd.set_read_timeout(Some(Duration::from_secs(20)))?;
    let mut daemon = host.daemon(daemon_options().env("NOTIFY_SOCKET", notify.display().to_string()))?;
    let mut message = [0; 64];
    let length = systemd.recv(&mut message).with_context(|| daemon.log().unwrap_or_default())?;
    ensure!(message[..length] == *b"READY=1\n", "{:?}", String::from_utf8_lossy(&message[..length]));
    ensure!(!daemon.log()?.contains("ready: "), "it cannot know any containers yet");

    host.engine().resume().await?;
    daemon.wait_ready(Duration::from_secs(20)).await?;
    for (name, file) in &answers {
        let text = until("served", file, |text| text.contains(" 200")).await?;
        // Before the engine can tell whose the question is, the answer is to try again.
        let other = |line: &&str| ![format!("{name} 200"), " 503".to_owned()].contains(&(*line).to_owned());
        let wrong: Vec<_> = text.lines().filter(other).collect();
        ensure!(wrong.is_empty(), "{name} was answered {wrong:?}");
    }
    ensure!(imds.requests().is_empty(), "reached the real service: {:#?}", imds.requests());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_daemon_ends_in_order_where_no_engine_ever_comes() -> Result<()> {
    let host = TestHost::start().await?;
    host.engine().stop().await?;
    let mut daemon = host.daemon(daemon_options())?;
    daemon.wait_for("its attempt", Duration::from_secs(10), |log| log.contains("cannot follow the engine")).await?;
    let status = daemon.terminate(Duration::from_secs(5)).await?;
    ensure!(status.success(), "{status}: {}", daemon.log()?);
    Ok(())
}

/// The region is asked of a service that does not answer, and a connection is held for four seconds only.
#[tokio::test(flavor = "multi_thread")]
async fn connections_do_not_wait_until_the_daemon_knows_its_aws() -> Result<()> {
    let host = TestHost::start().await?;
    let (imds, _sts) = (stage::start_imds(&host)?, stage::start_sts(&host)?);
    imds.set_fault(Some(Fault::Delay(Duration::from_secs(30))));
    let spec = ContainerSpec::on_host("early", ["sleep", "600"]).label("metadata-proxy.role", &role_arn("early"));
    let container = host.run(spec).await?;
    let mut daemon = host.daemon(daemon_options().env("AWS_REGION", ""))?;
    daemon.wait_for("attached", Duration::from_secs(20), |log| log.contains("attached: ")).await?;
    let url = "http://169.254.169.254/latest/meta-data/iam/security-credentials/";
    let finished = container.exec(["curl", "-s", "--connect-timeout", "1", "--max-time", "60", url]).await?;
    ensure!(finished.stdout == "early", "{finished:?} {}", daemon.log()?);
    ensure!(daemon.log()?.contains("no region in AWS_REGION"), "the region was known: {}", daemon.log()?);
    Ok(())
}
