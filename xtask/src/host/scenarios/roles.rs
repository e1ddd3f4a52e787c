//! Everybody's own role, on each kind of network.

use anyhow::{bail, ensure};

use super::{Scenario, same};
use crate::host::guest::Guest;

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario { name: "bridge", quick: true, run: |guest| own(guest, "bridge") },
    Scenario { name: "a user's network", quick: true, run: user_network },
    Scenario { name: "host", quick: true, run: |guest| own(guest, "host") },
    Scenario { name: "none", quick: true, run: |guest| own(guest, "none") },
    Scenario { name: "another container's", quick: true, run: shared },
    Scenario { name: "a step of a build, by BuildKit and without, host: nothing", quick: false, run: builds },
    Scenario { name: "a process of the host: the host's", quick: true, run: host_process },
    Scenario { name: "a stand-in on the host's loopback: for the host only", quick: false, run: loopback },
];

fn own(guest: &mut Guest, network: &str) -> anyhow::Result<String> {
    same(&guest.sh(&format!("own web --network {network}"))?, "web, key of web")
}

fn user_network(guest: &mut Guest) -> anyhow::Result<String> {
    let seen = guest.sh("docker network create users > /dev/null; own web --network users; docker network rm users")?;
    same(&seen, "web, key of web\nusers")
}

fn shared(guest: &mut Guest) -> anyhow::Result<String> {
    let seen = guest.sh(
        "docker run --detach --stop-signal KILL --name pod --label metadata-proxy.role=pod box sleep 3600 > /dev/null
         own web --network container:pod
         docker exec pod ask 20 | cut -d' ' -f1; docker rm --force pod",
    )?;
    same(&seen, "web, key of web\npod\npod")
}

/// No engine tells of what BuildKit runs, and its cgroup is named otherwise than a container's.
fn builds(guest: &mut Guest) -> anyhow::Result<String> {
    let mut seen = Vec::new();
    for (buildkit, network) in [(1, "host"), (1, "default"), (0, "host")] {
        let said = guest.sh(&format!(
            "printf 'FROM box\\nRUN cat /proc/self/cgroup > /tmp/cgroup; ask 1 > /tmp/said; true\\n' |
                 DOCKER_BUILDKIT={buildkit} docker build --quiet --no-cache --network={network} --tag built - > /dev/null 2>&1
             docker run --rm built cat /tmp/said; docker run --rm built cat /tmp/cgroup; docker rmi --force built > /dev/null"
        ))?;
        ensure!(said.starts_with("nothing: ") && said.contains("404") && !said.contains("role"), "{said}");
        seen.push(said.lines().next_back().unwrap_or_default().to_owned());
    }
    Ok(seen.join(", "))
}

fn host_process(guest: &mut Guest) -> anyhow::Result<String> {
    let seen = guest.sh("on_host $roles; echo; on_host ${roles}simulated-host-role | grep -o ASIAHOST.............")?;
    same(&seen, "simulated-host-role\nASIAHOSTSECRET000001\"")
}

/// The daemon is started anew, so that its own credentials come from there, too.
fn loopback(guest: &mut Guest) -> anyhow::Result<String> {
    let seen = guest.sh("near; on_host $roles; echo
         systemctl restart $unit; wait_for 20 serves
         own web; own agent --network host; own sealed --network none
         grep -q ' aws-sdk-rust/.* SECRET$' /run/near.log && echo the daemon, too
         systemctl stop $unit
         docker run --rm box ask 1; docker run --rm --network host box ask 1
         leaks; not_near; systemctl start $unit; wait_for 20 serves")?;
    let lines: Vec<&str> = seen.lines().collect();
    let [served @ .., bridged, on_host] = &*lines else { bail!("{seen}") };
    same(
        &served.join("\n"),
        "simulated-host-role\nweb, key of web\nagent, key of agent\nsealed, key of sealed\nthe daemon, too",
    )?;
    ensure!([bridged, on_host].iter().all(|line| line.starts_with("nothing: ")), "{seen}");
    Ok(format!("without the daemon, {bridged}"))
}
