//! Which engines are followed: flags, or `docker-host` and `[[engine]]` of the file, or those that a host may have.

use std::collections::{HashMap, HashSet};

use serde::Deserialize;

use crate::{
    containers::docker::EngineAt,
    identity::rules::{Allowed, EnginePolicy},
    services,
};

const DOCKER: &str = "unix:///var/run/docker.sock";
const PODMAN: &str = "unix:///run/podman/podman.sock";

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub(super) struct Table {
    host: String,
    name: Option<String>,
    allow: Vec<String>,
    deny: Vec<String>,
}

/// As one string, or as several.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(super) enum Hosts {
    One(String),
    Several(Vec<String>),
}

impl Hosts {
    pub(super) fn all(self) -> Vec<String> {
        match self {
            Self::One(host) => vec![host],
            Self::Several(hosts) => hosts,
        }
    }
}

#[derive(Debug)]
pub(super) struct Engines {
    pub(super) at: Vec<EngineAt>,
    /// By their names.
    pub(super) policies: HashMap<String, EnginePolicy>,
}

impl Engines {
    /// `hosts` are those of the flags, or else of `docker-host`, and `origin` is where they stand. Tables name engines of
    /// their own where there are no flags, and say what those of flags are called and may have.
    pub(super) fn resolve(
        hosts: Vec<String>,
        origin: &str,
        tables: Vec<(String, Table)>,
        by_flag: bool,
    ) -> Result<Self, String> {
        let mut found = Self { at: Vec::new(), policies: HashMap::new() };
        let mut names = HashSet::new();
        let mut add = |at: &mut Vec<EngineAt>, place: &str, name: String, host: String| {
            if !["unix:///", "tcp://", "http://"].iter().any(|scheme| host.starts_with(scheme)) {
                return Err(format!("{place} {host:?}: expected unix:///path or tcp://host:port"));
            }
            if at.iter().any(|other| other.host == host) {
                return Err(format!("{place} {host:?}: it is given twice"));
            }
            if name == services::ENGINE {
                return Err(format!(
                    "{place} {host:?}: {name:?} is what services of the host are of; give it another name"
                ));
            }
            if !names.insert(name.clone()) {
                return Err(format!(
                    "{place} {host:?}: another engine is called {name:?}, too; give it a name in [[engine]]"
                ));
            }
            at.push(EngineAt { name, host, optional: false });
            Ok(())
        };
        let mut named = HashMap::new();
        for (place, table) in &tables {
            if named.insert(table.host.clone(), name_of(table)).is_some() {
                return Err(format!("{place}: host {:?} has another [[engine]]", table.host));
            }
        }
        for host in hosts {
            let name = named.get(&host).cloned().unwrap_or_else(|| default_name(&host));
            add(&mut found.at, origin, name, host)?;
        }
        for (place, table) in tables {
            let name = name_of(&table);
            if !found.at.iter().any(|at| at.host == table.host) && !by_flag {
                add(&mut found.at, &format!("{place}: host"), name.clone(), table.host)?;
            }
            let roles = |what: &str, roles: Vec<String>| {
                let parse = |role: String| role.parse().map_err(|error| format!("{place}: {what}: {error}"));
                roles.into_iter().map(parse).collect::<Result<Vec<Allowed>, _>>()
            };
            let policy = EnginePolicy { allow: roles("allow", table.allow)?, deny: roles("deny", table.deny)? };
            if !policy.allow.is_empty() || !policy.deny.is_empty() {
                found.policies.insert(name, policy);
            }
        }
        if found.at.is_empty() {
            let optional = |name: &str, host: &str| EngineAt { name: name.into(), host: host.into(), optional: true };
            found.at = vec![optional("docker", DOCKER), optional("podman", PODMAN)];
        }
        Ok(found)
    }
}

fn name_of(table: &Table) -> String {
    table.name.clone().unwrap_or_else(|| default_name(&table.host))
}

/// By the place: of a user's engines, with the user's directory.
fn default_name(host: &str) -> String {
    let kind = if host.contains("podman") { "podman" } else { "docker" };
    match host.strip_prefix("unix:///run/user/").and_then(|path| path.split('/').next()) {
        Some(uid) => format!("{kind}-{uid}"),
        None => kind.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(
        hosts: &[&str],
        tables: &[(&str, Option<&str>)],
        by_flag: bool,
    ) -> Result<Vec<(String, String)>, String> {
        let table = |(host, name): &(&str, Option<&str>)| {
            let table = Table { host: (*host).to_owned(), name: name.map(str::to_owned), ..Table::default() };
            ("file:1".to_owned(), table)
        };
        let hosts = hosts.iter().map(|host| (*host).to_owned()).collect();
        let engines = Engines::resolve(hosts, "--docker-host", tables.iter().map(table).collect(), by_flag)?;
        Ok(engines.at.into_iter().map(|at| (at.name, at.host)).collect())
    }

    #[test]
    fn engines_have_the_names_that_they_are_given_or_that_their_places_tell() {
        let pairs =
            |pairs: &[(&str, &str)]| Ok(pairs.iter().map(|(a, b)| ((*a).into(), (*b).into())).collect::<Vec<_>>());
        assert_eq!(resolve(&[], &[], false), pairs(&[("docker", DOCKER), ("podman", PODMAN)]));
        let users = "unix:///run/user/1000/docker.sock";
        assert_eq!(resolve(&[DOCKER, users], &[], true), pairs(&[("docker", DOCKER), ("docker-1000", users)]));
        // A flag wins over the file's engines, and the file still says what they are called.
        assert_eq!(resolve(&[users], &[(users, Some("ci")), (PODMAN, None)], true), pairs(&[("ci", users)]));
        assert_eq!(
            resolve(&[DOCKER], &[(PODMAN, None), (DOCKER, Some("main"))], false),
            pairs(&[("main", DOCKER), ("podman", PODMAN)])
        );
    }

    #[test]
    fn what_cannot_be_told_apart_is_an_error() {
        for (hosts, tables, reason) in [
            (&[DOCKER, DOCKER][..], &[][..], "given twice"),
            (&[DOCKER, "tcp://other:1"], &[], "another engine is called \"docker\""),
            (&[], &[(DOCKER, None), (DOCKER, None)], "has another [[engine]]"),
            (&[], &[(DOCKER, Some("a")), (PODMAN, Some("a"))], "another engine is called \"a\""),
            (&["/var/run/docker.sock"], &[], "expected unix:///path"),
            (&[], &[("", None)], "expected unix:///path"),
        ] {
            let error = resolve(hosts, tables, false).unwrap_err();
            assert!(error.contains(reason), "{error}");
        }
    }
}
