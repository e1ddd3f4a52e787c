//! What an operator does with the unit, and what befalls it.

use anyhow::ensure;

use super::{Scenario, same};
use crate::host::guest::Guest;

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario { name: "check, from a shell: all ok, and the daemon's own", quick: true, run: check },
    Scenario { name: "reload: a new default role holds", quick: true, run: reload },
    Scenario { name: "reload of a wrong file: refused, the old one holds", quick: false, run: refused },
    Scenario { name: "journal: that is a warning, attaching is none", quick: false, run: priorities },
    Scenario { name: "restart under load: no request fails", quick: false, run: restart },
    Scenario { name: "[[service]]: units have roles of their own, or none", quick: false, run: services },
    Scenario { name: "kill -9: comes back", quick: false, run: kill },
    Scenario { name: "kill -STOP: the watchdog replaces it", quick: true, run: hang },
    Scenario { name: "a full disk below the audit log: serves", quick: false, run: full_disk },
    Scenario { name: "stop: containers get errors", quick: true, run: stop },
];

/// What the containers get that ask all the time.
const SERVED: &str = "web: web, key of web\nagent: agent, key of agent";

/// The shell has not the unit's environment, so what AWS is and who the daemon is there can only come from the daemon.
fn check(guest: &mut Guest) -> anyhow::Result<String> {
    let answer = guest.ask("metadata-proxy check")?;
    ensure!(answer.status == 0, "exit status {}: {}", answer.status, answer.text);
    ensure!(answer.text.lines().all(|line| line.starts_with("ok ")), "{}", answer.text);
    let line = |name: &str| {
        answer.text.lines().find_map(|line| Some(line.strip_prefix("ok      ")?.strip_prefix(name)?.trim()))
    };
    let pid = guest.sh("main_pid")?;
    let version = env!("CARGO_PKG_VERSION");
    same(line("daemon").unwrap_or_default(), &format!("version {version} runs as process {pid}"))?;
    let configuration = line("configuration").unwrap_or_default();
    ensure!(configuration.starts_with("the daemon's (/etc/metadata-proxy/config.toml): "), "{configuration}");
    let identity = line("STS identity").unwrap_or_default();
    ensure!(identity.starts_with("arn:aws:sts::"), "{identity}");
    Ok(format!("{} lines; {identity}", answer.text.lines().count()))
}

