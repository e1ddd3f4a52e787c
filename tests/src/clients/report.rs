//! What a client prints: one word and its text on each line.

use anyhow::{Context as _, Result, ensure};

#[derive(Clone, Debug, Default, PartialEq)]
pub struct ClientReport {
    pub version: String,
    pub attempts: Vec<Attempt>,
    /// What the service says about the credentials, if the client was to ask and got any: the last word.
    pub identity: Option<String>,
    pub identity_error: Option<String>,
}

/// One load of credentials.
#[derive(Clone, Debug, PartialEq)]
pub struct Attempt {
    pub access_key: Option<String>,
    /// How long the load took; of a program that is run anew, with its start.
    pub ms: f64,
    pub error: Option<String>,
}

impl ClientReport {
    /// Finds the report in what a client wrote to its standard output.
    pub fn parse(stdout: &str) -> Result<Self> {
        let mut report = Self::default();
        for line in stdout.lines() {
            let (word, text) = line.split_once(' ').unwrap_or((line, ""));
            match word {
                "version" => report.version = text.to_owned(),
                "key" => {
                    let (key, ms) = text.split_once(' ').with_context(|| format!("no time in {line:?}"))?;
                    let ms = ms.parse().with_context(|| format!("no time in {line:?}"))?;
                    report.attempts.push(Attempt { access_key: Some(key.to_owned()), ms, error: None });
                }
                "error" => {
                    report.attempts.push(Attempt { access_key: None, ms: 0.0, error: Some(text.to_owned()) });
                }
                "identity" => report.identity = Some(text.to_owned()),
                "identity-error" => report.identity_error = Some(text.to_owned()),
                _ => {} // a warning of its own
            }
        }
        ensure!(!report.version.is_empty(), "no report in the client's output: {stdout:?}");
        Ok(report)
    }

    /// The access keys it got, one for each attempt that succeeded.
    pub fn access_keys(&self) -> impl Iterator<Item = &str> {
        self.attempts.iter().filter_map(|attempt| attempt.access_key.as_deref())
    }

    /// What went wrong, in any attempt or afterwards.
    pub fn errors(&self) -> impl Iterator<Item = &str> {
        let attempts = self.attempts.iter().filter_map(|attempt| attempt.error.as_deref());
        attempts.chain(self.identity_error.as_deref())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_found_among_other_output() {
        let output = "warning: something\nversion 1\nkey ASIAX 12\nidentity arn:a\nerror none at all\n";
        let report = ClientReport::parse(output).unwrap();
        assert_eq!(report.access_keys().collect::<Vec<_>>(), ["ASIAX"]);
        assert_eq!(report.errors().collect::<Vec<_>>(), ["none at all"]);
        assert_eq!(report.identity.as_deref(), Some("arn:a"));
        assert!(ClientReport::parse("Traceback").is_err());
        assert!(ClientReport::parse("version 1\nkey ASIAX soon").is_err());
    }
}
