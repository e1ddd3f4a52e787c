//! Ways that take more than one process, or a preparation.

use std::{path::Path, time::Duration};

use anyhow::{Context as _, Result, ensure};
use futures_util::future::try_join_all;
use tokio::{task::JoinHandle, time::Instant};

use super::{
    Expect::{self, Host, Known, Nobody, Ours, Refused},
    Report, Row, Seen,
    scene::{PROBE, SHARE, Scene, privileged, report},
    table::Place,
};
use crate::host::{Container, Network};

/// A probe that has begun and waits for a sign.
pub(super) struct Held {
    what: &'static str,
    file: &'static str,
    place: Place,
    expect: Expect,
    probe: JoinHandle<Result<Report>>,
}

/// The listener's port, as /proc/net/tcp writes it.
const LISTENER_PORT: &str = ":421D";
const SQUATTERS: [(&str, &str); 2] = [("squat-own", "127.169.254.169"), ("squat-any", "0.0.0.0")];
const SOON: Duration = Duration::from_secs(10);
/// How many containers connect in their first milliseconds.
const EARLY: usize = 20;

impl Scene {
    pub(super) fn row(&self, way: &str, place: &str, expect: Expect, report: Report) -> Row {
        let (way, place) = (way.to_owned(), place.to_owned());
        Row { way, place, expect, report, seen: self.seen(), before: None, leads_there: true }
    }

    /// Sockets and servers from before the daemon.
    pub(super) async fn hold_over(&self) -> Result<Vec<Held>> {
        for (name, address) in SQUATTERS {
            let squatter = self.host.run(self.spec(name, [PROBE, "squat", address, "16925"])).await?;
            let table = format!("/proc/{}/net/tcp", squatter.pid().await?);
            until("the squatter listens", || std::fs::read_to_string(&table).is_ok_and(|t| t.contains(LISTENER_PORT)))
                .await?;
        }
        let mut held = Vec::new();
        for (what, file, place, use_it, expect) in [
            ("socket from before the daemon", "made-plain", Place::Plain, "connect", Ours("plain")),
            ("socket from before the daemon", "made-host", Place::Host, "connect", Ours("host")),
            ("established before the daemon", "open-plain", Place::Plain, "ask", Refused),
            ("established before the daemon", "open-host", Place::Host, "ask", Refused),
        ] {
            let container = self.container(place)?.clone();
            let words = [PROBE.into(), "wait".into(), format!("{SHARE}/{file}"), use_it.into()];
            let probe = tokio::spawn(async move { report(container.exec(words).await?) });
            let ready = self.share.join(format!("{file}.ready"));
            until("the probe is ready", || ready.exists()).await?;
            held.push(Held { what, file, place, expect, probe });
        }
        Ok(held)
    }

