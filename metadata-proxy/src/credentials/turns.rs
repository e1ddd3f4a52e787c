//! Whose call of STS is next: a rate, limits of what is under way, and an order among those who wait.
//!
//! governor would do the rate, which is ten lines of this, but by a clock of its own that tokio's paused one does not move;
//! and it knows neither an order nor shares.

use std::collections::{BTreeMap, HashMap};
use std::time::Duration;

use tokio::sync::{mpsc, oneshot};
use tokio::time::{Instant, sleep_until};

use super::Failure;

/// How many calls there may be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Limits {
    /// On the average. Twice as many may go at once after a quiet while.
    pub(crate) per_second: f64,
    /// At the same time.
    pub(crate) concurrent: usize,
}

/// AWS grants an account 600 calls of STS per second and region, over all of its hosts (IAM User Guide, "IAM and AWS STS
/// quotas"): twelve hosts that all start at once stay below. A call takes about 0.1 s, so 50 per second have five under way;
/// the rest of the 32 is for an STS that is slow.
impl Default for Limits {
    fn default() -> Self {
        Self { per_second: 50.0, concurrent: 32 }
    }
}

/// So much of the concurrent calls one role may have, and those whose last call failed have together: an STS that hangs for some
/// leaves the others their turns.
const SHARE: usize = 4;
/// Calls that may go at once, as the time in which they are earned.
const BURST: Duration = Duration::from_secs(2);
/// With so much left a renewal goes before those who come after that with nothing to serve: where turns are too few, they
/// would otherwise let run out all that is served.
const URGENT: Duration = Duration::from_secs(10 * 60);
/// The account is throttled as a whole: each such answer halves the rate, down to this, and each other one raises it again.
const SLOWEST: Duration = Duration::from_secs(1);
const RECOVERY: f64 = 0.95;

/// What is known of a call before it is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Need {
    /// There is nothing to serve, and somebody may be waiting.
    Now,
    /// What is served ends then.
    By(Instant),
    /// The last call failed, and not for throttling. However many of these there are, they cannot crowd out the others.
    Again,
}

/// The order of turns: those whose last call failed last; before them, by when the call is due; and among equals the first
/// comes first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Place {
    again: bool,
    due: Instant,
    number: u64,
}

impl Place {
    fn new(need: Need, number: u64) -> Self {
        let now = Instant::now();
        let due = match need {
            Need::Now | Need::Again => now,
            Need::By(end) => end.checked_sub(URGENT).unwrap_or(now),
        };
        Self { again: need == Need::Again, due, number }
    }
}

/// How a call ended, for the rate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Ending {
    Throttled,
    Answered,
    /// No answer, so nothing is known.
    Silent,
}

impl Ending {
    pub(super) fn of<T>(outcome: &Result<T, Failure>) -> Self {
        match outcome {
            Err(Failure::Unavailable { throttled: true, .. }) => Self::Throttled,
            Err(Failure::Unavailable { .. }) => Self::Silent,
            Ok(_) | Err(Failure::Refused { .. }) => Self::Answered,
        }
    }
}

/// Where turns are asked for.
pub(super) struct Turns {
    messages: mpsc::UnboundedSender<Message>,
}

/// The permission to make one call; it is over when this is dropped.
pub(super) struct Turn {
    messages: mpsc::UnboundedSender<Message>,
    role: String,
    need: Need,
    pub(super) ending: Ending,
}

enum Message {
    Wanted { role: String, need: Need, granted: oneshot::Sender<Turn> },
    Over { role: String, need: Need, ending: Ending },
}

impl Turns {
    /// Must be called within a tokio runtime. Ends when this and all turns have been dropped.
    pub(super) fn new(limits: Limits) -> Self {
        let (messages, inbox) = mpsc::unbounded_channel();
        // Weak, or it would wait for itself.
        tokio::spawn(Giver::new(limits, messages.downgrade()).run(inbox));
        Self { messages }
    }

    /// Waits for a turn; gives up its place when dropped. None once there are none any more.
    pub(super) async fn next(&self, role: &str, need: Need) -> Option<Turn> {
        let (granted, turn) = oneshot::channel();
        self.messages.send(Message::Wanted { role: role.to_owned(), need, granted }).ok()?;
        turn.await.ok()
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let role = std::mem::take(&mut self.role);
        let over = Message::Over { role, need: self.need, ending: self.ending };
        // The giver has ended: then nobody waits.
        let _ = self.messages.send(over);
    }
}

