//! `[[service]]` and `[host]`: what processes of the host get.

use std::{collections::BTreeMap, path::PathBuf};

use serde::Deserialize;

use crate::{
    identity,
    services::{At, Service},
};

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub(super) struct Host {
    pub(super) default: Default,
}

/// What a process of the host has that is neither exempt nor a service's.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Default {
    #[default]
    Allow,
    Deny,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Table {
    unit: Option<String>,
    cgroup: Option<PathBuf>,
    /// Named as containers' labels, without their prefix.
    #[serde(flatten)]
    said: BTreeMap<String, String>,
}

impl Table {
    pub(super) fn service(self, place: &str) -> Result<Service, String> {
        let at = match (self.unit, self.cgroup) {
            (Some(unit), None) if !unit.is_empty() && !unit.contains('/') => At::Unit(unit),
            (None, Some(path)) if path.is_absolute() && path.iter().count() > 1 => {
                At::Cgroup(path.strip_prefix("/").unwrap_or(&path).to_owned())
            }
            _ => {
                return Err(
                    "expected either unit, a name such as \"backup.service\" or \"app@*.service\", or cgroup, a path below the \
                     cgroup2 mount such as \"/system.slice/backup.service\""
                        .to_owned(),
                );
            }
        };
        let labels =
            self.said.into_iter().map(|(name, value)| (format!("{}{name}", identity::PREFIX), value)).collect();
        let service = Service { place: format!("[[service]] {place}"), at, labels };
        identity::check_service(&service.container("x.service".as_ref(), 1, 1)).map(|()| service)
    }
}
