//! The operator's policy: rules in order, of which the first that matches a container holds.

use std::{collections::BTreeMap, fmt, str::FromStr, time::Duration};

use super::{
    glob::Glob,
    options::{Options, UNCLEAR},
    origin,
    role::{self, BadRole, Home, RoleArn, RoleBase, RoleSpec},
    template::Template,
};
use crate::containers::{Container, UserNamespace};

#[derive(Debug, Default)]
pub(crate) struct Rules {
    pub(crate) rules: Vec<Rule>,
    /// Whether a container that no rule matches is treated as if there were none.
    pub(crate) unmatched_allowed: bool,
}

#[derive(Debug)]
pub(crate) struct Rule {
    /// Where it stands, for those who ask.
    pub(crate) place: String,
    pub(crate) matching: Matching,
    pub(crate) effect: Effect,
}

/// All that are given must match.
#[derive(Debug, Default)]
pub(crate) struct Matching {
    pub(crate) label: BTreeMap<String, Glob>,
    pub(crate) name: Option<Glob>,
    pub(crate) image: Option<Glob>,
    pub(crate) compose_project: Option<Glob>,
    pub(crate) ecs_cluster: Option<Glob>,
    pub(crate) ecs_family: Option<Glob>,
    pub(crate) network: Option<Glob>,
    pub(crate) user_namespace: Option<UserNamespace>,
    pub(crate) engine: Option<Glob>,
}

/// What the containers of an engine may have, whatever the rules say.
#[derive(Debug, Default)]
pub(crate) struct EnginePolicy {
    /// Any role, if there is none.
    pub(crate) allow: Vec<Allowed>,
    pub(crate) deny: Vec<Allowed>,
}

#[derive(Debug)]
pub(crate) enum Effect {
    Deny,
    Allow(Box<Allowance>),
}

#[derive(Debug, Default)]
pub(crate) struct Allowance {
    pub(crate) allow: Vec<Allowed>,
    pub(crate) default_role: Option<RoleSpec>,
    pub(crate) max_duration: Option<Duration>,
    /// Forced upon the session.
    pub(crate) policy: Option<String>,
    pub(crate) policy_arns: Vec<String>,
    pub(crate) tags: Vec<(String, Template)>,
}

/// What a rule lets a container have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Allowed {
    /// `@instance`: the real service.
    Instance,
    /// A pattern of whole ARNs, beginning with `arn:`.
    Arn(Glob),
    /// A pattern that is completed as a role's short name is.
    Short(Glob),
}

impl FromStr for Allowed {
    type Err = BadRole;

    fn from_str(given: &str) -> Result<Self, BadRole> {
        // What no role could be named like would match nothing, which nobody means.
        if given.starts_with("arn:") {
            role::check_pattern(given)?;
            return Ok(Self::Arn(Glob(given.to_owned())));
        }
        match given.replace(['*', '?'], "x").parse()? {
            RoleSpec::Instance => Ok(Self::Instance),
            RoleSpec::Arn(_) | RoleSpec::Short { .. } => Ok(Self::Short(Glob(given.to_owned()))),
        }
    }
}

impl Allowed {
    fn covers(&self, arn: &RoleArn, base: Option<&RoleBase>, home: Option<&Home>) -> bool {
        match self {
            Self::Instance => false,
            Self::Arn(glob) => glob.matches(arn.as_str()),
            Self::Short(glob) => role_pattern(&glob.0, base, home).is_some_and(|pattern| pattern.matches(arn.as_str())),
        }
    }
}

impl EnginePolicy {
    pub(super) fn allows(&self, arn: &RoleArn, base: Option<&RoleBase>, home: Option<&Home>) -> bool {
        let any = |all: &[Allowed]| all.iter().any(|allowed| allowed.covers(arn, base, home));
        (self.allow.is_empty() || any(&self.allow)) && !any(&self.deny)
    }

    pub(super) fn allows_instance(&self) -> bool {
        (self.allow.is_empty() || self.allow.contains(&Allowed::Instance)) && !self.deny.contains(&Allowed::Instance)
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the rule at {}", self.place)
    }
}

