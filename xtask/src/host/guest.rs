//! A guest as the scenarios see it: a shell on it, and a table to tell what was seen.
#![expect(clippy::print_stdout, reason = "the table is its standard output")]

use std::time::{Duration, Instant};

use anyhow::ensure;

use super::machine::Machine;
use super::port::Answer;
use super::scenarios::{Chosen, NotHere};

/// For each step; an emulated processor is slow.
const LIMIT: Duration = Duration::from_secs(300);

/// The last that the daemon and systemd have to say, but for what our containers cause many times.
const LOG: &str =
    "journalctl --no-pager --boot --output short-precise --unit 'metadata-proxy*' | grep -v 'handed out' | tail -n 40";

pub(super) struct Guest {
    distribution: &'static str,
    machine: Machine,
    verbose: bool,
}

impl Guest {
    pub(super) fn new(distribution: &'static str, machine: Machine, verbose: bool) -> Self {
        Self { distribution, machine, verbose }
    }

    /// Boots, and goes through the groups whatever becomes of one; whether all is as it should be.
    pub(super) fn go_through(&mut self, groups: &[Chosen]) -> anyhow::Result<bool> {
        let begin = Instant::now();
        self.machine.boot()?;
        println!("{:<16} booted in {:.0} s", self.distribution, begin.elapsed().as_secs_f64());
        let mut good = true;
        for (group, scenarios) in groups {
            let begin = Instant::now();
            for scenario in scenarios {
                good &= self.go(group, scenario.name, scenario.run)?;
            }
            println!("{:<16} {:<10} took {:.0} s", self.distribution, group, begin.elapsed().as_secs_f64());
        }
        Ok(good)
    }

    /// One scenario, and its line. An error is a guest that is lost to those that follow.
    fn go(&mut self, group: &str, name: &str, run: fn(&mut Self) -> anyhow::Result<String>) -> anyhow::Result<bool> {
        let begin = Instant::now();
        let result = run(self).and_then(|seen| self.no_leak().map(|()| seen));
        let (word, seen) = match &result {
            Ok(seen) => ("ok", seen.clone()),
            Err(error) if error.is::<NotHere>() => ("-", error.to_string()),
            Err(error) => ("FAILED", format!("{error:#}")),
        };
        let (seconds, seen) = (begin.elapsed().as_secs_f64(), seen.replace('\n', "; "));
        println!("{:<16} {group:<10} {name:<52} {word:<7} {seconds:>4.0}  {seen}", self.distribution);
        if word == "FAILED" {
            self.machine.alive()?;
            if self.verbose {
                let log = self.ask(LOG)?;
                println!("  {}", log.text.replace('\n', "\n  "));
            }
            self.ask("tidy")?;
        }
        Ok(word != "FAILED")
    }

    /// What a script prints; it has to succeed.
    pub(super) fn sh(&mut self, script: &str) -> anyhow::Result<String> {
        let Answer { status, text } = self.ask(script)?;
        ensure!(status == 0, "exit status {status} of `{script}`: {text}");
        Ok(text)
    }

    /// Runs a script, whatever becomes of it.
    pub(super) fn ask(&mut self, script: &str) -> anyhow::Result<Answer> {
        self.machine.run(&format!(". /opt/host/lib.sh\n{script}"), LIMIT)
    }

    pub(super) fn reboot(&mut self) -> anyhow::Result<String> {
        Ok(format!("booted in {:.0} s", self.machine.reboot()?))
    }

    /// Nobody but the daemon and host processes, which say that they are, got the host's credentials.
    fn no_leak(&mut self) -> anyhow::Result<()> {
        let leaks = self.sh("leaks")?;
        ensure!(leaks.is_empty(), "the host's credentials were given away: {leaks}");
        Ok(())
    }
}
