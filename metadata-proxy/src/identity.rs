//! From a container's description to the role it is to have, with the reasons. Pure.

mod glob;
mod lineage;
mod options;
mod origin;
mod role;
pub(crate) mod rules;
mod source;
mod template;

use std::collections::{HashMap, HashSet};

use crate::{
    containers::Container,
    credentials::{DEFAULT_DURATION, RoleSession},
    imds::View,
};
use options::Options;
use rules::{Allowance, Effect, EnginePolicy, Rules};
use source::{Found, Names, OfImage};

pub(crate) use glob::Glob;
pub(crate) use lineage::Lineage;
pub(crate) use options::{PREFIX, check_policy_arns, check_tags, duration, policy, seconds, session_tag};
pub(crate) use role::{Home, INSTANCE, RoleArn, RoleBase, RoleSpec};
pub(crate) use source::Said;
pub(crate) use template::{Kind, Template};

/// What the operator has said about roles.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) default_role: Option<RoleSpec>,
    pub(crate) role_base: Option<RoleBase>,
    /// Of containers that give no session name.
    pub(crate) session_name: Template,
    /// Of all sessions.
    pub(crate) session_tags: Vec<(String, Template)>,
    pub(crate) require_imdsv2: bool,
    /// Containers may show themselves more of the real service than others see.
    pub(crate) container_labels: bool,
    /// Names of containers that keep the real service.
    pub(crate) exempt: HashSet<String>,
    pub(crate) rules: Rules,
    /// By their names, of those that have any.
    pub(crate) engines: HashMap<String, EnginePolicy>,
    /// The host's name.
    pub(crate) host: String,
}

/// Says which container acted, and keeps the id whole: names may be long.
pub(crate) const SESSION_NAME: &str = "{container.name}-{container.id:12}";

/// What a container gets, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Decision {
    pub(crate) verdict: Verdict,
    /// Who has named the role, if anybody has.
    pub(crate) source: Option<String>,
    /// Requests without a session token are refused.
    pub(crate) require_imdsv2: bool,
    /// What it shows and hides of the real service for itself.
    pub(crate) view: View,
    /// In the order in which they were found; the last one decided.
    pub(crate) reasons: Vec<String>,
}

