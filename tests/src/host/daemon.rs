//! The daemon under test: the built binary, run as a host process.

use std::{
    env,
    path::PathBuf,
    process::ExitStatus,
    sync::atomic::{AtomicU32, Ordering},
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use rustix::process::Signal;

use super::{machine::Machine, process::Process};

const PROGRAM: &str = "metadata-proxy";
/// Names the binary to test, for a build that lies elsewhere.
const PROGRAM_VARIABLE: &str = "METADATA_PROXY_BIN";
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// The daemon runs as `metadata-proxy run ARGS` with `PATH` and this environment, nothing of the tester's.
#[derive(Debug, Clone, Default)]
pub struct DaemonOptions {
    /// `--cgroup` and `--docker-host` are added unless they are given here.
    pub args: Vec<String>,
    pub env: Vec<(String, String)>,
}

impl DaemonOptions {
    pub fn arg(mut self, arg: impl Into<String>) -> Self {
        self.args.push(arg.into());
        self
    }

    pub fn env(mut self, name: &str, value: impl Into<String>) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    fn sets(&self, flag: &str) -> bool {
        self.args.iter().any(|arg| arg.strip_prefix(flag).is_some_and(|rest| rest.is_empty() || rest.starts_with('=')))
    }
}

/// A started daemon, killed when dropped.
pub struct Daemon(Process);

impl Daemon {
    pub fn start(machine: &Machine, docker_host: &str, options: DaemonOptions) -> Result<Self> {
        let mut command = machine.command(program()?);
        command.arg("run");
        // In a guest it finds the root by itself, as in production.
        if !machine.is_guest() && !options.sets("--cgroup") {
            command.arg("--cgroup").arg(machine.inner_cgroup());
        }
        if !options.sets("--docker-host") {
            command.arg("--docker-host").arg(docker_host);
        }
        command.args(options.args).envs(options.env);

        static COUNT: AtomicU32 = AtomicU32::new(0);
        let log = format!("daemon-{}.log", COUNT.fetch_add(1, Ordering::Relaxed));
        Ok(Self(Process::spawn(PROGRAM, command, machine.directory().join(log))?))
    }

    pub fn pid(&self) -> u32 {
        self.0.pid()
    }

    /// All it has written so far, to standard output and standard error.
    pub fn log(&self) -> Result<String> {
        self.0.log()
    }

    /// Waits for a line of its log with the word `ready`.
    pub async fn wait_ready(&mut self, limit: Duration) -> Result<()> {
        self.wait_for("ready", limit, says_ready).await
    }

    /// Waits until its log satisfies `found`; an error with the log if it ends before.
    pub async fn wait_for(&mut self, what: &str, limit: Duration, found: impl Fn(&str) -> bool) -> Result<()> {
        self.0.until(what, limit, async |process| Ok(found(&process.log()?).then_some(()))).await
    }

    /// Waits for its own end, as of one that was started wrongly.
    pub async fn wait(&mut self, limit: Duration) -> Result<ExitStatus> {
        self.0.wait(limit).await
    }

    /// SIGTERM, and how it ended.
    pub async fn terminate(&mut self, limit: Duration) -> Result<ExitStatus> {
        self.0.signal(Signal::TERM)?;
        self.0.wait(limit).await
    }

    /// SIGKILL: no chance to tidy up.
    pub async fn kill(&mut self) -> Result<()> {
        self.0.signal(Signal::KILL)?;
        self.0.wait(KILL_LIMIT).await?;
        Ok(())
    }
}

/// The whole word: "address already in use" is not ready.
fn says_ready(log: &str) -> bool {
    log.split(|c: char| !c.is_alphanumeric()).any(|word| word == "ready")
}

/// The program under test: given by the environment, else built beside this program (`target/debug`) or above it (a test, in
/// `target/debug/deps`).
pub fn program() -> Result<PathBuf> {
    if let Some(given) = env::var_os(PROGRAM_VARIABLE) {
        let path = std::path::absolute(given)?;
        ensure!(path.is_file(), "{PROGRAM_VARIABLE}={} is not a file", path.display());
        return Ok(path);
    }
    let own = env::current_exe().context("finding the test's own path")?;
    let mut candidates = own.ancestors().skip(1).take(2).map(|directory| directory.join(PROGRAM));
    candidates
        .find(|path| path.is_file())
        .with_context(|| format!("no {PROGRAM} beside {}: cargo xtask build, or set {PROGRAM_VARIABLE}", own.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ready_is_a_word() {
        assert!(says_ready("2026-01-01 INFO listening\n2026-01-01 INFO metadata_proxy: ready cgroup=/x\n"));
        assert!(says_ready(r#"{"level":"INFO","message":"ready"}"#));
        assert!(!says_ready("ERROR address already in use"));
    }

    #[test]
    fn given_flags_replace_the_defaults() {
        let options = DaemonOptions::default().arg("--cgroup=/x").arg("--docker-hosts");
        assert!(options.sets("--cgroup"));
        assert!(!options.sets("--docker-host"));
    }
}