struct Giver {
    limits: Limits,
    messages: mpsc::WeakUnboundedSender<Message>,
    waiting: BTreeMap<Place, (String, Need, oneshot::Sender<Turn>)>,
    arrivals: u64,
    running: usize,
    running_by_role: HashMap<String, usize>,
    running_again: usize,
    /// Between two calls, now.
    interval: Duration,
    /// When the calls so far would have been due at that interval (the generic cell rate algorithm).
    due: Instant,
}

impl Giver {
    fn new(limits: Limits, messages: mpsc::WeakUnboundedSender<Message>) -> Self {
        Self {
            limits,
            messages,
            waiting: BTreeMap::new(),
            arrivals: 0,
            running: 0,
            running_by_role: HashMap::new(),
            running_again: 0,
            interval: Self::interval(limits),
            due: Instant::now(),
        }
    }

    fn interval(limits: Limits) -> Duration {
        Duration::from_secs_f64(1.0 / limits.per_second)
    }

    async fn run(mut self, mut inbox: mpsc::UnboundedReceiver<Message>) {
        loop {
            let again = self.give();
            let message = tokio::select! {
                message = inbox.recv() => message,
                () = sleep_until(again.unwrap_or_else(Instant::now)), if again.is_some() => continue,
            };
            match message {
                None => return,
                Some(Message::Wanted { role, need, granted }) => {
                    self.arrivals += 1;
                    self.waiting.insert(Place::new(need, self.arrivals), (role, need, granted));
                }
                Some(Message::Over { role, need, ending }) => self.over(&role, need, ending),
            }
        }
    }

    /// Gives all turns that there are; the time when there may be another, if it is only for the rate that somebody waits.
    fn give(&mut self) -> Option<Instant> {
        self.waiting.retain(|_, (.., granted)| !granted.is_closed());
        loop {
            let share = self.limits.concurrent.div_ceil(SHARE);
            let may = |(place, (role, ..)): &(&Place, &(String, Need, _))| {
                self.running < self.limits.concurrent
                    && self.running_by_role.get(role).is_none_or(|running| *running < share)
                    && (!place.again || self.running_again < share)
            };
            let place = self.waiting.iter().find(may).map(|(place, _)| *place)?;
            let now = Instant::now();
            let due = self.due.max(now);
            if due > now + BURST {
                return Some(due - BURST);
            }
            let (role, need, granted) = self.waiting.remove(&place)?;
            let messages = self.messages.upgrade()?;
            self.due = due + self.interval;
            self.running += 1;
            *self.running_by_role.entry(role.clone()).or_default() += 1;
            self.running_again += usize::from(need == Need::Again);
            // If nobody wants it after all, dropping it is its end.
            let _ = granted.send(Turn { messages, role, need, ending: Ending::Silent });
        }
    }

