//! A long-running host process whose output goes to a file.

use std::{
    fs::{self, File},
    path::PathBuf,
    process::{Child, Command, ExitStatus},
    time::Duration,
};

use anyhow::{Context as _, Result, bail};
use rustix::process::{Pid, Signal, kill_process};
use tokio::time::{Instant, sleep};

const POLL: Duration = Duration::from_millis(5);
/// How many lines of the log an error message has.
const TAIL: usize = 40;

pub(super) struct Process {
    name: &'static str,
    child: Child,
    log: PathBuf,
}

impl Process {
    /// Its output is appended to `log`, so that a restart keeps what came before.
    pub(super) fn spawn(name: &'static str, mut command: Command, log: PathBuf) -> Result<Self> {
        let output = File::options().create(true).append(true).open(&log);
        let output = output.with_context(|| format!("opening {}", log.display()))?;
        let child =
            command.stdout(output.try_clone()?).stderr(output).spawn().with_context(|| format!("starting {name}"))?;
        Ok(Self { name, child, log })
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(super) fn log(&self) -> Result<String> {
        let bytes = fs::read(&self.log).with_context(|| format!("reading {}", self.log.display()))?;
        Ok(String::from_utf8_lossy(&bytes).into_owned())
    }

    fn tail(&self) -> Result<String> {
        let log = self.log()?;
        let lines: Vec<&str> = log.lines().collect();
        Ok(lines[lines.len().saturating_sub(TAIL)..].join("\n"))
    }

    /// Sends nothing once it has ended: its process id may by then be another's.
    pub(super) fn signal(&mut self, signal: Signal) -> Result<()> {
        if self.child.try_wait()?.is_none() {
            kill_process(Pid::from_child(&self.child), signal)
                .with_context(|| format!("sending {signal:?} to {}", self.name))?;
        }
        Ok(())
    }

    pub(super) async fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(status);
            }
            if Instant::now() > deadline {
                bail!("{} has not ended after {limit:?}; the end of its log:\n{}", self.name, self.tail()?);
            }
            sleep(POLL).await;
        }
    }

    /// Waits until `check` gives an answer; an error when it ends before, or too much time passes.
    pub(super) async fn until<T>(
        &mut self,
        what: &str,
        limit: Duration,
        mut check: impl AsyncFnMut(&Self) -> Result<Option<T>>,
    ) -> Result<T> {
        let deadline = Instant::now() + limit;
        loop {
            let ended = self.child.try_wait()?;
            if let Some(answer) = check(self).await? {
                return Ok(answer);
            }
            if let Some(status) = ended {
                bail!("{} ended before it was {what}: {status}; the end of its log:\n{}", self.name, self.tail()?);
            }
            if Instant::now() > deadline {
                bail!("{} is not {what} after {limit:?}; the end of its log:\n{}", self.name, self.tail()?);
            }
            sleep(POLL).await;
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
