//! The cache of credentials: who asks, who holds, and which entries there are.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use jiff::Timestamp;
use tokio_util::sync::CancellationToken;

use super::entry::{Cached, Entry};
use super::turns::{Limits, Turns};
use super::{Clock, Credentials, Failure, RoleSession, SessionState, Sts, keeper};

/// For who can do without: clients wait a second for each answer.
const SOON: Duration = Duration::from_millis(500);

#[derive(Clone)]
pub(crate) struct Settings {
    /// Of the calls of STS, over all keys.
    pub(crate) limits: Limits,
    /// How long an asker waits for the first answer of STS. Most clients give up after 1 s by themselves and try again,
    /// which finds the cache filled; .NET and whoever has set `AWS_METADATA_SERVICE_TIMEOUT` waits for 5 s and more.
    pub(crate) answer_within: Duration,
    /// How long a refusal is remembered, so that a container that asks in a loop costs no calls.
    pub(crate) refusal_memory: Duration,
    pub(crate) clock: Clock,
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { limits, answer_within, refusal_memory, clock: _ } = self;
        write!(f, "{limits:?}, {answer_within:?}, {refusal_memory:?}")
    }
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            limits: Limits::default(),
            answer_within: Duration::from_millis(4500),
            refusal_memory: Duration::from_secs(30),
            clock: Arc::new(Timestamp::now),
        }
    }
}

/// Credentials by role session. Dropping the store ends all renewal.
pub(crate) struct Store {
    shared: Arc<Shared>,
}

/// What the store has in common with its keepers and holds.
pub(super) struct Shared {
    pub(super) sts: Arc<dyn Sts>,
    pub(super) settings: Settings,
    pub(super) turns: Turns,
    slots: Mutex<HashMap<RoleSession, Slot>>,
    /// Of the runtime that the store was made in, so that `hold` may be called from anywhere.
    runtime: tokio::runtime::Handle,
    stop: CancellationToken,
}

struct Slot {
    entry: Arc<Entry>,
    holds: usize,
    /// Had holds and lost the last one. A key that was only ever asked for lives on until its credentials would be renewed.
    released: bool,
}

impl Store {
    /// To be called within a tokio runtime, on which the keepers then run.
    pub(crate) fn new(sts: impl Sts, settings: Settings) -> Self {
        Self {
            shared: Arc::new(Shared {
                sts: Arc::new(sts),
                turns: Turns::new(settings.limits),
                settings,
                slots: Mutex::default(),
                runtime: tokio::runtime::Handle::current(),
                stop: CancellationToken::new(),
            }),
        }
    }

    /// From the cache, usually at once. The first asker waits for STS, for `answer_within` at most; the call goes on without
    /// it and fills the cache.
    pub(crate) async fn get(&self, key: &RoleSession) -> Result<Arc<Credentials>, Failure> {
        let ask = async {
            loop {
                let entry = self.shared.entry(key, 0, None);
                // An entry may be closed between finding it and asking it; it has left the map by then.
                if let Some(answer) = entry.answer(|| self.shared.now()).await {
                    return answer;
                }
            }
        };
        let patience = self.shared.settings.answer_within;
        tokio::time::timeout(patience, ask).await.unwrap_or_else(|_| {
            Err(Failure::unavailable(format!(
                "STS has not answered for {} within {patience:?}; it is still to be had, so ask again",
                key.role_arn
            )))
        })
    }

    #[cfg(test)]
    pub(crate) fn hold(&self, key: RoleSession) -> Hold {
        self.hold_after(key, None)
    }

    /// Fetches ahead and keeps renewed until the last hold of this key is dropped; then the credentials are wiped. For who had
    /// another key before that differs by its name only, its credentials, which can do the same, are served until there are
    /// new ones.
    pub(crate) fn hold_after(&self, key: RoleSession, before: Option<&RoleSession>) -> Hold {
        let renamed =
            |before: &&RoleSession| RoleSession { session_name: key.session_name.clone(), ..(*before).clone() } == key;
        let inherited = before.filter(renamed).and_then(|before| self.look(before)?.inheritance());
        self.shared.entry(&key, 1, inherited).nudge(self.shared.now());
        Hold { shared: Arc::clone(&self.shared), key }
    }
}

