//! One key of the cache: what is known about it, whether that may be served, and who is waiting.

use std::sync::Arc;

use jiff::Timestamp;
use tokio::sync::watch;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

use super::{Credentials, Failure, RoleSession, Served, SessionState};

/// What the keeper of an entry is doing.
#[derive(Clone, Debug)]
pub(super) enum Phase {
    /// A call is under way or waits for its turn.
    Fetching,
    /// The last call failed a moment ago; until the keeper's pause is over this is the answer, and costs no call.
    Failed(Failure),
    /// Nothing to do; an asker who finds nothing fresh sets `Fetching`, which wakes the keeper.
    Idle,
    /// The keeper has gone; ask the store for a new entry.
    Closed,
}

/// Credentials with their ends. Two clocks, because either may lie: the wall clock is set by hand or by NTP, the monotonic
/// one stands still while the machine is suspended.
#[derive(Clone, Debug)]
pub(super) struct Cached {
    pub(super) credentials: Arc<Credentials>,
    pub(super) expires: Instant,
    pub(super) renew: Instant,
    /// The wall clock's view of `renew`.
    pub(super) renew_at: Timestamp,
}

impl Cached {
    fn valid(&self, wall: Timestamp) -> bool {
        Instant::now() < self.expires && wall < self.credentials.expiration
    }
}

#[derive(Debug)]
pub(super) struct State {
    pub(super) cached: Option<Cached>,
    pub(super) phase: Phase,
    /// The last one if nothing has succeeded since, with the time from which on there may be another attempt.
    failure: Option<(Failure, Timestamp)>,
}

#[derive(Debug)]
pub(super) struct Entry {
    pub(super) key: RoleSession,
    pub(super) state: watch::Sender<State>,
    /// Tells the keeper that the entry is out of the store.
    pub(super) retired: CancellationToken,
}

/// What an asker gets without waiting.
enum Glance {
    Answer(Result<Arc<Credentials>, Failure>),
    Wait,
    Closed,
}

impl Entry {
    pub(super) fn new(key: RoleSession, cached: Option<Cached>, retired: CancellationToken) -> Self {
        let state = State { cached, phase: Phase::Fetching, failure: None };
        Self { key, state: watch::Sender::new(state), retired }
    }

    /// The answer for one asker, as soon as there is one; `None` once the entry is closed.
    pub(super) async fn answer(&self, wall: impl Fn() -> Timestamp) -> Option<Result<Arc<Credentials>, Failure>> {
        // Subscribed before the first look, so that no change between look and wait is missed.
        let mut changes = self.state.subscribe();
        loop {
            match self.glance(wall()) {
                Glance::Answer(answer) => return Some(answer),
                Glance::Closed => return None,
                Glance::Wait => changes.changed().await.ok()?,
            }
        }
    }

    /// Looks, and wakes an idle keeper if what is there is not fresh.
    fn glance(&self, wall: Timestamp) -> Glance {
        let mut glance = Glance::Wait;
        self.state.send_if_modified(|state| {
            let mut fresh = false;
            if let Some(cached) = state.cached.as_ref().filter(|cached| cached.valid(wall)) {
                glance = Glance::Answer(Ok(Arc::clone(&cached.credentials)));
                // Usually the keeper's own timer comes first; not after a suspend.
                fresh = wall <= cached.renew_at;
            } else if let Phase::Failed(failure) = &state.phase {
                glance = Glance::Answer(Err(failure.clone()));
            } else if matches!(state.phase, Phase::Closed) {
                glance = Glance::Closed;
            }
            state.wake_unless(fresh)
        });
        glance
    }

    pub(super) fn show(&self, wall: Timestamp) -> SessionState {
        let state = self.state.borrow();
        let cached = state.cached.as_ref().filter(|cached| cached.valid(wall));
        let served = cached.map(|cached| Served {
            access_key_id: cached.credentials.access_key_id.clone(),
            expiration: cached.credentials.expiration,
            renewal: cached.renew_at,
        });
        SessionState { served, failure: state.failure.clone() }
    }

    /// What is served, for an entry that is to have its own as soon as possible.
    pub(super) fn inheritance(&self) -> Option<Cached> {
        self.state.borrow().cached.clone()
    }

    /// Fetch ahead for somebody who will ask later.
    pub(super) fn nudge(&self, wall: Timestamp) {
        self.glance(wall);
    }

    pub(super) fn set_phase(&self, phase: Phase) {
        self.state.send_modify(|state| state.phase = phase);
    }

    pub(super) fn serves(&self, wall: Timestamp) -> bool {
        self.serves_until(wall).is_some()
    }

    pub(super) fn serves_until(&self, wall: Timestamp) -> Option<Instant> {
        let state = self.state.borrow();
        state.cached.as_ref().filter(|cached| cached.valid(wall)).map(|cached| cached.expires)
    }

    /// Whether the keeper only waits, with no failure to remember, so that nobody loses anything if the entry goes at once.
    pub(super) fn idle(&self) -> bool {
        let state = self.state.borrow();
        matches!(state.phase, Phase::Idle) && state.failure.is_none()
    }

    pub(super) fn publish(&self, cached: Cached) {
        self.state.send_modify(|state| *state = State { cached: Some(cached), phase: Phase::Idle, failure: None });
    }

    /// Credentials that are still valid stay and go on being served.
    pub(super) fn publish_failure(&self, failure: Failure, wall: Timestamp, next: Timestamp) {
        self.state.send_modify(|state| {
            state.cached.take_if(|cached| !cached.valid(wall));
            state.failure = Some((failure.clone(), next));
            state.phase = Phase::Failed(failure);
        });
    }

    /// Until an asker, or the end of the entry, has ended `Idle`.
    pub(super) async fn woken(&self) {
        let mut changes = self.state.subscribe();
        // Fails only without a sender, and the sender is `self`'s.
        let _ = changes.wait_for(|state| !matches!(state.phase, Phase::Idle)).await;
    }

    /// Forgets the secrets, which wipes them once no answer carries them any more.
    pub(super) fn wipe(&self) {
        self.state.send_modify(|state| state.cached = None);
    }

    /// Forgets the secrets and sends whoever still waits here back to the store.
    pub(super) fn close(&self) {
        self.state.send_modify(|state| {
            state.cached = None;
            state.phase = Phase::Closed;
        });
    }
}

impl State {
    fn wake_unless(&mut self, fresh: bool) -> bool {
        let wake = !fresh && matches!(self.phase, Phase::Idle);
        if wake {
            self.phase = Phase::Fetching;
        }
        wake
    }
}
