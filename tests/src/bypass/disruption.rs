//! While the daemon goes, is gone, and comes back; and what takes its programs off.

use std::{os::unix::fs::MetadataExt as _, time::Duration};

use anyhow::{Context as _, Result};

use super::{
    Expect::{Known, Ours, Refused},
    Row,
    scene::{PROBE, Scene, report},
    table::Place,
};
use crate::host::Network;

const STOP: Duration = Duration::from_secs(15);
const UNPINNED: &str =
    "who is root on the host can take off anything. Do not run with --privileged what you do not trust";

impl Scene {
    pub(super) async fn disruption(&mut self) -> Result<Vec<Row>> {
        let mut rows = self.replaced().await?;
        self.daemon()?.terminate(STOP).await?;
        rows.extend(self.while_down("after SIGTERM").await?);
        rows.extend(self.held_until_back("back after SIGTERM").await?);
        self.daemon()?.kill().await?;
        rows.extend(self.while_down("after SIGKILL").await?);
        rows.extend(self.held_until_back("back after SIGKILL").await?);
        rows.extend(self.detached().await?);
        Ok(rows)
    }

    /// Two containers ask without pause while one daemon ends and the next begins.
    async fn replaced(&mut self) -> Result<Vec<Row>> {
        let containers = [self.container(Place::Plain)?.clone(), self.container(Place::Host)?.clone()];
        let asking = containers
            .map(|container| tokio::spawn(async move { report(container.exec([PROBE, "hammer", "2500"]).await?) }));
        tokio::time::sleep(Duration::from_millis(300)).await;
        self.daemon()?.terminate(STOP).await?;
        let mut again = self.host.daemon(super::scene::options())?;
        again.wait_ready(STOP).await?;
        self.daemon = Some(again);
        let mut rows = Vec::new();
        for (role, asking) in ["plain", "host"].into_iter().zip(asking) {
            rows.push(self.row("while the daemon is replaced", role, Ours(role), asking.await??));
        }
        Ok(rows)
    }

    /// At the same time, for each waits as long as connections are held.
    async fn while_down(&self, when: &str) -> Result<Vec<Row>> {
        let started = self.spec("while-down", [PROBE, "connect"]).network(Network::Host);
        let start = async {
            let container = self.host.run(started).await?;
            let finished = container.wait().await?;
            container.remove().await?;
            report(finished)
        };
        let (plain, host, v6, udp, direct, new) = tokio::try_join!(
            self.probe(Place::Plain, "connect"),
            self.probe(Place::Host, "connect"),
            self.probe(Place::V6, "v6"),
            self.probe(Place::Plain, "udp 80"),
            self.probe(Place::Pod, "direct"),
            start,
        )?;
        let rows = [
            ("connect", "plain", plain),
            ("connect", "host", host),
            ("v6", "ipv6", v6),
            ("udp 80", "plain", udp),
            ("direct", "pod", direct),
            ("started meanwhile, connect", "host", new),
        ];
        // What has arrived counts against the first; one is enough.
        Ok(rows.map(|(way, place, report)| self.row(&format!("{when}: {way}"), place, Refused, report)).into())
    }

    /// A connection from the time without a daemon is answered by the next.
    async fn held_until_back(&mut self, when: &str) -> Result<Vec<Row>> {
        let containers = [self.container(Place::Plain)?.clone(), self.container(Place::Host)?.clone()];
        let asking =
            containers.map(|container| tokio::spawn(async move { report(container.exec([PROBE, "connect"]).await?) }));
        self.start_daemon().await?;
        let mut rows = Vec::new();
        for (role, asking) in ["plain", "host"].into_iter().zip(asking) {
            rows.push(self.row(when, role, Ours(role), asking.await??));
        }
        Ok(rows)
    }

    /// The last of all: who is root on the host takes our programs off.
    async fn detached(&mut self) -> Result<Vec<Row>> {
        let cgroup = self.host.machine().cgroup();
        let id = std::fs::metadata(cgroup).with_context(|| format!("finding {}", cgroup.display()))?.ino();
        let asked = self.probe(Place::Privileged, &format!("detach-links {id}")).await?;
        let mut rows = vec![self.row("BPF_LINK_DETACH from the cgroup", "privileged", Refused, asked)];
        self.daemon()?.terminate(STOP).await?;
        self.start_daemon().await?;
        // What the detached programs let through before counts for nothing.
        self.seen();
        for place in [Place::Plain, Place::Host] {
            let asked = self.probe(place, "connect").await?;
            rows.push(self.row("after a restart: connect", place.name(), Ours(place.name()), asked));
        }
        let mounts = format!("--mount=/proc/{}/ns/mnt", self.host.machine().holder());
        // The kernel takes them off in the background.
        let script = format!("nsenter {mounts} rm -r /sys/fs/bpf/metadata-proxy; sleep 0.5; exec {PROBE} connect");
        let asked = self.in_host_pids("unpin", &script).await?;
        rows.push(self.row("rm of our pins in the host's mounts", "privileged", Known(UNPINNED), asked));
        Ok(rows)
    }
}
