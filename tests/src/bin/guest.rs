//! The tests inside a virtual machine of `cargo xtask vm`, which boots it with this program as all there is to do.
//!
//! Usage: `guest serves unified|hybrid` where the daemon is to work, `guest refuses TEXT` where it must end and say TEXT. The machine is the host of a container
//! engine, as in production: the daemon finds the root cgroup by itself. One line is printed for each test, fields apart by tabs:
//! `GUEST`, `ok` or `FAILED`, the test, what was seen.
#![expect(clippy::print_stdout, reason = "what it has to say goes to the machine's console")]

use std::{
    env,
    process::{Command, ExitCode, Output, Stdio},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use metadata_proxy_tests::{
    bypass,
    clients::{Client, Programs},
    host::{Container, ContainerSpec, Daemon, Network, TestHost, program},
    imds::{HOST_ROLE, Imds},
    stage::{self, Stage, daemon_options, role_arn},
};
use tokio::time::timeout;

/// For each test; an emulated processor is slow.
const LIMIT: Duration = Duration::from_secs(120);
/// For the one that is many.
const LONG_LIMIT: Duration = Duration::from_secs(900);
const PINS: &str = "/sys/fs/bpf/metadata-proxy";
const ROLES: &str = "http://169.254.169.254/latest/meta-data/iam/security-credentials/";

#[tokio::main]
async fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let done = match *words.as_slice() {
        ["serves", cgroups] => serves(cgroups).await,
        ["refuses", text] => tell("refused with the reason", async { refuses(text) }).await.map(drop),
        _ => Err(anyhow::anyhow!("usage: guest serves unified|hybrid | guest refuses TEXT")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs one test and prints its line.
async fn tell(name: &str, test: impl Future<Output = Result<String>>) -> Result<()> {
    tell_within(LIMIT, name, test).await
}

async fn tell_within(limit: Duration, name: &str, test: impl Future<Output = Result<String>>) -> Result<()> {
    let result = timeout(limit, test).await.unwrap_or_else(|_| Err(anyhow::anyhow!("not done after {limit:?}")));
    let (word, seen) = match &result {
        Ok(seen) => ("ok", seen.clone()),
        Err(error) => ("FAILED", format!("{error:#}").replace(['\n', '\t'], " ")),
    };
    println!("GUEST\t{word}\t{name}\t{seen}");
    result.map(drop)
}

fn refuses(text: &str) -> Result<String> {
    refuses_by(Command::new(program()?).arg("run"), text)
}

/// As in a container that was not given the host's. It is to attach to nothing.
fn refuses_namespaces() -> Result<String> {
    let mut said = Vec::new();
    for (flags, bpffs, text) in [
        ("-n", "/sys/fs/bpf", "--network=host"),
        ("-pf", "/sys/fs/bpf", "--pid=host"),
        ("-m", "/tmp", "On the host: mount -t bpf bpf /tmp"),
    ] {
        let mut command = Command::new("unshare");
        said.push(refuses_by(command.arg(flags).arg(program()?).args(["run", "--bpffs", bpffs]), text)?);
    }
    ensure!(!std::path::Path::new(PINS).exists(), "{PINS} is there");
    Ok(said.join("; "))
}

fn refuses_by(command: &mut Command, text: &str) -> Result<String> {
    let output = command.stdin(Stdio::null()).output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    let reason = said.lines().last().unwrap_or_default();
    ensure!(output.status.code() == Some(1), "{}: {said}", output.status);
    ensure!(reason.contains(text), "no {text:?} in: {said}");
    Ok(reason.to_owned())
}

async fn serves(cgroups: &str) -> Result<()> {
    let host = TestHost::guest().await.context("starting the container engine")?;
    let imds = stage::start_imds(&host)?;
    let sts = stage::start_sts(&host)?;
    // Without this, all that follows would prove nothing.
    tell("without the daemon: the real service", leaks(&host, &imds, "before")).await?;

    tell("in namespaces of its own: refused", async { refuses_namespaces() }).await?;

    let mut daemon = host.daemon(daemon_options())?;
    let ready = tell("attaches to the true root", attaches(&mut daemon)).await;
    if ready.is_err() {
        println!("{}", daemon.log()?);
        return ready;
    }
    let mut stage = Stage { daemon, sts, imds, host };
    let done = tests(&mut stage, cgroups).await;
    if done.is_err() {
        println!("the daemon's log:\n{}", stage.daemon.log()?);
    }
    done
}

/// All of them, whatever becomes of one; an error if any failed.
async fn tests(stage: &mut Stage, cgroups: &str) -> Result<()> {
    let pod = stage.run(ContainerSpec::busybox("pod", ["sleep", "3600"])).await?;
    let mut results = vec![tell("the engine's cgroups", engine(stage, cgroups, &pod)).await];
    let shared = Network::Container(pod.name().to_owned());
    let places = [("bridge", Network::Default), ("none", Network::None), ("host", Network::Host), ("shared", shared)];
    for (place, network) in places {
        let name = format!("{place} network: its own role");
        results.push(tell(&name, own_role(stage, place, network)).await);
    }
    results.push(tell("the uplink: guarded", uplink(stage)).await);
    results.push(tell("a host process: the real service", async { host_process(stage) }).await);
    results.push(tell("ping: dropped by the guard", ping(stage)).await);
    results.push(tell_within(LONG_LIMIT, "the ways around us: none leads there", ways(stage)).await);
    results.push(tell("daemon killed: nothing gets through", killed(stage)).await);
    results.push(tell("daemon back: its own role", back(stage)).await);
    results.push(tell("detach: as if it had never been", detach(stage)).await);
    results.into_iter().collect()
}

/// A container gets at the real service, and its pings do.
async fn leaks(host: &TestHost, imds: &Imds, name: &str) -> Result<String> {
    let asked = host.run(ContainerSpec::busybox(name, ["wget", "-qO-", ROLES])).await?;
    let role = asked.wait().await?.success()?;
    ensure!(role.trim() == HOST_ROLE, "{role:?}");
    ensure!(!imds.credential_requests().is_empty(), "the stand-in has seen nothing");
    imds.clear();
    ensure!(frame_leaves(host)?, "a frame does not leave by up0");
    let pinged = asked_to_ping(host, &format!("{name}-ping")).await?;
    ensure!(pinged == 0, "ping ended with {pinged}");
    Ok(role.trim().to_owned())
}

async fn attaches(daemon: &mut Daemon) -> Result<String> {
    daemon.wait_ready(LIMIT / 2).await?;
    // The root cgroup is the one whose id is 1.
    let links = glob_links()?;
    ensure!(links == ["links-1"], "{PINS} has {links:?}");
    Ok("cgroup id 1".to_owned())
}

fn glob_links() -> Result<Vec<String>> {
    let mut links = Vec::new();
    for version in std::fs::read_dir(PINS).context(PINS)? {
        for entry in std::fs::read_dir(version?.path())? {
            links.push(entry?.file_name().to_string_lossy().into_owned());
        }
    }
    links.retain(|name| name.starts_with("links-"));
    Ok(links)
}

/// What the container engine makes of the machine, and where its containers are then.
async fn engine(stage: &Stage, cgroups: &str, pod: &Container) -> Result<String> {
    let info = stage.docker().info().await?;
    let version = info.cgroup_version.map(|version| version.to_string()).unwrap_or_default();
    ensure!(version == if cgroups == "hybrid" { "1" } else { "2" }, "the engine uses version {version:?}");
    let paths = std::fs::read_to_string(format!("/proc/{}/cgroup", pod.pid().await?))?;
    let own = paths.lines().find_map(|line| line.strip_prefix("0::")).context("the container is in no cgroup2")?;
    ensure!(own == format!("/docker/{}", pod.id()), "the container is in {own}");
    Ok(format!("version {version}; hierarchies with containers, cgroup2 among them: {}", paths.lines().count()))
}

async fn own_role(stage: &Stage, name: &str, network: Network) -> Result<String> {
    let programs = Programs { aws_config: stage::aws_config_client()?, ..Programs::default() };
    let spec = stage::client_spec(name, Client::AWS_CONFIG, &programs, 2, None).network(network);
    let report = stage::report(stage, spec.label("metadata-proxy.role", &role_arn(name))).await?;
    if let Some(error) = report.errors().next() {
        bail!("{error}");
    }
    let roles: Vec<_> = report.access_keys().map(|key| stage.role_of(key)).collect();
    ensure!(roles.len() == 2 && roles.iter().all(|role| role.as_deref() == Some(name)), "roles {roles:?}");
    stage.assert_no_leak()?;
    let times: Vec<_> = report.attempts.iter().map(|attempt| format!("{:.0} ms", attempt.ms)).collect();
    Ok(format!("role {name}: {}", times.join(", ")))
}

/// Past connect(2) go the frames of packet sockets: whether the uplink takes one.
fn frame_leaves(host: &TestHost) -> Result<bool> {
    let probe = env::current_exe()?.with_file_name("probe");
    let said = text(host.command(probe).args(["frame-blind", "up0"]).output()?)?;
    let outcome: serde_json::Value = serde_json::from_str(&said)?;
    match (outcome["outcome"].as_str(), outcome["detail"].as_str()) {
        (Some("timeout"), Some("sent")) => Ok(true),
        (Some("refused"), Some("sendto: ENOBUFS")) => Ok(false),
        _ => bail!("the probe says {said}"),
    }
}

/// By tcx or clsact frames are stopped where they would leave.
async fn uplink(stage: &mut Stage) -> Result<String> {
    stage.daemon.wait_for("guarding the uplink", LIMIT / 2, |log| log.contains("guarding uplink up0")).await?;
    let warned = stage
        .daemon
        .log()?
        .lines()
        .find(|line| line.contains("packet sockets can") && line.contains("up0"))
        .map(str::to_owned);
    ensure!(warned.is_none(), "{warned:?}");
    ensure!(!frame_leaves(&stage.host)?, "a frame leaves by up0");
    // Not busybox's, which is found first.
    let shown = text(stage.command("/usr/bin/tc").args(["filter", "show", "dev", "up0", "egress"]).output()?)?;
    let by = match (stage.daemon.log()?.contains("by tcx links"), shown.matches("name imds_uplink").count()) {
        (true, 0) => "a tcx link",
        (false, 1) => "a clsact filter",
        (_, filters) => bail!("{filters} filters on up0: {shown}"),
    };
    Ok(format!("guarding up0 by {by}: the frame is dropped"))
}

fn host_process(stage: &Stage) -> Result<String> {
    let role = text(stage.command("busybox").args(["timeout", "20", "wget", "-qO-", ROLES]).output()?)?;
    ensure!(role == HOST_ROLE, "{role:?}");
    stage.imds.clear();
    Ok(role)
}

/// The exit status of a ping to the service from a container.
async fn asked_to_ping(host: &TestHost, name: &str) -> Result<i64> {
    let spec = ContainerSpec::busybox(name, ["ping", "-c", "1", "-W", "3", "169.254.169.254"]);
    Ok(host.run(spec).await?.wait().await?.exit_code)
}

async fn ping(stage: &Stage) -> Result<String> {
    let status = asked_to_ping(stage, "ping").await?;
    ensure!(status == 1, "ping ended with {status}");
    Ok("no answer".to_owned())
}

/// Those of the bypass matrix that need no other host.
async fn ways(stage: &Stage) -> Result<String> {
    let rows = bypass::run_on(stage).await?;
    let (text, good) = bypass::print(&rows);
    ensure!(good, "{text}");
    Ok(format!("{} ways", rows.len()))
}

/// SIGKILL: the containers that run and those that come get errors.
async fn killed(stage: &mut Stage) -> Result<String> {
    stage.daemon.kill().await?;
    let mut seen = Vec::new();
    for (name, network) in [("orphan", Network::Default), ("orphan-on-host", Network::Host)] {
        // Not as the first process, to which the signal at the end of the time would mean nothing.
        let script = format!("timeout 30 wget -qO- {ROLES}; exit $?");
        let spec = ContainerSpec::busybox(name, ["sh".to_owned(), "-c".to_owned(), script]).network(network);
        let finished = stage.run(spec).await?.wait().await?;
        ensure!(finished.exit_code != 0 && finished.stdout.is_empty(), "{name} got {finished:?}");
        seen.push(finished.stderr.trim().to_owned());
    }
    let requests = stage.imds.requests();
    ensure!(requests.is_empty(), "the stand-in was asked: {requests:?}");
    ensure!(!frame_leaves(&stage.host)?, "a frame leaves by up0");
    Ok(seen.join("; "))
}

/// A daemon that finds the other's guard takes it over, and adds none.
async fn back(stage: &mut Stage) -> Result<String> {
    stage.daemon = stage.host.daemon(daemon_options())?;
    stage.daemon.wait_ready(LIMIT / 2).await?;
    uplink(stage).await?;
    host_process(stage)?;
    own_role(stage, "again", Network::Default).await
}

async fn detach(stage: &mut Stage) -> Result<String> {
    let status = stage.daemon.terminate(Duration::from_secs(30)).await?;
    ensure!(status.success(), "after SIGTERM the daemon ended with {status}");
    let output = stage.command(program()?).arg("detach").output()?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    text(output)?;
    let filters = said.matches("removed the filter on up0").count();
    ensure!(filters == usize::from(!stage.daemon.log()?.contains("by tcx links")), "{said}");
    let removed = said.lines().count();
    ensure!(!std::path::Path::new(PINS).exists(), "{PINS} is still there");
    leaks(&stage.host, &stage.imds, "after").await?;
    Ok(format!("{removed} pins and filters removed"))
}

fn text(output: Output) -> Result<String> {
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{}: {said}", output.status);
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
