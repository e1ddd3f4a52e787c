//! What each container may have at the same time, and no more: whoever asks for too much harms only itself.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// Of one container, or of a cgroup that belongs to none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Open at a time. An SDK has one or two; a program may start hundreds of processes at once.
    pub(crate) connections: usize,
    /// Asked and not yet taken in full, without those that wait for credentials.
    pub(crate) requests: usize,
    /// Bytes in the head of a request. An SDK's has about 500, in 10 headers.
    pub(crate) head_size: usize,
    pub(crate) headers: usize,
    /// For the whole head of a request, and between two requests.
    pub(crate) head_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { connections: 512, requests: 128, head_size: 8192, headers: 64, head_timeout: Duration::from_secs(2) }
    }
}

/// How many there are of one kind, by cgroup.
#[derive(Default)]
pub(super) struct Shares(Mutex<HashMap<u64, usize>>);

impl Shares {
    /// None: this cgroup has its share.
    pub(super) fn enter(self: &Arc<Self>, cgroup: u64, limit: usize) -> Option<Entered> {
        let mut counts = self.lock();
        let count = counts.get(&cgroup).copied().unwrap_or_default();
        if count >= limit {
            return None;
        }
        counts.insert(cgroup, count + 1);
        Some(Entered { shares: Arc::clone(self), cgroup })
    }

    fn leave(&self, cgroup: u64) {
        let mut counts = self.lock();
        if let Some(count) = counts.get_mut(&cgroup) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&cgroup);
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One of them, until it is dropped.
pub(super) struct Entered {
    shares: Arc<Shares>,
    cgroup: u64,
}

impl Entered {
    /// Does not count while this is waited for: what costs nothing, however many wait for the same.
    pub(super) async fn apart<T>(&self, wait: impl Future<Output = T>) -> T {
        self.shares.leave(self.cgroup);
        // Whoever gives up waiting is counted again, and then drops it.
        let _back = Back(self);
        wait.await
    }
}

struct Back<'a>(&'a Entered);

impl Drop for Back<'_> {
    fn drop(&mut self) {
        *self.0.shares.lock().entry(self.0.cgroup).or_default() += 1;
    }
}

impl Drop for Entered {
    fn drop(&mut self) {
        self.shares.leave(self.cgroup);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroup_has_its_share_and_no_more() {
        let shares = Arc::<Shares>::default();
        let mut entered: Vec<_> = (0..3).map(|_| shares.enter(1, 3).unwrap()).collect();
        assert!(shares.enter(1, 3).is_none());
        assert!(shares.enter(2, 3).is_some());
        entered.pop();
        assert!(shares.enter(1, 3).is_some());
        drop(entered);
        assert!(shares.lock().is_empty());
    }

    #[tokio::test]
    async fn who_waits_apart_has_no_share_and_who_gives_up_leaves_none_behind() {
        let shares = Arc::<Shares>::default();
        let (first, second) = (shares.enter(1, 1).unwrap(), Arc::clone(&shares));
        let other = first.apart(async { second.enter(1, 1).unwrap() }).await;
        assert_eq!(shares.lock().get(&1), Some(&2));
        drop(other);
        let waiting = async move { first.apart(std::future::pending::<()>()).await };
        assert!(tokio::time::timeout(Duration::from_millis(1), waiting).await.is_err());
        assert!(shares.lock().is_empty());
    }
}
