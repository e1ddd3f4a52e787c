//! A virtual day of a large host: the real store and its keepers, on tokio's paused clock, before an STS with the manners of
//! the real one. `cargo xtask simulate-fleet` prints what comes of it; docs/credentials.md says what it means.
//!
//! A test, because only tests may stop tokio's clock, and because what it finds is asserted as well. Ignored, because it
//! takes minutes.
#![expect(clippy::print_stdout, reason = "the table is what it is for")]

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use jiff::SignedDuration;
use tokio::time::{Instant, sleep};

use super::*;

const CONTAINERS: usize = 5000;
const ROLES: usize = 50;
const SECOND: Duration = Duration::from_secs(1);
const MINUTE: Duration = Duration::from_secs(60);
const HOUR: Duration = Duration::from_secs(3600);
const DAY: Duration = Duration::from_secs(24 * 3600);
/// All containers ask at once when the day begins; what they wait then is told apart.
const START: Duration = Duration::from_secs(10 * 60);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Scenario {
    /// Nothing goes wrong.
    Quiet,
    /// Three times, for twenty minutes, STS throttles nine calls of ten.
    Throttled,
    /// For an hour nothing answers.
    Outage,
    /// Containers live for an hour on the average.
    Churn,
    /// Both at once: who has just started and who is to be renewed want the few turns there are.
    ThrottledChurn,
    /// Each of 15 minutes, the least that STS grants.
    ShortSessions,
}

/// The day, as those who ask and those who are asked share it.
struct Day {
    scenario: Scenario,
    begin: Instant,
    random: Mutex<u64>,
    calls: AtomicUsize,
    failed_calls: AtomicUsize,
    keys: AtomicUsize,
    most_calls_of_a_key: AtomicUsize,
    answers: AtomicUsize,
    refusals: AtomicUsize,
    least_left: Mutex<Duration>,
    worst_wait_at_start: Mutex<Duration>,
    /// Later, of containers that have just started, and of those that have been served before.
    worst_wait_of_new: Mutex<Duration>,
    worst_wait_of_served: Mutex<Duration>,
}

impl Day {
    fn new(scenario: Scenario) -> Arc<Self> {
        let count = || AtomicUsize::new(0);
        Arc::new(Self {
            scenario,
            begin: Instant::now(),
            random: Mutex::new(scenario as u64),
            calls: count(),
            failed_calls: count(),
            keys: count(),
            most_calls_of_a_key: count(),
            answers: count(),
            refusals: count(),
            least_left: Mutex::new(Duration::MAX),
            worst_wait_at_start: Mutex::default(),
            worst_wait_of_new: Mutex::default(),
            worst_wait_of_served: Mutex::default(),
        })
    }

    fn time(&self) -> Duration {
        self.begin.elapsed()
    }

    fn wall(&self) -> Timestamp {
        Timestamp::UNIX_EPOCH + SignedDuration::from_hours(500_000) + self.time()
    }

