//! An instance that is not there: everything that the real service would tell of it, from some settings. For machines
//! off EC2.
//!
//! What is asked for is answered from a map of paths to documents, and listings follow from the paths. Nothing here is
//! secret but what the operator has put in for the containers to read, so all is shown that nobody wants hidden.

mod instance;

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use super::{listing::own_entry, path::is_name};

/// What may be said of the instance; everything has a default, the same on every machine.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub(crate) struct Settings {
    pub(crate) instance_id: Option<String>,
    pub(crate) region: Option<String>,
    /// In the region: its first, if none is given.
    pub(crate) zone: Option<String>,
    pub(crate) account: Option<String>,
    pub(crate) instance_type: Option<String>,
    pub(crate) ami_id: Option<String>,
    pub(crate) tags: BTreeMap<String, String>,
    pub(crate) user_data: Option<String>,
    /// Further documents by their path below the version; they replace those of the same path.
    pub(crate) extra: BTreeMap<String, String>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(crate) enum BadInstance {
    #[error("{setting} = {value:?}: expected {expected}")]
    Setting { setting: &'static str, value: String, expected: &'static str },
    #[error("tags: {0:?} can be no name: letters, digits and -._~+=,:@ can, and not `.`, `..` or `_index`")]
    Tag(String),
    #[error("extra: {0:?} is no path below the version, such as `meta-data/public-ipv4`")]
    Path(String),
    #[error("extra: {0:?} is answered by metadata-proxy itself")]
    Ours(String),
    #[error("extra: {0:?} would be a document and a directory at once")]
    Both(String),
}

/// The documents of the instance, by their path below the version.
#[derive(Debug)]
pub(crate) struct Instance(BTreeMap<String, String>);

impl Instance {
    pub(crate) fn new(settings: Settings) -> Result<Self, BadInstance> {
        let mut documents = instance::documents(&settings)?;
        for (key, value) in settings.tags {
            if !is_name(&key) || matches!(key.as_str(), "." | ".." | "_index") {
                return Err(BadInstance::Tag(key));
            }
            documents.insert(format!("meta-data/tags/instance/{key}"), value);
        }
        if let Some(user_data) = settings.user_data {
            documents.insert("user-data".to_owned(), user_data);
        }
        for (path, document) in settings.extra {
            check_extra(&path, &documents)?;
            documents.insert(path, document);
        }
        Ok(Self(documents))
    }

    /// The document with this path below the version, or the listing of the directory, without what is hidden. With a
    /// role, the caller's own `iam/` is in the listing above it.
    pub(super) fn find(&self, path: &[&str], has_role: bool, hidden: impl Fn(&[&str]) -> bool) -> Option<String> {
        let joined = path.join("/");
        if let Some(document) = self.0.get(&joined) {
            return Some(document.clone());
        }
        let prefix = if path.is_empty() { joined } else { joined + "/" };
        let below = self.0.range(prefix.clone()..).map_while(|(path, _)| path.strip_prefix(&prefix));
        let shown = below.filter(|rest| {
            let whole: Vec<_> = path.iter().copied().chain(rest.split('/')).collect();
            (path.len() + 1..=whole.len()).all(|depth| !hidden(&whole[..depth]))
        });
        let mut entries: BTreeSet<String> = shown.map(|rest| entry(path, rest)).collect();
        if entries.is_empty() {
            return None;
        }
        entries.extend(own_entry(path, has_role).map(str::to_owned));
        Some(entries.into_iter().collect::<Vec<_>>().join("\n"))
    }
}

/// What a directory lists for a document somewhere below it.
fn entry(directory: &[&str], rest: &str) -> String {
    match (directory, rest.split_once('/')) {
        (_, None) => rest.to_owned(),
        // The real service lists these two levels in ways of its own.
        ([], Some((name, _))) => name.to_owned(),
        (["meta-data", "public-keys"], Some((number, _))) => format!("{number}=key-{number}"),
        (_, Some((name, _))) => format!("{name}/"),
    }
}

