//! The host as it comes, and the package on it.

use anyhow::ensure;

use super::{Scenario, same};
use crate::host::guest::Guest;

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario { name: "the distribution: all its units run", quick: true, run: distribution },
    Scenario { name: "without the package: the host's role", quick: true, run: leaks },
    Scenario { name: "the package is installed and the unit enabled", quick: true, run: install },
    Scenario { name: "systemd has nothing to say about the units", quick: true, run: verify },
];

fn distribution(guest: &mut Guest) -> anyhow::Result<String> {
    let state = guest.ask("systemctl is-system-running --wait; systemctl --failed --no-legend --plain")?;
    ensure!(state.text == "running", "{}", state.text);
    guest.sh("systemctl --version | sed -n '1s/.*(\\(.*\\))/systemd \\1/p'
         echo \"Linux $(uname -r)\"
         docker info --format \
             'Docker {{.ServerVersion}}, {{.CgroupDriver}} driver, cgroup {{.CgroupVersion}}, {{.Driver}}'")
}

/// Otherwise, all that follows would prove nothing.
fn leaks(guest: &mut Guest) -> anyhow::Result<String> {
    let seen = guest.sh("make_image box; docker run --rm box ask 5; sleep 0.2; leaks | wc -l; : > /run/cloud.log")?;
    same(&seen, "simulated-host-role ASIAHOSTSECRET000001\n1")?;
    Ok("and `leaks` has seen it".to_owned())
}

fn install(guest: &mut Guest) -> anyhow::Result<String> {
    guest.sh("dpkg --install /opt/host/now.deb > /run/dpkg 2>&1 || { cat /run/dpkg; exit 1; }
         mkdir -p /etc/systemd/system/$unit.d
         printf '[Service]\\nEnvironment=%s\\n' \"$aws\" > /etc/systemd/system/$unit.d/aws.conf
         systemctl daemon-reload
         systemctl enable --now --quiet $unit
         systemctl is-active $unit
         wait_for 20 serves")
}

fn verify(guest: &mut Guest) -> anyhow::Result<String> {
    let said = guest.sh("systemd-analyze verify $unit metadata-proxy-attach.service 2>&1")?;
    same(&said, "")?;
    guest.sh("systemd-analyze security --no-pager $unit | tail -n 1")
}
