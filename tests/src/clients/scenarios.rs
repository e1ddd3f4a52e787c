//! What each client is put through, and what came of it.

use std::{
    collections::BTreeMap,
    fmt,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use futures_util::future::{join_all, try_join};
use tokio::{sync::Semaphore, time::sleep};

use super::{
    Client, ClientReport, Loads, Programs,
    living::long,
    recording::Recording,
    sniffer::{Sniffer, overhear},
};
use crate::{
    host::{Container, ContainerSpec},
    stage::{STS_ENDPOINT, Stage, client_spec, role_arn},
    sts::Fault,
};

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Scenario {
    /// Credentials of exactly the container's own session.
    Identity,
    /// STS does not answer for longer than most clients wait.
    SlowSts,
    /// STS refuses the role.
    Refused,
    /// The container has none.
    NoRole,
    /// The session token, valid for six hours, was taken seven hours ago.
    ExpiredToken,
    /// The daemon ends and another begins between two requests.
    Restart,
    /// Two renewals, by one client that goes on.
    Renewals,
}

impl Scenario {
    pub const ALL: [Self; 7] =
        [Self::Identity, Self::SlowSts, Self::Refused, Self::NoRole, Self::ExpiredToken, Self::Restart, Self::Renewals];
}

impl fmt::Display for Scenario {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.pad(match self {
            Self::Identity => "identity",
            Self::SlowSts => "slow STS",
            Self::Refused => "refused role",
            Self::NoRole => "no role",
            Self::ExpiredToken => "expired token",
            Self::Restart => "restart",
            Self::Renewals => "renewals",
        })
    }
}

/// What came of a scenario.
#[derive(Clone, Debug)]
pub enum Outcome {
    /// As it should be, with what is worth telling.
    Good(String),
    /// The client cannot do this by its nature.
    NotApplicable(&'static str),
    Bad(String),
}

/// Everything about one client.
#[derive(Clone, Debug)]
pub struct Row {
    pub client: Client,
    pub version: String,
    pub outcomes: BTreeMap<Scenario, Outcome>,
    /// Of one load of credentials.
    pub recording: Recording,
}

impl Row {
    pub fn good(&self) -> bool {
        !self.outcomes.values().any(|outcome| matches!(outcome, Outcome::Bad(_)))
    }
}

/// So many containers start at the same time: more would only wait for each other, and clients have their limits.
pub(super) const AT_ONCE: usize = 3;
/// A slow start of a client on a busy machine is not what is looked for.
pub(super) const PATIENCE: Duration = Duration::from_secs(60);
/// For what befalls a client that lives on: the SDK for Rust goes on with expired credentials for up to a minute of these.
const LONG_PATIENCE: Duration = Duration::from_secs(180);
/// Longer than any client waits for an answer.
const SLOW: Duration = Duration::from_secs(3);

/// Puts the clients through everything.
pub async fn run(programs: &Programs, clients: &[Client]) -> Result<Vec<Row>> {
    ensure!(
        !programs.further.as_os_str().is_empty(),
        "METADATA_PROXY_FURTHER_CLIENTS is not set; start this with `cargo xtask clients`"
    );
    // On hosts of their own; the long lives are mostly waiting.
    let (mut rows, long) = try_join(short(programs, clients), long(programs, clients)).await?;
    for (row, outcomes) in rows.iter_mut().zip(long) {
        row.outcomes.extend(outcomes);
    }
    Ok(rows)
}

/// Each scenario in a container of its own.
async fn short(programs: &Programs, clients: &[Client]) -> Result<Vec<Row>> {
    let stage = Stage::start().await?;
    let turns = Semaphore::new(AT_ONCE);
    let rows = clients.iter().map(async |client| {
        let trial = Trial { stage: &stage, programs, client: *client };
        let mut row =
            Row { client: *client, version: String::new(), outcomes: BTreeMap::new(), recording: Recording::default() };
        for scenario in [Scenario::Identity, Scenario::SlowSts, Scenario::Refused, Scenario::NoRole] {
            let turn = turns.acquire().await;
            let outcome = match scenario {
                Scenario::Identity => trial.identity(&mut row).await,
                Scenario::SlowSts => trial.slow_sts().await,
                Scenario::Refused => trial.nothing("refused", true).await,
                _ => trial.nothing("roleless", false).await,
            };
            drop(turn);
            row.outcomes.insert(scenario, outcome.unwrap_or_else(|error| Outcome::Bad(format!("{error:#}"))));
        }
        row
    });
    let rows = join_all(rows).await;
    stage.assert_no_leak()?;
    Ok(rows)
}

struct Trial<'a> {
    stage: &'a Stage,
    programs: &'a Programs,
    client: Client,
}

