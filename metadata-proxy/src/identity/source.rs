//! Where the values of a container come from: labels and environment, each under several names.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::{options::PREFIX, origin};
use crate::containers::Container;

/// Where a container's role or option was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    Label(&'static str),
    /// A setting of a `[[service]]`, by the label that it would be of a container.
    Service(&'static str),
    Environment(&'static str),
}

/// What is found under one name.
pub(super) struct Found<'a> {
    pub(super) source: Source,
    pub(super) value: &'a str,
    /// The image says it, and perhaps the starter as well.
    pub(super) from_image: bool,
}

impl Source {
    fn find(self, container: &Container) -> Option<Found<'_>> {
        let (own, image) = match self {
            Self::Label(name) | Self::Service(name) => {
                (origin::label(container, name), origin::image_label(container, name))
            }
            Self::Environment(name) => {
                (container.env.get(name).map(String::as_str), origin::image_variable(container, name))
            }
        };
        let value = own.or(image)?.trim();
        Some(Found { source: self, value, from_image: own.is_none() })
    }
}

/// What was found in one place.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Said {
    pub(crate) source: String,
    /// As far as it counts.
    pub(crate) value: Option<String>,
    /// The container's image has a value here.
    pub(crate) from_image: bool,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Label(name) => write!(f, "label {name}"),
            Self::Service(name) => write!(f, "[[service]] {}", name.trim_start_matches(PREFIX)),
            Self::Environment(name) => write!(f, "environment variable {name}"),
        }
    }
}

/// What becomes of a setting that an image has brought, and that its starter may have repeated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum OfImage {
    /// It grants or selects something, so it does not count: without it the container has less.
    Ignored,
    /// It only takes away, so it counts whoever has said it.
    Counts,
    /// With it and without it the container might have more than it was meant to: it gets no role.
    Refused,
}

/// The names of one setting, in the order in which they are asked.
pub(crate) struct Names {
    pub(crate) labels: &'static [&'static str],
    pub(crate) variables: &'static [&'static str],
    pub(super) of_image: OfImage,
}

impl Names {
    fn sources(&self, container: &Container) -> impl Iterator<Item = Source> {
        // The operator says it under one name only.
        let (label, most): (fn(&'static str) -> Source, _) =
            if container.service { (Source::Service, 1) } else { (Source::Label, usize::MAX) };
        let labels = self.labels.iter().take(most).map(move |name| label(name));
        let variables = self.variables.iter().filter(move |_| most > 1);
        labels.chain(variables.map(|name| Source::Environment(name)))
    }

    /// Those that are there, whoever has said them.
    pub(super) fn found<'a>(&self, container: &'a Container) -> impl Iterator<Item = Found<'a>> {
        self.sources(container).filter_map(|source| source.find(container))
    }

    /// Those that count.
    pub(super) fn given<'a>(&self, container: &'a Container) -> impl Iterator<Item = Found<'a>> {
        self.found(container).filter(|found| !found.from_image || self.of_image == OfImage::Counts)
    }

    /// The first that is not empty: for a role, an empty value counts as absent, as an unset variable of a compose file
    /// arrives. Not for an option, which may have been meant as a restriction.
    pub(super) fn find<'a>(&self, container: &'a Container) -> Option<Found<'a>> {
        self.given(container).find(|found| !found.value.is_empty())
    }

    /// What each of the names says, for those who ask.
    pub(super) fn said(&self, container: &Container) -> Vec<Said> {
        let said = |source: Source| {
            let found = source.find(container);
            let from_image = found.as_ref().is_some_and(|found| found.from_image);
            let counts = found.filter(|_| !from_image || self.of_image == OfImage::Counts);
            Said { source: source.to_string(), value: counts.map(|found| found.value.to_owned()), from_image }
        };
        self.sources(container).map(said).collect()
    }
}
