//! What each container may have at the same time, and no more: whoever asks for too much harms only itself.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// Of one container, or of a cgroup that belongs to none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Limits {
    /// Open at a time. An SDK has one or two.
    pub(crate) connections: usize,
    /// Asked and not yet taken in full.
    pub(crate) requests: usize,
    /// Bytes in the head of a request. An SDK's has about 500, in 10 headers.
    pub(crate) head_size: usize,
    pub(crate) headers: usize,
    /// For the whole head of a request, and between two requests.
    pub(crate) head_timeout: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { connections: 256, requests: 128, head_size: 8192, headers: 64, head_timeout: Duration::from_secs(2) }
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

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One of them, until it is dropped.
pub(super) struct Entered {
    shares: Arc<Shares>,
    cgroup: u64,
}

impl Drop for Entered {
    fn drop(&mut self) {
        let mut counts = self.shares.lock();
        if let Some(count) = counts.get_mut(&self.cgroup) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.cgroup);
            }
        }
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
}
