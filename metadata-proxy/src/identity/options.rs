//! What a container may ask of STS beside its role. A wrong value refuses the role: what somebody meant
//! as a restriction must not be left out.
//!
//! Limits: AWS STS API Reference, AssumeRole.

use std::time::Duration;

use super::{
    source::{Found, Names, OfImage},
    template::{Kind, Template},
};
use crate::{
    containers::Container,
    credentials::DEFAULT_DURATION,
    imds::{PolicyError, View},
};

#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Options {
    pub(super) external_id: Option<String>,
    pub(super) policy: Option<String>,
    pub(super) policy_arns: Vec<String>,
    pub(super) duration: Option<Duration>,
    pub(super) session_name: Option<Template>,
    pub(super) session_tags: Vec<(String, Template)>,
    pub(super) source_identity: Option<String>,
    pub(super) require_imdsv2: bool,
    pub(super) view: View,
}

/// The variables are those of lyft's metadataproxy, of a fork of iam-docker and of ec2metaproxy. A trust policy may ask for an
/// external id, a source identity, session tags or a session's name, and a policy may deny by them: they are neither grant
/// nor restriction by themselves.
const EXTERNAL_ID: Names = Names {
    labels: &["metadata-proxy.external-id"],
    variables: &["IAM_EXTERNAL_ID", "IAM_ROLE_EXTERNALID"],
    of_image: OfImage::Refused,
};
const POLICY: Names =
    Names { labels: &["metadata-proxy.policy"], variables: &["IAM_POLICY"], of_image: OfImage::Counts };
const POLICY_ARNS: Names = by_label(&["metadata-proxy.policy-arns"], OfImage::Counts);
const DURATION: Names = by_label(&["metadata-proxy.duration"], OfImage::Counts);
const SESSION_NAME: Names = by_label(&["metadata-proxy.session-name"], OfImage::Refused);
const SESSION_TAGS: Names = by_label(&["metadata-proxy.session-tags"], OfImage::Refused);
const SOURCE_IDENTITY: Names = by_label(&["metadata-proxy.source-identity"], OfImage::Refused);
const REQUIRE_IMDSV2: Names = by_label(&["metadata-proxy.require-imdsv2"], OfImage::Counts);
const ALLOW_USER_DATA: Names = by_label(&["metadata-proxy.allow-user-data"], OfImage::Ignored);
const UPSTREAM_ALLOW: Names = by_label(&["metadata-proxy.upstream-allow"], OfImage::Ignored);
const UPSTREAM_DENY: Names = by_label(&["metadata-proxy.upstream-deny"], OfImage::Counts);

const fn by_label(labels: &'static [&'static str], of_image: OfImage) -> Names {
    Names { labels, variables: &[], of_image }
}

pub(super) const ALL: [Names; 11] = [
    EXTERNAL_ID,
    POLICY,
    POLICY_ARNS,
    DURATION,
    SESSION_NAME,
    SESSION_TAGS,
    SOURCE_IDENTITY,
    REQUIRE_IMDSV2,
    ALLOW_USER_DATA,
    UPSTREAM_ALLOW,
    UPSTREAM_DENY,
];

/// Session tags of one session.
const TAGS: usize = 50;

pub(crate) const PREFIX: &str = "metadata-proxy.";
/// What an error message repeats of somebody's input.
const QUOTE_LIMIT: usize = 100;
/// Of what an image has in the same words.
pub(super) const UNCLEAR: &str = "nobody can tell whether its starter has said it; have one of them say something else, or use --trust-image-metadata";
const EMPTY: &str = "expected a value; leave the whole label or variable out if none is meant";