    pub(super) async fn held_over(&self, held: Vec<Held>) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        for held in &held {
            std::fs::write(self.share.join(format!("{}.go", held.file)), "").context("giving the sign")?;
        }
        for Held { what, place, expect, probe, .. } in held {
            rows.push(self.row(what, place.name(), expect, probe.await??));
        }
        Ok(rows)
    }

    pub(super) async fn scenarios(&self) -> Result<Vec<Row>> {
        let mut rows = self.squatted().await?;
        rows.extend(self.handed_over().await?);
        rows.extend(self.by_host_processes().await?);
        rows.extend(self.rewritten().await?);
        rows.extend(self.early("pid 1, first thing", Ours("early")).await?);
        let container = self.host.run(self.spec("fresh", [PROBE, "connect"]).network(Network::Default)).await?;
        rows.push(self.row("pid 1, first thing", "fresh", Ours("fresh"), report(container.wait().await?)?));
        let words = "exec setpriv --reuid=65534 --regid=65534 --clear-groups /probe connect";
        rows.push(self.row("as nobody", "plain", Ours("plain"), self.script(Place::Plain, words).await?));
        Ok(rows)
    }

    /// Somebody else listens at our address.
    async fn squatted(&self) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        for (name, address) in SQUATTERS {
            let container = Container::find(self.host.docker(), name).await?;
            let asked = self.probe_in(&container, "connect").await?;
            let (said, _) = container.output().await?;
            ensure!(said.is_empty(), "the squatter {name} says {said}");
            rows.push(self.row(&format!("{address}:16925 is taken"), name, Ours(name), asked));
        }
        Ok(rows)
    }

    /// Sockets made by one and used by another.
    async fn handed_over(&self) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        for (what, state, use_it, expect) in [
            // It is plain's connection, whoever holds it.
            ("connected socket of `plain`", "connected", "ask", Ours("plain")),
            ("unconnected socket of `plain`", "unconnected", "connect", Ours("pod")),
        ] {
            let path = format!("{SHARE}/{state}");
            let give = format!("give {path} {state}");
            let take = format!("take {path} {use_it}");
            let (_, taken) = tokio::try_join!(self.probe(Place::Plain, &give), self.probe(Place::Pod, &take))?;
            rows.push(self.row(what, "pod", expect, taken));
        }
        // In the host's network, but connected by a container.
        let give = format!("exec $PROBE give {}/of-host unconnected", self.share.display());
        let take = format!("take {SHARE}/of-host connect");
        let (_, taken) = tokio::try_join!(self.probe_on_host(&give), self.probe(Place::Plain, &take))?;
        rows.push(self.row("unconnected socket of the host", "plain", Ours("plain"), taken));
        Ok(rows)
    }

    /// Host processes, in the host's network namespace and elsewhere.
    async fn by_host_processes(&self) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        let pid = self.container(Place::Plain)?.pid().await?;
        let network = format!("--net=/proc/{pid}/ns/net");
        let scope = format!("docker-{}.scope", "0a1b".repeat(16));
        let directory = Path::new("/sys/fs/cgroup").join(self.host.machine().name()).join("host").join(&scope);
        let scoped = format!("mkdir {0} && echo $$ > {0}/cgroup.procs && exec $PROBE connect", directory.display());
        for (what, script, expect) in [
            ("connect", "exec $PROBE connect".to_owned(), Host),
            ("connect to the listener", "exec $PROBE direct".to_owned(), Refused),
            ("connect in a container's network", format!("exec nsenter {network} $PROBE connect"), Nobody),
            ("to the listener in a container's network", format!("exec nsenter {network} $PROBE direct"), Refused),
            // As the systemd cgroup driver names them.
            ("connect in docker-<64 digits>.scope", scoped, Nobody),
        ] {
            let asked = self.probe_on_host(&script).await?;
            rows.push(self.row(what, "(host process)", expect, asked));
        }
        let holder = format!("host-netns {}", self.host.machine().holder());
        let asked = self.probe_on_host("exec $PROBE option").await?;
        rows.push(self.row("PACKET_QDISC_BYPASS is set", "(host process)", Ours("set"), asked));
        rows.push(self.by_32_bit_program(Place::Host, "frame-direct-32 up0").await?);
        let asked = self.in_host_pids("nsenter", &format!("exec {PROBE} {holder}")).await?;
        rows.push(self.row("setns to the host's network", "nsenter", Ours("nsenter"), asked));
        Ok(rows)
    }

    /// Refused where the kernel takes a program for that, which the daemon tells in its log.
    async fn by_32_bit_program(&self, place: Place, words: &str) -> Result<Row> {
        let log = self.daemon.as_ref().context("the daemon is not there")?.log()?;
        let open = "this kernel takes no program that changes what its functions return";
        let expect = if log.contains("by 32-bit programs") { Known(open) } else { Refused };
        Ok(self.row(words, place.name(), expect, self.probe(place, words).await?))
    }

    /// In a privileged container that sees the host's processes.
    pub(super) async fn in_host_pids(&self, name: &str, script: &str) -> Result<Report> {
        let mut spec = self.spec(name, ["sh", "-ec", script]);
        privileged(&mut spec.host_config);
        spec.host_config.pid_mode = Some("host".into());
        report(self.host.run(spec).await?.wait().await?)
    }

    /// The container's own rules turn other addresses into the service's, and ours into others.
    async fn rewritten(&self) -> Result<Vec<Row>> {
        let ruled = |rule: &str, words: &str| {
            format!("iptables-nft -t nat -A {rule}; /probe {words}; iptables-nft -t nat -D {rule}")
        };
        let redirect = ruled("OUTPUT -d 169.254.169.254 -p tcp -j REDIRECT --to-ports 9", "connect");
        let other = ruled("OUTPUT -d 198.51.100.7 -j DNAT --to-destination 169.254.169.254", "to 198.51.100.7 80");
        let ours = ruled("OUTPUT -d 127.169.254.169 -j DNAT --to-destination 169.254.169.254", "connect");
        let asked = self.script(Place::NetAdmin, &redirect).await?;
        let mut rows = vec![self.row("own rule redirects the service", "net-admin", Ours("net-admin"), asked)];
        // Those that time out, at the same time. What has arrived counts against the first; one is enough.
        let (ours, other, forwarded) = tokio::try_join!(
            self.script(Place::NetAdmin, &ours),
            self.script(Place::Privileged, &other),
            self.script(Place::Privileged, FORWARD),
        )?;
        rows.push(self.row("own rule turns our address into it", "net-admin", Refused, ours));
        rows.push(self.row("own rule turns another address into it", "privileged", Refused, other));
        rows.push(self.row("forwarded from a nested network", "privileged", Refused, forwarded));
        Ok(rows)
    }

    /// Containers in the host's network, whose first process connects at once.
    pub(super) async fn early(&self, what: &str, expect: Expect) -> Result<Vec<Row>> {
        let mut reports = Vec::new();
        let numbers: Vec<usize> = (0..EARLY).collect();
        for some in numbers.chunks(4) {
            let run = |number: &usize| {
                let mut spec = self.spec("early", [PROBE, "connect"]).network(Network::Host);
                spec.name = format!("early-{number}");
                async move {
                    let container = self.host.run(spec).await?;
                    let finished = container.wait().await?;
                    container.remove().await?;
                    report(finished)
                }
            };
            reports.extend(try_join_all(some.iter().map(run)).await?);
        }
        let rows: Vec<Row> = reports.into_iter().map(|report| self.row(what, "host", expect, report)).collect();
        Ok(vec![worst(rows).context("no container was started")?])
    }
}

