//! What the running daemon says of itself to `metadata-proxy check`.

use std::{
    path::PathBuf,
    sync::{PoisonError, RwLock},
};

use serde::{Deserialize, Serialize};

use crate::config::Config;

/// As it is now; `change` follows the rest of the daemon.
pub(crate) struct About(RwLock<Facts>);

#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Facts {
    pub(crate) version: String,
    pub(crate) pid: u32,
    /// In few words.
    pub(crate) configuration: String,
    pub(crate) file: Option<PathBuf>,
    /// Processes of the host have nothing unless they are listed.
    #[serde(default)]
    pub(crate) host_denied: bool,
    /// Why the file that was last read is not the one in force.
    pub(crate) refused: Option<String>,
    /// Who it is to AWS, once that is known.
    pub(crate) identity: Option<String>,
    /// Else why not.
    pub(crate) trouble: Option<String>,
    /// Where its own credentials come from.
    pub(crate) source: Option<String>,
}

impl About {
    pub(crate) fn new(config: &Config) -> Self {
        Self(RwLock::new(Facts {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            configuration: config.in_short(),
            file: config.file.clone(),
            host_denied: config.services.deny,
            refused: None,
            identity: None,
            trouble: None,
            source: None,
        }))
    }

    pub(crate) fn change(&self, change: impl FnOnce(&mut Facts)) {
        change(&mut self.0.write().unwrap_or_else(PoisonError::into_inner));
    }

    pub(super) fn facts(&self) -> Facts {
        self.0.read().unwrap_or_else(PoisonError::into_inner).clone()
    }
}