impl Options {
    pub(super) fn read(container: &Container) -> Result<Self, String> {
        let known =
            |label: &str| label == "metadata-proxy.role" || ALL.iter().any(|names| names.labels.contains(&label));
        // A misspelt restriction would be none.
        let of_image = container.from_image.iter().flat_map(|image| image.labels.keys());
        let mut labels = container.labels.keys().chain(of_image);
        if let Some(label) = labels.find(|label| label.starts_with(PREFIX) && !known(label)) {
            let known = ALL.iter().flat_map(|names| names.labels.iter().copied());
            if container.service {
                let [label, known] =
                    [label.as_str(), &known.collect::<Vec<_>>().join(", ")].map(|all| all.replace(PREFIX, ""));
                return Err(format!("{label:?}: there is no such setting of a service, only role, {known}"));
            }
            let known: Vec<_> = known.collect();
            return Err(format!("label {label:?}: there is no such option, only {}", known.join(", ")));
        }
        one_policy(container)?;
        Ok(Self {
            external_id: read(container, &EXTERNAL_ID, external_id)?,
            policy: read(container, &POLICY, policy)?,
            policy_arns: read(container, &POLICY_ARNS, policy_arns)?.unwrap_or_default(),
            duration: read_duration(container)?,
            session_name: read(container, &SESSION_NAME, |text| Template::parse(Kind::SessionName, text))?,
            session_tags: read(container, &SESSION_TAGS, session_tags)?.unwrap_or_default(),
            source_identity: read(container, &SOURCE_IDENTITY, source_identity)?,
            require_imdsv2: read(container, &REQUIRE_IMDSV2, switch)?.unwrap_or_default(),
            view: view(container)?,
        })
    }

    /// Hiding something is everybody's own affair.
    pub(super) fn permitted(self, container_labels: bool) -> Result<Self, String> {
        if self.view.widens() && !container_labels {
            let [user_data, allow] = [ALLOW_USER_DATA, UPSTREAM_ALLOW].map(|names| names.labels.join(" "));
            return Err(format!(
                "labels {user_data} and {allow}: the daemon's configuration does not permit them \
                 (container-labels = true in [upstream])"
            ));
        }
        Ok(self)
    }
}

fn read<T>(
    container: &Container,
    names: &Names,
    parse: impl Fn(&str) -> Result<T, String>,
) -> Result<Option<T>, String> {
    let Some(Found { source, value, .. }) = names.given(container).next() else { return Ok(None) };
    // As `${POLICY}` of a compose file arrives where nobody has set it: a restriction is not left out for that.
    let parsed = if value.is_empty() { Err(EMPTY.to_owned()) } else { parse(value) };
    let parsed = parsed.map_err(|rule| {
        let quoted: String = value.chars().take(QUOTE_LIMIT).collect();
        format!("{source} {quoted:?}: {rule}")
    })?;
    Ok(Some(parsed))
}

/// A session may do what any of its policies allows: one of the image would widen what another restricts, and of two of
/// the image one may be all that the starter has said.
fn one_policy(container: &Container) -> Result<(), String> {
    let given: Vec<Found> = [POLICY, POLICY_ARNS].iter().flat_map(|names| names.given(container)).collect();
    match given.iter().find(|found| found.from_image) {
        Some(Found { source, .. }) if given.len() > 1 => Err(format!(
            "{source} is the image's, too, and a session may do what any of several policies allows: nobody can tell \
             whether its starter has meant this one as well; name all policies under one label, in other words than the image"
        )),
        _ => Ok(()),
    }
}

/// A session longer than it would be anyway is no restriction.
fn read_duration(container: &Container) -> Result<Option<Duration>, String> {
    let from_image = DURATION.given(container).any(|found| found.from_image);
    let duration = read(container, &DURATION, duration)?;
    Ok(duration.filter(|duration| !from_image || *duration <= DEFAULT_DURATION))
}

/// Whether a role can be had at all with what the image has brought.
pub(super) fn check_origin(container: &Container) -> Result<(), String> {
    for names in ALL.iter().filter(|names| names.of_image == OfImage::Refused) {
        if let Some(Found { source, from_image: true, .. }) = names.found(container).next() {
            return Err(format!("{source} is the image's, too: {UNCLEAR}"));
        }
    }
    Ok(())
}

