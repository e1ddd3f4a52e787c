//! The daemon as a container, of the packages' image, on a host that has it in no other way.

use anyhow::ensure;

use super::{Scenario, same};
use crate::host::guest::Guest;

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario { name: "without --cgroupns=host: roles, and the daemon's own", quick: false, run: serves },
    Scenario { name: "without --pid=host: refused, with the remedy", quick: false, run: refused },
    Scenario { name: "detach, by the image: nothing is left", quick: false, run: detach },
];

/// What it is to have, but for the namespaces; read-only, as nothing is written but to memory.
const RUN: &str = "docker run --privileged --read-only --network host $(printf -- '--env %s ' $aws) \
    --volume /sys/fs/cgroup:/sys/fs/cgroup --volume /sys/fs/bpf:/sys/fs/bpf \
    --volume /var/run/docker.sock:/var/run/docker.sock --volume /run/metadata-proxy:/run/metadata-proxy";
const IMAGE: &str = concat!("metadata-proxy:", env!("CARGO_PKG_VERSION"));

fn serves(guest: &mut Guest) -> anyhow::Result<String> {
    let seen = guest.sh(&format!(
        "systemctl stop $unit 2> /dev/null
         docker load --quiet --input /opt/host/image.tar > /dev/null
         {RUN} --pid host --detach --name daemon {IMAGE} > /dev/null
         wait_for 30 docker exec daemon metadata-proxy ps || docker logs daemon
         own web; own agent --network host
         docker exec daemon metadata-proxy ps | grep -c 'daemon .*exempt'"
    ))?;
    same(&seen, "web, key of web\nagent, key of agent\n1")
}

fn refused(guest: &mut Guest) -> anyhow::Result<String> {
    let said = guest.ask(&format!("docker rm --force daemon > /dev/null; {RUN} --rm {IMAGE}"))?;
    ensure!(said.status == 1 && said.text.contains("--pid=host"), "{}: {}", said.status, said.text);
    Ok(said.text)
}

fn detach(guest: &mut Guest) -> anyhow::Result<String> {
    let seen = guest.sh(&format!(
        "{RUN} --pid host --rm {IMAGE} detach > /dev/null 2>&1
         ls -d /sys/fs/bpf/metadata-proxy 2> /dev/null
         docker run --rm box ask 3; sleep 0.2; : > /run/cloud.log"
    ))?;
    same(&seen, "simulated-host-role ASIAHOSTSECRET000001")
}
