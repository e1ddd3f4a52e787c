//! Directory listings: one name a line, no newline after the last.
//!
//! cloud-init asks for each entry that it sees, and one that fails makes it drop the whole tree. So a listing never
//! names what would then be denied.

use super::path::{is_name, is_version};
use super::policy::{Access, Policy, View};

/// The versions that the real service lists. Every other date is answered as well.
pub(super) const VERSIONS: &str = "1.0\n2007-01-19\n2007-03-01\n2007-08-29\n2007-10-10\n2007-12-15\n2008-02-01\n\
    2008-09-01\n2009-04-04\n2011-01-01\n2011-05-01\n2012-01-12\n2014-02-25\n2014-11-05\n2015-10-20\n2016-04-19\n\
    2016-06-30\n2016-09-02\n2018-03-28\n2018-08-17\n2018-09-24\n2019-10-01\n2020-10-27\n2021-01-03\n2021-03-23\n\
    2021-07-15\n2022-09-24\n2024-04-11\nlatest";

pub(super) const IAM: &str = "info\nsecurity-credentials/";

/// What is to be fetched from the real service.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Forward {
    path: String,
    listing: Option<Listing>,
}

/// A directory whose listing has to be filtered.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Listing {
    Versions,
    Entries { parent: Vec<String>, has_role: bool, view: View },
}

impl Forward {
    pub(super) fn new(path: String, listing: Option<Listing>) -> Self {
        Self { path, listing }
    }

    /// The canonical path, ready for a request line. There is never a query.
    pub(crate) fn path(&self) -> &str {
        &self.path
    }

    /// Whether an answer with status 200 has to pass `Imds::filter_listing`: it is to be fetched whole, with GET also
    /// for a HEAD, and its length changes. Any other answer can be streamed.
    pub(crate) fn is_listing(&self) -> bool {
        self.listing.is_some()
    }

    pub(super) fn filter(&self, policy: &Policy, body: &str) -> String {
        let entries = body.lines().filter(|entry| !entry.is_empty());
        let kept: Vec<_> = match &self.listing {
            None => return body.to_owned(),
            Some(Listing::Versions) => entries.filter(|entry| is_version(name_of(entry))).collect(),
            Some(Listing::Entries { parent, has_role, view }) => {
                let parent: Vec<_> = parent.iter().map(String::as_str).collect();
                let shown = entries.filter(|entry| is_shown(policy, view, &parent, entry));
                with_own_entry(shown.collect(), own_entry(&parent, *has_role))
            }
        };
        let end = if body.ends_with('\n') { "\n" } else { "" };
        kept.join("\n") + end
    }
}

/// What a directory below the version lists by ourselves when nothing of it may come from upstream: the way to `iam/`.
pub(super) fn own_listing(directory: &[&str], has_role: bool) -> Option<String> {
    match directory {
        [] | ["meta-data"] => Some(own_entry(directory, has_role).unwrap_or_default().into()),
        _ => None,
    }
}

/// The entry of a directory below the version that we answer, whatever upstream has there.
pub(super) fn own_entry(directory: &[&str], has_role: bool) -> Option<&'static str> {
    match directory {
        [] => Some("meta-data"),
        ["meta-data"] if has_role => Some("iam/"),
        _ => None,
    }
}

fn is_shown(policy: &Policy, view: &View, parent: &[&str], entry: &str) -> bool {
    let name = match (parent, entry.split_once('=')) {
        // Listed as `0=name-of-the-key`, asked for as `0/`.
        (["meta-data", "public-keys"], Some((number, _))) => number,
        _ => name_of(entry),
    };
    is_name(name) && policy.access(&[parent, &[name]].concat(), view) != Access::Denied
}

/// Listings are sorted, and the entry takes its place in that order.
fn with_own_entry<'a>(mut entries: Vec<&'a str>, own: Option<&'a str>) -> Vec<&'a str> {
    if let Some(own) = own
        && !entries.iter().any(|entry| name_of(entry) == name_of(own))
    {
        let place = entries.iter().position(|entry| *entry > own);
        entries.insert(place.unwrap_or(entries.len()), own);
    }
    entries
}