/// Each pattern is checked by itself, so that a mistake is told with its label.
fn view(container: &Container) -> Result<View, String> {
    let patterns = |names, as_view: fn(&[String]) -> Result<View, PolicyError>| {
        let check = |text: &str| {
            let patterns = list(text)?;
            as_view(&patterns).map(|_| patterns).map_err(|error| error.to_string())
        };
        read(container, names, check).map(Option::unwrap_or_default)
    };
    let user_data = read(container, &ALLOW_USER_DATA, switch)?.unwrap_or_default();
    let allow = patterns(&UPSTREAM_ALLOW, |allow| View::new(allow, &[], false))?;
    let deny = patterns(&UPSTREAM_DENY, |deny| View::new(&[], deny, false))?;
    View::new(&allow, &deny, user_data).map_err(|error| error.to_string())
}

fn in_name(c: char) -> bool {
    c.is_ascii_alphanumeric() || "_+=,.@-".contains(c)
}

fn external_id(text: &str) -> Result<String, String> {
    let allowed = |c| in_name(c) || ":/".contains(c);
    if !(2..=1224).contains(&text.len()) || !text.chars().all(allowed) {
        return Err("expected 2 to 1224 letters, digits or _+=,.@:/-".to_owned());
    }
    Ok(text.to_owned())
}

fn source_identity(text: &str) -> Result<String, String> {
    if !(2..=64).contains(&text.len()) || !text.chars().all(in_name) {
        return Err("expected 2 to 64 letters, digits or _+=,.@-".to_owned());
    }
    Ok(text.to_owned())
}

pub(crate) fn policy(text: &str) -> Result<String, String> {
    if text.chars().count() > 2048 {
        return Err("a session policy has at most 2048 characters".to_owned());
    }
    if !text.chars().all(|c| matches!(c, '\t' | '\n' | '\r' | ' '..='\u{ff}')) {
        return Err("a session policy has no characters beyond U+00FF".to_owned());
    }
    let object = text.starts_with('{') && serde_json::from_str::<serde::de::IgnoredAny>(text).is_ok();
    if !object {
        return Err("a session policy is a JSON object".to_owned());
    }
    Ok(text.to_owned())
}

fn policy_arns(text: &str) -> Result<Vec<String>, String> {
    let arns = list(text)?;
    check_policy_arns(&arns)?;
    Ok(arns)
}

pub(crate) fn check_policy_arns(arns: &[String]) -> Result<(), String> {
    if arns.len() > 10 {
        return Err("AWS takes at most 10 policies".to_owned());
    }
    match arns.iter().find(|arn| !is_policy_arn(arn)) {
        Some(arn) => Err(format!("{arn:?} is not arn:PARTITION:iam::ACCOUNT:policy/NAME")),
        None => Ok(()),
    }
}

fn is_policy_arn(arn: &str) -> bool {
    let parts: Vec<&str> = arn.splitn(6, ':').collect();
    let ["arn", partition, "iam", "", account, resource] = parts.as_slice() else { return false };
    let account = *account == "aws" || (account.len() == 12 && account.bytes().all(|byte| byte.is_ascii_digit()));
    let name = resource.strip_prefix("policy/").is_some_and(|name| !name.is_empty());
    partition.starts_with("aws") && account && name && arn.len() <= 2048 && arn.chars().all(|c| c.is_ascii_graphic())
}

pub(crate) fn duration(text: &str) -> Result<Duration, String> {
    let range = Duration::from_secs(900)..=Duration::from_secs(43_200);
    let rule = "expected 15 minutes to 12 hours: 900 to 43200 seconds, or such as 15m or 1h";
    seconds(text).filter(|duration| range.contains(duration)).ok_or_else(|| rule.to_owned())
}

