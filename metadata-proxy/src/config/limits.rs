//! The `[limits]` table of the configuration file: what one container may have.

use std::{ops::RangeInclusive, time::Duration};

use jiff::SignedDuration;
use serde::Deserialize;

use crate::server::Limits;

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub(super) struct Table {
    connections: Option<usize>,
    requests: Option<usize>,
    head_size: Option<usize>,
    headers: Option<usize>,
    head_timeout: Option<SignedDuration>,
}

impl Table {
    pub(super) fn limits(self) -> Result<Limits, String> {
        let defaults = Limits::default();
        Ok(Limits {
            connections: within("connections", self.connections, 1..=65_536, defaults.connections)?,
            requests: within("requests", self.requests, 1..=65_536, defaults.requests)?,
            // Less would refuse SDKs; hyper itself takes no smaller buffer.
            head_size: within("head-size", self.head_size, 8192..=1_048_576, defaults.head_size)?,
            headers: within("headers", self.headers, 32..=1024, defaults.headers)?,
            head_timeout: match self.head_timeout.map(Duration::try_from) {
                None => defaults.head_timeout,
                Some(Ok(time)) if (100..=60_000).contains(&time.as_millis()) => time,
                Some(_) => return Err("head-timeout: expected 100 ms to 60 s, such as \"2s\"".to_owned()),
            },
        })
    }
}

fn within(name: &str, given: Option<usize>, bounds: RangeInclusive<usize>, default: usize) -> Result<usize, String> {
    match given {
        Some(value) if !bounds.contains(&value) => {
            Err(format!("{name} = {value}: expected {} to {}", bounds.start(), bounds.end()))
        }
        given => Ok(given.unwrap_or(default)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn limits(text: &str) -> Result<Limits, String> {
        toml::from_str::<Table>(text).map_err(|error| error.message().to_owned())?.limits()
    }

    #[test]
    fn what_is_given_replaces_the_default() {
        let given = "connections = 1\nrequests = 2\nhead-size = 16384\nheaders = 32\nhead-timeout = '500ms'\n";
        let expected = Limits {
            connections: 1,
            requests: 2,
            head_size: 16_384,
            headers: 32,
            head_timeout: Duration::from_millis(500),
        };
        assert_eq!(limits(given), Ok(expected));
        assert_eq!(limits(""), Ok(Limits::default()));
    }

    #[test]
    fn what_would_serve_nobody_is_an_error_that_names_the_limit() {
        for (given, expected) in [
            ("connections = 0", "connections = 0: expected 1 to 65536"),
            ("requests = 100000", "requests = 100000: expected"),
            ("head-size = 100", "head-size = 100: expected 8192 to"),
            ("headers = 1", "headers = 1: expected 32 to 1024"),
            ("head-timeout = '0s'", "head-timeout: expected 100 ms to 60 s"),
            ("head-timeout = '-2s'", "head-timeout: expected"),
            ("head-timeout = 2", "invalid type"),
            ("connections = -1", "invalid value"),
        ] {
            let error = limits(given).unwrap_err();
            assert!(error.contains(expected), "{given}: {error}");
        }
    }
}
