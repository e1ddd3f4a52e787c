//! The host and the containers in which all of it happens.

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
    time::Duration,
};

use anyhow::{Context as _, Result};
use bollard::models::{HostConfig, HostConfigCgroupnsModeEnum, Ipam, IpamConfig, NetworkCreateRequest};
use futures_util::future::try_join_all;

use super::{
    Report, Row, Seen,
    scenarios::Held,
    table::{Place, TABLE, Way},
    witness::Witness,
};
use crate::{
    cloud::Cloud,
    host::{Container, ContainerSpec, Daemon, DaemonOptions, Finished, Network, TestHost},
    imds::Imds,
    stage::{self, daemon_options, role_arn},
    sts::Sts,
};

const READY: Duration = Duration::from_secs(20);
/// Any way is at its end by then.
const LIMIT: &str = "20";
/// Where containers see the probe, and a directory that they share.
pub(super) const PROBE: &str = "/probe";
pub(super) const SHARE: &str = "/share";
const V6_NETWORK: &str = "with-ipv6";
const MACVLAN: &str = "on-the-uplink";

pub(super) struct Scene {
    // In the order of their end.
    pub(super) daemon: Option<Daemon>,
    containers: HashMap<&'static str, Container>,
    witness: Witness,
    pub(super) share: PathBuf,
    probe: PathBuf,
    _sts: Sts,
    imds: Imds,
    _cloud: Cloud,
    pub(super) host: TestHost,
}

/// What was learnt before the daemon was there.
pub(super) struct Before {
    /// In the order of the table.
    pub(super) seen: Vec<Option<Seen>>,
    pub(super) held: Vec<Held>,
}

impl Scene {
    /// Everything but the daemon.
    pub(super) async fn set() -> Result<Self> {
        let host = TestHost::start().await?;
        let sts = stage::start_sts(&host)?;
        let cloud = Cloud::make(&host)?;
        let (imds, witness) = (cloud.start_imds()?, Witness::start(&cloud)?);
        let share = host.directory().join("share");
        std::fs::create_dir(&share).context("making the shared directory")?;
        create_v6_network(&host).await?;
        create_macvlan(&host).await?;
        let probe = probe()?;
        let mut scene = Self {
            daemon: None,
            containers: HashMap::new(),
            witness,
            share,
            probe,
            _sts: sts,
            imds,
            _cloud: cloud,
            host,
        };
        // First the one whose network namespace others share.
        let pod = scene.start(Place::Pod).await?;
        scene.containers.insert(Place::Pod.name(), pod);
        let others: Vec<_> = Place::ALL.into_iter().filter(|place| *place != Place::Pod).collect();
        for places in others.chunks(4) {
            let started = try_join_all(places.iter().map(|place| scene.start(*place))).await?;
            scene.containers.extend(places.iter().map(|place| place.name()).zip(started));
        }
        Ok(scene)
    }

    async fn start(&self, place: Place) -> Result<Container> {
        self.host.run(place.furnish(self.spec(place.name(), ["sleep", "600"]))).await
    }

    /// A container with the probe in it and a role of its name.
    pub(super) fn spec<S: Into<String>>(&self, name: &str, cmd: impl IntoIterator<Item = S>) -> ContainerSpec {
        spec(&self.probe, name, cmd).bind(format!("{}:{SHARE}", self.share.display()))
    }

    pub(super) fn probe_file(&self) -> &Path {
        &self.probe
    }

    pub(super) fn container(&self, place: Place) -> Result<&Container> {
        self.containers.get(place.name()).with_context(|| format!("there is no container {}", place.name()))
    }

    pub(super) async fn start_daemon(&mut self) -> Result<()> {
        let mut daemon = self.host.daemon(options())?;
        daemon.wait_ready(READY).await?;
        let guarding = |log: &str| log.contains("guarding uplink up0");
        daemon.wait_for("guarding the uplink", READY, guarding).await?;
        self.daemon = Some(daemon);
        Ok(())
    }

    pub(super) fn daemon(&mut self) -> Result<&mut Daemon> {
        self.daemon.as_mut().context("the daemon is not there")
    }

