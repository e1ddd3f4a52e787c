//! What befalls a client that goes on: one container of each lives through all of it.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use futures_util::future::join_all;
use tokio::{sync::Semaphore, time::sleep};

use super::{
    Client, ClientReport, Life, Loads, Programs, faketime,
    recording::Recording,
    scenarios::{AT_ONCE, Outcome, PATIENCE, Scenario, all_own, until},
    sniffer::Sniffer,
};
use crate::{
    host::{Container, DaemonOptions},
    stage::{STS_ENDPOINT, Stage, client_spec, daemon_options, role_arn},
};

/// Of about three tries a second, so many may fail on a busy machine where none has to.
const FEW: usize = 10;
/// Of role sessions. The daemon renews them before their half.
const LIFETIME: Duration = Duration::from_secs(12);

/// One container of each client lives through what befalls the daemon.
pub(super) async fn long(programs: &Programs, clients: &[Client]) -> Result<Vec<BTreeMap<Scenario, Outcome>>> {
    // Seven hours behind: its session tokens of six hours are too old for the daemon that comes after it.
    let behind = |options: DaemonOptions| {
        let variables = faketime(&programs.faketime(), [("FAKETIME", "-7h")]);
        variables.into_iter().fold(options, |options, (name, value)| options.env(&name, value))
    };
    let mut stage = Stage::start_with(behind(daemon_options())).await?;
    // That daemon does not see them end, so they have to last until the next one is there.
    stage.sts.set_lifetime(Some(PATIENCE));
    let clock = Clock::start(stage.directory().join(CLOCK))?;
    let turns = Semaphore::new(2 * AT_ONCE);
    let lives = join_all(clients.iter().map(async |client| {
        let _turn = turns.acquire().await;
        Living::start(&stage, programs, *client).await
    }))
    .await;
    let mut lives: Vec<Result<Living>> = lives.into_iter().collect();

    stage.sts.set_lifetime(Some(LIFETIME));
    for client in clients {
        if let Some(session) = client.session {
            stage.sts.set_role_lifetime(&role_arn(client.name), session);
        }
    }
    stage.replace_daemon(daemon_options()).await?;
    phase(&mut lives, &stage, programs, Scenario::ExpiredToken, 1).await;
    phase(&mut lives, &stage, programs, Scenario::Renewals, 2).await;
    stage.replace_daemon(daemon_options()).await?;
    phase(&mut lives, &stage, programs, Scenario::Restart, 1).await;
    drop(clock);
    let outcomes = lives.into_iter().map(|living| match living {
        Ok(living) => living.outcomes,
        Err(error) => {
            let bad = Outcome::Bad(format!("{error:#}"));
            [Scenario::ExpiredToken, Scenario::Renewals, Scenario::Restart]
                .map(|scenario| (scenario, bad.clone()))
                .into()
        }
    });
    stage.assert_no_leak()?;
    Ok(outcomes.collect())
}

/// A folder in the host's directory, and what is in it.
const CLOCK: &str = "clock";
const AHEAD_FILE: &str = "ahead";
const BEHIND_FILE: &str = "behind";

/// Two days, which no test lasts.
const BEHIND: i64 = 48 * 3600;

/// Sets the clocks of those who read them four minutes ahead each second: one begins with the true time, the other behind.
struct Clock(tokio::task::JoinHandle<()>);

