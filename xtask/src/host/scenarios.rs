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
    /// Among the few that tell most for their time.
    pub(super) quick: bool,
    pub(super) run: fn(&mut Guest) -> anyhow::Result<String>,
}

struct Group {
    name: &'static str,
    scenarios: &'static [Scenario],
}

/// The group that takes the container image.
pub(super) const IMAGE: &str = "container";

/// In this order: the first makes the host what the others take for granted, and from the last but one on the package is gone.
const GROUPS: [Group; 7] = [
    Group { name: "start", scenarios: start::SCENARIOS },
    Group { name: "roles", scenarios: roles::SCENARIOS },
    Group { name: "service", scenarios: service::SCENARIOS },
    Group { name: "engine", scenarios: engine::SCENARIOS },
    Group { name: "boots", scenarios: boots::SCENARIOS },
    Group { name: "package", scenarios: package::SCENARIOS },
    Group { name: IMAGE, scenarios: container::SCENARIOS },
];

/// A group's name, and those of its scenarios that are gone through.
pub(super) type Chosen = (&'static str, Vec<&'static Scenario>);

/// The groups of these names, all if there are none; the first is always among them.
pub(super) fn chosen(names: &[String], quick: bool) -> anyhow::Result<Vec<Chosen>> {
    let known = GROUPS.iter().map(|group| group.name).collect::<Vec<_>>();
    if let Some(name) = names.iter().find(|name| !known.contains(&name.as_str())) {
        bail!("no group {name}: there are {}", known.join(", "));
    }
    let wanted = |group: &Group| names.is_empty() || names.iter().any(|name| name == group.name);
    let groups = GROUPS.iter().enumerate().filter(|(at, group)| *at == 0 || wanted(group));
    let chosen = groups.map(|(_, group)| {
        let scenarios = group.scenarios.iter().filter(|scenario| scenario.quick || !quick);
        (group.name, scenarios.collect::<Vec<_>>())
    });
    Ok(chosen.filter(|(_, scenarios)| !scenarios.is_empty()).collect())
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