    fn over(&mut self, role: &str, need: Need, ending: Ending) {
        self.running -= 1;
        self.running_again -= usize::from(need == Need::Again);
        if let Some(running) = self.running_by_role.get_mut(role) {
            *running -= 1;
            if *running == 0 {
                self.running_by_role.remove(role);
            }
        }
        match ending {
            Ending::Throttled => {
                self.interval = (self.interval * 2).min(SLOWEST.max(Self::interval(self.limits)));
                self.due = self.due.max(Instant::now() + BURST);
            }
            Ending::Answered => self.interval = self.interval.mul_f64(RECOVERY).max(Self::interval(self.limits)),
            Ending::Silent => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::{sleep, timeout};

    use super::*;

    use Need::{Again, By, Now};

    const MOMENT: Duration = Duration::from_nanos(1);

    fn limits(per_second: f64, concurrent: usize) -> Limits {
        Limits { per_second, concurrent }
    }

    /// Nothing is left to wait for but time.
    async fn at_once(turns: &Turns, role: &str, need: Need) -> Option<Turn> {
        timeout(MOMENT, turns.next(role, need)).await.ok().flatten()
    }

    #[tokio::test(start_paused = true)]
    async fn a_burst_goes_at_once_and_then_the_rate_holds() {
        let turns = Turns::new(limits(10.0, 1000));
        let start = Instant::now();
        for _ in 0..21 {
            drop(turns.next("a", Now).await);
        }
        assert_eq!(start.elapsed(), Duration::ZERO, "two seconds' worth, and one");
        for _ in 0..100 {
            drop(turns.next("a", Now).await);
        }
        assert!((9_900..=10_100).contains(&start.elapsed().as_millis()), "{:?}", start.elapsed());
        sleep(Duration::from_secs(3600)).await;
        let start = Instant::now();
        for _ in 0..31 {
            drop(turns.next("a", Now).await);
        }
        assert!(start.elapsed() >= Duration::from_millis(990), "no more is saved up");
    }

    #[tokio::test(start_paused = true)]
    async fn one_role_has_its_share_and_leaves_the_others_theirs() {
        let turns = Turns::new(limits(1000.0, 8));
        let hanging = [turns.next("a", Now).await, turns.next("a", Now).await];
        assert!(at_once(&turns, "a", Now).await.is_none());
        assert!(at_once(&turns, "b", Now).await.is_some());
        drop(hanging);
        assert!(at_once(&turns, "a", Now).await.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn those_who_failed_before_have_a_share_together() {
        let turns = Turns::new(limits(1000.0, 8));
        let _hanging = [turns.next("a", Again).await, turns.next("b", Again).await];
        assert!(at_once(&turns, "c", Again).await.is_none());
        assert!(at_once(&turns, "c", Now).await.is_some());
    }

    #[tokio::test(start_paused = true)]
    async fn whoever_runs_out_first_is_first_and_who_failed_before_is_last() {
        let turns = std::sync::Arc::new(Turns::new(limits(1000.0, 1)));
        let running = turns.next("x", Now).await;
        let by = |secs| By(Instant::now() + Duration::from_secs(secs));
        let (order, mut came) = mpsc::unbounded_channel();
        for (name, need) in [("failed", Again), ("late", by(1800)), ("soon", by(900)), ("first", Now), ("second", Now)]
        {
            let (turns, order) = (turns.clone(), order.clone());
            tokio::spawn(async move {
                let turn = turns.next(name, need).await;
                order.send(name).unwrap();
                drop(turn);
            });
            sleep(MOMENT).await;
        }
        drop(running);
        for expected in ["first", "second", "soon", "late", "failed"] {
            assert_eq!(came.recv().await, Some(expected));
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_is_served_does_not_run_out_for_those_who_keep_coming() {
        let turns = std::sync::Arc::new(Turns::new(limits(1.0, 1)));
        let mut running = turns.next("x", Now).await;
        let end = Instant::now() + Duration::from_secs(1200);
        let renewal = tokio::spawn({
            let turns = turns.clone();
            async move { turns.next("served", By(end)).await.map(|_| Instant::now()) }
        });
        sleep(MOMENT).await;
        // Half as many again as there are turns for, one of them always waiting.
        for at in 0..1800 {
            let turns = turns.clone();
            tokio::spawn(async move { drop(turns.next("new", Now).await) });
            sleep(Duration::from_secs(1).mul_f64(2.0 / 3.0)).await;
            assert!(at > 1 || !renewal.is_finished(), "nobody had to wait");
            if at == 1 {
                drop(running.take());
            }
        }
        assert!(renewal.is_finished(), "it has run out");
    }

    #[tokio::test(start_paused = true)]
    async fn who_no_longer_waits_costs_no_turn() {
        let turns = Turns::new(limits(0.1, 1));
        let running = turns.next("x", Now).await;
        assert!(at_once(&turns, "gone", Now).await.is_none());
        drop(running);
        let start = Instant::now();
        drop(turns.next("x", Now).await);
        let waited = start.elapsed().as_millis();
        assert!((7_990..=8_010).contains(&waited), "{waited} ms, not one interval of 10 s less the burst's 2 s");
    }

    #[tokio::test(start_paused = true)]
    async fn throttling_slows_all_down_and_answers_speed_them_up_again() {
        let turns = Turns::new(limits(50.0, 1));
        for _ in 0..10 {
            turns.next("a", Now).await.unwrap().ending = Ending::Throttled;
        }
        let start = Instant::now();
        for _ in 0..10 {
            turns.next("a", Now).await.unwrap().ending = Ending::Answered;
        }
        assert!(start.elapsed() > Duration::from_secs(5), "{:?}", start.elapsed());
        for _ in 0..200 {
            turns.next("a", Now).await.unwrap().ending = Ending::Answered;
        }
        let start = Instant::now();
        for _ in 0..50 {
            drop(turns.next("a", Now).await);
        }
        assert!(start.elapsed() <= Duration::from_secs(1), "{:?}", start.elapsed());
    }
}
