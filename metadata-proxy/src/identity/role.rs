//! IAM roles: the full ARN, and the short ways to name one.

use std::{fmt, str::FromStr};

/// An IAM role by its full ARN, `arn:<partition>:iam::<account>:role/<path/><name>`.
///
/// Grammar: AWS IAM User Guide, "IAM identifiers"; CreateRole in the IAM API Reference for the
/// lengths and characters of path and name.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct RoleArn(String);

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{given:?} is not an IAM role: {reason}; expected NAME, PATH/NAME, NAME@ACCOUNT or arn:PARTITION:iam::ACCOUNT:role/NAME"
)]
pub(crate) struct BadRole {
    given: String,
    reason: &'static str,
}

impl BadRole {
    fn new(given: &str, reason: &'static str) -> Self {
        Self { given: given.chars().take(QUOTE_LIMIT).collect(), reason }
    }
}

const ACCOUNT_DIGITS: usize = 12;
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
        let bad = |reason| BadRole::new(given, reason);
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
        if account.len() != ACCOUNT_DIGITS || !account.bytes().all(|byte| byte.is_ascii_digit()) {
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

/// Where roles are that are named without an account.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Home {
    partition: String,
    account: String,
    /// The daemon itself acts under a role, so AWS grants an hour at most.
    pub(crate) chained: bool,
}

impl Home {
    /// From the ARN that GetCallerIdentity tells.
    pub(crate) fn of_caller(arn: &str) -> Option<Self> {
        let mut parts = arn.splitn(6, ':').skip(1);
        let (partition, _service, _region, account) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let chained = parts.next()?.starts_with("assumed-role/");
        Some(Self { partition: partition.to_owned(), account: account.to_owned(), chained })
    }
}

/// `--role-base`: what short names are appended to, `arn:<partition>:iam::<account>:role/<path/>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RoleBase {
    partition: String,
    account: String,
    path: String,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no base of roles: expected arn:PARTITION:iam::ACCOUNT:role/ or arn:PARTITION:iam::ACCOUNT:role/PATH/"
)]
pub(crate) struct BadBase(String);

impl FromStr for RoleBase {
    type Err = BadBase;

    fn from_str(given: &str) -> Result<Self, BadBase> {
        let bad = || BadBase(given.chars().take(QUOTE_LIMIT).collect());
        // What a name can be appended to, and nothing that would become part of the name.
        let role: RoleArn = format!("{given}x").parse().map_err(|_| bad())?;
        let mut parts = role.as_str().splitn(6, ':').skip(1);
        let mut next = || parts.next().map(str::to_owned).ok_or_else(bad);
        let (partition, _service, _region, account) = (next()?, next()?, next()?, next()?);
        let path = given.splitn(6, ':').nth(5).and_then(|role| role.strip_prefix("role/")).ok_or_else(bad)?;
        if role.name() != "x" {
            return Err(bad());
        }
        Ok(Self { partition, account, path: path.to_owned() })
    }
}

/// Where a role named without an ARN is.
pub(super) struct Place<'a> {
    partition: &'a str,
    account: &'a str,
    path: &'a str,
}

/// None while nobody knows whose account the daemon is in.
pub(super) fn place<'a>(base: Option<&'a RoleBase>, home: Option<&'a Home>) -> Option<Place<'a>> {
    match (base, home) {
        (Some(base), _) => Some(Place { partition: &base.partition, account: &base.account, path: &base.path }),
        (None, Some(home)) => Some(Place { partition: &home.partition, account: &home.account, path: "" }),
        (None, None) => None,
    }
}

impl Place<'_> {
    pub(super) fn arn(&self, name: &str, account: Option<&str>) -> String {
        let Self { partition, account: own, path } = self;
        format!("arn:{partition}:iam::{}:role/{path}{name}", account.unwrap_or(own))
    }
}

/// How the host's own role is asked for. No role can be named so without an account.
pub(crate) const INSTANCE: &str = "@instance";

/// A role as somebody has named it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum RoleSpec {
    /// The host's own, from the real service.
    Instance,
    Arn(RoleArn),
    /// `[path/]name[@account]`
    Short {
        name: String,
        account: Option<String>,
    },
}

impl RoleSpec {
    /// The bare name, which is known before the account is.
    pub(crate) fn name(&self) -> &str {
        match self {
            Self::Instance => INSTANCE,
            Self::Arn(arn) => arn.name(),
            Self::Short { name, .. } => name.rsplit('/').next().unwrap_or_default(),
        }
    }

    /// The role that is meant; None while nobody knows whose account the daemon is in.
    pub(crate) fn resolve(&self, base: Option<&RoleBase>, home: Option<&Home>) -> Result<Option<RoleArn>, BadRole> {
        let (name, account) = match self {
            // None that could be assumed.
            Self::Instance => return Ok(None),
            Self::Arn(arn) => return Ok(Some(arn.clone())),
            Self::Short { name, account } => (name, account.as_deref()),
        };
        place(base, home).map(|place| place.arn(name, account).parse()).transpose()
    }
}

/// `name[@account]`. `@` may be part of a name, but behind the last one, digits are meant as an account.
pub(super) fn split_account(given: &str) -> (&str, Option<&str>) {
    let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    match given.rsplit_once('@') {
        Some((name, account)) if digits(account) => (name, Some(account)),
        _ => (given, None),
    }
}

impl FromStr for RoleSpec {
    type Err = BadRole;