fn check_extra(path: &str, documents: &BTreeMap<String, String>) -> Result<(), BadInstance> {
    let segments: Vec<&str> = path.split('/').collect();
    if !segments.iter().all(|name| is_name(name) && !name.bytes().all(|byte| byte == b'.')) {
        return Err(BadInstance::Path(path.to_owned()));
    }
    if matches!(segments.as_slice(), ["meta-data", "iam", ..] | ["api", ..]) || path == "meta-data" {
        return Err(BadInstance::Ours(path.to_owned()));
    }
    let is_above =
        |directory: &str, document: &str| document.strip_prefix(directory).is_some_and(|rest| rest.starts_with('/'));
    if documents.keys().any(|known| is_above(known, path) || is_above(path, known)) {
        return Err(BadInstance::Both(path.to_owned()));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn settings(text: &str) -> Settings {
        toml::from_str(text).unwrap()
    }

    fn find(text: &str, path: &str) -> Option<String> {
        let path: Vec<_> = path.split('/').filter(|name| !name.is_empty()).collect();
        Instance::new(settings(text)).unwrap().find(&path, true, |_| false)
    }

    #[test]
    fn directories_list_what_is_below() {
        for (path, expected) in [
            ("", "dynamic\nmeta-data"),
            ("dynamic", "fws/\ninstance-identity/"),
            ("meta-data/placement", "availability-zone\navailability-zone-id\nregion"),
            ("meta-data/services", "domain\npartition"),
            ("meta-data/events/maintenance", "history\nscheduled"),
        ] {
            assert_eq!(find("", path).as_deref(), Some(expected), "{path}");
        }
        for missing in ["meta-data/place", "user-data", "meta-data/tags", "meta-data/ami-id/x", "meta-data/nothing"] {
            assert_eq!(find("", missing), None, "{missing}");
        }
    }

    #[test]
    fn every_entry_of_every_listing_can_be_asked_for() {
        let text =
            "user-data = 'x'\n[tags]\nName = 'web'\n[extra]\n'meta-data/public-keys/0/openssh-key' = 'ssh-rsa x'\n";
        let instance = Instance::new(settings(text)).unwrap();
        let mut documents = 0;
        let mut directories = vec![String::new()];
        while let Some(directory) = directories.pop() {
            let path: Vec<_> = directory.split('/').filter(|name| !name.is_empty()).collect();
            for entry in instance.find(&path, false, |_| false).unwrap().lines() {
                let name = entry.split_once('=').map_or(entry, |(number, _)| number).trim_end_matches('/');
                let below: Vec<_> = path.iter().copied().chain([name]).collect();
                assert!(instance.find(&below, false, |_| false).is_some(), "{below:?}");
                match instance.0.contains_key(&below.join("/")) {
                    true => documents += 1,
                    false => directories.push(below.join("/")),
                }
            }
        }
        assert_eq!(documents, instance.0.len());
    }

    #[test]
    fn iam_is_listed_for_those_with_a_role() {
        let instance = Instance::new(Settings::default()).unwrap();
        let listing = |has_role| instance.find(&["meta-data"], has_role, |_| false).unwrap();
        assert!(listing(true).contains("hostname\niam/\ninstance-action"));
        assert!(!listing(false).contains("iam"));
    }

    #[test]
    fn tags_user_data_and_extra_documents_are_there_when_given() {
        let text = "user-data = '#!/bin/sh'\n[tags]\nName = 'my web server'\n[extra]\n'meta-data/public-ipv4' = '192.0.2.1'\n\
            'meta-data/ami-launch-index' = '7'\n'meta-data/public-keys/0/openssh-key' = 'ssh-rsa x'\n";
        for (path, expected) in [
            ("", "dynamic\nmeta-data\nuser-data"),
            ("user-data", "#!/bin/sh"),
            ("meta-data/tags/instance", "Name"),
            ("meta-data/tags/instance/Name", "my web server"),
            ("meta-data/public-ipv4", "192.0.2.1"),
            ("meta-data/ami-launch-index", "7"),
            ("meta-data/public-keys", "0=key-0"),
            ("meta-data/public-keys/0", "openssh-key"),
        ] {
            assert_eq!(find(text, path).as_deref(), Some(expected), "{path}");
        }
    }

    #[test]
    fn what_cannot_be_is_an_error_that_says_so() {
        for (text, expected) in [
            ("tags = { 'a b' = 'x' }", "tags: \"a b\" can be no name"),
            ("tags = { _index = 'x' }", "tags: \"_index\" can be no name"),
            ("extra = { '/meta-data/x' = 'x' }", "extra: \"/meta-data/x\" is no path below the version"),
            ("extra = { 'meta-data/../x' = 'x' }", "is no path below the version"),
            ("extra = { 'meta-data/iam/info' = 'x' }", "is answered by metadata-proxy itself"),
            ("extra = { 'api/token' = 'x' }", "is answered by metadata-proxy itself"),
            ("extra = { 'meta-data/placement' = 'x' }", "a document and a directory at once"),
            ("extra = { 'meta-data/ami-id/x' = 'x' }", "a document and a directory at once"),
        ] {
            let error = Instance::new(settings(text)).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }
}
