//! What containers see that the engine starts by itself, at a host's boot.

use anyhow::{Context as _, bail, ensure};

use super::{Scenario, same};
use crate::host::guest::Guest;

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario { name: "--restart always: from the first instruction, their own role", quick: true, run: restart_always },
    Scenario { name: "a network that is late by 25 s: errors, then their role", quick: false, run: slow_network },
    Scenario { name: "a wrong configuration file: errors, and why", quick: true, run: wrong_file },
    Scenario { name: "the daemon's file gone: no engine, so no container", quick: false, run: no_daemon },
];

const HOST_ROLE: &str = "simulated-host-role";

fn restart_always(guest: &mut Guest) -> anyhow::Result<String> {
    guest.sh("askers")?;
    let booted = guest.reboot()?;
    let answers = guest.sh("wait_for 120 serves; wait_for 120 all_answered; answers")?;
    let refused = before_their_role(&answers)?;
    ensure!(refused.len() == 4, "{answers}");
    let (errors, longest) = (refused.iter().filter(|refused| **refused).count(), guest.sh("longest_wait")?);
    Ok(format!(
        "{booted}; 4 containers, {errors} of them with an error before their role; waited for {longest} s at most"
    ))
}

/// Whether each of them, which all got their own role once and nobody else's ever, had an error before.
fn before_their_role(answers: &str) -> anyhow::Result<Vec<bool>> {
    let refused = |line: &str| {
        let (name, got) = line.split_once(": ").unwrap_or((line, ""));
        let (errors, own): (Vec<&str>, Vec<&str>) =
            got.split(',').filter(|answer| !answer.is_empty()).partition(|answer| answer.contains(" nothing: "));
        ensure!(own == [format!("1 {name} KEY")] && !got.contains(HOST_ROLE), "{answers}");
        Ok(!errors.is_empty())
    };
    answers.lines().map(refused).collect()
}

/// As by DHCP, for which nothing waits: containers are there before the host has an address.
fn slow_network(guest: &mut Guest) -> anyhow::Result<String> {
    guest.sh("askers; late")?;
    let booted = guest.reboot()?;
    let early = guest
        .sh("wait_for 120 test -s /var/lib/asked/plain; ip route show default; grep ASIA /var/lib/asked/* | wc -l")?;
    same(&early, "0")?;
    let answers = guest.sh("wait_for 120 all_answered 5; not_late; answers; rm /var/lib/asked/plain")?;
    let refused = before_their_role(&answers)?;
    ensure!(refused.len() == 5 && refused.iter().all(|refused| *refused), "{answers}");
    Ok(format!("{booted}; {}", answers.lines().last().unwrap_or_default()))
}

fn wrong_file(guest: &mut Guest) -> anyhow::Result<String> {
    guest.sh("askers; configure 'default-rol = \"x\"'")?;
    let booted = guest.reboot()?;
    let seen = guest.sh("wait_for 120 all_asked; sleep 10; answers")?;
    ensure!(seen.lines().count() == 4 && seen.lines().all(|line| line.contains(" nothing: ")), "{seen}");
    ensure!(!seen.contains("KEY") && !seen.contains("HOST") && !seen.contains(HOST_ROLE), "{seen}");
    let status = guest.ask("systemctl status --no-pager --full $unit")?.text;
    let why = status.lines().find(|line| line.contains("default-rol"));
    let why = why.with_context(|| format!("the status does not say why: {status}"))?;
    same(&guest.sh("configure ''; systemctl restart $unit; wait_for 20 serves; own web")?, "web, key of web")?;
    Ok(format!("{booted}; {}; {why}; repaired, it serves", seen.lines().next().unwrap_or_default()))
}

/// The units see to it that the engine waits for the interception, or each of its containers would have the host's role.
fn no_daemon(guest: &mut Guest) -> anyhow::Result<String> {
    guest.sh("askers; mv /usr/bin/metadata-proxy /usr/bin/metadata-proxy.away; sync")?;
    let booted = guest.reboot()?;
    let seen = guest.ask(
        "systemctl is-system-running --wait; systemctl is-active docker.service
         docker ps --quiet 2>&1; ls /var/lib/asked
         systemctl --failed --no-legend --plain | cut -d' ' -f1 | tr '\\n' ' '",
    )?;
    let lines: Vec<&str> = seen.text.lines().collect();
    let ["degraded", "inactive" | "failed" | "activating", docker, failed] = *lines else { bail!("{}", seen.text) };
    ensure!(docker.contains("Cannot connect"), "{}", seen.text);
    let back = guest.sh(
        "mv /usr/bin/metadata-proxy.away /usr/bin/metadata-proxy
         systemctl reset-failed; systemctl start docker.service $unit; wait_for 60 serves; wait_for 120 all_answered; answers",
    )?;
    ensure!(before_their_role(&back)?.len() == 4, "{back}");
    Ok(format!("{booted}; failed: {failed}; put back and started, containers get their roles"))
}
