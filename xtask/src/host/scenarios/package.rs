//! The package's life after its installation.

use anyhow::ensure;

use super::{Scenario, same};
use crate::host::guest::Guest;

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario { name: "upgrade under load: no request fails", quick: false, run: upgrade },
    Scenario { name: "removal: no daemon, nothing attached, containers stay", quick: true, run: removal },
    Scenario { name: "purge: no configuration, no logs", quick: true, run: purge },
];

fn upgrade(guest: &mut Guest) -> anyhow::Result<String> {
    let seen = guest.sh(
        "dpkg --install --force-downgrade /opt/host/before.deb > /run/dpkg 2>&1 || { cat /run/dpkg; exit 1; }
         wait_for 20 serves; was=$(main_pid)
         clients
         dpkg --install /opt/host/now.deb > /run/dpkg 2>&1 || { cat /run/dpkg; exit 1; }
         replaced $was && echo replaced
         wait_for 20 serves; next web agent > /dev/null; loaded web agent",
    )?;
    let lines: Vec<&str> = seen.lines().collect();
    let ["replaced", failed @ .., bridged, on_host] = &*lines else { anyhow::bail!("{seen}") };
    let away = guest.sh("away")?;
    let all = failed.is_empty() && [bridged, on_host].iter().all(|line| line.ends_with(", 0 failed"));
    ensure!(all, "{seen}; the daemon was away for {away} s, and connections are held for four");
    Ok(format!("{bridged}; {on_host}; the daemon was away for {away} s"))
}

fn removal(guest: &mut Guest) -> anyhow::Result<String> {
    let seen =
        guest.sh("no_containers; docker run --detach --name stays --stop-signal KILL box sleep 3600 > /dev/null
         dpkg --remove metadata-proxy > /run/dpkg 2>&1 || { cat /run/dpkg; exit 1; }
         pidof metadata-proxy
         ls -d /sys/fs/bpf/metadata-proxy 2> /dev/null
         tc filter show dev eth0 egress
         systemctl list-units --plain --no-legend --all 'metadata-proxy*' | grep -v -e not-found -e masked
         docker ps --format '{{.Names}}'
         docker run --rm box ask 3; sleep 0.2; : > /run/cloud.log")?;
    same(&seen, "stays\nsimulated-host-role ASIAHOSTSECRET000001")?;
    Ok("containers have the real service again".to_owned())
}

fn purge(guest: &mut Guest) -> anyhow::Result<String> {
    let seen = guest.sh("dpkg --purge metadata-proxy > /run/dpkg 2>&1 || { cat /run/dpkg; exit 1; }
         rm -r /etc/systemd/system/$unit.d
         find / -xdev -name '*metadata-proxy*' -not -path '/root/*' -not -path '/run/*'")?;
    same(&seen, "")?;
    Ok("no file is left".to_owned())
}
