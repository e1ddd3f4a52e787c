//! What an operator does with the unit, and what befalls it.

use anyhow::ensure;

use super::{Scenario, same};
use crate::host::guest::Guest;

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario { name: "check: the host has all that is needed", run: check },
    Scenario { name: "reload: a new default role holds", run: reload },
    Scenario { name: "reload of a wrong file: refused, the old one holds", run: refused },
    Scenario { name: "journal: that is a warning, attaching is none", run: priorities },
    Scenario { name: "restart: serves", run: restart },
    Scenario { name: "kill -9: comes back", run: kill },
    Scenario { name: "kill -STOP: the watchdog replaces it", run: hang },
    Scenario { name: "a full disk below the audit log: serves", run: full_disk },
    Scenario { name: "stop: containers get errors", run: stop },
];

fn check(guest: &mut Guest) -> anyhow::Result<String> {
    let answer =
        guest.ask("set -a; . /etc/default/metadata-proxy; METADATA_PROXY_CONFIG=$config metadata-proxy check")?;
    ensure!(answer.status == 0, "exit status {}: {}", answer.status, answer.text);
    Ok(format!("{} lines", answer.text.lines().count()))
}

fn reload(guest: &mut Guest) -> anyhow::Result<String> {
    let seen = guest.sh("docker run --detach --stop-signal KILL --name unnamed box sleep 3600 > /dev/null
         configure 'default-role = \"reloaded\"'
         systemctl reload $unit
         sleep 1
         docker exec unnamed ask 20 | { read -r role key; echo \"$role, key of $(role_of $key)\"; }")?;
    same(&seen, "reloaded, key of reloaded")
}

fn refused(guest: &mut Guest) -> anyhow::Result<String> {
    let seen = guest.sh("configure 'default-rol = \"x\"'
         systemctl reload $unit > /run/said 2>&1; echo $?
         systemctl is-active $unit
         docker exec unnamed ask 20 | cut -d' ' -f1
         configure 'default-role = \"reloaded\"'
         systemctl reload $unit; echo $?
         docker rm --force unnamed > /dev/null")?;
    same(&seen, "1\nactive\nreloaded\n0")?;
    guest.sh("head -n 1 /run/said")
}

fn priorities(guest: &mut Guest) -> anyhow::Result<String> {
    let show = |options: &str| format!("journalctl --no-pager --boot --output cat --unit $unit {options}");
    let warnings = guest.sh(&show("--priority warning"))?;
    let rest = guest.sh(&show("--priority notice..debug"))?;
    ensure!(warnings.contains("default-rol"), "warnings: {warnings}");
    ensure!(!warnings.contains("attached"), "warnings: {warnings}");
    ensure!(rest.contains("attached"), "no warnings: {rest}");
    ensure!(!rest.contains("default-rol\""), "no warnings: {rest}");
    Ok(format!("{} warnings, {} other lines", warnings.lines().count(), rest.lines().count()))
}

fn restart(guest: &mut Guest) -> anyhow::Result<String> {
    let seen = guest.sh("systemctl restart $unit; systemctl is-active $unit; wait_for 20 serves; own web")?;
    same(&seen, "active\nweb, key of web")
}

fn kill(guest: &mut Guest) -> anyhow::Result<String> {
    let seen = guest.sh("was=$(main_pid); kill -9 $was
         wait_for 10 replaced $was; wait_for 20 serves; systemctl is-active $unit; own web")?;
    same(&seen, "active\nweb, key of web")
}

fn hang(guest: &mut Guest) -> anyhow::Result<String> {
    let limit = guest.sh("systemctl show --property WatchdogUSec --value $unit")?;
    ensure!(limit != "0" && limit != "infinity", "the unit has no watchdog");
    let seen = guest.sh("was=$(main_pid); kill -STOP $was
         begin=$(date +%s); wait_for 120 replaced $was; echo $(($(date +%s) - begin)) > /run/seconds
         wait_for 20 serves; systemctl is-active $unit; own web")?;
    same(&seen, "active\nweb, key of web")?;
    Ok(format!("WatchdogSec={limit}; replaced after {} s", guest.sh("cat /run/seconds")?))
}

fn full_disk(guest: &mut Guest) -> anyhow::Result<String> {
    let seen = guest.sh("mkdir -p /var/log/metadata-proxy
         mount -t tmpfs -o size=64k,mode=700 tmpfs /var/log/metadata-proxy
         cat /dev/zero > /var/log/metadata-proxy/fill 2> /dev/null
         configure 'audit-log = \"/var/log/metadata-proxy/audit.log\"'
         systemctl restart $unit; wait_for 20 serves; own web; own agent --network host
         rm /var/log/metadata-proxy/fill
         own later; sleep 1; grep -o '.container_name.:.[a-z]*.' /var/log/metadata-proxy/audit.log
         configure ''; systemctl restart $unit
         umount /var/log/metadata-proxy")?;
    same(&seen, "web, key of web\nagent, key of agent\nlater, key of later\n\"container_name\":\"later\"")?;
    Ok("and records again, once there is room".to_owned())
}

fn stop(guest: &mut Guest) -> anyhow::Result<String> {
    let seen = guest.sh("systemctl stop $unit; asks web; asks agent --network host; systemctl start $unit")?;
    for line in seen.lines() {
        ensure!(line.starts_with("nothing: "), "{seen}");
    }
    ensure!(seen.lines().count() == 2, "{seen}");
    Ok(seen)
}
