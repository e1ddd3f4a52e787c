//! From a container's description to the role it is to have, with the reason. Pure.

use std::{collections::HashMap, fmt, str::FromStr};

/// An IAM role by its full ARN, `arn:<partition>:iam::<account>:role/<path/><name>`.
///
/// Grammar: AWS IAM User Guide, "IAM identifiers"; CreateRole in the IAM API Reference for the
/// lengths and characters of path and name.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct RoleArn(String);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{given:?} is not the ARN of an IAM role: {reason}; expected arn:PARTITION:iam::ACCOUNT:role/NAME")]
pub(crate) struct BadRole {
    given: String,
    reason: &'static str,
}

const NAME_LIMIT: usize = 64;
const PATH_LIMIT: usize = 512;
/// What an error message repeats of somebody's input.
const QUOTE_LIMIT: usize = 100;

impl RoleArn {
    pub(crate) fn as_str(&self) -> &str {
        &self.0
    }

    /// The bare name, as the metadata service lists it.
    pub(crate) fn name(&self) -> &str {
        self.0.rsplit('/').next().unwrap_or_default()
    }
}

impl fmt::Display for RoleArn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for RoleArn {
    type Err = BadRole;

    fn from_str(given: &str) -> Result<Self, BadRole> {
        let bad = |reason| BadRole { given: given.chars().take(QUOTE_LIMIT).collect(), reason };
        let mut parts = given.splitn(6, ':');
        let mut next = |reason| parts.next().ok_or(bad(reason));
        if next("it does not begin with arn:")? != "arn" {
            return Err(bad("it does not begin with arn:"));
        }
        let partition = next("it has no partition")?;
        let lower = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-';
        if !partition.starts_with("aws") || !partition.bytes().all(lower) {
            return Err(bad("the partition is none (aws, aws-cn, aws-us-gov, ...)"));
        }
        if next("it has no service")? != "iam" {
            return Err(bad("the service is not iam"));
        }
        if !next("it has no region field")?.is_empty() {
            return Err(bad("IAM has no regions: the field is empty"));
        }
        let account = next("it has no account")?;
        if account.len() != 12 || !account.bytes().all(|byte| byte.is_ascii_digit()) {
            return Err(bad("the account is not 12 digits"));
        }
        let path = next("it has no resource")?.strip_prefix("role/").ok_or(bad("the resource is not role/..."))?;
        let (path, name) = path.rsplit_once('/').map_or(("", path), |(path, name)| (path, name));
        let in_name = |byte: u8| byte.is_ascii_alphanumeric() || b"+=,.@_-".contains(&byte);
        if name.is_empty() || name.len() > NAME_LIMIT || !name.bytes().all(in_name) {
            return Err(bad("the name is not 1 to 64 letters, digits or +=,.@_-"));
        }
        // Two slashes and the path: IAM allows any printable ASCII. No name is `.` or `..` to us,
        // so a path cannot climb in the URL it becomes part of.
        if path.len() + 2 > PATH_LIMIT || !path.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(bad("the path is longer than 512 characters or not printable ASCII"));
        }
        if matches!(name, "." | "..") {
            return Err(bad("the name is a dot segment"));
        }
        Ok(Self(given.to_owned()))
    }
}

/// Where a container's role was found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Source {
    Label(&'static str),
    Environment(&'static str),
    Default,
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Label(name) => write!(f, "label {name}"),
            Self::Environment(name) => write!(f, "environment variable {name}"),
            Self::Default => f.write_str("the default role"),
        }
    }
}

/// In the order in which they are asked. The second label and the variables are those of iam-docker,
/// ec2metaproxy, docker-ec2-metadata and lyft's metadataproxy.
const LABELS: [&str; 2] = ["metadata-proxy.role", "com.swipely.iam-docker.iam-profile"];
const VARIABLES: [&str; 2] = ["IAM_ROLE", "IAM_PROFILE"];

/// The role a container asks for, and why. An empty value counts as absent, as an unset variable of
/// a compose file arrives. A malformed one is an error, never a reason to look further: what
/// somebody meant to restrict must not fall back to a default that allows more.
pub(crate) fn choose_role(
    labels: &HashMap<String, String>,
    env: &HashMap<String, String>,
    default: Option<&RoleArn>,
) -> Option<(Source, Result<RoleArn, BadRole>)> {
    let labels = LABELS.iter().map(|name| (Source::Label(name), labels.get(*name)));
    let variables = VARIABLES.iter().map(|name| (Source::Environment(name), env.get(*name)));
    let named = labels.chain(variables).find_map(|(source, value)| {
        let value = value.map(|value| value.trim()).filter(|value| !value.is_empty())?;
        Some((source, value.parse()))
    });
    named.or_else(|| default.map(|role| (Source::Default, Ok(role.clone()))))
}

const SESSION_NAME_LIMIT: usize = 64;