/// What of a container a rule is held against.
#[derive(Debug, Clone, Copy)]
enum Reading {
    /// What its starter has said, and all of its networks.
    Sure,
    /// What its starter may have said, too, and any of its networks.
    Unclear,
    /// All that is there, whoever has said it.
    Anybodys,
}

impl Reading {
    fn label<'a>(self, container: &'a Container, name: &str) -> Option<&'a str> {
        let further = || match self {
            Self::Sure => None,
            Self::Unclear => origin::unclear_label(container, name),
            Self::Anybodys => origin::image_label(container, name),
        };
        origin::label(container, name).or_else(further)
    }
}

impl Rules {
    /// The rule for a container: an error if it gets nothing, None if everything is allowed.
    pub(super) fn find(&self, container: &Container) -> Result<Option<&Rule>, String> {
        for rule in &self.rules {
            let matches = |reading| rule.matching.covers(container, reading);
            match rule.effect {
                _ if matches(Reading::Sure) => return Ok(Some(rule)),
                Effect::Deny if matches(Reading::Anybodys) => return Ok(Some(rule)),
                // It may grant more than those behind it, or less.
                Effect::Allow(_) if matches(Reading::Unclear) => {
                    return Err(format!(
                        "{rule} matches in part: by one of several networks, or by a label that is the image's, too, so that {UNCLEAR}"
                    ));
                }
                _ => {}
            }
        }
        if self.rules.is_empty() || self.unmatched_allowed {
            return Ok(None);
        }
        Err("no rule matches it, and unmatched containers get no role (unmatched = \"allow\")".to_owned())
    }
}

impl Matching {
    fn covers(&self, container: &Container, reading: Reading) -> bool {
        let label = |name: &str| reading.label(container, name);
        let on = |glob: &Glob| {
            let mut networks = container.networks.iter();
            match reading {
                Reading::Sure => networks.all(|network| glob.matches(network)),
                Reading::Unclear | Reading::Anybodys => networks.any(|network| glob.matches(network)),
            }
        };
        let fits = |glob: &Option<Glob>, value: Option<&str>| {
            glob.as_ref().is_none_or(|glob| value.is_some_and(|value| glob.matches(value)))
        };
        fits(&self.name, Some(&container.name))
            && fits(&self.image, Some(&container.image))
            && fits(&self.engine, Some(&container.engine))
            && self.network.as_ref().is_none_or(on)
            && self.user_namespace.is_none_or(|namespace| namespace == container.user_namespace)
            && fits(&self.compose_project, label("com.docker.compose.project"))
            && fits(&self.ecs_cluster, label("com.amazonaws.ecs.cluster"))
            && fits(&self.ecs_family, label("com.amazonaws.ecs.task-definition-family"))
            && self.label.iter().all(|(name, glob)| label(name).is_some_and(|value| glob.matches(value)))
    }
}

impl Allowance {
    pub(super) fn allows_instance(&self) -> bool {
        self.allow.contains(&Allowed::Instance) || self.default_role == Some(RoleSpec::Instance)
    }

    /// Whether a role may be had. Short patterns match nothing while their place is not known.
    pub(super) fn allows(&self, arn: &RoleArn, base: Option<&RoleBase>, home: Option<&Home>) -> bool {
        let is_default = self
            .default_role
            .as_ref()
            .is_some_and(|role| role.resolve(base, home).is_ok_and(|role| role.as_ref() == Some(arn)));
        is_default || self.allow.iter().any(|allowed| allowed.covers(arn, base, home))
    }

    /// What the rule puts upon the container's options. What would undo it refuses the role.
    pub(super) fn restrict(&self, options: &mut Options) -> Result<(), String> {
        if let Some(most) = self.max_duration {
            if options.duration.is_some_and(|asked| asked > most) {
                return Err(format!("it asks for more than max-duration, {} s", most.as_secs()));
            }
            options.duration = Some(options.duration.unwrap_or(most.min(crate::credentials::DEFAULT_DURATION)));
        }
        if self.policy.is_some() || !self.policy_arns.is_empty() {
            // A session may do what any of its policies allows: one more would widen it.
            if options.policy.is_some() || !options.policy_arns.is_empty() {
                return Err("it brings a session policy, and so does the rule".to_owned());
            }
            options.policy.clone_from(&self.policy);
            options.policy_arns.clone_from(&self.policy_arns);
        }
        Ok(())
    }
}

