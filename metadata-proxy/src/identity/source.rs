//! Where the values of a container come from: labels and environment, each under several names.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::containers::Container;

/// Where a container's role or option was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    Label(&'static str),
    Environment(&'static str),
}

impl Source {
    fn value(self, container: &Container) -> Option<&str> {
        let value = match self {
            Self::Label(name) => container.labels.get(name),
            Self::Environment(name) => container.env.get(name),
        };
        value.map(String::as_str)
    }
}

/// What was found in one place.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Said {
    pub(crate) source: String,
    pub(crate) value: Option<String>,
    /// The container's image has a value here, which does not count.
    pub(crate) from_image: bool,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Label(name) => write!(f, "label {name}"),
            Self::Environment(name) => write!(f, "environment variable {name}"),
        }
    }
}

/// The names of one setting, in the order in which they are asked.
pub(crate) struct Names {
    pub(crate) labels: &'static [&'static str],
    pub(crate) variables: &'static [&'static str],
}

impl Names {
    fn sources(&self) -> impl Iterator<Item = Source> {
        let labels = self.labels.iter().map(|name| Source::Label(name));
        labels.chain(self.variables.iter().map(|name| Source::Environment(name)))
    }

    /// Those that are there.
    pub(super) fn given<'a>(&self, container: &'a Container) -> impl Iterator<Item = (Source, &'a str)> {
        self.sources().filter_map(|source| Some((source, source.value(container)?.trim())))
    }

    /// The first that is not empty: for a role, an empty value counts as absent, as an unset variable of a compose file
    /// arrives. Not for an option, which may have been meant as a restriction.
    pub(super) fn find<'a>(&self, container: &'a Container) -> Option<(Source, &'a str)> {
        self.given(container).find(|(_, value)| !value.is_empty())
    }

    /// What each of the names says, for those who ask.
    pub(super) fn said(&self, container: &Container) -> Vec<Said> {
        let brought = self.brought(container);
        let said = |source: Source| {
            let (value, from_image) = (source.value(container), brought.contains(&source.to_string()));
            Said { source: source.to_string(), value: value.map(|value| value.trim().to_owned()), from_image }
        };
        self.sources().map(said).collect()
    }

    /// Those of the names that the container's image has given a value, which does not count.
    pub(super) fn brought(&self, container: &Container) -> Vec<String> {
        let brought = container.from_image.as_deref().unwrap_or_default();
        self.sources().map(|source| source.to_string()).filter(|source| brought.contains(source)).collect()
    }
}