fn name_of(entry: &str) -> &str {
    entry.strip_suffix('/').unwrap_or(entry)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn filter(policy: &Policy, parent: &[&str], has_role: bool, body: &str) -> String {
        let parent = parent.iter().map(ToString::to_string).collect();
        let view = View::default();
        Forward::new("/".into(), Some(Listing::Entries { parent, has_role, view })).filter(policy, body)
    }

    fn default_policy() -> Policy {
        Policy::new(View::default())
    }

    const META_DATA: &str = "ami-id\nami-manifest-path\nblock-device-mapping/\nevents/\nhostname\niam/\niam-ecs-agent/\n\
        identity-credentials/\ninstance-id\nmanaged-ssh-keys/\nnetwork/\npublic-keys/\nsomething-new/\nspot/\ntags/";

    #[test]
    fn denied_entries_are_removed_and_iam_is_the_containers_own() {
        assert_eq!(
            filter(&default_policy(), &["meta-data"], true, META_DATA),
            "ami-id\nevents/\nhostname\niam/\ninstance-id\nnetwork/\nspot/"
        );
        assert_eq!(
            filter(&default_policy(), &["meta-data"], false, META_DATA),
            "ami-id\nevents/\nhostname\ninstance-id\nnetwork/\nspot/"
        );
    }

    #[test]
    fn iam_stands_in_its_place_also_where_upstream_has_none() {
        for (body, expected) in [
            ("", "iam/"),
            ("hostname", "hostname\niam/"),
            ("instance-id", "iam/\ninstance-id"),
            ("hostname\ninstance-id", "hostname\niam/\ninstance-id"),
            ("hostname\niam\ninstance-id\n", "hostname\niam/\ninstance-id\n"),
            ("hostname\r\ninstance-id\r\n", "hostname\niam/\ninstance-id\n"),
        ] {
            assert_eq!(filter(&default_policy(), &["meta-data"], true, body), expected);
        }
    }

    #[test]
    fn top_levels_are_filtered() {
        let latest = "dynamic\nmeta-data\nuser-data";
        assert_eq!(filter(&default_policy(), &[], true, latest), "dynamic\nmeta-data");
        let with_user_data = Policy::new(View::new(&[], &[], true).unwrap());
        assert_eq!(filter(&with_user_data, &[], true, latest), latest);
        assert_eq!(filter(&default_policy(), &[], true, "dynamic\nuser-data"), "dynamic\nmeta-data");

        let versions = Forward::new("/".into(), Some(Listing::Versions));
        assert_eq!(versions.filter(&default_policy(), "1.0\n2021-07-15\nadmin\nlatest"), "1.0\n2021-07-15\nlatest");
    }

    #[test]
    fn numbered_keys_are_shown_by_their_number() {
        let view = View::new(&["meta-data/public-keys".into()], &["meta-data/public-keys/1".into()], false);
        let policy = Policy::new(view.unwrap());
        let parent = ["meta-data", "public-keys"];
        assert_eq!(filter(&policy, &parent, true, "0=my key\n1=other"), "0=my key");
    }

    #[test]
    fn documents_are_not_touched() {
        let document = Forward::new("/latest/user-data".into(), None);
        assert!(!document.is_listing());
        assert_eq!(document.filter(&default_policy(), "iam\n\nuser-data\n"), "iam\n\nuser-data\n");
    }

    #[test]
    fn without_upstream_the_way_to_iam_remains() {
        assert_eq!(own_listing(&[], true).as_deref(), Some("meta-data"));
        assert_eq!(own_listing(&["meta-data"], true).as_deref(), Some("iam/"));
        assert_eq!(own_listing(&["meta-data"], false).as_deref(), Some(""));
        assert_eq!(own_listing(&["dynamic"], true), None);
        assert!(VERSIONS.lines().all(is_version));
        assert!(VERSIONS.lines().is_sorted());
    }
}
