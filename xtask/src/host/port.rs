//! How a guest is told what to do: the other end of `guest/agent.sh`.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

/// For the guest to end a script that takes too long, and to say so.
const GRACE: Duration = Duration::from_secs(30);
/// The status of such a script, as timeout(1) gives it; or of one that had to be killed.
const LATE: [i32; 2] = [124, 137];

pub(super) struct Port {
    reader: BufReader<UnixStream>,
    writer: UnixStream,
}

/// What came of a script.
#[derive(Debug)]
pub(super) struct Answer {
    pub(super) status: i32,
    pub(super) text: String,
}

impl Port {
    pub(super) fn new(stream: UnixStream) -> anyhow::Result<Self> {
        let writer = stream.try_clone().context("duplicate the guest's port")?;
        Ok(Self { reader: BufReader::new(stream), writer })
    }

    /// Waits for the guest to say that it has booted; tells the seconds since its kernel's start.
    pub(super) fn boot(&mut self, limit: Duration) -> anyhow::Result<f64> {
        let line = self.line(limit).with_context(|| format!("not booted within {} s", limit.as_secs()))?;
        let uptime = line.strip_prefix("boot ").with_context(|| format!("instead of a boot: {line}"))?;
        uptime.parse().with_context(|| format!("not an uptime: {uptime}"))
    }

    pub(super) fn run(&mut self, script: &str, limit: Duration) -> anyhow::Result<Answer> {
        write!(self.writer, "{} {}\n{script}", script.len(), limit.as_secs()).context("write to the guest's port")?;
        let line = self.line(limit + GRACE)?;
        let ["done", status, length] = *line.split(' ').collect::<Vec<_>>() else {
            bail!("instead of an answer: {line} (was it rebooted?)");
        };
        let mut text = vec![0; length.parse().context("the answer's length")?];
        self.writer.set_read_timeout(Some(GRACE))?;
        self.reader.read_exact(&mut text).context("read the guest's port")?;
        let text = String::from_utf8_lossy(&text).trim_end().to_owned();
        let status = status.parse().context("the answer's status")?;
        if LATE.contains(&status) {
            bail!("not done within {} s; it had said: {text}", limit.as_secs());
        }
        Ok(Answer { status, text })
    }

    fn line(&mut self, limit: Duration) -> anyhow::Result<String> {
        let deadline = Instant::now() + limit;
        let mut line = Vec::new();
        while line.last() != Some(&b'\n') {
            let left = deadline.saturating_duration_since(Instant::now());
            self.writer.set_read_timeout(Some(left.max(Duration::from_millis(1))))?;
            match self.reader.read_until(b'\n', &mut line) {
                Ok(0) => bail!("the emulator has ended"),
                Ok(_) => {}
                Err(_) if left.is_zero() => bail!("it has said nothing for {} s", limit.as_secs()),
                Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error).context("read the guest's port"),
            }
        }
        Ok(String::from_utf8_lossy(&line).trim_end().to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair() -> (Port, UnixStream) {
        let (ours, guest) = UnixStream::pair().unwrap();
        (Port::new(ours).unwrap(), guest)
    }

    #[test]
    fn an_answer_is_read_by_its_length() {
        let (mut port, mut guest) = pair();
        guest.write_all(b"boot 12.5\ndone 3 9\na\ndone 0\ndone 124 0\n").unwrap();
        assert!((port.boot(GRACE).unwrap() - 12.5).abs() < 0.01);
        let answer = port.run("exit 3", Duration::from_secs(1)).unwrap();
        assert_eq!((answer.status, answer.text.as_str()), (3, "a\ndone 0"));
        let mut sent = [0; 10];
        guest.read_exact(&mut sent).unwrap();
        assert_eq!(&sent, b"6 1\nexit 3");
        let late = port.run("sleep 9", Duration::from_secs(1)).unwrap_err();
        assert!(late.to_string().contains("within 1 s"), "{late}");
    }

    #[test]
    fn a_silent_guest_is_not_waited_for() {
        let (mut port, guest) = pair();
        let error = port.boot(Duration::from_millis(20)).unwrap_err();
        assert!(format!("{error:#}").contains("not booted"), "{error:#}");
        drop(guest);
        assert!(format!("{:#}", port.boot(GRACE).unwrap_err()).contains("has ended"));
    }
}