    /// In `0.0..1.0`, the same in each run (SplitMix64).
    fn random(&self) -> f64 {
        let mut state = self.random.lock().unwrap();
        *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut bits = *state;
        bits = (bits ^ (bits >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        bits = (bits ^ (bits >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((bits ^ (bits >> 31)) >> 11) as f64 / (1_u64 << 53) as f64
    }

    /// Around the mean, as waiting for something that comes by chance.
    fn exponential(&self, mean: Duration) -> Duration {
        mean.mul_f64(-(1.0 - self.random()).ln())
    }

    fn throttles(&self) -> bool {
        let hours = [6, 12, 18].map(|hour| HOUR * hour);
        let episode = hours.iter().any(|start| (*start..*start + 20 * MINUTE).contains(&self.time()));
        matches!(self.scenario, Scenario::Throttled | Scenario::ThrottledChurn) && episode && self.random() < 0.9
    }

    fn is_down(&self) -> bool {
        self.scenario == Scenario::Outage && (12 * HOUR..13 * HOUR).contains(&self.time())
    }

    /// One container after another, to the end of the day.
    async fn slot(self: Arc<Self>, store: Arc<Store>, slot: usize) {
        for generation in 0.. {
            let life = match self.scenario {
                Scenario::Churn | Scenario::ThrottledChurn => self.exponential(HOUR),
                _ => DAY,
            };
            let session = RoleSession::plain(&format!("role-{}", slot % ROLES), &format!("{slot}-{generation}"));
            let duration = if self.scenario == Scenario::ShortSessions { 15 * MINUTE } else { session.duration };
            self.keys.fetch_add(1, Ordering::Relaxed);
            let hold = store.hold(RoleSession { duration, ..session });
            // Cut off where it ends, as a container is.
            let _ = tokio::time::timeout(life, self.ask(&store, &hold)).await;
            drop(hold);
            if self.time() >= DAY {
                return;
            }
        }
    }

    /// A client that asks about four times an hour, the first time as soon as a program has started, and after a failure
    /// again and again as SDKs do.
    async fn ask(&self, store: &Store, hold: &Hold) {
        sleep(SECOND.mul_f64(0.3 + self.random())).await;
        let mut served = false;
        while self.time() < DAY {
            let asked = self.time();
            let mut pause = SECOND;
            loop {
                match store.get(&hold.key).await {
                    Ok(credentials) => {
                        let left = Duration::try_from(credentials.expiration.duration_since(self.wall())).unwrap();
                        update(&self.least_left, |least| left.min(least));
                        self.answers.fetch_add(1, Ordering::Relaxed);
                        break;
                    }
                    Err(_) => {
                        self.refusals.fetch_add(1, Ordering::Relaxed);
                        sleep(pause.mul_f64(0.5 + self.random())).await;
                        pause = (pause * 2).min(20 * SECOND);
                    }
                }
            }
            let waited = self.time() - asked;
            let worst = match (asked < START, served) {
                (true, _) => &self.worst_wait_at_start,
                (false, false) => &self.worst_wait_of_new,
                (false, true) => &self.worst_wait_of_served,
            };
            update(worst, |worst| waited.max(worst));
            served = true;
            sleep(self.exponential(15 * MINUTE)).await;
        }
    }
}

fn update(value: &Mutex<Duration>, change: impl Fn(Duration) -> Duration) {
    let mut value = value.lock().unwrap();
    *value = change(*value);
}

struct FleetSts {
    day: Arc<Day>,
    calls_by_key: Mutex<std::collections::HashMap<String, usize>>,
}

impl Sts for FleetSts {
    fn assume<'a>(&'a self, session: &'a RoleSession) -> AssumeFuture<'a> {
        Box::pin(async move {
            let day = &self.day;
            day.calls.fetch_add(1, Ordering::Relaxed);
            {
                let mut calls = self.calls_by_key.lock().unwrap();
                let calls = calls.entry(session.session_name.clone()).or_default();
                *calls += 1;
                day.most_calls_of_a_key.fetch_max(*calls, Ordering::Relaxed);
            }
            let failure = if day.is_down() {
                // What the client's connect timeout makes of it.
                sleep(2 * SECOND).await;
                Some(Failure::unavailable("down"))
            } else {
                // Half of the calls below 70 ms, one of 1000 above a second.
                sleep(Duration::from_millis(30).mul_f64(1.0 + day.exponential(SECOND).as_secs_f64().powf(1.9))).await;
                let throttled = || Failure::Unavailable { message: "Throttling".into(), throttled: true };
                day.throttles().then(throttled)
            };
            if let Some(failure) = failure {
                day.failed_calls.fetch_add(1, Ordering::Relaxed);
                return Err(failure);
            }
            Ok(Credentials {
                access_key_id: String::new(),
                secret_access_key: "".into(),
                session_token: "".into(),
                last_updated: day.wall(),
                expiration: day.wall() + session.duration,
            })
        })
    }
}

fn live(scenario: Scenario) -> Arc<Day> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let day = Day::new(scenario);
        let clock = Arc::clone(&day);
        let sts = FleetSts { day: Arc::clone(&day), calls_by_key: Mutex::default() };
        let settings = Settings { clock: Arc::new(move || clock.wall()), ..Settings::default() };
        let store = Arc::new(Store::new(sts, settings));
        let slots: Vec<_> =
            (0..CONTAINERS).map(|slot| tokio::spawn(Arc::clone(&day).slot(Arc::clone(&store), slot))).collect();
        for slot in slots {
            slot.await.unwrap();
        }
        day
    })
}

#[test]
#[ignore = "takes minutes: cargo xtask simulate-fleet"]
fn a_virtual_day() {
    println!("{CONTAINERS} containers on {ROLES} roles, a virtual day each\n");
    println!(
        "{:<15}{:>10}{:>9}{:>9}{:>10}{:>6}{:>11}{:>13}{:>12}{:>12}{:>11}{:>9}",
        "",
        "STS",
        "of them",
        "keys",
        "calls",
        "most",
        "least life",
        "worst wait",
        "of new",
        "of served",
        "answers",
        "503s"
    );
    println!(
        "{:<15}{:>10}{:>9}{:>9}{:>10}{:>6}{:>11}{:>13}{:>12}{:>12}{:>11}{:>9}",
        "", "calls", "failed", "", "per key", "", "served", "at the start", "later", "later", "", ""
    );
    let scenarios = [
        Scenario::Quiet,
        Scenario::Throttled,
        Scenario::Outage,
        Scenario::Churn,
        Scenario::ThrottledChurn,
        Scenario::ShortSessions,
    ];
    for day in scenarios.map(|scenario| std::thread::spawn(move || live(scenario))) {
        let day = day.join().unwrap();
        let scenario = day.scenario;
        let count = |count: &AtomicUsize| count.load(Ordering::Relaxed);
        let (calls, keys, refusals) = (count(&day.calls), count(&day.keys), count(&day.refusals));
        let least = *day.least_left.lock().unwrap();
        let waits = [&day.worst_wait_at_start, &day.worst_wait_of_new, &day.worst_wait_of_served];
        let [at_start, of_new, of_served] = waits.map(|wait| *wait.lock().unwrap());
        println!(
            "{:<15}{calls:>10}{:>9}{keys:>9}{:>10.1}{:>6}{:>7.1} min{:>11.1} s{:>10.1} s{:>10.1} s{:>11}{refusals:>9}",
            format!("{scenario:?}"),
            count(&day.failed_calls),
            calls as f64 / keys as f64,
            count(&day.most_calls_of_a_key),
            least.as_secs_f64() / 60.0,
            at_start.as_secs_f64(),
            of_new.as_secs_f64(),
            of_served.as_secs_f64(),
            count(&day.answers),
        );
        // Twice as many calls as containers times half-lives would be a call too many for each.
        match scenario {
            Scenario::Quiet => {
                assert!(least >= 30 * MINUTE && of_served == Duration::ZERO && calls / keys < 61, "{scenario:?}");
            }
            Scenario::Throttled => assert!(of_served == Duration::ZERO, "credentials ran out while STS was throttling"),
            Scenario::Outage => assert!(of_served < HOUR, "the end of the outage was not noticed"),
            Scenario::Churn => {
                assert!(least >= 30 * MINUTE && of_new < 5 * SECOND && of_served == Duration::ZERO, "{scenario:?}");
            }
            Scenario::ThrottledChurn => {
                assert!(of_served == Duration::ZERO, "credentials ran out while STS was throttling");
                assert!(of_new < 25 * MINUTE, "the end of the throttling was not noticed");
            }
            Scenario::ShortSessions => {
                assert!(least >= 10 * MINUTE && of_served == Duration::ZERO, "{scenario:?}");
            }
        }
    }
}
