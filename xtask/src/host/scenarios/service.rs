//! What an operator does with the unit.

use super::Scenario;

pub(super) const SCENARIOS: &[Scenario] = &[];