/// One row for several of a kind: a wrong one if there is any, with all that was seen.
pub(super) fn worst(mut rows: Vec<Row>) -> Option<Row> {
    let number = rows.len();
    let seen = rows.iter().map(|row| &row.seen).find(|seen| !seen.nothing()).cloned();
    rows.sort_by_key(|row| row.differences().len());
    let mut row = rows.pop()?;
    row.way = format!("{} ({number} times)", row.way);
    row.seen = seen.unwrap_or_else(Seen::default);
    Some(row)
}

pub(super) async fn until(what: &str, there: impl Fn() -> bool) -> Result<()> {
    let deadline = Instant::now() + SOON;
    while !there() {
        ensure!(Instant::now() < deadline, "{what}: not within {SOON:?}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    Ok(())
}

/// A network inside the container's, whose packets the container translates and forwards.
const FORWARD: &str = "
unshare -n sleep 15 & inner=$!
sleep 0.2
ip link add outside type veth peer name inside netns $inner
ip address add 10.77.0.1/24 dev outside
ip link set outside up
nsenter -t $inner -n sh -ec 'ip address add 10.77.0.2/24 dev inside; ip link set inside up; ip route add default via 10.77.0.1'
echo 1 > /proc/sys/net/ipv4/ip_forward
iptables-nft -t nat -A PREROUTING -d 198.51.100.7 -j DNAT --to-destination 169.254.169.254
iptables-nft -t nat -A POSTROUTING -o eth0 -j MASQUERADE
nsenter -t $inner -n /probe to 198.51.100.7 80
kill $inner
";