/// Whole seconds, or with a unit: `900`, `15m`, `1h`.
pub(crate) fn seconds(text: &str) -> Option<Duration> {
    let (number, unit) = match text.strip_suffix(['s', 'm', 'h']) {
        Some(number) if text.ends_with('h') => (number, 3600),
        Some(number) if text.ends_with('m') => (number, 60),
        Some(number) => (number, 1),
        None => (text, 1),
    };
    number.parse::<u64>().ok().and_then(|number| number.checked_mul(unit)).map(Duration::from_secs)
}

/// `key=value,key=value`; the value is a template. No comma can be part of a tag.
fn session_tags(text: &str) -> Result<Vec<(String, Template)>, String> {
    let mut tags = Vec::new();
    for tag in text.split(',').map(str::trim).filter(|tag| !tag.is_empty()) {
        let (key, value) = tag.split_once('=').ok_or_else(|| format!("{tag:?} is not KEY=VALUE"))?;
        tags.push(session_tag(key.trim(), value.trim())?);
    }
    if tags.is_empty() {
        return Err(EMPTY.to_owned());
    }
    check_tags(&tags)?;
    Ok(tags)
}

/// Of one session together.
pub(crate) fn check_tags(tags: &[(String, Template)]) -> Result<(), String> {
    if tags.len() > TAGS {
        return Err(format!("{} session tags: AWS takes {TAGS} at most", tags.len()));
    }
    for (at, (key, _)) in tags.iter().enumerate() {
        if tags.iter().take(at).any(|(other, _)| same_key(other, key)) {
            return Err(format!("key {key:?} is there twice; AWS tells keys not apart by case"));
        }
    }
    Ok(())
}

pub(crate) fn session_tag(key: &str, value: &str) -> Result<(String, Template), String> {
    let allowed = |c: char| c.is_alphanumeric() || " _.:/=+-@".contains(c);
    let reserved = key.get(..4).is_some_and(|start| start.eq_ignore_ascii_case("aws:"));
    if key.is_empty() || key.chars().count() > 128 || !key.chars().all(allowed) || reserved {
        return Err(format!(
            "key {key:?}: expected 1 to 128 letters, digits, spaces or _.:/=+-@, not beginning with aws:"
        ));
    }
    let value = Template::parse(Kind::TagValue, value).map_err(|rule| format!("value of {key:?}: {rule}"))?;
    Ok((key.to_owned(), value))
}

pub(super) fn same_key(a: &str, b: &str) -> bool {
    a.to_lowercase() == b.to_lowercase()
}

fn switch(text: &str) -> Result<bool, String> {
    match text {
        "true" => Ok(true),
        "false" => Ok(false),
        _ => Err("expected true or false".to_owned()),
    }
}

