//! The host as it comes, and the package on it.

use anyhow::ensure;

use super::Scenario;
use crate::host::guest::Guest;

pub(super) const SCENARIOS: &[Scenario] = &[
    Scenario { name: "the distribution", run: distribution },
    Scenario { name: "an image for containers", run: image },
    Scenario { name: "without the package: the host's role", run: leaks },
];

fn distribution(guest: &mut Guest) -> anyhow::Result<String> {
    let state = guest.ask("systemctl is-system-running --wait; systemctl --failed --no-legend --plain")?;
    ensure!(state.text == "running", "{}", state.text);
    guest.sh(
        "systemctl --version | sed -n '1s/.*(\\(.*\\))/systemd \\1/p'
         echo \"Linux $(uname -r)\"
         docker info --format 'Docker {{.ServerVersion}}, {{.CgroupDriver}} driver, cgroup {{.CgroupVersion}}, {{.Driver}}'",
    )
}

fn image(guest: &mut Guest) -> anyhow::Result<String> {
    guest.sh("make_image box")
}

/// Without this, all that follows would prove nothing. (It does not come from the daemon, so `leaks` would tell.)
fn leaks(guest: &mut Guest) -> anyhow::Result<String> {
    let seen = guest.sh("docker run --rm box ask 5; sleep 0.2; leaks | wc -l; : > /run/cloud.log")?;
    ensure!(seen == "simulated-host-role ASIAHOSTSECRET000001\n1", "{seen}");
    Ok("the stand-in saw it".to_owned())
}
