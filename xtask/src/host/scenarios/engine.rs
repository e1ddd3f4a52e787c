//! Docker, as it may be set up.

use anyhow::ensure;

use super::{NotHere, Scenario, same};
use crate::host::guest::Guest;

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario { name: "live-restore: requests while dockerd is gone", quick: false, run: live_restore },
    Scenario { name: "containerd's image store: labels of images ignored", quick: false, run: image_store },
    Scenario { name: "userns-remap: its own role", quick: false, run: user_namespaces },
    Scenario { name: "a Swarm service on an overlay network: its own role", quick: false, run: swarm },
];

fn live_restore(guest: &mut Guest) -> anyhow::Result<String> {
    guest.sh("engine '{\"live-restore\": true}'; clients")?;
    guest.sh("sleep 2; systemctl restart docker.service; sleep 2")?;
    guest.sh("systemctl stop docker.socket docker.service; sleep 60; systemctl start docker.socket docker.service")?;
    let seen = guest.sh("next web agent > /dev/null; loaded web agent")?;
    ensure!(seen.lines().count() == 2 && seen.lines().all(|line| line.ends_with(", 0 failed")), "{seen}");
    Ok(seen)
}

fn image_store(guest: &mut Guest) -> anyhow::Result<String> {
    let version = guest.sh("docker version --format '{{.Server.Version}}'")?;
    let major = version.split('.').next().and_then(|major| major.parse::<u32>().ok());
    if major.is_some_and(|major| major < 24) {
        return Err(NotHere(format!("Docker {version} has no such store")).into());
    }
    let seen = guest.sh("engine '{\"features\": {\"containerd-snapshotter\": true}}'
         docker info --format '{{json .DriverStatus}}' | grep -o io.containerd.snapshotter.v1
         make_image box
         make_image labelled --change 'LABEL metadata-proxy.role=images'
         own web
         docker run --rm labelled ask 3
         docker run --rm --label metadata-proxy.role=web labelled ask 20 | cut -d' ' -f1
         engine '{}'");
    let seen = seen?;
    let lines: Vec<&str> = seen.lines().collect();
    let ["io.containerd.snapshotter.v1", own, unlabelled, relabelled] = *lines else { anyhow::bail!("{seen}") };
    same(own, "web, key of web")?;
    ensure!(unlabelled.starts_with("nothing: ") && unlabelled.contains("404"), "{seen}");
    same(relabelled, "web")?;
    Ok(unlabelled.to_owned())
}

fn user_namespaces(guest: &mut Guest) -> anyhow::Result<String> {
    let seen = guest.sh("engine '{\"userns-remap\": \"default\"}'
         make_image box
         docker run --rm box cat /proc/self/uid_map | awk '{ print ($2 > 0) }'
         own web; own agent --network host --userns host
         engine '{}'")?;
    same(&seen, "1\nweb, key of web\nagent, key of agent")
}

fn swarm(guest: &mut Guest) -> anyhow::Result<String> {
    let seen = guest.sh("docker swarm init --advertise-addr 198.51.100.1 > /dev/null
         docker network create --driver overlay wide > /dev/null
         docker service create --detach --quiet --no-resolve-image --name web --network wide \
             --container-label metadata-proxy.role=web box sh -c 'ask 100; exec sleep 3600' > /dev/null
         answered() { docker service logs --raw web | grep -q ASIA; }
         wait_for 90 answered
         docker service logs --raw web | { read -r role key; echo \"$role, key of $(role_of $key)\"; }
         docker service rm web > /dev/null; docker swarm leave --force > /dev/null")?;
    same(&seen, "web, key of web")
}
