//! What containers see that the engine starts by itself, at a host's boot.

use anyhow::ensure;

use super::{Scenario, same};
use crate::host::guest::Guest;

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario { name: "--restart always: from the first instruction, their own role", run: restart_always },
    Scenario { name: "a wrong configuration file: errors, and why", run: wrong_file },
    Scenario { name: "the daemon's file gone: what containers get", run: no_daemon },
];

fn restart_always(guest: &mut Guest) -> anyhow::Result<String> {
    guest.sh("askers")?;
    let booted = guest.reboot()?;
    let answers = guest.sh("wait_for 60 serves; wait_for 60 all_answered; answers")?;
    let mut errors = 0;
    for line in answers.lines() {
        let (name, got) = line.split_once(": ").unwrap_or((line, ""));
        let (others, own): (Vec<&str>, Vec<&str>) =
            got.split(',').filter(|answer| !answer.is_empty()).partition(|answer| answer.contains("wget: "));
        ensure!(own == [format!("1 {name} KEY")], "{answers}");
        errors += others.len();
    }
    ensure!(answers.lines().count() == 4, "{answers}");
    Ok(format!("{booted}; 4 containers, {errors} of them with an error before their role"))
}

fn wrong_file(guest: &mut Guest) -> anyhow::Result<String> {
    guest.sh("askers; configure 'default-rol = \"x\"'")?;
    let booted = guest.reboot()?;
    let seen = guest.sh("wait_for 120 all_asked; sleep 10; answers")?;
    ensure!(seen.lines().count() == 4 && seen.lines().all(|line| line.contains("wget: ")), "{seen}");
    ensure!(!seen.contains("KEY") && !seen.contains("HOST"), "{seen}");
    let why = guest.sh("journalctl --no-pager --boot --output cat --unit $unit | grep default-rol | head -n 1")?;
    ensure!(!why.is_empty(), "the journal does not say why");
    same(&guest.sh("configure ''; systemctl restart $unit; wait_for 20 serves; own web")?, "web, key of web")?;
    Ok(format!("{booted}; {}; the journal: {why}; repaired, it serves", seen.lines().next().unwrap_or_default()))
}

/// Nothing of ours runs, so nobody of ours can say anything: what is seen is what the engine and the units make of that.
fn no_daemon(guest: &mut Guest) -> anyhow::Result<String> {
    guest.sh("askers; mv /usr/bin/metadata-proxy /usr/bin/metadata-proxy.away; sync")?;
    let booted = guest.reboot()?;
    let seen = guest.sh("wait_for 120 all_asked; sleep 10; systemctl is-active docker; answers
         mv /usr/bin/metadata-proxy.away /usr/bin/metadata-proxy
         no_containers; systemctl restart metadata-proxy-attach.service $unit; wait_for 20 serves; : > /run/cloud.log
         own web")?;
    ensure!(seen.ends_with("web, key of web"), "{seen}");
    Ok(format!("{booted}; docker {seen}"))
}