    fn from_str(given: &str) -> Result<Self, BadRole> {
        if given.starts_with("arn:") {
            return given.parse().map(Self::Arn);
        }
        if given == INSTANCE {
            return Ok(Self::Instance);
        }
        let (name, account) = split_account(given);
        if account.is_some_and(|account| account.len() != ACCOUNT_DIGITS) {
            return Err(BadRole::new(given, "the account is not 12 digits"));
        }
        let name = name.strip_prefix('/').unwrap_or(name);
        // In any place the same names are possible.
        let anywhere = format!("arn:aws:iam::000000000000:role/{name}").parse::<RoleArn>();
        anywhere.map_err(|error| BadRole::new(given, error.reason))?;
        Ok(Self::Short { name: name.to_owned(), account: account.map(str::to_owned) })
    }
}

/// Whether a pattern of whole ARNs could match a role at all: what it says in full is as in a role.
pub(super) fn check_pattern(given: &str) -> Result<(), BadRole> {
    const EXAMPLE: [&str; 6] = ["arn", "aws", "iam", "", "000000000000", "role/x"];
    const ACCOUNT: usize = 4;
    let mut role: Vec<String> = Vec::new();
    for (at, field) in given.splitn(EXAMPLE.len(), ':').enumerate() {
        let is_resource = at > ACCOUNT;
        if field.contains('*') && !is_resource {
            // It may stand for colons, so nobody knows what comes in which field.
            role.extend(EXAMPLE.iter().skip(at).map(|&field| field.to_owned()));
            break;
        }
        let first = field.find(['*', '?']);
        role.push(match first {
            None => field.to_owned(),
            Some(_) if at == ACCOUNT => field.replace('?', "0"),
            Some(first) if is_resource && first >= "role/".len() => field.replace(['*', '?'], "x"),
            Some(_) => EXAMPLE.iter().skip(at).take(1).map(|&field| field.to_owned()).collect(),
        });
    }
    let role = role.join(":").parse::<RoleArn>();
    role.map(drop).map_err(|error| BadRole::new(given, error.reason))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn arn(name: &str) -> String {
        format!("arn:aws:iam::123456789012:role/{name}")
    }

    fn resolved(given: &str, base: Option<&str>, caller: Option<&str>) -> Option<String> {
        let base = base.map(|base| base.parse::<RoleBase>().unwrap());
        let home = caller.map(|caller| Home::of_caller(caller).unwrap());
        let spec: RoleSpec = given.parse().unwrap();
        spec.resolve(base.as_ref(), home.as_ref()).unwrap().map(|role| role.as_str().to_owned())
    }

    #[test]
    fn short_names_are_completed() {
        let base = Some("arn:aws-cn:iam::111122223333:role/containers/");
        let caller = Some("arn:aws:sts::123456789012:assumed-role/host/i-1");
        for (given, base, expected) in [
            ("web", None, "arn:aws:iam::123456789012:role/web"),
            ("/team/web", None, "arn:aws:iam::123456789012:role/team/web"),
            ("team/web@210987654321", None, "arn:aws:iam::210987654321:role/team/web"),
            ("me@work", None, "arn:aws:iam::123456789012:role/me@work"),
            ("web", base, "arn:aws-cn:iam::111122223333:role/containers/web"),
            ("team/web@210987654321", base, "arn:aws-cn:iam::210987654321:role/containers/team/web"),
            ("arn:aws:iam::123456789012:role/web", base, "arn:aws:iam::123456789012:role/web"),
        ] {
            assert_eq!(resolved(given, base, caller).as_deref(), Some(expected), "{given}");
        }
    }

    #[test]
    fn a_short_name_waits_for_the_account_only_without_a_base() {
        assert_eq!(resolved("web", None, None), None);
        assert!(resolved("web", Some("arn:aws:iam::123456789012:role/"), None).is_some());
        assert!(resolved(&arn("web"), None, None).is_some());
    }

    #[test]
    fn malformed_short_names_are_refused() {
        for given in ["", "we b", "@123456789012", "web@12345", "a/", "a/../..", "wéb", "//", "@instance@1"] {
            assert!(given.parse::<RoleSpec>().is_err(), "{given:?} was accepted");
        }
    }

    #[test]
    fn a_base_ends_with_a_slash() {
        for given in [
            "",
            "web",
            "arn:aws:iam::123456789012:role/containers",
            "arn:aws:iam::1:role/",
            "arn:aws:iam::123456789012:",
        ] {
            assert!(given.parse::<RoleBase>().is_err(), "{given:?} was accepted");
        }
    }

    #[test]
    fn patterns_that_could_match_no_role_are_refused() {
        for given in [
            "arn:*",
            "arn:aws*",
            "arn:aws:iam::*",
            "arn:aws:iam::*:role/web",
            "arn:aws:iam::1234*:role/web",
            "arn:aws:iam::12345678901?:role/web",
            "arn:a??:iam::123456789012:role/we?",
            "arn:aws:iam::123456789012:role/*",
            "arn:aws:iam::123456789012:ro*",
            "arn:aws:iam::123456789012:role/a/*/b-*",
        ] {
            assert_eq!(check_pattern(given), Ok(()), "{given}");
        }
        for given in [
            "arn:",
            "arn:aws:iam::12345678901:role/*",
            "arn:aws:iam::12345678901?",
            "arn:aws:iam::1234567890123:role/*",
            "arn:aws:iam:eu-west-1:123456789012:role/*",
            "arn:aws:sts::123456789012:*",
            "arn:aws:iam::123456789012:user/*",
            "arn:aws:iam::123456789012:role/*/",
            "arn:aws:iam::123456789012:role/we b*",
            "arn:gcp:*",
        ] {
            assert!(check_pattern(given).is_err(), "{given} was accepted");
        }
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
}
