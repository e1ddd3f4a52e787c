//! The bypass matrix: every way that a process in a container has to the metadata service, tried, and
//! what came of it held against what must.
//!
//! The `probe` program tries one way at a time inside a container of a hermetic host. That nothing got
//! through is proven at the far end, beyond the host's uplink: by what the stand-in for the real service
//! recorded, and for packets that are no HTTP requests by a witness of packets. That the way leads there
//! at all is proven too: each was tried before the daemon was started.

mod disruption;
mod elsewhere;
mod sandboxes;
mod scenarios;
mod scene;
mod table;
mod witness;

use std::fmt;

use anyhow::Result;
use serde::Deserialize;

use crate::imds::HOST_ROLE;
pub use elsewhere::run_on;
use scene::Scene;

/// What must come of a way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Expect {
    /// We answer, with the role of this container.
    Ours(&'static str),
    /// We answer that there is no role, for nobody knows who asks.
    Nobody,
    /// Nobody answers.
    Refused,
    /// Nobody answers, and this kernel may not even have such sockets.
    RefusedIfThere,
    /// Whoever answers, it is not the real service.
    Elsewhere,
    /// The real service answers a process of the host.
    Host,
    /// It gets through; SECURITY.md says why, and what helps.
    Known(&'static str),
}

impl fmt::Display for Expect {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ours(role) => write!(f, "role {role}"),
            Self::Nobody => f.write_str("no role"),
            Self::Refused => f.write_str("refused"),
            Self::RefusedIfThere => f.write_str("refused, if there"),
            Self::Elsewhere => f.write_str("not there"),
            Self::Host => f.write_str("the host's role"),
            Self::Known(_) => f.write_str("known leak"),
        }
    }
}

/// What the probe prints.
#[derive(Debug, Clone, Deserialize)]
pub struct Report {
    pub way: String,
    /// `served`, `refused`, `timeout` or `error`.
    pub outcome: String,
    /// The answer, or what the kernel said.
    pub detail: String,
    pub ms: f64,
    /// What getpeername(2) shows of a connection that was answered.
    pub peername: String,
}

impl Report {
    fn answer(&self) -> Option<&str> {
        (self.outcome == "served").then_some(self.detail.as_str())
    }

    /// The redirection does not show.
    fn hides_us(&self) -> bool {
        !self.peername.contains("127.169.254.169")
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.answer() {
            Some(answer) => write!(f, "{answer:?}")?,
            None => write!(f, "{}", self.detail)?,
        }
        if !self.hides_us() {
            write!(f, ", peer {}", self.peername)?;
        }
        write!(f, ", {:.0} ms", self.ms)
    }
}

/// What arrived at the far end while a way was tried.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Seen {
    pub requests: usize,
    /// Such as `3 TCP, 1 UDP`; empty for none.
    pub packets: String,
}

impl Seen {
    pub fn nothing(&self) -> bool {
        self.requests == 0 && self.packets.is_empty()
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.requests, self.packets.as_str()) {
            (0, "") => f.write_str("-"),
            (0, packets) => f.write_str(packets),
            (requests, packets) => write!(f, "{requests} HTTP, {packets}"),
        }
    }
}

/// One row of the matrix.
#[derive(Debug, Clone)]
pub struct Row {
    pub way: String,
    pub place: String,
    pub expect: Expect,
    pub report: Report,
    pub seen: Seen,
    /// What arrived when the same was tried before the daemon was there; None: it was not tried.
    pub before: Option<Seen>,
    /// Whether something had to arrive then.
    pub leads_there: bool,
}

impl Row {
    /// One that was not tried without us, and at which nothing has arrived.
    fn of(way: &str, place: &str, expect: Expect, report: Report) -> Self {
        let (way, place, seen) = (way.to_owned(), place.to_owned(), Seen::default());
        Self { way, place, expect, report, seen, before: None, leads_there: false }
    }

