//! The store on a virtual clock, with a stand-in for STS.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};

use jiff::SignedDuration;
use tokio::time::{Instant, sleep};

use super::*;

const MINUTE: Duration = Duration::from_secs(60);

/// What the stand-in does with a call.
#[derive(Clone)]
enum Mood {
    Grant,
    Fail(Failure),
    Panic,
}

/// One virtual host: its wall clock, and the STS that it talks to.
struct World {
    origin: Instant,
    wall_offset: Mutex<SignedDuration>,
    suspended: Mutex<SignedDuration>,
    mood: Mutex<Mood>,
    delay: Mutex<Duration>,
    /// Roles whose names begin so are never answered.
    hanging: Mutex<Option<&'static str>>,
    calls: AtomicUsize,
    running: AtomicUsize,
    most_running: AtomicUsize,
}

#[derive(Clone)]
struct FakeSts(Arc<World>);

impl World {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            origin: Instant::now(),
            wall_offset: Mutex::new(SignedDuration::ZERO),
            suspended: Mutex::new(SignedDuration::ZERO),
            mood: Mutex::new(Mood::Grant),
            delay: Mutex::new(Duration::from_millis(100)),
            hanging: Mutex::new(None),
            calls: AtomicUsize::new(0),
            running: AtomicUsize::new(0),
            most_running: AtomicUsize::new(0),
        })
    }

    /// Time as STS has it, which nobody's clock jumps can move.
    fn true_time(&self) -> Timestamp {
        let start = Timestamp::from_second(1_800_000_000).unwrap();
        start + Instant::now().duration_since(self.origin) + *lock(&self.suspended)
    }

    fn wall(&self) -> Timestamp {
        self.true_time() + *lock(&self.wall_offset)
    }

    fn set_mood(&self, mood: Mood) {
        *lock(&self.mood) = mood;
    }

    fn set_delay(&self, delay: Duration) {
        *lock(&self.delay) = delay;
    }

    fn hang(&self, roles: &'static str) {
        *lock(&self.hanging) = Some(roles);
    }

    fn jump_wall(&self, by: SignedDuration) {
        *lock(&self.wall_offset) += by;
    }

    /// While a machine sleeps, its monotonic clock stands still.
    fn suspend(&self, duration: SignedDuration) {
        *lock(&self.suspended) += duration;
    }

    fn calls(&self) -> usize {
        self.calls.load(Ordering::Relaxed)
    }

    fn store(self: &Arc<Self>) -> Store {
        self.store_with(Settings::default())
    }

    fn store_with(self: &Arc<Self>, settings: Settings) -> Store {
        let world = Arc::clone(self);
        Store::new(FakeSts(Arc::clone(self)), Settings { clock: Arc::new(move || world.wall()), ..settings })
    }
}

fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Sts for FakeSts {
    fn assume<'a>(&'a self, session: &'a RoleSession) -> AssumeFuture<'a> {
        Box::pin(async move {
            let world = &self.0;
            let call = world.calls.fetch_add(1, Ordering::Relaxed) + 1;
            let running = world.running.fetch_add(1, Ordering::Relaxed) + 1;
            world.most_running.fetch_max(running, Ordering::Relaxed);
            let delay = *lock(&world.delay);
            let hangs = lock(&world.hanging).is_some_and(|roles| session.role_arn.starts_with(roles));
            sleep(if hangs { Duration::MAX } else { delay }).await;
            world.running.fetch_sub(1, Ordering::Relaxed);
            let mood = lock(&world.mood).clone();
            match mood {
                Mood::Grant => Ok(Credentials {
                    access_key_id: format!("ASIA{call}-{}", session.role_arn),
                    secret_access_key: "the-secret".into(),
                    session_token: "the-token".into(),
                    last_updated: world.wall(),
                    expiration: world.true_time() + session.duration,
                }),
                Mood::Fail(failure) => Err(failure),
                Mood::Panic => panic!("as a bug in the SDK would"),
            }
        })
    }
}

fn key(role: &str) -> RoleSession {
    RoleSession::plain(role, "s")
}

fn refusal() -> Failure {
    Failure::Refused { code: "AccessDenied".into(), message: "no".into() }
}

fn outage() -> Failure {
    Failure::unavailable("down")
}