impl Store {
    /// Looks, and causes nothing.
    pub(crate) fn state(&self, key: &RoleSession) -> SessionState {
        self.look(key).map_or_else(SessionState::default, |entry| entry.show(self.shared.now()))
    }

    /// Whether there are credentials, for who can do without and is not to wait for long.
    pub(crate) async fn has_soon(&self, key: &RoleSession) -> bool {
        tokio::time::timeout(SOON, self.get(key)).await.is_ok_and(|got| got.is_ok())
    }

    fn look(&self, key: &RoleSession) -> Option<Arc<Entry>> {
        self.shared.slots().get(key).map(|slot| Arc::clone(&slot.entry))
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        self.shared.stop.cancel();
    }
}

/// Somebody's need for a key, such as a running container's.
#[must_use = "dropping it releases the credentials"]
pub(crate) struct Hold {
    shared: Arc<Shared>,
    pub(super) key: RoleSession,
}

impl Drop for Hold {
    fn drop(&mut self) {
        let mut slots = self.shared.slots();
        let Some(slot) = slots.get_mut(&self.key) else {
            return;
        };
        slot.holds = slot.holds.saturating_sub(1);
        if slot.holds > 0 {
            return;
        }
        slot.released = true;
        slot.entry.wipe();
        // A call under way and a remembered failure survive, so that a container restarting in a loop does not cause a call
        // each time; the keeper retires the entry after them.
        if slot.entry.idle() {
            slot.entry.retired.cancel();
            slot.entry.close();
            slots.remove(&self.key);
        }
    }
}

impl Shared {
    pub(super) fn now(&self) -> Timestamp {
        (self.settings.clock)()
    }

    /// Nothing here panics while the lock is held, and every state of the map is a valid one.
    fn slots(&self) -> MutexGuard<'_, HashMap<RoleSession, Slot>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The entry of a key, made and given its keeper if there is none.
    fn entry(self: &Arc<Self>, key: &RoleSession, holds: usize, inherited: Option<Cached>) -> Arc<Entry> {
        let mut slots = self.slots();
        if let Some(slot) = slots.get_mut(key) {
            slot.holds += holds;
            slot.released &= slot.holds == 0;
            return Arc::clone(&slot.entry);
        }
        let entry = Arc::new(Entry::new(key.clone(), inherited, self.stop.child_token()));
        slots.insert(key.clone(), Slot { entry: Arc::clone(&entry), holds, released: false });
        self.runtime.spawn(keeper::keep(Arc::clone(self), Arc::clone(&entry)));
        entry
    }

    pub(super) fn held(&self, entry: &Arc<Entry>) -> bool {
        self.slots().get(&entry.key).is_some_and(|slot| slot.holds > 0)
    }

    /// Takes an entry that nobody holds out of the store; `false` if somebody does.
    pub(super) fn retire_unheld(&self, entry: &Arc<Entry>) -> bool {
        self.retire_if(entry, |slot| slot.holds == 0)
    }

    /// Takes an entry out of the store if its last hold has been dropped.
    pub(super) fn retire_released(&self, entry: &Arc<Entry>) -> bool {
        self.retire_if(entry, |slot| slot.released)
    }

    /// Decided and done under one lock, or a hold could come in between. Only the keeper of the entry calls this, so the
    /// entry in the slot is its own or has been closed already.
    fn retire_if(&self, entry: &Arc<Entry>, condition: impl Fn(&Slot) -> bool) -> bool {
        let mut slots = self.slots();
        let Some(slot) = slots.get(&entry.key).filter(|slot| Arc::ptr_eq(&slot.entry, entry)) else {
            return true;
        };
        let retire = condition(slot);
        if retire {
            slots.remove(&entry.key);
            entry.close();
        }
        retire
    }

    #[cfg(test)]
    pub(super) fn entries(&self) -> usize {
        self.slots().len()
    }
}

#[cfg(test)]
impl Store {
    pub(super) fn entries(&self) -> usize {
        self.shared.entries()
    }
}
