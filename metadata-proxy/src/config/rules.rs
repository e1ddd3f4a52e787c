//! `[[rule]]` tables of the configuration file.

use std::collections::BTreeMap;

use serde::Deserialize;

pub(super) use crate::identity::rules::Rules;
use crate::{
    containers::UserNamespace,
    identity::{
        Glob, INSTANCE, check_policy_arns, duration, policy,
        rules::{Allowance, Effect, Matching, Rule},
    },
};

/// What becomes of a container that no rule matches, if there are rules.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Unmatched {
    #[default]
    Deny,
    Allow,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub(super) struct Table {
    label: BTreeMap<String, Glob>,
    name: Option<Glob>,
    image: Option<Glob>,
    compose_project: Option<Glob>,
    ecs_cluster: Option<Glob>,
    ecs_family: Option<Glob>,
    network: Option<Glob>,
    user_namespace: Option<UserNamespace>,
    engine: Option<Glob>,

    deny: bool,
    allow: Vec<String>,
    default_role: Option<String>,
    max_duration: Option<String>,
    policy: Option<String>,
    policy_arns: Vec<String>,
    tags: BTreeMap<String, String>,
}

impl Table {
    pub(super) fn rule(self, place: &str) -> Result<Rule, String> {
        let gives = !self.allow.is_empty() || self.default_role.is_some();
        let limits = self.max_duration.is_some()
            || self.policy.is_some()
            || !self.policy_arns.is_empty()
            || !self.tags.is_empty();
        let names_instance = self.allow.iter().chain(&self.default_role).any(|role| role == INSTANCE);
        if limits && names_instance {
            return Err(format!("nothing can be forced upon the host's own role: give {INSTANCE} a rule of its own"));
        }
        let effect = match (self.deny, gives, limits) {
            (true, false, false) => Effect::Deny,
            (true, ..) => return Err("a rule with deny = true has nothing else but what it matches".to_owned()),
            (false, false, _) => {
                return Err("a rule says allow = [...], default-role = \"...\" or deny = true".to_owned());
            }
            (false, true, _) => Effect::Allow(Box::new(Allowance {
                allow: self
                    .allow
                    .iter()
                    .map(|role| role.parse().map_err(|error| format!("allow: {error}")))
                    .collect::<Result<_, _>>()?,
                default_role: self
                    .default_role
                    .map(|role| role.parse().map_err(|error| format!("default-role: {error}")))
                    .transpose()?,
                max_duration: self
                    .max_duration
                    .map(|text| duration(&text).map_err(|error| format!("max-duration {text:?}: {error}")))
                    .transpose()?,
                policy: self
                    .policy
                    .map(|text| policy(&text).map_err(|error| format!("policy: {error}")))
                    .transpose()?,
                policy_arns: check_policy_arns(&self.policy_arns)
                    .map(|()| self.policy_arns)
                    .map_err(|error| format!("policy-arns: {error}"))?,
                tags: super::tags(&self.tags).map_err(|error| format!("tags: {error}"))?,
            })),
        };
        let matching = Matching {
            label: self.label,
            name: self.name,
            image: self.image,
            compose_project: self.compose_project,
            ecs_cluster: self.ecs_cluster,
            ecs_family: self.ecs_family,
            network: self.network,
            user_namespace: self.user_namespace,
            engine: self.engine,
        };
        Ok(Rule { place: place.to_owned(), matching, effect })
    }
}
