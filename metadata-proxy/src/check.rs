//! `metadata-proxy check`: whether this host has what the daemon needs, as a table. Changes nothing but
//! what `run` would mount.
#![expect(clippy::print_stdout, reason = "the table is its standard output")]

mod ecs;

use std::time::Duration;

use anyhow::{Context as _, bail};
use tokio::time::timeout;

use crate::{
    admin::{about::Facts, client},
    app::SANDBOXES_UNTOLD,
    config::{self, Config, Place},
    containers::{cgroup, docker::Engine},
    credentials::{Aws, CLOCK_TOLERANCE},
    interceptor::{self, features, preflight},
    netns,
    upstream::{Payload, Upstream},
};

/// For each thing that is somebody else's to answer.
const PATIENCE: Duration = Duration::from_secs(15);

/// Prints one line for each thing; false if one that is needed is missing.
pub(crate) async fn run(config: &Config) -> bool {
    let mut table = Table { good: true };
    let daemon = client::about(&config.admin_socket).await.transpose();
    table.line("daemon", told(config, &daemon));
    let daemon = daemon.ok().flatten();
    table.line("configuration", configuration(config, daemon.as_ref()));
    table.line("kernel", kernel());
    table.line("capabilities", preflight::capabilities().map(|()| "all there".to_owned()));
    table.line("cgroup2", cgroup2(&config.place));
    table.line("host's processes", on_whole_host(config, preflight::host_processes));
    table.line("host's network", on_whole_host(config, preflight::host_network));
    let bpffs = preflight::bpffs(&config.place.bpffs, config.place.is_whole_host());
    table.line("bpffs", bpffs.map(|()| config.place.bpffs.display().to_string()));
    table.line("tracefs", preflight::tracefs().map(|()| "mounted".to_owned()));
    table.line("network namespaces", netns::current_cookie().map(|cookie| format!("the host's has cookie {cookie}")));
    table.line("BPF programs", interceptor::try_load().map(|()| "the kernel accepts all of them".to_owned()));
    table.advice("sandboxes", sandboxes());
    table.advice("socket options", interceptor::try_load_options());
    table.line("uplinks", uplinks().await);
    table.line("name servers", name_servers());
    table.line("exempt cgroups", exempt(config));
    for (name, result) in engines(config).await {
        table.line(&name, result);
    }
    if let Some(agent) = ecs::agent(config).await {
        table.advice("ECS agent", agent);
    }
    let aws = Aws::connect(config.imds_endpoint.as_deref()).await;
    let clock = clock(aws.as_ref().ok()).await;
    table.line("STS identity", identity(aws, daemon).await);
    table.line("clock", clock);
    table.line("real service", real_service(config).await);
    table.good
}

/// One that is wrong has not come so far.
pub(crate) fn configuration_only(config: &Config) {
    Table { good: true }.line("configuration", Ok(config.in_short()));
}

struct Table {
    good: bool,
}

impl Table {
    fn line(&mut self, name: &str, result: anyhow::Result<String>) {
        match result {
            Ok(detail) => println!("ok      {name:<20}{detail}"),
            Err(error) => {
                self.good = false;
                println!("FAILED  {name:<20}{error:#}");
            }
        }
    }

    /// Of something that is not needed to run.
    fn advice(&mut self, name: &str, result: anyhow::Result<String>) {
        match result {
            Ok(detail) => self.line(name, Ok(detail)),
            Err(error) => println!("warning {name:<20}{error:#}"),
        }
    }
}

/// What a kernel may lack.
fn sandboxes() -> anyhow::Result<String> {
    let untold = || format!("in the host's network, {SANDBOXES_UNTOLD}");
    interceptor::task_layout().with_context(untold)?;
    Ok("told by their namespaces".to_owned())
}

/// Whom all else is about: a daemon that runs has an environment of its own, such as its unit's.
fn told(config: &Config, daemon: &anyhow::Result<Option<Facts>>) -> anyhow::Result<String> {
    match daemon {
        Ok(Some(facts)) => Ok(format!("version {} runs as process {}", facts.version, facts.pid)),
        Ok(None) if interceptor::is_attached(&config.place.bpffs) => bail!(
            "programs are attached, and none answers at {}: containers get errors. See why (journalctl -u metadata-proxy), and start it, or remove them (metadata-proxy detach)",
            config.admin_socket.display()
        ),
        Ok(None) => {
            Ok(format!("none at {}; looking by the environment of this process", config.admin_socket.display()))
        }
        Err(error) => bail!("{error:#}"),
    }
}

fn configuration(config: &Config, daemon: Option<&Facts>) -> anyhow::Result<String> {
    let Some(facts) = daemon else { return Ok(config.in_short()) };
    if let Some(refused) = &facts.refused {
        bail!("the one in force is the daemon's old one, for the new one is wrong: {refused}");
    }
    let file = facts.file.as_ref().map_or("no file".to_owned(), |file| file.display().to_string());
    Ok(format!("the daemon's ({file}): {}", facts.configuration))
}

fn on_whole_host(config: &Config, look: impl Fn() -> anyhow::Result<()>) -> anyhow::Result<String> {
    if !config.place.is_whole_host() {
        return Ok("not looked at, for --cgroup is given".to_owned());
    }
    look().map(|()| "in sight".to_owned())
}

