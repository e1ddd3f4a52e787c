//! What a reload cannot change.

use super::Config;

/// By the names of the settings.
pub(crate) type Fixed = Vec<(&'static str, String)>;

impl Config {
    pub(crate) fn fixed(&self) -> Fixed {
        // All of it: what is new is a mistake here until somebody has thought of it.
        let Self {
            engines,
            file: _,
            place,
            identity: _,
            trust_image_metadata,
            credentials,
            upstream,
            imds_endpoint,
            exempt_cgroups,
            services,
            admin_socket,
            metrics_address,
            limits,
            audit_log,
            log_format,
            log,
        } = self;
        vec![
            ("docker-host and [[engine]] hosts", format!("{engines:?}")),
            ("cgroup", format!("{:?}", place.cgroup)),
            ("bpffs", format!("{:?}", place.bpffs)),
            ("trust-image-metadata", trust_image_metadata.to_string()),
            ("[sts]", format!("{credentials:?}")),
            ("upstream or simulation", format!("{upstream:?}")),
            ("imds-endpoint", format!("{imds_endpoint:?}")),
            ("[exempt] cgroups", format!("{exempt_cgroups:?}")),
            ("[host] and [[service]]", format!("{services:?}")),
            ("admin-socket", format!("{admin_socket:?}")),
            ("metrics-address", format!("{metrics_address:?}")),
            ("[limits]", format!("{limits:?}")),
            ("audit-log", format!("{audit_log:?}")),
            ("log-format", format!("{log_format:?}")),
            ("log", log.clone()),
        ]
    }

    /// The settings that are other than those in force, and cannot be taken over.
    pub(crate) fn needs_restart(&self, in_force: &Fixed) -> Vec<&'static str> {
        let now = self.fixed();
        let changed = now.iter().zip(in_force).filter(|(new, old)| new != old);
        changed.map(|((name, _), _)| *name).collect()
    }
}
