//! A daemon that ended between any two steps leaves pins that the next one mends, and at no moment the
//! real service.

use std::{os::unix::fs::MetadataExt as _, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, ensure};
use metadata_proxy_tests::{
    host::{Container, ContainerSpec, Network},
    imds::HOST_ROLE,
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
        "rm v4/links-*/imds_connect6 v4/links-*/imds_connect4",
        "rm v4/links-*/imds_getpeername* v4/links-*/imds_sock_ops",
        "rm v4/links-*/imds_cgroup_made",
        "rm v4/links-*/*",
        // Maps that a detach has removed and others that it has not.
        "rm v4/maps/FLOWS v4/maps/CLIENTS",
        "rm v4/links-*/* v4/maps/*",
        // Directories and nothing in them; nothing at all.
        "rm v4/links-*/* v4/maps/*; rmdir v4/links-* v4/maps",
        "rm -r v4",
    ] {
        stage.daemon.kill().await?;
        shell(&stage, &format!("cd {PINS}; {left}"))?;
        stage.daemon = stage.host.daemon(daemon_options())?;
        stage.daemon.wait_ready(READY).await.with_context(|| format!("after {left}"))?;
        each_has_its_role(&stage, &containers, left).await?;
    }
    Ok(())
}

/// By `BPF_LINK_DETACH`, as root on the host or in a privileged container can: the pins stay, of links that do nothing.
#[tokio::test(flavor = "multi_thread")]
async fn links_that_somebody_has_detached_the_next_daemon_makes_anew() -> Result<()> {
    let mut stage = Stage::start().await?;
    let containers = containers(&stage).await?;
    let cgroup = std::fs::metadata(stage.host.machine().cgroup())?.ino().to_string();
    let detached = stage.command(probe()?).args(["detach-links", &cgroup]).output()?;
    ensure!(detached.status.success(), "{detached:?}");
    // The one on a bridge has no way there.
    let answer = containers[1].exec(["sh", "-c", ASK]).await?;
    ensure!(answer.stdout == HOST_ROLE, "nothing was detached: {answer:?}");
    stage.imds.clear();
    stage.replace_daemon(daemon_options()).await?;
    each_has_its_role(&stage, &containers, "BPF_LINK_DETACH").await?;
    let log = stage.daemon.log()?;
    // A seventh is where the kernel refuses socket options at the hook of cgroups only.
    ensure!(matches!(log.matches("was no longer attached").count(), 6 | 7), "{log}");
    // Theirs are in the place of those.
    stage.replace_daemon(daemon_options()).await?;
    ensure!(!stage.daemon.log()?.contains("was no longer attached"), "{}", stage.daemon.log()?);
    shell(&stage, &format!("test $(ls {PINS}/v4/links-*/ | wc -l) = 9"))
}

/// Beside the tests.
fn probe() -> Result<PathBuf> {
    let tests = std::env::current_exe()?;
    tests.ancestors().nth(2).map(|debug| debug.join("probe")).context("the test lies nowhere")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_programs_of_another_layout_are_replaced_without_a_gap() -> Result<()> {
    let mut stage = Stage::start().await?;
    let containers = containers(&stage).await?;
    stage.daemon.kill().await?;
    // As a daemon with another layout has left them. Theirs go when ours are in place.
    shell(&stage, &format!("mv {PINS}/v4 {PINS}/v0"))?;
    // Many at a time, for each is held while no daemon is there.
    let asking = "while sleep 0.02; do { timeout 9 wget -qO- http://169.254.169.254/latest/meta-data/ami-id 2>&1; echo; } & done";
    let mut askers = Vec::new();
    for (name, network) in [("asking-bridge", Network::Default), ("asking-host", Network::Host)] {
        askers.push(stage.run(ContainerSpec::busybox(name, ["sh", "-c", asking]).network(network)).await?);
    }
    stage.imds.clear();
    stage.daemon = stage.host.daemon(daemon_options())?;
    stage.daemon.wait_ready(READY).await?;
    each_has_its_role(&stage, &containers, "a change of layout").await?;
    for asker in askers {
        // Those that were held by the old programs are lost with them; no program refuses what another has redirected.
        tokio::time::sleep(Duration::from_secs(1)).await;
        let (said, _) = asker.output().await?;
        let (served, refused) = (said.matches("ami-").count(), said.matches("not permitted").count());
        ensure!(served > 10 && refused == 0, "{}: {served} were served, {refused} refused: {said}", asker.name());
    }
    for request in stage.imds.requests() {
        ensure!(
            request.user_agent().starts_with("metadata-proxy/"),
            "{} {} got through",
            request.method,
            request.target
        );
    }
    shell(&stage, &format!("test ! -e {PINS}/v0 && test -e {PINS}/v4"))
}
