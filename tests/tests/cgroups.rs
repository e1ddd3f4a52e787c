//! Containers in the host's network are told by their cgroup alone: what a container may do with cgroups
//! takes nobody out of the interception.

use std::{fs, time::Duration};

use anyhow::{Context as _, Result, ensure};
use bollard::models::HostConfig;
use metadata_proxy_tests::{
    host::{Container, ContainerSpec, Network, TestHost},
    imds::HOST_ROLE,
    stage::{Stage, daemon_options, role_arn, with_config},
};

const ASK: &str = "/usr/bin/curl -sS --max-time 9 -w %{http_code} \
                   http://169.254.169.254/latest/meta-data/iam/security-credentials/";
const METRICS: &str = "127.0.0.1:9199";

fn on_host_network(name: &str, command: &str) -> ContainerSpec {
    let spec = ContainerSpec::on_host(name, ["/usr/bin/sh", "-c", command]).network(Network::Host);
    spec.label("metadata-proxy.role", &role_arn(name))
}

async fn lost(stage: &Stage) -> Result<u64> {
    let output = stage.command("curl").args(["-sf", &format!("http://{METRICS}/metrics")]).output()?;
    let text = String::from_utf8(output.stdout)?;
    let line = text.lines().find_map(|line| line.strip_prefix("metadata_proxy_bpf_cgroups_lost_total "));
    line.with_context(|| format!("no such counter in {text}"))?.parse().context("no number")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_makes_thousands_of_cgroups_costs_no_other_its_interception() -> Result<()> {
    // Named like containers', below its own.
    const FLOOD: &str = r#"
import glob, os, socket, sys
[own] = glob.glob(f"/cgroup/{sys.argv[1]}/containers/{socket.gethostname()}*")
for number in range(5000):
    os.mkdir(f"{own}/{number:064x}")
"#;
    let stage = Stage::start_with(daemon_options().arg("--metrics-address").arg(METRICS)).await?;
    ensure!(lost(&stage).await? == 0);
    let flood = ContainerSpec::on_host("flood", ["/usr/bin/python3", "-c", FLOOD, stage.host.machine().name()]);
    let flood = stage.run(flood.bind("/sys/fs/cgroup:/cgroup")).await?;
    flood.wait().await?.success()?;
    let lost = lost(&stage).await?;
    ensure!(lost > 0, "the container has not made enough cgroups");

    // Asks at once, before the engine says that it runs; and where no daemon is there to say anything.
    for number in 0..5 {
        let name = format!("early-{number}");
        let asked = stage.run(on_host_network(&name, ASK)).await?.wait().await?.success()?;
        ensure!(asked == format!("{name}200"), "{name} was answered {asked:?}");
    }
    stage.assert_no_leak()
}

/// Deeper than what a connection's record holds, and its processes deeper still.
#[tokio::test(flavor = "multi_thread")]
async fn a_container_deep_in_the_tree_of_cgroups_is_refused_rather_than_taken_for_the_host() -> Result<()> {
    let stage = Stage::start().await?;
    let own = stage.host.machine().name().to_owned();
    let mut spec = on_host_network("deep", "sleep 600");
    spec.host_config =
        HostConfig { cgroup_parent: Some(format!("/{own}/containers/1/2/3/4/5/6/7/8/9")), ..HostConfig::default() };
    let deep = stage.run(spec).await?;
    let answer = deep.exec(["/usr/bin/sh", "-c", ASK]).await?.success()?;
    ensure!(answer == "deep200", "in its own cgroup: {answer}");

    // Where its processes have cgroups of their own.
    let pid = deep.pid().await?;
    let path = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let path = path.lines().find_map(|line| line.strip_prefix("0::/")).context("no cgroup2")?;
    let script =
        format!("cd /sys/fs/cgroup/{path} && mkdir -p below/it && echo $$ > below/it/cgroup.procs && exec {ASK}");
    let output = stage.command("timeout").args(["8", "sh", "-c", &script]).output()?;
    ensure!(String::from_utf8_lossy(&output.stdout).ends_with("404"), "from deeper still: {output:?}");
    stage.assert_no_leak()
}

/// A service's cgroup goes with it, and comes back as another one.
#[tokio::test(flavor = "multi_thread")]
async fn an_exempt_cgroup_is_exempt_whenever_it_comes() -> Result<()> {
    let host = TestHost::start().await?;
    // Named so that only the exemption tells it from a container's.
    let path = format!("/{}/host/{}", host.machine().name(), "a9".repeat(32));
    let options = daemon_options().arg("--exempt-cgroup").arg(&path);
    let mut stage = Stage::on(host, options).await?;
    ensure!(stage.daemon.log()?.contains("no such cgroup; it is exempt when it comes"), "{}", stage.daemon.log()?);
    let ask = |stage: &Stage| -> Result<String> {
        let script = format!("echo $$ > /sys/fs/cgroup{path}/cgroup.procs && exec {ASK}");
        let output = stage.command("timeout").args(["8", "sh", "-c", &script]).output()?;
        Ok(String::from_utf8(output.stdout)?)
    };
    let cgroup = format!("/sys/fs/cgroup{path}");
    for round in 1..=2 {
        ensure!(stage.command("mkdir").arg(&cgroup).status()?.success(), "mkdir");
        let before = ask(&stage)?;
        ensure!(before.ends_with("404"), "not yet exempt, but was answered {before}");
        let exempt = |log: &str| log.matches(&format!("exempt: {path}")).count() == round;
        stage.daemon.wait_for("the exemption", Duration::from_secs(20), exempt).await?;
        let after = ask(&stage)?;
        ensure!(after == format!("{HOST_ROLE}200"), "exempt, but was answered {after}");
        ensure!(stage.command("rmdir").arg(&cgroup).status()?.success(), "rmdir");
    }
    Ok(())
}

/// Its first daemon has been told by the engine; those after it not, or otherwise.
#[tokio::test(flavor = "multi_thread")]
async fn a_container_keeps_the_real_service_over_a_restart_until_the_engine_tells_otherwise() -> Result<()> {
    const EXEMPT: &str = "[exempt]\ncontainers = [\"agent\"]\n";
    let mut stage = Stage::configured(daemon_options(), EXEMPT).await?;
    let agent = stage.run(on_host_network("agent", "sleep 600")).await?;
    let other = stage.run(on_host_network("other", "sleep 600")).await?;
    let ask = async |container: &Container| container.exec(["/usr/bin/sh", "-c", ASK]).await;
    ensure!(ask(&agent).await?.success()? == format!("{HOST_ROLE}200"));
    ensure!(ask(&other).await?.success()? == "other200");

    stage.daemon.terminate(Duration::from_secs(15)).await?;
    let options = with_config(&stage.host, daemon_options(), EXEMPT)?;
    stage.daemon = stage.host.daemon(options.arg("--docker-host").arg("unix:///nowhere.sock"))?;
    let following = |log: &str| log.contains("cannot follow the engine");
    stage.daemon.wait_for("its attempt", Duration::from_secs(20), following).await?;
    let answer = ask(&agent).await?.success()?;
    ensure!(answer == format!("{HOST_ROLE}200"), "without an engine the agent was answered {answer}");
    let answer = ask(&other).await?.success()?;
    ensure!(answer == "other200", "known from before, the other was answered {answer}");

    let options = with_config(&stage.host, daemon_options(), "")?;
    stage.replace_daemon(options).await?;
    let answer = ask(&agent).await?.success()?;
    ensure!(answer == "agent200", "no longer exempt, the agent was answered {answer}");
    Ok(())
}
