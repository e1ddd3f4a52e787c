//! How many questions the real service is asked at the same time, and by whom.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use tokio::sync::{AcquireError, OwnedSemaphorePermit, Semaphore};

/// Answers that are still being passed on included; the rest wait, within their time.
const AT_ONCE: usize = 128;
/// Of these one asker may have so many, so that the others find some free also when the service is slow.
const SHARE: usize = 32;

pub(super) struct Slots {
    all: Arc<Semaphore>,
    /// Of whoever has or waits for some.
    shares: Mutex<HashMap<u64, Weak<Semaphore>>>,
}

/// One question's place, until it is dropped.
pub(super) struct Slot {
    _of_all: OwnedSemaphorePermit,
    _of_share: OwnedSemaphorePermit,
}

impl Slots {
    pub(super) fn new() -> Self {
        Self { all: Arc::new(Semaphore::new(AT_ONCE)), shares: Mutex::default() }
    }

    /// Fails only when closed, which they never are.
    pub(super) async fn take(&self, asker: u64) -> Result<Slot, AcquireError> {
        // In this order: whoever waits for its own share keeps nothing of the others'.
        let of_share = self.share(asker).acquire_owned().await?;
        Ok(Slot { _of_all: Arc::clone(&self.all).acquire_owned().await?, _of_share: of_share })
    }

    fn share(&self, asker: u64) -> Arc<Semaphore> {
        let mut shares = self.shares.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(share) = shares.get(&asker).and_then(Weak::upgrade) {
            return share;
        }
        shares.retain(|_, share| share.strong_count() > 0);
        let share = Arc::new(Semaphore::new(SHARE));
        shares.insert(asker, Arc::downgrade(&share));
        share
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn an_asker_has_its_share_and_all_have_no_more_than_there_are() {
        let slots = Slots::new();
        let waits = async |asker| timeout(Duration::from_secs(1), slots.take(asker)).await.is_err();
        let mut taken = Vec::new();
        for asker in 0..4 {
            for _ in 0..SHARE {
                taken.push(slots.take(asker).await.unwrap());
            }
            assert!(waits(asker).await, "{asker}");
        }
        assert_eq!(taken.len(), AT_ONCE);
        assert!(waits(9).await);
        taken.pop();
        assert!(!waits(9).await);
        // Who has gone leaves nothing behind.
        drop(taken);
        drop(slots.take(10).await);
        assert_eq!(slots.shares.lock().unwrap().len(), 1);
    }
}