/// `<name>-<first 12 digits of the id>`, so that CloudTrail says which container acted. Characters
/// that STS refuses become `-`; a long name is cut, never the id.
///
/// Grammar: `RoleSessionName` in the AWS STS API Reference, AssumeRole.
pub(crate) fn session_name(name: &str, id: &str) -> String {
    let id: String = id.chars().filter(char::is_ascii_alphanumeric).take(12).collect();
    let allowed = |c: char| if c.is_ascii_alphanumeric() || "_+=,.@-".contains(c) { c } else { '-' };
    let room = SESSION_NAME_LIMIT - 1 - id.len();
    let name: String = name.chars().take(room).map(allowed).collect();
    format!("{name}-{id}")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
    }

    fn chosen(labels: &[(&str, &str)], env: &[(&str, &str)], default: Option<&str>) -> Option<(Source, String)> {
        let default = default.map(|role| arn(role).parse().unwrap());
        let (source, role) = choose_role(&map(labels), &map(env), default.as_ref())?;
        Some((source, role.unwrap().name().to_owned()))
    }

    fn arn(name: &str) -> String {
        format!("arn:aws:iam::123456789012:role/{name}")
    }

    #[test]
    fn sources_are_asked_in_order() {
        let [own, swipely, role, profile] = ["own", "swipely", "role", "profile"].map(arn);
        let labels = [("metadata-proxy.role", own.as_str()), ("com.swipely.iam-docker.iam-profile", swipely.as_str())];
        let env = [("IAM_ROLE", role.as_str()), ("IAM_PROFILE", profile.as_str())];
        let name = |choice: Option<(Source, String)>| choice.map(|(_, name)| name);
        assert_eq!(name(chosen(&labels, &env, Some("default"))), Some("own".into()));
        assert_eq!(name(chosen(&labels[1..], &env, Some("default"))), Some("swipely".into()));
        assert_eq!(name(chosen(&[], &env, Some("default"))), Some("role".into()));
        assert_eq!(name(chosen(&[], &env[1..], Some("default"))), Some("profile".into()));
        assert_eq!(chosen(&[], &[], Some("default")), Some((Source::Default, "default".into())));
        assert_eq!(chosen(&[], &[], None), None);
    }

    #[test]
    fn an_empty_value_counts_as_absent() {
        assert_eq!(chosen(&[("metadata-proxy.role", "")], &[("IAM_ROLE", " ")], None), None);
    }

    #[test]
    fn a_malformed_role_does_not_fall_back_to_the_default() {
        let default: RoleArn = arn("default").parse().unwrap();
        let choice = choose_role(&map(&[("metadata-proxy.role", "nonsense")]), &map(&[]), Some(&default));
        assert!(matches!(choice, Some((Source::Label("metadata-proxy.role"), Err(_)))));
    }

    #[test]
    fn roles_of_every_partition_and_path_are_understood() {
        for (given, name) in [
            ("arn:aws:iam::123456789012:role/web", "web"),
            ("arn:aws-cn:iam::123456789012:role/a/b/web", "web"),
            ("arn:aws-us-gov:iam::123456789012:role/w+=,.@_-", "w+=,.@_-"),
            ("arn:aws-iso-b:iam::123456789012:role/web", "web"),
            ("arn:aws:iam::123456789012:role/with:colon/web", "web"),
        ] {
            let role: RoleArn = given.parse().unwrap();
            assert_eq!((role.as_str(), role.name()), (given, name));
        }
    }

    #[test]
    fn malformed_roles_are_refused_with_a_reason() {
        let long = arn(&"x".repeat(65));
        for given in [
            "",
            "web",
            "arn",
            "arn:aws",
            "arn:aws:iam",
            "arn:aws:iam::123456789012",
            "arn:aws:iam::123456789012:user/web",
            "arn:aws:iam::12345678901:role/web",
            "arn:aws:iam::12345678901x:role/web",
            "arn:aws:iam:us-east-1:123456789012:role/web",
            "arn:aws:s3::123456789012:role/web",
            "arn:gcp:iam::123456789012:role/web",
            "arn:aws:iam::123456789012:role/",
            "arn:aws:iam::123456789012:role/web/",
            "arn:aws:iam::123456789012:role/we b",
            "arn:aws:iam::123456789012:role/../..",
            "arn:aws:iam::123456789012:role/a\nb/web",
            "arn:aws:iam::123456789012:role/wéb",
            &long,
        ] {
            assert!(given.parse::<RoleArn>().is_err(), "{given:?} was accepted");
        }
    }

    #[test]
    fn session_names_are_what_sts_accepts() {
        let id = "0123456789abcdef".repeat(4);
        assert_eq!(session_name("web", &id), "web-0123456789ab");
        assert_eq!(session_name("we b/é", &id), "we-b---0123456789ab");
        let long = session_name(&"x".repeat(300), &id);
        assert_eq!(long.len(), 64);
        assert!(long.ends_with("-0123456789ab"));
        assert_eq!(session_name("", ""), "-");
    }
}
