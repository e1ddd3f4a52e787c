//! One run of a virtual machine, from its first instruction to the last word of its tests.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Context as _;

use crate::install::{Kernel, QEMU};

/// Tells the guest's programs that they are alone; the tests' `Machine::guest` looks for it.
const GUEST: &str = "metadata-proxy-guest";
/// A whole run takes a minute or two; emulated, and on a machine that has other work, some more.
const LIMIT: Duration = Duration::from_secs(900);

/// What a run has printed.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Report {
    pub(super) tests: Vec<Test>,
    /// The guest's program has run to its end and was content.
    pub(super) good: bool,
    /// Everything else on its console.
    pub(super) console: Vec<String>,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Test {
    pub(super) name: String,
    pub(super) good: bool,
    pub(super) seen: String,
}

/// Boots the kernel with the files of `initramfs` as its whole world.
pub(super) fn boot(kernel: &Kernel, cgroups: &str, initramfs: &Path, kvm: bool) -> anyhow::Result<Report> {
    let mut qemu = Command::new(QEMU);
    qemu.args(if kvm { ["-accel", "kvm", "-cpu", "host"] } else { ["-accel", "tcg,thread=multi", "-cpu", "max"] });
    // No network device, no disk: nothing gets out, and nothing is left behind.
    qemu.args(["-smp", "2", "-m", "2048", "-nodefaults", "-no-user-config", "-no-reboot", "-nic", "none"]);
    qemu.args(["-display", "none", "-monitor", "none", "-serial", "stdio", "-kernel"]).arg(&kernel.image);
    qemu.arg("-initrd").arg(initramfs).arg("-append");
    qemu.arg(format!("console=ttyS0 quiet panic=-1 mitigations=off rdinit=/init cgroups={cgroups} {GUEST}"));
    let child = qemu.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::inherit()).spawn();
    let mut child = Killed(child.with_context(|| format!("cannot start {QEMU}"))?);

    let output = child.0.stdout.take().context("the guest has no console")?;
    let (sender, lines) = mpsc::channel();
    thread::spawn(move || {
        for line in BufReader::new(output).split(b'\n').map_while(Result::ok) {
            if sender.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                break;
            }
        }
    });
    let deadline = Instant::now() + LIMIT;
    let mut report = Report::default();
    loop {
        match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
            Ok(line) => report.read(&line),
            Err(RecvTimeoutError::Disconnected) => break,
            Err(RecvTimeoutError::Timeout) => {
                report.good = false;
                report.console.push(format!("the guest was not done after {LIMIT:?} and was turned off"));
                break;
            }
        }
    }
    Ok(report)
}

impl Report {
    fn read(&mut self, line: &str) {
        // The firmware leaves the cursor in the middle of a line.
        let words = line.find("GUEST\t").map(|at| line[at..].split('\t').skip(1).collect::<Vec<_>>());
        match words.as_deref() {
            Some(["end", status, uptime]) => {
                self.good = *status == "0";
                self.console.push(format!("turned off after {uptime} s"));
            }
            Some([result, name, seen]) => {
                let (name, seen) = ((*name).to_owned(), (*seen).to_owned());
                self.tests.push(Test { name, good: *result == "ok", seen });
            }
            _ => self.console.push(line.to_owned()),
        }
    }
}

/// An emulator that is not left running, whatever happens here.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Puts the parts of an initramfs together: the kernel takes several archives in a row.
pub(super) fn join(parts: &[&[u8]], to: &Path) -> anyhow::Result<()> {
    fs::write(to, parts.concat()).with_context(|| format!("write {}", to.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_told_from_the_rest_of_the_console() {
        let mut report = Report::default();
        for line in
            ["booting", "\u{1b}[2JGUEST\tok\tbridge\trole web", "GUEST\tFAILED\tnone\twhy", "GUEST\tend\t1\t9.5"]
        {
            report.read(line);
        }
        let test = |name: &str, good, seen: &str| Test { name: name.into(), good, seen: seen.into() };
        assert_eq!(report.tests, [test("bridge", true, "role web"), test("none", false, "why")]);
        assert!(!report.good);
        report.read("GUEST\tend\t0\t10.0");
        assert!(report.good);
    }
}
