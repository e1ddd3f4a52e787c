//! Patterns of the operator: `*` stands for any run of characters, `?` for one. As in IAM's own
//! policies, both stand for slashes too.

use serde::Deserialize;

use crate::wildcard;

#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(transparent)]
pub(crate) struct Glob(pub(super) String);

impl Glob {
    pub(super) fn matches(&self, text: &str) -> bool {
        wildcard::matches(&self.0, text)
    }
}
