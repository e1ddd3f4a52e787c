//! What happens to a host, in groups. Each scenario says what was seen, or how that was not as it should be.

mod boots;
mod container;
mod engine;
mod package;
mod roles;
mod service;
mod start;

use std::fmt;

use anyhow::{bail, ensure};

use super::guest::Guest;

pub(super) struct Scenario {
    pub(super) name: &'static str,
    pub(super) run: fn(&mut Guest) -> anyhow::Result<String>,
}

pub(super) struct Group {
    pub(super) name: &'static str,
    /// Takes neither a reboot nor another engine.
    quick: bool,
    pub(super) scenarios: &'static [Scenario],
}

/// In this order: the first makes the host what the others take for granted, and from the last but one on the package is gone.
const GROUPS: [Group; 7] = [
    Group { name: "start", quick: true, scenarios: start::SCENARIOS },
    Group { name: "roles", quick: true, scenarios: roles::SCENARIOS },
    Group { name: "service", quick: true, scenarios: service::SCENARIOS },
    Group { name: "engine", quick: false, scenarios: engine::SCENARIOS },
    Group { name: "boots", quick: false, scenarios: boots::SCENARIOS },
    Group { name: "package", quick: true, scenarios: package::SCENARIOS },
    Group { name: "container", quick: true, scenarios: container::SCENARIOS },
];

/// The groups of these names, all if there are none; the first is always among them.
pub(super) fn chosen(names: &[String], quick: bool) -> anyhow::Result<Vec<&'static Group>> {
    let known = GROUPS.iter().map(|group| group.name).collect::<Vec<_>>();
    if let Some(name) = names.iter().find(|name| !known.contains(&name.as_str())) {
        bail!("no group {name}: there are {}", known.join(", "));
    }
    let wanted = |group: &Group| names.is_empty() || names.iter().any(|name| name == group.name);
    let groups = GROUPS.iter().enumerate();
    let groups = groups.filter(|(at, group)| *at == 0 || (wanted(group) && (group.quick || !quick)));
    Ok(groups.map(|(_, group)| group).collect())
}

/// A scenario that this distribution cannot have, for this reason.
#[derive(Debug)]
pub(super) struct NotHere(String);

impl fmt::Display for NotHere {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(&self.0)
    }
}

impl std::error::Error for NotHere {}

/// What was seen, if it is this.
fn same(seen: &str, wanted: &str) -> anyhow::Result<String> {
    ensure!(seen == wanted, "{seen:?} instead of {wanted:?}");
    Ok(seen.to_owned())
}