    /// What has arrived at the far end since the last call.
    pub(super) fn seen(&self) -> Seen {
        let requests = self.imds.requests().len();
        self.imds.clear();
        let packets: Vec<String> =
            self.witness.take().iter().map(|(packet, number)| format!("{number} {packet}")).collect();
        Seen { requests, packets: packets.join(", ") }
    }

    /// Tries one way in one container.
    pub(super) async fn probe(&self, place: Place, words: &str) -> Result<Report> {
        self.probe_in(self.container(place)?, words).await
    }

    pub(super) async fn probe_in(&self, container: &Container, words: &str) -> Result<Report> {
        let command = ["timeout", LIMIT, PROBE].into_iter().chain(words.split(' '));
        report(container.exec(command).await?).with_context(|| format!("{words} in {}", container.name()))
    }

    /// The same after other commands, in a shell.
    pub(super) async fn script(&self, place: Place, script: &str) -> Result<Report> {
        let finished = self.container(place)?.exec(["timeout", LIMIT, "sh", "-ec", script]).await?;
        report(finished).with_context(|| format!("{script} in {}", place.name()))
    }

    /// Tries a way as a process of the host.
    pub(super) async fn probe_on_host(&self, script: &str) -> Result<Report> {
        let mut command = self.host.command("timeout");
        command.args([LIMIT, "sh", "-ec", script]).env("PROBE", &self.probe).env("SHARE", &self.share);
        command.env("MACHINE", self.host.machine().name());
        let output = tokio::process::Command::from(command).output().await.context("running a host process")?;
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let exit_code = output.status.code().unwrap_or(-1).into();
        report(Finished { exit_code, stdout: text(&output.stdout), stderr: text(&output.stderr) })
    }

    async fn try_way(&self, way: &Way) -> Result<(Report, Seen)> {
        let report = self.probe(way.place, way.words).await?;
        Ok((report, self.seen()))
    }

    /// Tries everything while nothing stops it.
    pub(super) async fn before(&mut self) -> Result<Before> {
        let mut seen = Vec::new();
        self.seen();
        for way in TABLE {
            seen.push(if way.leads_there { Some(self.try_way(way).await?.1) } else { None });
        }
        let held = self.hold_over().await?;
        Ok(Before { seen, held })
    }

    pub(super) async fn table(&self, before: &[Option<Seen>]) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        let row = |way: &Way, before: &Option<Seen>, report, seen| {
            let (before, place) = (before.clone(), way.place.name().to_owned());
            let (expect, leads_there) = (way.expect, way.leads_there);
            Row { way: shorten(way.words), place, expect, report, seen, before, leads_there }
        };
        let (held, others): (Vec<_>, Vec<_>) = TABLE.iter().zip(before).partition(|(way, _)| way.held);
        for (way, before) in others {
            let (report, seen) = self.try_way(way).await?;
            rows.push(row(way, before, report, seen));
        }
        let reports = try_join_all(held.iter().map(|(way, _)| self.probe(way.place, way.words))).await?;
        for ((way, before), report) in held.into_iter().zip(reports) {
            // What has arrived counts against the first; one is enough.
            rows.push(row(way, before, report, self.seen()));
        }
        Ok(rows)
    }
}

/// A container with the probe in it and a role of its name.
pub(super) fn spec<S: Into<String>>(probe: &Path, name: &str, cmd: impl IntoIterator<Item = S>) -> ContainerSpec {
    ContainerSpec { host_config: HostConfig::default(), ..ContainerSpec::on_host(name, cmd) }
        .bind(format!("{}:{PROBE}:ro", probe.display()))
        .label("metadata-proxy.role", &role_arn(name))
}