fn list(text: &str) -> Result<Vec<String>, String> {
    let items = text.split([',', ' ', '\t', '\n']).filter(|item| !item.is_empty());
    let items: Vec<_> = items.map(str::to_owned).collect();
    if items.is_empty() { Err(EMPTY.to_owned()) } else { Ok(items) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identity::tests::container;

    fn options(labels: &[(&str, &str)], env: &[(&str, &str)]) -> Result<Options, String> {
        Options::read(&container("web", labels, env))
    }

    #[test]
    fn options_are_read_from_labels_and_the_peers_variables() {
        let read = options(
            &[
                (
                    "metadata-proxy.policy-arns",
                    "arn:aws:iam::aws:policy/ReadOnlyAccess, arn:aws:iam::123456789012:policy/a/b",
                ),
                ("metadata-proxy.duration", "15m"),
                ("metadata-proxy.source-identity", "alice"),
                ("metadata-proxy.session-tags", "team=web, image={image}"),
                ("metadata-proxy.require-imdsv2", "true"),
            ],
            &[("IAM_ROLE_EXTERNALID", "x:1"), ("IAM_POLICY", r#"{"Version":"2012-10-17","Statement":[]}"#)],
        );
        let read = read.unwrap();
        assert_eq!(read.external_id.as_deref(), Some("x:1"));
        assert!(read.policy.is_some() && read.require_imdsv2);
        assert_eq!((read.policy_arns.len(), read.session_tags.len()), (2, 2));
        assert_eq!(read.duration, Some(Duration::from_secs(900)));
        assert_eq!(read.source_identity.as_deref(), Some("alice"));
        assert_eq!(options(&[], &[]).unwrap(), Options::default());
    }

    #[test]
    fn a_label_wins_over_a_variable() {
        let read = options(&[("metadata-proxy.external-id", "label")], &[("IAM_EXTERNAL_ID", "variable")]);
        assert_eq!(read.unwrap().external_id.as_deref(), Some("label"));
    }

    #[test]
    fn what_sts_would_refuse_is_refused_with_option_and_rule() {
        let many = ["arn:aws:iam::aws:policy/x"; 11].join(",");
        let long = format!("{{\"a\":\"{}\"}}", "x".repeat(2048));
        for (option, value, rule) in [
            ("external-id", "x", "2 to 1224"),
            ("external-id", "a b", "letters"),
            ("policy", "not json", "JSON object"),
            ("policy", "[]", "JSON object"),
            ("policy", "{", "JSON object"),
            ("policy", "{\"a\":\"\u{20ac}\"}", "U+00FF"),
            ("policy", &long, "2048"),
            ("policy-arns", "ReadOnlyAccess", "arn:PARTITION:iam::ACCOUNT:policy/NAME"),
            ("policy-arns", &many, "at most 10"),
            ("duration", "60", "900 to 43200"),
            ("duration", "13h", "900 to 43200"),
            ("duration", "an hour", "900 to 43200"),
            ("session-name", "a/b", "the character '/'"),
            ("session-name", "{nothing}", "there is no {nothing}"),
            ("session-tags", "team", "KEY=VALUE"),
            ("session-tags", "aws:x=1", "not beginning with aws:"),
            ("session-tags", "a=1,A=2", "twice"),
            ("session-tags", "a=(x)", "the character '('"),
            ("source-identity", "x", "2 to 64"),
            ("require-imdsv2", "perhaps", "true or false"),
            ("allow-user-data", "yes", "true or false"),
            ("upstream-allow", "meta-data/iam", "holds credentials of the host"),
            ("upstream-allow", "meta-data/tags,nothing", "`nothing` matches nothing"),
            ("upstream-deny", "/meta-data", "begins with `/`"),
        ] {
            let label = format!("metadata-proxy.{option}");
            let error = options(&[(&label, value)], &[]).unwrap_err();
            assert!(error.starts_with(&format!("label {label} ")) && error.contains(rule), "{error}");
            assert!(error.len() < 600, "{error}");
        }
    }

    #[test]
    fn an_option_that_is_there_and_empty_is_refused() {
        for names in ALL {
            let labels = names.labels.iter().map(|label| (label, options(&[(label, "")], &[])));
            let variables = names.variables.iter().map(|variable| (variable, options(&[], &[(variable, " \t")])));
            for (name, read) in labels.chain(variables) {
                let error = read.unwrap_err();
                assert!(error.contains(name) && error.ends_with(EMPTY), "{error}");
            }
        }
        for option in ["policy-arns", "session-tags", "upstream-allow", "upstream-deny"] {
            let error = options(&[(&format!("metadata-proxy.{option}"), " , ")], &[]).unwrap_err();
            assert!(error.contains(option) && error.ends_with(EMPTY), "{error}");
        }
        // Not even if another name of it says something.
        assert!(options(&[("metadata-proxy.policy", "")], &[("IAM_POLICY", "{}")]).is_err());
    }

    #[test]
    fn a_misspelt_option_is_refused() {
        let error = options(&[("metadata-proxy.polcy", "{}")], &[]).unwrap_err();
        assert!(error.contains("metadata-proxy.polcy") && error.contains("metadata-proxy.policy,"), "{error}");
    }
}