#[tokio::test(start_paused = true)]
async fn a_hundred_concurrent_askers_cost_one_call() {
    let world = World::new();
    let store = Arc::new(world.store());
    let askers: Vec<_> = (0..100)
        .map(|_| {
            let store = Arc::clone(&store);
            tokio::spawn(async move { store.get(&key("a")).await })
        })
        .collect();
    for asker in askers {
        assert_eq!(asker.await.unwrap().unwrap().access_key_id, "ASIA1-a");
    }
    assert_eq!(world.calls(), 1);
}

#[tokio::test(start_paused = true)]
async fn distinct_keys_are_distinct() {
    let world = World::new();
    let store = world.store();
    let base = key("a");
    let keys = [
        base.clone(),
        key("b"),
        RoleSession { session_name: "t".into(), ..base.clone() },
        RoleSession { external_id: Some("x".into()), ..base.clone() },
        RoleSession { policy: Some("{}".into()), ..base.clone() },
        RoleSession { policy_arns: vec!["arn:aws:iam::aws:policy/x".into()], ..base.clone() },
        RoleSession { tags: vec![("team".into(), "a".into())], ..base.clone() },
        RoleSession { source_identity: Some("alice".into()), ..base.clone() },
        RoleSession { duration: 15 * MINUTE, ..base },
    ];
    for (at, key) in keys.iter().enumerate() {
        let credentials = store.get(key).await.unwrap();
        assert_eq!(credentials.access_key_id, format!("ASIA{}-{}", at + 1, key.role_arn));
    }
    assert_eq!(world.calls(), keys.len());
}

#[tokio::test(start_paused = true)]
async fn held_credentials_are_fetched_ahead_and_renewed_at_half_life() {
    let world = World::new();
    let store = world.store();
    let _hold = store.hold(key("a"));
    sleep(Duration::from_secs(1)).await;
    assert_eq!(world.calls(), 1, "fetched before anybody asked");
    // A day of somebody asking every ten seconds.
    for _ in 0..8640 {
        sleep(Duration::from_secs(10)).await;
        let asked = Instant::now();
        let credentials = store.get(&key("a")).await.unwrap();
        assert_eq!(asked, Instant::now(), "nobody waits");
        assert!(credentials.expiration.duration_since(world.wall()) >= SignedDuration::from_mins(30));
    }
    assert!((50..=61).contains(&world.calls()), "{} calls", world.calls());
}

#[tokio::test(start_paused = true)]
async fn the_shortest_sessions_are_renewed_before_botocore_presses_for_it() {
    let world = World::new();
    let store = world.store();
    let short = RoleSession { duration: 15 * MINUTE, ..key("a") };
    let _hold = store.hold(short.clone());
    for _ in 0..120 {
        sleep(MINUTE).await;
        let credentials = store.get(&short).await.unwrap();
        assert!(credentials.expiration.duration_since(world.wall()) >= SignedDuration::from_mins(10));
    }
    assert!(world.calls() < 32, "{} calls in two hours", world.calls());
}

#[tokio::test(start_paused = true)]
async fn an_outage_is_bridged_until_expiry_and_told_afterwards() {
    for failure in [outage(), refusal()] {
        let world = World::new();
        let store = world.store();
        let _hold = store.hold(key("a"));
        sleep(MINUTE).await;
        world.set_mood(Mood::Fail(failure.clone()));
        sleep(58 * MINUTE).await;
        assert_eq!(store.get(&key("a")).await.unwrap().access_key_id, "ASIA1-a");
        sleep(2 * MINUTE).await;
        assert_eq!(store.get(&key("a")).await.unwrap_err(), failure);
        assert!(world.calls() < 130, "{} calls", world.calls());

        world.set_mood(Mood::Grant);
        sleep(MINUTE).await;
        assert!(store.get(&key("a")).await.is_ok(), "the end of the outage is noticed");
    }
}

#[tokio::test(start_paused = true)]
async fn a_refusal_is_remembered_and_then_tried_again() {
    let world = World::new();
    let store = world.store();
    world.set_mood(Mood::Fail(refusal()));
    let _hold = store.hold(key("a"));
    // Soon at first, for the role may just have been made: after 2, 4, 8 and 16 seconds, and then after 30.
    for (seconds, calls) in [(1, 1), (4, 2), (8, 3), (16, 4), (28, 4), (50, 5), (88, 6), (118, 7)] {
        while world.origin.elapsed() < Duration::from_secs(seconds) {
            assert_eq!(store.get(&key("a")).await.unwrap_err(), refusal());
            sleep(Duration::from_millis(100)).await;
        }
        assert_eq!(world.calls(), calls, "after {seconds} s");
    }
    sleep(2 * MINUTE).await;
    assert_eq!(world.calls(), 7, "nobody asks, nothing is tried");
    world.set_mood(Mood::Grant);
    assert!(store.get(&key("a")).await.is_ok());
    assert_eq!(world.calls(), 8);
}