impl Place {
    /// Makes of a container what this place is.
    pub(super) fn furnish(self, mut spec: ContainerSpec) -> ContainerSpec {
        let options = &mut spec.host_config;
        let words = |word: &str| Some(vec![word.to_owned()]);
        match self {
            Self::Plain => {}
            Self::Unconfined => options.security_opt = words("seccomp=unconfined"),
            Self::NetAdmin => options.cap_add = words("NET_ADMIN"),
            Self::Privileged => {
                privileged(options);
                // Its own cgroup is the root of what it sees; engines of version 1 would not do so by themselves.
                options.cgroupns_mode = Some(HostConfigCgroupnsModeEnum::PRIVATE);
            }
            Self::Host => spec.network = Network::Host,
            Self::HostPrivileged => {
                privileged(options);
                spec.network = Network::Host;
            }
            Self::V6 => spec.network = Network::Named(V6_NETWORK.into()),
            Self::Macvlan => spec.network = Network::Named(MACVLAN.into()),
            Self::None => spec.network = Network::None,
            Self::Pod => {}
            Self::Side => spec.network = Network::Container(Self::Pod.name().into()),
            Self::PidHost => options.pid_mode = Some("host".into()),
            Self::UsernsHost => options.userns_mode = Some("host".into()),
            Self::CgroupnsHost => options.cgroupns_mode = Some(HostConfigCgroupnsModeEnum::HOST),
            Self::FewPorts => {
                let range = ("net.ipv4.ip_local_port_range".to_owned(), "40000 40003".to_owned());
                options.sysctls = Some(HashMap::from([range]));
                options.cap_add = words("NET_ADMIN");
            }
        }
        spec
    }
}

/// What `--privileged` gives to a program that wants around us. The flag itself asks for every
/// capability there is, and CAP_SYS_RESOURCE not every machine's root can give.
pub(super) fn privileged(options: &mut HostConfig) {
    let words = |word: &str| Some(vec![word.to_owned()]);
    options.cap_add = words("ALL");
    options.cap_drop = words("SYS_RESOURCE");
    options.security_opt = words("seccomp=unconfined");
    options.masked_paths = Some(Vec::new());
    options.readonly_paths = Some(Vec::new());
}

/// Alone on the far end: whatever arrives there is the containers' doing.
pub(super) fn options() -> DaemonOptions {
    daemon_options().arg("--disable-upstream")
}

fn shorten(words: &str) -> String {
    words.split(' ').map(|word| if word.len() > 24 { "<64 digits>" } else { word }).collect::<Vec<_>>().join(" ")
}

pub(super) fn report(finished: Finished) -> Result<Report> {
    let line = finished.stdout.lines().rev().find(|line| line.starts_with('{'));
    let line = line.with_context(|| format!("the probe told nothing: {finished:?}"))?;
    serde_json::from_str(line).with_context(|| format!("reading the probe's report: {line}"))
}

/// Addresses of the documentation's: they lead nowhere outside.
async fn create_v6_network(host: &TestHost) -> Result<()> {
    let subnet = |subnet: &str| IpamConfig { subnet: Some(subnet.into()), ..Default::default() };
    let config = vec![subnet("198.18.6.0/24"), subnet("2001:db8:6::/64")];
    let request = NetworkCreateRequest {
        name: V6_NETWORK.into(),
        enable_ipv6: Some(true),
        ipam: Some(Ipam { config: Some(config), ..Default::default() }),
        ..Default::default()
    };
    host.docker().create_network(request).await.context("creating a network with IPv6")?;
    Ok(())
}

/// In the network between the host and what is beyond.
async fn create_macvlan(host: &TestHost) -> Result<()> {
    let text = |text: &str| Some(text.to_owned());
    let config = IpamConfig {
        subnet: text("198.51.100.0/24"),
        ip_range: text("198.51.100.128/25"),
        gateway: text("198.51.100.2"),
        ..Default::default()
    };
    let request = NetworkCreateRequest {
        name: MACVLAN.into(),
        driver: text("macvlan"),
        options: Some(HashMap::from([("parent".into(), "up0".into())])),
        ipam: Some(Ipam { config: Some(vec![config]), ..Default::default() }),
        ..Default::default()
    };
    host.docker().create_network(request).await.context("creating a network on the uplink")?;
    Ok(())
}

/// Beside the running program, or one directory up from a test.
pub(super) fn probe() -> Result<PathBuf> {
    let own = std::env::current_exe().context("finding the running program")?;
    let mut directories = own.ancestors().skip(1).take(2).map(|directory: &Path| directory.join("probe"));
    directories.find(|probe| probe.is_file()).context("probe is not built: cargo build -p metadata-proxy-tests --bins")
}