fn kernel() -> anyhow::Result<String> {
    if !std::path::Path::new("/sys/kernel/btf/vmlinux").exists() {
        bail!(
            "no /sys/kernel/btf/vmlinux: the kernel was built without CONFIG_DEBUG_INFO_BTF; use the distribution's own"
        );
    }
    features::require()?;
    let name = rustix::system::uname();
    Ok(format!("{} {}", name.sysname().to_string_lossy(), name.release().to_string_lossy()))
}

fn cgroup2(place: &Place) -> anyhow::Result<String> {
    let attached = preflight::cgroup(place.cgroup.as_deref())?;
    let mount = preflight::cgroup2_mount()?;
    let mode = if mount == std::path::Path::new("/sys/fs/cgroup") { "version 2" } else { "hybrid" };
    Ok(format!("{} ({mode})", attached.display()))
}

async fn uplinks() -> anyhow::Result<String> {
    let names = interceptor::uplinks_on_host().await?;
    Ok(if names.is_empty() { interceptor::NO_UPLINKS.to_owned() } else { names.join(", ") })
}

/// Other clouds have theirs at the address of the metadata service, where containers reach nothing but us.
fn name_servers() -> anyhow::Result<String> {
    // Docker reads the second where the first names systemd-resolved.
    for file in ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf"] {
        let text = std::fs::read_to_string(file).unwrap_or_default();
        let mut words = text.lines().map(str::split_whitespace);
        if words.any(|mut line| line.next() == Some("nameserver") && line.next() == Some("169.254.169.254")) {
            bail!(
                "{file} names 169.254.169.254, which containers cannot ask for names any more: have Docker give them another, such as a forwarder on the host (\"dns\" in /etc/docker/daemon.json, or --dns)"
            );
        }
    }
    Ok("none at the address of the metadata service".to_owned())
}

fn exempt(config: &Config) -> anyhow::Result<String> {
    let cgroup2 = preflight::cgroup2_mount()?;
    for path in &config.exempt_cgroups {
        cgroup::id_at(&cgroup2, path)?;
    }
    Ok(match config.exempt_cgroups.len() {
        0 => "none".to_owned(),
        count => format!("{count}, all there"),
    })
}

/// Those that are there; all, where none is.
async fn engines(config: &Config) -> Vec<(String, anyhow::Result<String>)> {
    let all = config.engines.iter().cloned().map(|at| Engine::new(at, config.trust_image_metadata));
    let (absent, there): (Vec<_>, Vec<_>) = all.partition(Engine::is_absent);
    let mut lines = Vec::new();
    for engine in if there.is_empty() { absent } else { there } {
        lines.push((format!("engine {}", engine.name()), engine.describe().await));
    }
    lines
}

/// That of the daemon, if there is one.
async fn identity(aws: anyhow::Result<Aws>, daemon: Option<Facts>) -> anyhow::Result<String> {
    let (arn, source) = match daemon {
        Some(Facts { identity: Some(arn), source, .. }) => (arn, source),
        Some(Facts { trouble: Some(trouble), .. }) => bail!("the daemon has none: {trouble}"),
        Some(_) => bail!("the daemon has none yet"),
        None => {
            let aws = aws?;
            let identity = timeout(PATIENCE, aws.caller_identity()).await.context("STS does not answer")??;
            (identity.arn, aws.source().await)
        }
    };
    Ok(format!("{arn}, by {}", source.unwrap_or_default()))
}

/// The SDK corrects its signatures, but when credentials end is judged by the host's clock.
async fn clock(aws: Option<&Aws>) -> anyhow::Result<String> {
    let ahead = async { aws?.clock_ahead().await };
    let Some(ahead) = timeout(PATIENCE, ahead).await.ok().flatten() else {
        return Ok("not compared, for STS does not answer".to_owned());
    };
    if ahead.abs() > CLOCK_TOLERANCE {
        let way = if ahead.is_positive() { "ahead of" } else { "behind" };
        let seconds = ahead.abs().as_secs();
        bail!("{seconds} s {way} that of STS: set it, and keep it so by NTP (chrony, systemd-timesyncd)");
    }
    Ok(format!("within {} s of that of STS", ahead.abs().as_secs() + 1))
}

async fn real_service(config: &Config) -> anyhow::Result<String> {
    const PATH: &str = "/latest/meta-data/instance-id";
    let endpoint = match &config.upstream {
        Some(config::Upstream::Real { endpoint, .. }) => endpoint,
        Some(config::Upstream::Simulated(..)) => return Ok("not used (an instance is simulated)".to_owned()),
        None => return Ok("not used (--disable-upstream)".to_owned()),
    };
    let remedy = || format!("{endpoint}: off EC2, run with --simulate or --disable-upstream");
    let answer = Upstream::new(endpoint.clone()).get(PATH, true, 0).await.with_context(remedy)?;
    match answer.payload {
        Payload::Whole(id) if answer.status.is_success() => Ok(format!("this is {}", String::from_utf8_lossy(&id))),
        _ => bail!("{endpoint} answers {} to {PATH}", answer.status),
    }
}
