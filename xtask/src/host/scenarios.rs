//! What happens to a host, in groups. Each scenario says what was seen, or how that was not as it should be.

mod service;
mod start;

use anyhow::Context as _;

use super::guest::Guest;

pub(super) struct Scenario {
    pub(super) name: &'static str,
    pub(super) run: fn(&mut Guest) -> anyhow::Result<String>,
}

pub(super) struct Group {
    pub(super) name: &'static str,
    /// Takes no reboot.
    quick: bool,
    pub(super) scenarios: &'static [Scenario],
}

/// In this order: the first makes the host what the others take for granted.
const GROUPS: [Group; 2] = [
    Group { name: "start", quick: true, scenarios: start::SCENARIOS },
    Group { name: "service", quick: true, scenarios: service::SCENARIOS },
];

/// The groups of these names, all if there are none; the first is always among them.
pub(super) fn chosen(names: &[String], quick: bool) -> anyhow::Result<Vec<&'static Group>> {
    let known = GROUPS.iter().map(|group| group.name).collect::<Vec<_>>();
    for name in names {
        known
            .contains(&name.as_str())
            .then_some(())
            .with_context(|| format!("no group {name}: there are {}", known.join(", ")))?;
    }
    let wanted = |group: &Group| names.is_empty() || names.iter().any(|name| name == group.name);
    let groups = GROUPS.iter().enumerate();
    let groups = groups.filter(|(at, group)| *at == 0 || (wanted(group) && (group.quick || !quick)));
    Ok(groups.map(|(_, group)| group).collect())
}
