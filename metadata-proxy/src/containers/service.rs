//! Services of the host, beside the containers: the operator's file tells of them, and no engine.

use std::sync::Arc;

use super::{Container, Entry, Registry};

/// In place of an engine.
pub(super) const SERVICES: usize = usize::MAX;

impl<W: Send + Sync + 'static> Registry<W> {
    /// For as long as its cgroup is there.
    pub(crate) fn admit_service(&self, service: Container) {
        let Container { id, pid, cgroup, name, .. } = service.clone();
        let mut entries = self.write();
        let workload = Arc::new((self.admit)(service, None));
        self.write_cgroups().insert(cgroup, id.clone());
        entries.insert(id, Entry { engine: SERVICES, pid, cgroup, name, complete: true, workload });
    }

    pub(crate) fn dismiss_service(&self, cgroup: u64) {
        let id = self.read_cgroups().get(&cgroup).cloned();
        if let Some(id) = id {
            self.dismiss_if(&id, |entry| entry.engine == SERVICES);
        }
    }
}
