//! `[sts]` of the configuration file: how STS is asked.

use serde::Deserialize;

use crate::{
    credentials::{Limits, Settings},
    identity::seconds,
};

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub(super) struct Table {
    calls_per_second: Option<f64>,
    concurrent_calls: Option<usize>,
    refusal_memory: Option<String>,
}

impl Table {
    pub(super) fn settings(self) -> Result<Settings, String> {
        let defaults = Settings::default();
        let limits = Limits {
            per_second: self.calls_per_second.unwrap_or(defaults.limits.per_second),
            concurrent: self.concurrent_calls.unwrap_or(defaults.limits.concurrent),
        };
        if !(0.1..=1000.0).contains(&limits.per_second) {
            return Err(format!("calls-per-second {}: expected 0.1 to 1000", limits.per_second));
        }
        if !(1..=1000).contains(&limits.concurrent) {
            return Err(format!("concurrent-calls {}: expected 1 to 1000", limits.concurrent));
        }
        let refusal_memory = match &self.refusal_memory {
            None => defaults.refusal_memory,
            Some(text) => seconds(text)
                .filter(|memory| (1..=3600).contains(&memory.as_secs()))
                .ok_or_else(|| format!("refusal-memory {text:?}: expected 1s to 1h"))?,
        };
        Ok(Settings { limits, refusal_memory, ..defaults })
    }
}