impl Trial<'_> {
    fn spec(&self, name: &str, loads: impl Into<Loads>) -> ContainerSpec {
        client_spec(name, self.client, self.programs, loads, Some(STS_ENDPOINT))
    }

    async fn identity(&self, row: &mut Row) -> Result<Outcome> {
        let name = self.client.name;
        let spec = self.spec(name, 1).label("metadata-proxy.role", &role_arn(name));
        let (container, finished, heard) = overhear(self.stage, spec).await?;
        row.recording = Recording::of(&heard);
        let report =
            ClientReport::parse(&finished.stdout).with_context(|| format!("it printed {}", finished.stderr))?;
        row.version.clone_from(&report.version);
        self.owns(&container, &report)?;
        container.remove().await?;
        let key = report.attempts.first().context("it loaded nothing")?;
        Ok(Outcome::Good(format!("{:.0} ms", key.ms)))
    }

    /// Everything that it got is its own container's, and it got something.
    fn owns(&self, container: &Container, report: &ClientReport) -> Result<()> {
        ensure!(
            report.access_keys().next().is_some(),
            "no credentials: {}",
            report.errors().collect::<Vec<_>>().join("; ")
        );
        let expected = all_own(self.stage, container, report)?;
        ensure!(report.identity_error.is_none(), "{:?}", report.identity_error);
        let told = report.identity.as_ref();
        ensure!(told == Some(&expected) || !self.tells(), "it was told {told:?}");
        Ok(())
    }

    /// Plain Java cannot sign, so nobody tells it whose its credentials are.
    fn tells(&self) -> bool {
        self.client.name != "java"
    }

    async fn slow_sts(&self) -> Result<Outcome> {
        let name = format!("{}-slow", self.client.name);
        self.stage.sts.set_role_fault(&role_arn(&name), Some(Fault::Hang));
        let spec = self.spec(&name, Loads::Watch).label("metadata-proxy.role", &role_arn(&name));
        let container = self.stage.run(spec).await?;
        // Not before it has asked: some need seconds to start.
        let sniffer = Sniffer::start(container.pid().await?)?;
        let begin = Instant::now();
        while !sniffer.has_heard() {
            ensure!(
                begin.elapsed() < PATIENCE,
                "it has not asked within {PATIENCE:?}: {:?}",
                container.output().await?
            );
            sleep(Duration::from_millis(50)).await;
        }
        sniffer.finish()?;
        let begin = Instant::now();
        sleep(SLOW).await;
        self.stage.sts.set_role_fault(&role_arn(&name), None);
        let report = until(&container, |report| {
            let told = report.identity.is_some() || report.identity_error.is_some() || !self.tells();
            report.access_keys().next().is_some() && told
        })
        .await?;
        // By our clock: some wait when they are made, which no attempt of theirs counts.
        let waited = begin.elapsed();
        container.remove().await?;
        self.owns(&container, &report)?;
        let failed = report.attempts.iter().take_while(|attempt| attempt.access_key.is_none()).count();
        Ok(Outcome::Good(match failed {
            0 => format!("waits {:.1} s", waited.as_secs_f64()),
            1 => "fails once, then good".to_owned(),
            _ => format!("fails {failed} times, then good"),
        }))
    }

    /// It finds no credentials, and says so.
    async fn nothing(&self, why: &str, refused: bool) -> Result<Outcome> {
        let name = format!("{}-{why}", self.client.name);
        let mut spec = self.spec(&name, 1);
        if refused {
            self.stage.sts.set_role_fault(&role_arn(&name), Some(Fault::Refuse));
            spec = spec.label("metadata-proxy.role", &role_arn(&name));
        }
        let container = self.stage.run(spec).await?;
        let finished = container.wait().await?;
        container.remove().await?;
        let report =
            ClientReport::parse(&finished.stdout).with_context(|| format!("it printed {}", finished.stderr))?;
        ensure!(report.access_keys().next().is_none(), "it got credentials: {report:?}");
        ensure!(!(128..160).contains(&finished.exit_code), "it crashed ({}): {}", finished.exit_code, finished.stderr);
        if report.errors().next().is_none() {
            ensure!(finished.exit_code != 0, "it got nothing and said nothing");
            return Ok(Outcome::Good(format!("ends with {}", finished.exit_code)));
        }
        Ok(Outcome::Good("an error".to_owned()))
    }
}

/// Whether every key is its own container's; whose they have to be.
pub(super) fn all_own(stage: &Stage, container: &Container, report: &ClientReport) -> Result<String> {
    let (name, id) = (container.name(), container.id().get(..12).unwrap_or_default());
    let expected = format!("arn:aws:sts::123456789012:assumed-role/{name}/{name}-{id}");
    for key in report.access_keys() {
        let owner = stage.sts.identity_of(key);
        ensure!(owner.as_ref() == Some(&expected), "{key} is {owner:?}'s, not {expected}'s");
    }
    Ok(expected)
}

/// Waits until a client's report so far is as wanted.
pub(super) async fn until(container: &Container, wanted: impl Fn(&ClientReport) -> bool) -> Result<ClientReport> {
    let deadline = Instant::now() + LONG_PATIENCE;
    loop {
        let (stdout, stderr) = container.output().await?;
        match ClientReport::parse(&stdout) {
            Ok(report) if wanted(&report) => return Ok(report),
            _ if container.pid().await? == 0 => bail!("it has ended; it printed {stdout} {stderr}"),
            _ if Instant::now() < deadline => sleep(Duration::from_millis(200)).await,
            _ => bail!("not within {LONG_PATIENCE:?}; it printed {stdout} {stderr}"),
        }
    }
}