fn role_pattern(short: &str, base: Option<&RoleBase>, home: Option<&Home>) -> Option<Glob> {
    let (name, account) = role::split_account(short);
    role::place(base, home).map(|place| Glob(place.arn(name, account)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::tests::container;

    fn glob(text: &str) -> Option<Glob> {
        Some(Glob(text.to_owned()))
    }

    #[test]
    fn all_that_is_given_must_match() {
        let labels = [
            ("team", "web"),
            ("com.docker.compose.project", "shop"),
            ("com.amazonaws.ecs.cluster", "prod"),
            ("com.amazonaws.ecs.task-definition-family", "family"),
        ];
        let container = container("web-1", &labels, &[]);
        let matching = || Matching {
            label: BTreeMap::from([("team".to_owned(), Glob("w*".into()))]),
            name: glob("web-*"),
            image: glob("registry/app:*"),
            compose_project: glob("shop"),
            ecs_cluster: glob("prod"),
            ecs_family: glob("fam*"),
            network: glob("bridge"),
            user_namespace: Some(UserNamespace::Host),
            engine: glob("d*"),
        };
        assert!(matching().covers(&container, Reading::Sure) && Matching::default().covers(&container, Reading::Sure));
        for wrong in [
            Matching { label: BTreeMap::from([("other".to_owned(), Glob("*".into()))]), ..matching() },
            Matching { name: glob("job-*"), ..matching() },
            Matching { image: glob("app"), ..matching() },
            Matching { compose_project: glob("x"), ..matching() },
            Matching { ecs_cluster: glob("x"), ..matching() },
            Matching { ecs_family: glob("x"), ..matching() },
            Matching { network: glob("host"), ..matching() },
            Matching { user_namespace: Some(UserNamespace::Own), ..matching() },
            Matching { engine: glob("podman"), ..matching() },
        ] {
            assert!(!wrong.covers(&container, Reading::Sure), "{wrong:?}");
        }
    }

    #[test]
    fn a_container_on_several_networks_is_denied_by_one_and_allowed_by_all() {
        let mut container = container("web", &[], &[]);
        container.networks = vec!["untrusted".into(), "shop".into()];
        let found = |first: &str, effect: Effect| {
            let rule =
                Rule { place: "1".into(), matching: Matching { network: glob(first), ..Matching::default() }, effect };
            let all = Rule { place: "2".into(), matching: Matching::default(), effect: Effect::Allow(Box::default()) };
            let rules = Rules { rules: vec![rule, all], unmatched_allowed: false };
            rules.find(&container).map(|rule| rule.unwrap().place.clone())
        };
        let allow = || Effect::Allow(Box::default());
        assert_eq!(found("untrusted", Effect::Deny).as_deref(), Ok("1"));
        assert!(found("shop", allow()).unwrap_err().contains("by one of several networks"));
        assert_eq!(found("*", allow()).as_deref(), Ok("1"));
        assert_eq!(found("bridge", allow()).as_deref(), Ok("2"));
    }

    #[test]
    fn patterns_of_roles_are_completed_as_roles_are() {
        let base: RoleBase = "arn:aws:iam::123456789012:role/containers/".parse().unwrap();
        let allows = |pattern: &str, role: &str| {
            let allowance = Allowance { allow: vec![pattern.parse().unwrap()], ..Allowance::default() };
            allowance.allows(&role.parse().unwrap(), Some(&base), None)
        };
        let web = "arn:aws:iam::123456789012:role/containers/web-1";
        assert!(allows("web-*", web) && allows("*", web) && allows(web, web) && allows("arn:*", web));
        let elsewhere = "arn:aws:iam::210987654321:role/containers/web-1";
        assert!(!allows("*", elsewhere) && allows("*@210987654321", elsewhere) && allows("arn:*", elsewhere));
        assert!(!allows("*", "arn:aws:iam::123456789012:role/admin") && !allows("web", web));
        assert!(!allows("@instance", web));
    }
}
