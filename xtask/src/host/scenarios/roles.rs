//! Everybody's own role, on each kind of network.

use super::{Scenario, same};
use crate::host::guest::Guest;

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario { name: "bridge", run: |guest| own(guest, "bridge") },
    Scenario { name: "a user's network", run: user_network },
    Scenario { name: "host", run: |guest| own(guest, "host") },
    Scenario { name: "none", run: |guest| own(guest, "none") },
    Scenario { name: "another container's", run: shared },
    Scenario { name: "a process of the host: the host's", run: host_process },
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

fn host_process(guest: &mut Guest) -> anyhow::Result<String> {
    let seen = guest.sh("on_host $roles; echo; on_host ${roles}simulated-host-role | grep -o ASIAHOST.............")?;
    same(&seen, "simulated-host-role\nASIAHOSTSECRET000001\"")
}
