//! A daemon that ended between any two steps leaves pins that the next one mends, and at no moment the
//! real service.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use metadata_proxy_tests::{
    host::{Container, ContainerSpec, Network},
    stage::{Stage, daemon_options, role_arn},
};

const PINS: &str = "/sys/fs/bpf/metadata-proxy";
const READY: Duration = Duration::from_secs(20);
const ASK: &str = "timeout 8 wget -qO- http://169.254.169.254/latest/meta-data/iam/security-credentials/";

async fn containers(stage: &Stage) -> Result<Vec<Container>> {
    let mut containers = Vec::new();
    for (name, network) in [("bridge", Network::Default), ("host", Network::Host)] {
        let spec = ContainerSpec::busybox(name, ["sleep", "600"]).network(network);
        containers.push(stage.run(spec.label("metadata-proxy.role", &role_arn(name))).await?);
    }
    Ok(containers)
}

async fn each_has_its_role(stage: &Stage, containers: &[Container], after: &str) -> Result<()> {
    for container in containers {
        let answer = container.exec(["sh", "-c", ASK]).await?;
        let log = || stage.daemon.log().unwrap_or_default();
        ensure!(answer.stdout == container.name(), "{after}: {} got {answer:?}\n{}", container.name(), log());
    }
    stage.assert_no_leak().with_context(|| format!("after {after}"))
}

fn shell(stage: &Stage, script: &str) -> Result<()> {
    let output = stage.command("sh").args(["-euc", script]).output()?;
    ensure!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_is_left_of_the_pins_the_next_daemon_mends() -> Result<()> {
    let mut stage = Stage::start().await?;
    let containers = containers(&stage).await?;
    each_has_its_role(&stage, &containers, "the first start").await?;
    for left in [
        // A start that was cut short before its last links, or a detach after its first.
        "rm v1/links-*/imds_connect6 v1/links-*/imds_connect4",
        "rm v1/links-*/imds_getpeername* v1/links-*/imds_sock_ops",
        "rm v1/links-*/imds_cgroup_made",
        "rm v1/links-*/*",
        // Maps that a detach has removed and others that it has not.
        "rm v1/maps/FLOWS v1/maps/CLIENTS",
        "rm v1/links-*/* v1/maps/*",
        // Directories and nothing in them; nothing at all.
        "rm v1/links-*/* v1/maps/*; rmdir v1/links-* v1/maps",
        "rm -r v1",
    ] {
        stage.daemon.kill().await?;
        shell(&stage, &format!("cd {PINS}; {left}"))?;
        stage.daemon = stage.host.daemon(daemon_options())?;
        stage.daemon.wait_ready(READY).await.with_context(|| format!("after {left}"))?;
        each_has_its_role(&stage, &containers, left).await?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_programs_of_another_layout_are_replaced_without_a_gap() -> Result<()> {
    let mut stage = Stage::start().await?;
    let containers = containers(&stage).await?;
    stage.daemon.kill().await?;
    // As a daemon with another layout has left them. Theirs go when ours are in place.
    shell(&stage, &format!("mv {PINS}/v1 {PINS}/v0"))?;
    let asking = "while sleep 0.01; do timeout 1 wget -qO- http://169.254.169.254/latest/meta-data/ami-id; done";
    for (name, network) in [("asking-bridge", Network::Default), ("asking-host", Network::Host)] {
        stage.run(ContainerSpec::busybox(name, ["sh", "-c", asking]).network(network)).await?;
    }
    stage.imds.clear();
    stage.daemon = stage.host.daemon(daemon_options())?;
    stage.daemon.wait_ready(READY).await?;
    each_has_its_role(&stage, &containers, "a change of layout").await?;
    for request in stage.imds.requests() {
        ensure!(
            request.user_agent().starts_with("metadata-proxy/"),
            "{} {} got through",
            request.method,
            request.target
        );
    }
    shell(&stage, &format!("test ! -e {PINS}/v0 && test -e {PINS}/v1"))
}