    /// What is not as it must be.
    pub fn differences(&self) -> Vec<String> {
        let mut differences = Vec::new();
        let mut check = |good: bool, what: &str| {
            if !good {
                differences.push(what.to_owned());
            }
        };
        let answer = self.report.answer();
        match self.expect {
            Expect::Ours(role) => {
                check(answer == Some(role), "not answered with its role");
                check(self.report.hides_us(), "getpeername shows the listener");
            }
            Expect::Nobody => check(answer == Some("HTTP 404"), "not answered as nobody"),
            Expect::Refused | Expect::RefusedIfThere => check(answer.is_none(), "answered"),
            Expect::Elsewhere => {}
            Expect::Host => check(answer == Some(HOST_ROLE), "a host process has lost the real service"),
            Expect::Known(_) => check(!self.seen.nothing(), "no longer gets through: say so in SECURITY.md"),
        }
        match self.expect {
            Expect::Host | Expect::Known(_) => {}
            _ => {
                check(self.seen.nothing(), "LEAK: it arrived at the real service");
                check(answer != Some(HOST_ROLE), "LEAK: the host's role");
            }
        }
        let went = self.report.outcome != "error" || self.expect == Expect::RefusedIfThere;
        check(went, "proves nothing: the probe could not go this way");
        if let Some(before) = &self.before {
            check(!self.leads_there || !before.nothing(), "proves nothing: it does not get there without us either");
        }
        differences
    }
}

/// All rows, in the order in which they were tried.
pub async fn run() -> Result<Vec<Row>> {
    let mut scene = Scene::set().await?;
    let sandboxes = scene.before_sandboxes().await?;
    let before = scene.before().await?;
    let mut rows = Vec::new();
    scene.start_daemon().await?;
    // Until now nothing stopped it.
    scene.seen();
    // At once, for some wait long. What arrives counts against whichever row looks first.
    let (held, table) = tokio::try_join!(scene.held_over(before.held), scene.table(&before.seen))?;
    rows.extend(held.into_iter().chain(table));
    rows.extend(scene.sandboxes(sandboxes).await?);
    rows.extend(scene.scenarios().await?);
    rows.extend(scene.disruption().await?);
    Ok(rows)
}

/// The matrix as text, its differences last, and whether there are none.
pub fn print(rows: &[Row]) -> (String, bool) {
    use std::fmt::Write as _;
    let mut text = String::new();
    let width = |of: fn(&Row) -> usize| rows.iter().map(of).max().unwrap_or_default();
    let (way, place) = (width(|row| row.way.len()), width(|row| row.place.len()));
    let expected = width(|row| row.expect.to_string().len());
    // Writing to a string does not fail.
    let _ = writeln!(
        text,
        "{:way$}  {:place$}  {:expected$}  {:44}  {:14}  without us",
        "way", "container", "expected", "what happened", "stand-in saw"
    );
    for row in rows {
        let before = row.before.as_ref().map_or_else(String::new, Seen::to_string);
        let mark = if row.differences().is_empty() { "" } else { "   <-- WRONG" };
        let (expect, report, seen) = (row.expect.to_string(), row.report.to_string(), row.seen.to_string());
        let line = format!(
            "{:way$}  {:place$}  {expect:expected$}  {report:44}  {seen:14}  {before}{mark}",
            row.way, row.place
        );
        let _ = writeln!(text, "{}", line.trim_end());
    }
    let known = rows.iter().filter_map(|row| match row.expect {
        Expect::Known(why) => Some(format!("{} ({}): {why}", row.way, row.place)),
        _ => None,
    });
    for known in known {
        let _ = writeln!(text, "known leak: {known}");
    }
    let mut differences = 0;
    for row in rows {
        for difference in row.differences() {
            differences += 1;
            let _ = writeln!(text, "DIFFERENCE: {} ({}): {difference}", row.way, row.place);
        }
    }
    let _ = writeln!(text, "{} ways, {differences} differences", rows.len());
    (text, differences == 0)
}

#[cfg(test)]
mod tests;