impl Decision {
    pub(crate) fn new(verdict: Verdict) -> Self {
        let (source, require_imdsv2, view, reasons) = Default::default();
        Self { verdict, source, require_imdsv2, view, reasons }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Verdict {
    Role {
        arn: RoleArn,
        session: RoleSession,
    },
    /// A role of this name; whose account it is in has to be found out yet.
    Pending {
        name: String,
    },
    /// The real service, as the host's own processes have it.
    Instance,
    /// Nobody has named a role.
    NoRole,
    /// There is a role, and the container does not get it.
    Refused,
}

/// In the order in which they are asked. The second label and the variables are those of iam-docker,
/// ec2metaproxy, docker-ec2-metadata and lyft's metadataproxy.
const ROLE: Names = Names {
    labels: &["metadata-proxy.role", "com.swipely.iam-docker.iam-profile"],
    variables: &["IAM_ROLE", "IAM_PROFILE"],
    of_image: OfImage::Ignored,
};

const OPTIONS_OF_INSTANCE: &str = "it has options, which nobody can see to if it has the host's own role";

/// As the source of the host's own role.
pub(crate) const EXEMPT: &str = "[exempt]";

/// The decision about a container. `home` is None until AWS has told who the daemon is.
pub(crate) fn decide(container: &Container, settings: &Settings, home: Option<&Home>) -> Decision {
    let mut decision = Decision { require_imdsv2: settings.require_imdsv2, ..Decision::new(Verdict::Refused) };
    match (Case { container, settings, home }).judge(&mut decision) {
        Ok(verdict) => decision.verdict = verdict,
        Err(refusal) => decision.reasons.push(refusal),
    }
    for reason in &mut decision.reasons {
        *reason = printable(reason);
    }
    decision
}

/// What the operator has said of a service of the host, before there is one.
pub(crate) fn check_service(service: &Container) -> Result<(), String> {
    Options::read(service)?;
    match ROLE.find(service) {
        Some(Found { value, .. }) => value.parse::<RoleSpec>().map(drop).map_err(|error| format!("role: {error}")),
        None => Ok(()),
    }
}

/// What others have written, for the log and for terminals: with a line break or an escape sequence in a label nobody is to
/// add lines of his own there.
pub(crate) fn printable(text: &str) -> String {
    let escaped = |c: char| if "\"'\\".contains(c) { c.to_string() } else { c.escape_debug().to_string() };
    text.chars().map(escaped).collect()
}

/// All places where a role is looked for, and those of options where something is.
pub(crate) fn sources(container: &Container) -> Vec<Said> {
    let options = options::ALL.iter().flat_map(|names| names.said(container));
    let found = options.filter(|said| said.value.is_some() || said.from_image);
    ROLE.said(container).into_iter().chain(found).collect()
}

/// Whether a decision about this container may depend on an environment variable of this name.
pub(crate) fn looks_at(variable: &str, container: &Container, settings: &Settings) -> bool {
    let of_rules = settings.rules.rules.iter().filter_map(|rule| match &rule.effect {
        Effect::Allow(allowance) => Some(&allowance.tags),
        Effect::Deny => None,
    });
    let tags = of_rules.chain([&settings.session_tags]).flatten().map(|(_, template)| template);
    let field = format!("{{env.{variable}");
    options::ALL.iter().chain([&ROLE]).any(|names| names.variables.contains(&variable))
        || tags.chain([&settings.session_name]).any(|template| template.looks_at(variable))
        // Its own templates.
        || container.labels.values().chain(container.env.values()).any(|value| value.contains(&field))
}

struct Case<'a> {
    container: &'a Container,
    settings: &'a Settings,
    home: Option<&'a Home>,
}

impl Case<'_> {
    /// An error is a refusal: never a reason to look further, because what somebody meant to restrict
    /// must not fall back to something that allows more.
    fn judge(&self, decision: &mut Decision) -> Result<Verdict, String> {
        let Self { container, settings, home } = *self;
        let Decision { require_imdsv2, view, reasons, source: named_by, .. } = decision;
        // Whoever owns an engine names its containers as he likes.
        if settings.exempt.contains(&container.name) && container.of_user.is_none() && !container.service {
            *named_by = Some(EXEMPT.to_owned());
            reasons.push("exempt by its name".to_owned());
            return Ok(Verdict::Instance);
        }
        self.origin(reasons)?;
        // First, lest a container with a wrong option answer requests that it meant to refuse.
        let mut options = Options::read(container)
            .and_then(|options| options.permitted(settings.container_labels || container.service))
            .inspect_err(|_| (*require_imdsv2, *view) = (true, View::closed()))?;
        *require_imdsv2 |= options.require_imdsv2;
        *view = options.view.clone();

        let rule = match self.rule(reasons) {
            // Nothing is refused to who wants nothing.
            Err(refusal) if ROLE.find(container).is_none() => {
                reasons.push(refusal);
                return Ok(Verdict::NoRole);
            }
            found => found?,
        };
        let Some(spec) = self.role(rule, named_by, reasons)? else {
            reasons.push("neither a label nor the environment nor the daemon names a role".to_owned());
            return Ok(Verdict::NoRole);
        };
        options::check_origin(container)?;
        let policy = settings.engines.get(&container.engine);
        let denied = |role: &str| format!("[[engine]] {} does not allow role {role}", container.engine);
        if spec == RoleSpec::Instance {
            if container.service && options == Options::default() {
                return Ok(Verdict::Instance);
            }
            if policy.is_some_and(|policy| !policy.allows_instance()) {
                return Err(denied(INSTANCE));
            }
            return match rule {
                Some(rule) if rule.allows_instance() && options == Options::default() => Ok(Verdict::Instance),
                Some(rule) if rule.allows_instance() => Err(OPTIONS_OF_INSTANCE.to_owned()),
                None if container.service => Err(OPTIONS_OF_INSTANCE.to_owned()),
                _ => Err("no rule allows it the host's own role (allow = [\"@instance\"])".to_owned()),
            };
        }
        let base = settings.role_base.as_ref();
        let arn = spec.resolve(base, home).map_err(|error| error.to_string())?;
        // A short pattern of a rule waits for the account as a short name does.
        let placed = home.is_some() || base.is_some();
        let Some(arn) = arn.filter(|_| placed || rule.is_none() && policy.is_none()) else {
            reasons.push("AWS has not told yet whose account the daemon is in".to_owned());
            return Ok(Verdict::Pending { name: spec.name().to_owned() });
        };
        if policy.is_some_and(|policy| !policy.allows(&arn, base, home)) {
            return Err(denied(arn.as_str()));
        }
        if let Some(rule) = rule {
            if !rule.allows(&arn, base, home) {
                return Err(format!("the rule does not allow role {arn}"));
            }
            rule.restrict(&mut options)?;
        }
        let session = self.session(&arn, options, rule)?;
        reasons.push(format!("session {}", session.session_name));
        Ok(Verdict::Role { arn, session })
    }

    /// None: everything is allowed.
    fn rule(&self, reasons: &mut Vec<String>) -> Result<Option<&Allowance>, String> {
        // The file itself is the operator's word.
        if self.container.service {
            return Ok(None);
        }
        let rule = self.settings.rules.find(self.container)?;
        if let Some(user) = self.container.of_user {
            let engine = &self.container.engine;
            let policy = self.settings.engines.get(engine);
            if rule.is_none_or(|rule| rule.matching.engine.is_none()) && policy.is_none_or(|p| p.allow.is_empty()) {
                return Err(format!(
                    "its engine {engine} is user {user}'s, who decides what its containers say of themselves: they get roles by a rule with engine = \"{engine}\", or by allow of [[engine]], only"
                ));
            }
        }
        let Some(rule) = rule else { return Ok(None) };
        reasons.push(format!("{rule} matches"));
        match &rule.effect {
            Effect::Deny => Err("the rule denies it any role".to_owned()),
            Effect::Allow(allowance) => Ok(Some(allowance)),
        }
    }

