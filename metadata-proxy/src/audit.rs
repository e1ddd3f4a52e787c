//! `--audit-log`: each hand-out of credentials as one line of JSON. Never a secret; the access key is CloudTrail's name for
//! the session.
//!
//! A thread of its own writes, so that a slow disk keeps no client waiting. What does not fit into its queue, and what
//! cannot be written, is lost, counted and warned about: serving goes before recording.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write as _},
    os::unix::fs::OpenOptionsExt as _,
    path::{Path, PathBuf},
    sync::mpsc::{Receiver, SyncSender, sync_channel},
    thread,
    time::Duration,
};

use anyhow::Context as _;
use jiff::Timestamp;
use prometheus_client::metrics::counter::Counter;
use serde::Serialize;
use tokio::sync::oneshot;
use tracing::{info, warn};

/// Records that wait for the disk: more than a minute's of a large host.
const QUEUE: usize = 4096;
/// What the daemon's end waits for the last records.
const DRAIN: Duration = Duration::from_secs(2);

/// Where records go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Target {
    /// `-`. The log is on standard error.
    Stdout,
    File(PathBuf),
}

impl From<&str> for Target {
    fn from(text: &str) -> Self {
        if text == "-" { Self::Stdout } else { Self::File(text.into()) }
    }
}

/// One hand-out.
#[derive(Debug, Serialize)]
pub(crate) struct Record<'a> {
    pub(crate) time: Timestamp,
    pub(crate) container_id: &'a str,
    pub(crate) container_name: &'a str,
    pub(crate) engine: &'a str,
    pub(crate) image: &'a str,
    pub(crate) role_arn: &'a str,
    pub(crate) session_name: &'a str,
    pub(crate) access_key_id: &'a str,
    /// Of the request.
    pub(crate) path: &'a str,
    /// When what was handed out ends.
    pub(crate) expiration: Timestamp,
}

/// The queue to the writer.
pub(crate) struct Audit {
    queue: SyncSender<Job>,
    lost: Counter,
}

enum Job {
    Write(Vec<u8>),
    Reopen,
    End(oneshot::Sender<()>),
}

impl Audit {
    pub(crate) fn start(target: Target, lost: Counter) -> anyhow::Result<Self> {
        let output = Output::open(&target)?;
        let (queue, jobs) = sync_channel(QUEUE);
        let writer = Writer { target, output, torn: false, failing: 0, lost: lost.clone() };
        thread::Builder::new().name("audit".into()).spawn(move || writer.run(&jobs)).context("starting a thread")?;
        Ok(Self { queue, lost })
    }

    pub(crate) fn record(&self, record: &Record<'_>) {
        let Ok(mut line) = serde_json::to_vec(record) else { return };
        line.push(b'\n');
        if self.queue.try_send(Job::Write(line)).is_err() && self.lost.inc() == 0 {
            warn!("records of the audit log are lost: its disk is too slow");
        }
    }

    /// For whoever rotates the file: moves it away, and tells us.
    pub(crate) fn reopen(&self) {
        // With a full queue there is no use in it.
        let _ = self.queue.try_send(Job::Reopen);
    }

    /// Waits until all records are written, but not for long.
    pub(crate) async fn end(&self) {
        let (done, written) = oneshot::channel();
        let _ = self.queue.try_send(Job::End(done));
        if !matches!(tokio::time::timeout(DRAIN, written).await, Ok(Ok(()))) {
            warn!("the last records of the audit log are lost: they were not written within {DRAIN:?}");
        }
    }
}

enum Output {
    Stdout,
    File(File),
}

impl Output {
    fn open(target: &Target) -> anyhow::Result<Self> {
        let open = |path: &Path| OpenOptions::new().append(true).create(true).mode(0o600).open(path);
        match target {
            Target::Stdout => Ok(Self::Stdout),
            Target::File(path) => {
                let file = open(path).with_context(|| format!("cannot open --audit-log {}", path.display()))?;
                Ok(Self::File(file))
            }
        }
    }

