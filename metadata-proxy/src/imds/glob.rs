//! Path patterns of the upstream policy: segments in which `*` stands for any run of characters, and a final `**` for
//! everything below.
//!
//! Patterns are relative to the version: `meta-data/placement/**`.

use super::path::is_name;
use crate::wildcard::matches;

/// Why an operator's pattern is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(crate) enum GlobError {
    #[error("it is empty")]
    Empty,
    #[error("it begins with `/`: patterns are relative to the version, as in `meta-data/tags`")]
    Absolute,
    #[error("`**` may stand at its end only")]
    InnerSubtree,
    #[error("it has an empty segment, a dot segment, or a character that metadata paths never have")]
    BadSegment,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pattern {
    segments: Vec<String>,
    subtree: bool,
}

impl Pattern {
    /// A pattern of this program.
    pub(super) fn known(text: &str) -> Self {
        let subtree = text.strip_suffix("/**");
        Self { segments: subtree.unwrap_or(text).split('/').map(Into::into).collect(), subtree: subtree.is_some() }
    }

    pub(super) fn everything() -> Self {
        Self { segments: Vec::new(), subtree: true }
    }

    /// A pattern of the operator. It always includes what is below: whoever denies a directory means its contents.
    pub(super) fn of_operator(text: &str) -> Result<Self, GlobError> {
        if text.is_empty() {
            return Err(GlobError::Empty);
        }
        if text.starts_with('/') {
            return Err(GlobError::Absolute);
        }
        let mut segments: Vec<String> = text.split('/').map(Into::into).collect();
        segments.pop_if(|last| last.is_empty() || last == "**");
        for segment in &segments {
            if segment.contains("**") {
                return Err(GlobError::InnerSubtree);
            }
            if !is_name(&segment.replace('*', "x")) || segment == "." || segment == ".." {
                return Err(GlobError::BadSegment);
            }
        }
        Ok(Self { segments, subtree: true })
    }

    pub(super) fn segments(&self) -> Vec<&str> {
        self.segments.iter().map(String::as_str).collect()
    }

    /// Whether the pattern matches a path.
    pub(super) fn covers(&self, path: &[&str]) -> bool {
        let deep_enough = path.len() == self.segments.len() || (self.subtree && path.len() > self.segments.len());
        deep_enough && self.agrees_with(path)
    }

    /// Whether a path is a directory above what the pattern matches.
    pub(super) fn is_below(&self, path: &[&str]) -> bool {
        path.len() < self.segments.len() && self.agrees_with(path)
    }

    /// Whether there may be a path that both patterns match. It sees no path that only two wildcards in the same segment
    /// have in common, as in `a*` and `*b`.
    pub(super) fn overlaps(&self, other: &Self) -> bool {
        let reaches = |one: &Self, two: &Self| one.subtree || one.segments.len() >= two.segments.len();
        let mut pairs = self.segments.iter().zip(&other.segments);
        reaches(self, other) && reaches(other, self) && pairs.all(|(one, two)| matches(one, two) || matches(two, one))
    }

    fn agrees_with(&self, path: &[&str]) -> bool {
        let mut pairs = self.segments.iter().zip(path);
        pairs.all(|(pattern, name)| matches(pattern, name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn subtree_covers_itself_and_what_is_below() {
        let pattern = Pattern::known("meta-data/tags/**");
        assert!(pattern.is_below(&[]));
        assert!(pattern.is_below(&["meta-data"]));
        assert!(!pattern.is_below(&["dynamic"]));
        assert!(pattern.covers(&["meta-data", "tags"]));
        assert!(pattern.covers(&["meta-data", "tags", "instance", "Name"]));
        assert!(!pattern.covers(&["meta-data", "tag"]));

        let leaf = Pattern::known("meta-data/ami-id");
        assert!(leaf.covers(&["meta-data", "ami-id"]));
        assert!(!leaf.covers(&["meta-data", "ami-id", "x"]));
    }

    #[test]
    fn operators_mean_the_contents_of_what_they_name() {
        for text in ["meta-data/tags", "meta-data/tags/", "meta-data/tags/**"] {
            let pattern = Pattern::of_operator(text).unwrap();
            assert!(pattern.covers(&["meta-data", "tags"]), "{text}");
            assert!(pattern.covers(&["meta-data", "tags", "instance"]), "{text}");
        }
        assert!(Pattern::of_operator("**").unwrap().covers(&[]));
    }

    #[test]
    fn unusable_patterns_are_refused() {
        for (text, error) in [
            ("", GlobError::Empty),
            ("/meta-data/tags", GlobError::Absolute),
            ("/", GlobError::Absolute),
            ("meta-data//tags", GlobError::BadSegment),
            ("meta-data/../tags", GlobError::BadSegment),
            ("meta-data/a b", GlobError::BadSegment),
            ("meta-data/a?", GlobError::BadSegment),
            ("meta-data/**/tags", GlobError::InnerSubtree),
            ("meta-data/a**", GlobError::InnerSubtree),
        ] {
            assert_eq!(Pattern::of_operator(text).unwrap_err(), error, "{text}");
        }
    }

    #[test]
    fn patterns_overlap_where_a_path_matches_both() {
        for (one, two, overlap) in [
            ("meta-data/tags/**", "meta-data/**", true),
            ("meta-data/tags/**", "meta-data/tags/instance/Name/**", true),
            ("meta-data/elastic-*/**", "meta-data/e*/**", true),
            ("meta-data/product-codes", "meta-data/product-codes/x/**", false),
            ("meta-data/tags/**", "dynamic/**", false),
        ] {
            let (one, two) = (Pattern::known(one), Pattern::known(two));
            assert_eq!(one.overlaps(&two), overlap, "{one:?} {two:?}");
            assert_eq!(two.overlaps(&one), overlap, "{one:?} {two:?}");
        }
    }
}