#[tokio::test(start_paused = true)]
async fn a_refusal_that_does_not_pass_by_itself_is_remembered_from_the_first_on() {
    let world = World::new();
    let store = world.store();
    world.set_mood(Mood::Fail(Failure::Refused { code: "ValidationError".into(), message: "no".into() }));
    let _hold = store.hold(key("a"));
    for _ in 0..290 {
        assert!(store.get(&key("a")).await.is_err());
        sleep(Duration::from_millis(100)).await;
    }
    assert_eq!(world.calls(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_long_memory_for_refusals_does_not_let_run_out_what_is_served() {
    let world = World::new();
    let store = world.store_with(Settings { refusal_memory: 60 * MINUTE, ..Settings::default() });
    let hold = store.hold(key("a"));
    sleep(MINUTE).await;
    world.set_mood(Mood::Fail(refusal()));
    while world.calls() < 2 {
        sleep(Duration::from_secs(1)).await;
    }
    // Until it is answered.
    sleep(Duration::from_secs(1)).await;
    world.set_mood(Mood::Grant);
    sleep(MINUTE).await;
    assert_eq!(store.get(&key("a")).await.unwrap().access_key_id, "ASIA3-a", "renewed soon after one refusal");

    // To its end, however late the refusals stop.
    world.set_mood(Mood::Fail(refusal()));
    let end = store.get(&key("a")).await.unwrap().expiration;
    sleep(Duration::try_from(end.duration_since(world.wall())).unwrap() - Duration::from_secs(10)).await;
    world.set_mood(Mood::Grant);
    sleep(Duration::from_secs(8)).await;
    assert!(store.get(&key("a")).await.unwrap().expiration > end);

    // With nothing to lose it holds.
    world.set_mood(Mood::Fail(refusal()));
    drop(hold);
    let (calls, _hold) = (world.calls(), store.hold(key("b")));
    for _ in 0..50 {
        assert_eq!(store.get(&key("b")).await.unwrap_err(), refusal());
        sleep(MINUTE).await;
    }
    assert_eq!(world.calls(), calls + 5, "four times soon after the first");
}

#[tokio::test(start_paused = true)]
async fn an_outage_with_nothing_cached_is_retried_less_and_less() {
    let world = World::new();
    let store = world.store();
    world.set_mood(Mood::Fail(outage()));
    for _ in 0..600 {
        assert_eq!(store.get(&key("a")).await.unwrap_err(), outage());
        sleep(Duration::from_secs(1)).await;
    }
    assert!((20..=60).contains(&world.calls()), "{} calls in ten minutes", world.calls());
    world.set_mood(Mood::Grant);
    sleep(Duration::from_secs(30)).await;
    assert!(store.get(&key("a")).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_cancelled_asker_does_not_cancel_the_call() {
    let world = World::new();
    let store = world.store();
    let (a, b) = (key("a"), key("a"));
    let impatient = tokio::time::timeout(Duration::from_millis(10), store.get(&a));
    let (impatient, patient) = tokio::join!(impatient, store.get(&b));
    assert!(impatient.is_err());
    assert_eq!(patient.unwrap().access_key_id, "ASIA1-a");
    assert_eq!(world.calls(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_slow_sts_is_answered_for_in_time_and_its_answer_kept() {
    let world = World::new();
    let store = world.store();
    world.set_delay(Duration::from_secs(8));
    let asked = Instant::now();
    let failure = store.get(&key("a")).await.unwrap_err();
    assert!(matches!(failure, Failure::Unavailable { .. }));
    assert_eq!(asked.elapsed(), Duration::from_millis(4500));
    assert_eq!(store.get(&key("a")).await.unwrap().access_key_id, "ASIA1-a");
    assert_eq!(world.calls(), 1);
}

#[tokio::test(start_paused = true)]
async fn an_sts_that_never_answers_blocks_nothing_for_ever() {
    let world = World::new();
    let store = world.store();
    world.set_delay(Duration::from_secs(1_000_000));
    let _holds: Vec<_> = (0..40).map(|at| store.hold(key(&at.to_string()))).collect();
    sleep(MINUTE).await;
    world.set_delay(Duration::from_millis(100));
    sleep(2 * MINUTE).await;
    for at in 0..40 {
        assert!(store.get(&key(&at.to_string())).await.is_ok());
    }
}

#[tokio::test(start_paused = true)]
async fn a_released_key_is_wiped_and_no_longer_renewed() {
    let world = World::new();
    let store = world.store();
    let (first, second) = (store.hold(key("a")), store.hold(key("a")));
    let weak = Arc::downgrade(&store.get(&key("a")).await.unwrap());
    drop(first);
    sleep(35 * MINUTE).await;
    assert_eq!(world.calls(), 2, "one hold is enough");
    assert!(weak.upgrade().is_none(), "replaced credentials are gone");
    let weak = Arc::downgrade(&store.get(&key("a")).await.unwrap());
    drop(second);
    assert!(weak.upgrade().is_none(), "gone with the last hold");
    assert_eq!(store.entries(), 0);
    sleep(600 * MINUTE).await;
    assert_eq!(world.calls(), 2);
}

#[tokio::test(start_paused = true)]
async fn a_container_restarting_in_a_loop_does_not_cause_a_call_each_time() {
    let world = World::new();
    let store = world.store();
    world.set_mood(Mood::Fail(refusal()));
    for _ in 0..20 {
        let hold = store.hold(key("a"));
        sleep(Duration::from_secs(1)).await;
        drop(hold);
    }
    assert_eq!(world.calls(), 4);
    sleep(2 * MINUTE).await;
    assert_eq!(store.entries(), 0);

    world.set_mood(Mood::Grant);
    drop(store.hold(key("b")));
    let _hold = store.hold(key("b"));
    assert!(store.get(&key("b")).await.is_ok());
    assert_eq!(world.calls(), 5, "released and taken again during the call");
    drop(store.hold(key("c")));
    sleep(MINUTE).await;
    assert_eq!(store.entries(), 1);
}

#[tokio::test(start_paused = true)]
async fn what_was_only_asked_for_is_cached_but_not_renewed() {
    let world = World::new();
    let store = world.store();
    for _ in 0..20 {
        assert!(store.get(&key("a")).await.is_ok());
        sleep(MINUTE).await;
    }
    assert_eq!(world.calls(), 1);
    sleep(60 * MINUTE).await;
    assert_eq!((world.calls(), store.entries()), (1, 0));
}

#[tokio::test(start_paused = true)]
async fn calls_are_limited_over_all_keys() {
    let world = World::new();
    let store = world.store();
    let _holds: Vec<_> = (0..300).map(|at| store.hold(key(&at.to_string()))).collect();
    sleep(Duration::from_millis(500)).await;
    assert!((100..=130).contains(&world.calls()), "{} of a burst of 100", world.calls());
    sleep(Duration::from_secs(4)).await;
    assert_eq!(world.calls(), 300, "the rest at 50 per second");
    assert_eq!(world.most_running.load(Ordering::Relaxed), 32);
}

#[tokio::test(start_paused = true)]
async fn hanging_roles_leave_the_others_their_turns() {
    let world = World::new();
    let store = world.store();
    world.hang("hung");
    // One role with many containers; then many roles, which at first take all turns there are.
    let _one: Vec<_> = (0..100).map(|at| store.hold(RoleSession::plain("hung", &at.to_string()))).collect();
    sleep(Duration::from_secs(1)).await;
    let asked = Instant::now();
    assert!(store.get(&key("well")).await.is_ok());
    assert_eq!(asked.elapsed(), Duration::from_millis(100));
    let _many: Vec<_> = (0..100).map(|at| store.hold(key(&format!("hung-{at}")))).collect();
    // Each has hung once by then.
    sleep(6 * MINUTE).await;
    for at in 0..100 {
        let asked = Instant::now();
        assert!(store.get(&key(&format!("well-{at}"))).await.is_ok());
        assert_eq!(asked.elapsed(), Duration::from_millis(100), "well-{at}");
        sleep(Duration::from_secs(1)).await;
    }
}

#[tokio::test(start_paused = true)]
async fn throttling_is_told_from_other_trouble() {
    let world = World::new();
    let store = world.store();
    let throttled = Failure::Unavailable { message: "slower".into(), throttled: true };
    world.set_mood(Mood::Fail(throttled.clone()));
    let _holds: Vec<_> = (0..50).map(|at| store.hold(key(&at.to_string()))).collect();
    sleep(MINUTE).await;
    assert_eq!(store.get(&key("0")).await.unwrap_err(), throttled);
    assert!(world.calls() < 150, "{} calls in a minute", world.calls());
    world.set_mood(Mood::Grant);
    sleep(2 * MINUTE).await;
    for at in 0..50 {
        assert!(store.get(&key(&at.to_string())).await.is_ok());
    }
}

#[tokio::test(start_paused = true)]
async fn who_was_throttled_is_not_put_behind_all_who_come_later() {
    let world = World::new();
    let limits = Limits { per_second: 1.0, concurrent: 4 };
    let store = world.store_with(Settings { limits, ..Settings::default() });
    world.set_mood(Mood::Fail(Failure::Unavailable { message: "slower".into(), throttled: true }));
    let _throttled = store.hold(key("throttled"));
    sleep(Duration::from_secs(1)).await;
    world.set_mood(Mood::Grant);
    // More than there are turns for.
    let mut later = Vec::new();
    for at in 0..60 {
        later.push(store.hold(key(&at.to_string())));
        sleep(Duration::from_millis(500)).await;
    }
    assert!(store.state(&key("throttled")).served.is_some());
    assert!(later.iter().any(|hold| store.state(&hold.key).served.is_none()), "nobody had to wait");
}

#[tokio::test(start_paused = true)]
async fn expired_credentials_are_not_served_whatever_the_wall_clock_says() {
    let world = World::new();
    let store = world.store();
    let _hold = store.hold(key("a"));
    sleep(MINUTE).await;
    world.set_mood(Mood::Fail(outage()));
    world.jump_wall(SignedDuration::from_hours(-5));
    assert!(store.get(&key("a")).await.is_ok());
    sleep(60 * MINUTE).await;
    assert_eq!(store.get(&key("a")).await.unwrap_err(), outage());

    // With a wall clock five hours behind, credentials live as long as they were asked for and no longer.
    world.set_mood(Mood::Grant);
    sleep(MINUTE).await;
    assert!(store.get(&key("a")).await.is_ok());
    world.set_mood(Mood::Fail(outage()));
    sleep(61 * MINUTE).await;
    assert_eq!(store.get(&key("a")).await.unwrap_err(), outage());
}

#[tokio::test(start_paused = true)]
async fn credentials_are_renewed_after_a_suspend() {
    let world = World::new();
    let store = world.store();
    let _hold = store.hold(key("a"));
    sleep(MINUTE).await;
    world.suspend(SignedDuration::from_mins(50));
    assert_eq!(store.get(&key("a")).await.unwrap().access_key_id, "ASIA1-a");
    sleep(Duration::from_secs(1)).await;
    assert_eq!(store.get(&key("a")).await.unwrap().access_key_id, "ASIA2-a");
    world.suspend(SignedDuration::from_hours(9));
    assert_eq!(store.get(&key("a")).await.unwrap().access_key_id, "ASIA3-a");
    assert_eq!(world.calls(), 3);
}

#[tokio::test(start_paused = true)]
async fn a_wall_clock_far_ahead_is_named_as_the_cause() {
    let world = World::new();
    let store = world.store();
    world.jump_wall(SignedDuration::from_hours(2));
    let failure = store.get(&key("a")).await.unwrap_err();
    assert!(failure.to_string().contains("expired by this host's clock"), "{failure}");
}

#[tokio::test(start_paused = true)]
async fn a_panic_in_the_sdk_is_a_failure_like_any_other() {
    let world = World::new();
    let store = world.store();
    world.set_mood(Mood::Panic);
    assert!(matches!(store.get(&key("a")).await, Err(Failure::Unavailable { .. })));
    world.set_mood(Mood::Grant);
    sleep(Duration::from_secs(2)).await;
    assert!(store.get(&key("a")).await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_dropped_store_renews_nothing() {
    let world = World::new();
    let store = world.store();
    let hold = store.hold(key("a"));
    let weak = Arc::downgrade(&store.get(&key("a")).await.unwrap());
    drop(store);
    sleep(MINUTE).await;
    assert!(weak.upgrade().is_none());
    sleep(600 * MINUTE).await;
    assert_eq!(world.calls(), 1);
    drop(hold);
}

#[tokio::test(start_paused = true)]
async fn debug_prints_no_secret() {
    let world = World::new();
    let store = world.store();
    let credentials = store.get(&key("a")).await.unwrap();
    let text = format!("{credentials:?} {credentials:#?}");
    assert!(text.contains("ASIA1-a") && !text.contains("the-secret") && !text.contains("the-token"), "{text}");
}