impl Clock {
    fn start(folder: PathBuf) -> Result<Self> {
        let begin = Instant::now();
        std::fs::create_dir_all(&folder).context("making the folder of a clock")?;
        let set = move || {
            let seconds = i64::try_from(begin.elapsed().as_millis() * 240 / 1000).unwrap_or(i64::MAX);
            for (name, seconds) in [(AHEAD_FILE, seconds), (BEHIND_FILE, seconds - BEHIND)] {
                // Whole or not at all: it is being read.
                std::fs::write(folder.join("next"), format!("{seconds:+}"))?;
                std::fs::rename(folder.join("next"), folder.join(name))?;
            }
            Ok::<_, std::io::Error>(())
        };
        set().context("setting a clock")?;
        Ok(Self(tokio::spawn(async move {
            while set().is_ok() {
                sleep(Duration::from_millis(500)).await;
            }
        })))
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Waits for so many new keys of every client.
async fn phase(lives: &mut [Result<Living>], stage: &Stage, programs: &Programs, scenario: Scenario, keys: usize) {
    join_all(lives.iter_mut().flatten().map(|living| living.live_through(stage, programs, scenario, keys))).await;
}

/// What is told of a client whose token was refused.
const REFUSED: &str = "401, then ";

/// A client that lives on in its container.
struct Living {
    client: Client,
    container: Container,
    /// Until the token has expired, to see whether the client presents it.
    sniffer: Option<Sniffer>,
    /// How many keys and errors were there when the phase began.
    keys: usize,
    errors: usize,
    outcomes: BTreeMap<Scenario, Outcome>,
}

impl Living {
    async fn start(stage: &Stage, programs: &Programs, client: Client) -> Result<Self> {
        let name = client.name;
        let mut spec = client_spec(name, client, programs, Loads::Watch, Some(STS_ENDPOINT));
        let clock_file = match client.life {
            Life::LongByClock => Some(AHEAD_FILE),
            Life::LongByPeriod => Some(BEHIND_FILE),
            _ => None,
        };
        if let Some(file) = clock_file {
            let clock = stage.directory().join(CLOCK);
            for (variable, value) in client.clock(programs, &clock.join(file)) {
                spec = spec.env(&variable, &value);
            }
            spec = spec.bind(format!("{0}:{0}:ro", clock.display()));
            if client.is_over_machine() {
                spec = spec.bind(format!("{0}:{0}:ro", programs.further.display()));
            }
        }
        let container = stage.run(spec.label("metadata-proxy.role", &role_arn(name))).await?;
        let sniffer = Some(Sniffer::start(container.pid().await?)?);
        let report = until(&container, |report| report.access_keys().next().is_some()).await?;
        let (keys, errors) = (report.access_keys().count(), report.errors().count());
        all_own(stage, &container, &report)?;
        Ok(Self { client, container, sniffer, keys, errors, outcomes: BTreeMap::new() })
    }

    async fn live_through(&mut self, stage: &Stage, programs: &Programs, scenario: Scenario, keys: usize) {
        let outcome = match (self.client.life, scenario) {
            (Life::Short, Scenario::ExpiredToken) => Outcome::NotApplicable("takes a token for each run"),
            (Life::Short, Scenario::Renewals) => Outcome::NotApplicable("loads anew in each run"),
            (Life::LongTrusting, Scenario::ExpiredToken) => {
                let failed = self.is_refused(stage, programs).await;
                failed.map_or_else(|error| Outcome::Bad(format!("{error:#}")), Outcome::Good)
            }
            _ => {
                let mut lived = self.gets(stage, scenario, keys).await;
                if scenario == Scenario::ExpiredToken {
                    lived = lived.and_then(|told| Ok(format!("{}{told}", self.refusals()?)));
                }
                lived.map_or_else(|error| Outcome::Bad(format!("{error:#}")), Outcome::Good)
            }
        };
        self.outcomes.insert(scenario, outcome);
    }

    /// Whether it has presented a token that was refused.
    fn refusals(&mut self) -> Result<&'static str> {
        let Some(sniffer) = self.sniffer.take() else { return Ok("") };
        let refused = Recording::of(&sniffer.finish()?).answered("401");
        Ok(if refused > 0 { REFUSED } else { "no old token sent, " })
    }

    /// It goes on with the refused token, and is replaced by another of its kind.
    async fn is_refused(&mut self, stage: &Stage, programs: &Programs) -> Result<String> {
        // Some do not tell of the 401. These are more errors than the end of the daemon before can have made.
        let (stdout, _) = self.container.output().await?;
        let errors = ClientReport::parse(&stdout)?.errors().count() + 10;
        until(&self.container, |report| report.errors().count() >= errors).await?;
        ensure!(self.refusals()? == REFUSED, "it says that it failed, but no token was refused");
        self.container.remove().await?;
        let outcomes = std::mem::take(&mut self.outcomes);
        *self = Self { outcomes, sniffer: None, ..Self::start(stage, programs, self.client).await? };
        Ok("fails until its own clock says so".to_owned())
    }

    /// So many keys that it had not before, all its own; what went wrong meanwhile is told.
    async fn gets(&mut self, stage: &Stage, scenario: Scenario, keys: usize) -> Result<String> {
        let report = until(&self.container, |report| report.access_keys().count() >= self.keys + keys).await?;
        all_own(stage, &self.container, &report)?;
        let all: Vec<&str> = report.errors().collect();
        let errors = all.len() - self.errors;
        (self.keys, self.errors) = (report.access_keys().count(), all.len());
        ensure!(scenario == Scenario::ExpiredToken || errors <= FEW, "good only after {errors} errors: {all:?}");
        Ok(match errors {
            0 => "good".to_owned(),
            1 => "good after an error".to_owned(),
            _ => format!("good after {errors} errors"),
        })
    }
}
