//! What containers see that the engine starts by itself, at a host's boot.

use anyhow::ensure;

use super::{Scenario, same};
use crate::host::guest::Guest;

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario { name: "--restart always: from the first instruction, their own role", run: restart_always },
    Scenario { name: "a wrong configuration file: errors, and why", run: wrong_file },
    Scenario { name: "the daemon's file gone: what containers get", run: no_daemon },
];

/// Containers that ask as their first instruction, on both kinds of network, and note each answer in a file of theirs.
const ASKERS: &str = "
no_containers
rm -rf /var/lib/asked; mkdir /var/lib/asked
for place in bridge host; do
    for number in 1 2 3; do
        name=$place-$number
        docker run --detach --restart always --name $name --network $place --label metadata-proxy.role=$name \
            --volume /var/lib/asked:/asked box sh -c \"ask 100 /asked/$name; exec sleep 3600\" > /dev/null
    done
done
sleep 5
rm -f /var/lib/asked/*
sync";

/// One line for each of them: its name, and all that it was answered.
const ANSWERS: &str = "
cd /var/lib/asked
for name in bridge-1 bridge-2 bridge-3 host-1 host-2 host-3; do
    echo \"$name: $(sort $name | uniq -c | sed 's/^ *//; s/ASIASTANDIN[A-Z]*/KEY/' | tr '\\n' ',')\"
done";

fn restart_always(guest: &mut Guest) -> anyhow::Result<String> {
    guest.sh(ASKERS)?;
    let booted = guest.reboot()?;
    guest.sh("wait_for 60 serves; cd /var/lib/asked; for try in $(seq 120); do [ \"$(grep -l ASIA * | wc -l)\" = 6 ] && break; sleep 0.5; done")?;
    let answers = guest.sh(ANSWERS)?;
    let mut errors = 0;
    for line in answers.lines() {
        let (name, got) = line.split_once(": ").unwrap_or((line, ""));
        let (others, own): (Vec<&str>, Vec<&str>) =
            got.split(',').filter(|answer| !answer.is_empty()).partition(|answer| answer.contains("wget: "));
        ensure!(own == [format!("1 {name} KEY")], "{answers}");
        errors += others.len();
    }
    Ok(format!("{booted}; 6 containers, {errors} of them with an error before their role"))
}

fn wrong_file(guest: &mut Guest) -> anyhow::Result<String> {
    guest.sh(&format!("configure 'default-rol = \"x\"'{ASKERS}"))?;
    let booted = guest.reboot()?;
    let seen = guest.sh("systemctl is-active $unit docker; asks late; asks late-on-host --network host")?;
    let lines: Vec<&str> = seen.lines().collect();
    let ["activating" | "failed", "active", bridge, host] = *lines else { anyhow::bail!("{seen}") };
    ensure!([bridge, host].iter().all(|got| got.starts_with("nothing: ")), "{seen}");
    let answers = guest.sh(ANSWERS)?;
    ensure!(!answers.contains("KEY") && !answers.contains("HOST"), "{answers}");
    let why = guest.ask("systemctl status --no-pager --full $unit")?.text;
    ensure!(why.contains("default-rol"), "the status does not say why: {why}");
    guest.sh("configure ''; systemctl restart $unit; wait_for 20 serves")?;
    same(&guest.sh("own web")?, "web, key of web")?;
    Ok(format!("{booted}; {bridge}; repaired, it serves"))
}

fn no_daemon(guest: &mut Guest) -> anyhow::Result<String> {
    guest.sh("no_containers; mv /usr/bin/metadata-proxy /usr/bin/metadata-proxy.away; sync")?;
    let booted = guest.reboot()?;
    let seen = guest.sh("systemctl is-active docker
         asks late; asks late-on-host --network host
         mv /usr/bin/metadata-proxy.away /usr/bin/metadata-proxy
         systemctl restart $unit; wait_for 20 serves; : > /run/cloud.log; own web")?;
    ensure!(seen.ends_with("web, key of web"), "{seen}");
    Ok(format!("{booted}; docker {seen}"))
}