    fn write(&mut self, line: &[u8]) -> io::Result<()> {
        match self {
            Self::Stdout => io::stdout().lock().write_all(line),
            Self::File(file) => file.write_all(line),
        }
    }
}

struct Writer {
    target: Target,
    output: Output,
    /// The last write may have left part of a line.
    torn: bool,
    /// Writes that have failed since the last good one.
    failing: u64,
    lost: Counter,
}

impl Writer {
    fn run(mut self, jobs: &Receiver<Job>) {
        for job in jobs {
            match job {
                Job::Write(line) => self.write(&line),
                Job::Reopen => match Output::open(&self.target) {
                    Ok(output) => self.output = output,
                    Err(error) => warn!("the audit log goes on where it was: {error:#}"),
                },
                Job::End(done) => drop(done.send(())),
            }
        }
    }

    fn write(&mut self, line: &[u8]) {
        let mended = if self.torn { self.output.write(b"\n") } else { Ok(()) };
        match mended.and_then(|()| self.output.write(line)) {
            Ok(()) => {
                if self.failing > 0 {
                    info!("the audit log is written again; {} records were lost", self.failing);
                }
                (self.torn, self.failing) = (false, 0);
            }
            Err(error) => {
                if self.failing == 0 {
                    warn!("cannot write to the audit log, records are lost: {error}");
                }
                self.torn = true;
                self.failing += 1;
                self.lost.inc();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{fs, os::unix::fs::PermissionsExt as _};

    use super::*;

    fn record(name: &str) -> Record<'_> {
        Record {
            time: Timestamp::UNIX_EPOCH,
            container_id: "0123",
            container_name: name,
            engine: "docker",
            image: "app:1",
            role_arn: "arn:aws:iam::123456789012:role/web",
            session_name: "s",
            access_key_id: "ASIA",
            path: "/latest/meta-data/iam/security-credentials/web",
            expiration: Timestamp::UNIX_EPOCH,
        }
    }

    fn file() -> PathBuf {
        let name = format!("metadata-proxy-audit-{}-{:?}.log", std::process::id(), thread::current().id());
        std::env::temp_dir().join(name)
    }

    fn names(path: &Path) -> Vec<String> {
        let text = fs::read_to_string(path).unwrap();
        let name = |line| serde_json::from_str::<serde_json::Value>(line).unwrap()["container_name"].to_string();
        text.lines().filter(|line| !line.is_empty()).map(name).collect()
    }

    #[tokio::test]
    async fn records_are_appended_and_the_file_is_opened_anew_when_told() {
        let (path, moved) = (file(), file().with_extension("1"));
        let lost = Counter::default();
        let audit = Audit::start(Target::File(path.clone()), lost.clone()).unwrap();
        audit.record(&record("a\"\n"));
        audit.end().await;
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        fs::rename(&path, &moved).unwrap();
        audit.record(&record("b"));
        audit.reopen();
        audit.record(&record("c"));
        audit.end().await;
        let again = Audit::start(Target::File(path.clone()), lost.clone()).unwrap();
        again.record(&record("d"));
        again.end().await;
        assert_eq!(names(&moved), [r#""a\"\n""#, "\"b\""]);
        assert_eq!(names(&path), ["\"c\"", "\"d\""]);
        assert_eq!(lost.get(), 0);
        fs::remove_file(&path).unwrap();
        fs::remove_file(&moved).unwrap();
    }

    #[tokio::test]
    async fn what_cannot_be_written_is_counted() {
        let lost = Counter::default();
        let audit = Audit::start(Target::File("/dev/full".into()), lost.clone()).unwrap();
        for _ in 0..3 {
            audit.record(&record("a"));
        }
        audit.end().await;
        assert_eq!(lost.get(), 3);
        let error = Audit::start(Target::File("/nowhere/audit.log".into()), lost).err().unwrap();
        assert!(format!("{error:#}").contains("--audit-log /nowhere/audit.log: No such file"), "{error:#}");
    }
}