fn reload(guest: &mut Guest) -> anyhow::Result<String> {
    let seen = guest.sh("configure 'default-role = \"first\"'; systemctl reload $unit
         load unnamed --label metadata-proxy.role=
         configure 'default-role = \"reloaded\"'
         systemctl reload $unit; echo $?; sleep 1; next unnamed")?;
    same(&seen, "0\nunnamed: reloaded, key of reloaded")
}

fn refused(guest: &mut Guest) -> anyhow::Result<String> {
    let seen = guest.sh("configure 'default-role = \"reloaded\"'; systemctl reload $unit
         load unnamed --label metadata-proxy.role=
         configure 'default-rol = \"x\"'
         systemctl reload $unit > /run/said 2>&1; echo $?
         sleep 1; next unnamed; systemctl is-active $unit
         configure 'default-role = \"reloaded\"'
         systemctl reload $unit; echo $?")?;
    same(&seen, "1\nunnamed: reloaded, key of reloaded\nactive\n0")?;
    guest.sh("head -n 1 /run/said")
}

/// The two before have made one warning at least.
fn priorities(guest: &mut Guest) -> anyhow::Result<String> {
    let show = |options: &str| format!("journalctl --no-pager --boot --output cat --unit $unit {options}");
    let warnings = guest.sh(&show("--priority warning"))?;
    let others = guest.sh(&show("--priority notice..debug"))?;
    ensure!(warnings.contains("default-rol") && !warnings.contains("attached"), "warnings: {warnings}");
    ensure!(others.contains("attached") && !others.contains("unknown field"), "no warnings: {others}");
    Ok(format!("{} warnings, {} other lines", warnings.lines().count(), others.lines().count()))
}

fn restart(guest: &mut Guest) -> anyhow::Result<String> {
    let seen = guest.sh("clients; before=$(cat /var/lib/seen/* | grep -c nothing)
         systemctl restart $unit; systemctl is-active $unit; next web agent
         cat /var/lib/seen/* | grep nothing | tail -n +$((before + 1))")?;
    let away = guest.sh("away")?;
    ensure!(
        seen == format!("active\n{SERVED}"),
        "{seen}; the daemon was away for {away} s, and connections are held for four"
    );
    Ok(format!("active; the daemon was away for {away} s"))
}

/// From the unit's first instruction; once more when it is started anew, and with a network of its own.
fn services(guest: &mut Guest) -> anyhow::Result<String> {
    let seen = guest.sh("configure '
[host]
default = \"deny\"
[[service]]
unit = \"job-*.service\"
role = \"job\"
[[service]]
unit = \"monitor.service\"
role = \"@instance\"'
         systemctl restart $unit; wait_for 20 serves
         in_unit job-1; in_unit job-1; in_unit job-2 --property PrivateNetwork=yes; in_unit monitor; in_unit other
         configure ''; systemctl restart $unit; wait_for 20 serves; in_unit other")?;
    let expected = "job-1: job\njob-1: job\njob-2: job\nmonitor: simulated-host-role\nother: nothing\n\
                    other: simulated-host-role";
    same(&seen, expected)
}

fn kill(guest: &mut Guest) -> anyhow::Result<String> {
    let seen = guest
        .sh("clients; was=$(main_pid); kill -9 $was; wait_for 10 replaced $was; wait_for 20 serves; systemctl is-active $unit
         next web agent")?;
    same(&seen, &format!("active\n{SERVED}"))?;
    Ok("active".to_owned())
}

fn hang(guest: &mut Guest) -> anyhow::Result<String> {
    let limit = guest.sh("systemctl show --property WatchdogUSec --value $unit")?;
    ensure!(limit != "0" && limit != "infinity", "the unit has no watchdog");
    let seen = guest.sh("clients; was=$(main_pid); kill -STOP $was
         begin=$(date +%s); wait_for 120 replaced $was; echo $(($(date +%s) - begin)) > /run/seconds
         wait_for 20 serves; systemctl is-active $unit; next web agent")?;
    same(&seen, &format!("active\n{SERVED}"))?;
    Ok(format!("WatchdogSec={limit}; replaced after {} s", guest.sh("cat /run/seconds")?))
}

fn full_disk(guest: &mut Guest) -> anyhow::Result<String> {
    let seen = guest.sh("clients; mkdir -p /var/log/metadata-proxy
         mount -t tmpfs -o size=64k,mode=700 tmpfs /var/log/metadata-proxy
         cat /dev/zero > /var/log/metadata-proxy/fill 2> /dev/null
         configure 'audit-log = \"/var/log/metadata-proxy/audit.log\"'
         systemctl restart $unit; wait_for 20 serves; next web agent
         cat /var/log/metadata-proxy/audit.log
         rm /var/log/metadata-proxy/fill
         next web > /dev/null; sleep 1
         grep -o '.container_name.:.web.' /var/log/metadata-proxy/audit.log | sort -u
         configure ''; systemctl restart $unit; umount /var/log/metadata-proxy")?;
    same(&seen, &format!("{SERVED}\n\"container_name\":\"web\""))?;
    Ok("and records again, once there is room".to_owned())
}

fn stop(guest: &mut Guest) -> anyhow::Result<String> {
    let seen = guest.sh("clients; systemctl stop $unit; next web agent; systemctl start $unit; no_containers")?;
    let [web, agent] = *seen.lines().collect::<Vec<_>>() else { anyhow::bail!("{seen}") };
    ensure!(web.starts_with("web: nothing: ") && agent.starts_with("agent: nothing: "), "{seen}");
    Ok(seen)
}