    /// Whether it can be told what the container's starter has said, and what of the rest does not count.
    fn origin(&self, reasons: &mut Vec<String>) -> Result<(), String> {
        let container = self.container;
        if container.from_image.is_none() {
            // Neither is safe: its own labels may be the image's, and without them a default could
            // give it more than it was meant to have.
            return Err(format!(
                "its image {} cannot be inspected, so nobody can tell whether its starter or its image has named a role",
                container.image
            ));
        }
        for names in options::ALL.iter().chain([&ROLE]) {
            if let Some(variable) = names.variables.iter().find(|name| container.repeats(name)) {
                return Err(format!(
                    "environment variable {variable} is there more than once, and programs take the first or the last: give it once"
                ));
            }
            for source in names.found(container).filter(|found| found.from_image).map(|found| found.source) {
                reasons.push(match names.of_image {
                    OfImage::Counts => format!("{source} is the image's, too, and counts as far as it takes away"),
                    _ => format!(
                        "{source} comes from the image, its own or that of an earlier container of its name, and does not count \
                         (--trust-image-metadata)"
                    ),
                });
            }
        }
        Ok(())
    }

    fn role(
        &self,
        rule: Option<&Allowance>,
        named_by: &mut Option<String>,
        reasons: &mut Vec<String>,
    ) -> Result<Option<RoleSpec>, String> {
        if let Some(Found { source, value, .. }) = ROLE.find(self.container) {
            *named_by = Some(source.to_string());
            let spec = value.parse().map_err(|error| format!("{source}: {error}"))?;
            reasons.push(format!("role {value} from {source}"));
            return Ok(Some(spec));
        }
        let of_rule = rule.and_then(|rule| rule.default_role.as_ref());
        let default = of_rule.or(self.settings.default_role.as_ref()).filter(|_| !self.container.service);
        if default.is_some() {
            let of_rule = if of_rule.is_some() { " of the rule" } else { "" };
            *named_by = Some(format!("default-role{of_rule}"));
            reasons.push(format!("the default role{of_rule}"));
        }
        Ok(default.cloned())
    }

    fn session(&self, arn: &RoleArn, options: Options, rule: Option<&Allowance>) -> Result<RoleSession, String> {
        let Self { container, settings, home } = *self;
        let duration = options.duration.unwrap_or(DEFAULT_DURATION);
        if duration > DEFAULT_DURATION && home.is_some_and(|home| home.chained) {
            return Err(format!(
                "a duration of {} s: the daemon acts under a role itself, for which AWS grants 3600 s at most",
                duration.as_secs()
            ));
        }
        let name = options.session_name.as_ref().unwrap_or(&settings.session_name);
        let session_name = name.render(container, &settings.host);
        if session_name.len() < 2 {
            return Err(format!("the session name {session_name:?} is shorter than the 2 characters that AWS wants"));
        }
        let of_rule = rule.map(|rule| rule.tags.as_slice()).unwrap_or_default();
        let mut tags = operators_tags(of_rule, &settings.session_tags);
        add_tags(&mut tags, options.session_tags)?;
        // In a session's name they only say who it is; policies grant and deny by tags.
        for (key, value) in &tags {
            if let Some(why) = value.unclear(container) {
                return Err(format!("session tag {key:?}: {why}"));
            }
        }
        let render = |(key, value): (String, Template)| (key, value.render(container, &settings.host));
        Ok(RoleSession {
            role_arn: arn.as_str().to_owned(),
            session_name,
            external_id: options.external_id,
            policy: options.policy,
            policy_arns: options.policy_arns,
            tags: tags.into_iter().map(render).collect(),
            source_identity: options.source_identity,
            duration,
        })
    }
}

/// Those of a rule, and of those of all sessions what it does not replace.
pub(crate) fn operators_tags(of_rule: &[(String, Template)], of_all: &[(String, Template)]) -> Vec<(String, Template)> {
    let replaced = |key: &str| of_rule.iter().any(|(other, _)| options::same_key(other, key));
    of_rule.iter().chain(of_all.iter().filter(|(key, _)| !replaced(key))).cloned().collect()
}

/// Adds the container's tags to the operator's, which it must not replace: policies may rely on them.
fn add_tags(tags: &mut Vec<(String, Template)>, own: Vec<(String, Template)>) -> Result<(), String> {
    for (key, value) in own {
        if tags.iter().any(|(operators, _)| options::same_key(operators, &key)) {
            return Err(format!("session tag {key:?}: its value is set by the daemon's configuration"));
        }
        tags.push((key, value));
    }
    check_tags(tags)
}

#[cfg(test)]
pub(crate) mod tests;
