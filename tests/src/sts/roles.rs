//! What STS knows by itself: which arguments of AssumeRole are valid, and what it issues for them.

use std::collections::BTreeMap;
use std::hash::{BuildHasher as _, RandomState};
use std::time::Duration;

use http::StatusCode;
use jiff::Timestamp;

use super::wire::{Refusal, element};

/// Credentials that were issued for a role, with all that is needed to tell afterwards whose they are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Issued {
    pub access_key: String,
    pub secret_key: String,
    pub session_token: String,
    /// As it was asked for, with its path.
    pub role_arn: String,
    pub session_name: String,
    /// `arn:aws:sts::ACCOUNT:assumed-role/NAME/SESSION`, without the path, as STS writes it.
    pub assumed_role_arn: String,
    pub expiration: Timestamp,
}

/// The arguments of a valid AssumeRole.
#[derive(Clone, Debug)]
pub(crate) struct AssumeRole {
    role_arn: String,
    session_name: String,
    duration: Duration,
}

impl AssumeRole {
    pub(crate) fn parse(parameters: &BTreeMap<String, String>) -> Result<Self, Refusal> {
        let text = |name: &str| parameters.get(name).map(String::as_str).unwrap_or_default();
        let role_arn = text("RoleArn");
        if assumed_role(role_arn).is_none() {
            return Err(invalid(format!("{role_arn} is invalid")));
        }
        let session_name = text("RoleSessionName");
        if !(2..=64).contains(&session_name.len()) || !session_name.bytes().all(is_session_byte) {
            return Err(invalid(format!(
                "1 validation error detected: Value '{session_name}' at 'roleSessionName' failed to satisfy \
                 constraint: Member must satisfy regular expression pattern: [\\w+=,.@-]*"
            )));
        }
        let duration = match parameters.get("DurationSeconds") {
            None => 3600,
            Some(seconds) => {
                seconds.parse().ok().filter(|seconds| (900..=43_200).contains(seconds)).ok_or_else(|| {
                    invalid(format!(
                        "1 validation error detected: Value '{seconds}' at 'durationSeconds' failed to satisfy \
                     constraint: Member must be between 900 and 43200"
                    ))
                })?
            }
        };
        Ok(Self {
            role_arn: role_arn.to_owned(),
            session_name: session_name.to_owned(),
            duration: Duration::from_secs(duration),
        })
    }

    /// Issues credentials number `serial`, valid for as long as was asked for or for `lifetime`.
    pub(crate) fn issue(self, serial: u64, lifetime: Option<Duration>) -> Option<Issued> {
        let assumed_role = assumed_role(&self.role_arn)?;
        let expiration = Timestamp::now().checked_add(lifetime.unwrap_or(self.duration)).ok()?;
        Some(Issued {
            access_key: format!("ASIASTANDIN{}", base32(serial, 9)),
            secret_key: format!("{}/+{}", base32(noise(serial), 13), base32(noise(!serial), 25)),
            // With the characters of real ones that a careless copy would mangle.
            session_token: format!("IQoJb3JpZ2luX2Vj//+{}/{}==", base32(noise(serial), 13), "simulated+".repeat(24)),
            assumed_role_arn: format!("{assumed_role}/{}", self.session_name),
            role_arn: self.role_arn,
            session_name: self.session_name,
            expiration,
        })
    }
}

/// What a caller of AssumeRole needs to be allowed, in its own policy and in the role's.
pub(crate) fn actions(parameters: &BTreeMap<String, String>) -> impl Iterator<Item = &'static str> {
    let tags = parameters.keys().any(|name| name.starts_with("Tags.")).then_some("sts:TagSession");
    let source = parameters.contains_key("SourceIdentity").then_some("sts:SetSourceIdentity");
    ["sts:AssumeRole"].into_iter().chain(tags).chain(source)
}

impl Issued {
    /// The result element of AssumeRole.
    pub(crate) fn xml(&self) -> String {
        let expiration = self.expiration.strftime("%Y-%m-%dT%H:%M:%SZ").to_string();
        let user = [
            element("AssumedRoleId", &format!("{}:{}", role_id(&self.role_arn), self.session_name)),
            element("Arn", &self.assumed_role_arn),
        ];
        let credentials = [
            element("AccessKeyId", &self.access_key),
            element("SecretAccessKey", &self.secret_key),
            element("SessionToken", &self.session_token),
            element("Expiration", &expiration),
        ];
        format!(
            "    <AssumedRoleUser>\n{}    </AssumedRoleUser>\n    <Credentials>\n{}    </Credentials>\n    \
             <PackedPolicySize>6</PackedPolicySize>\n",
            user.concat(),
            credentials.concat()
        )
    }
}

/// The result element of GetCallerIdentity for any ARN.
pub(crate) fn identity_xml(arn: &str) -> String {
    let account = arn.split(':').nth(4).unwrap_or_default();
    let id = match arn.rsplit_once('/') {
        Some((role, session)) if arn.contains(":assumed-role/") => {
            format!("{}:{session}", role_id(role))
        }
        _ => format!("AIDA{}", base32(digest(arn), 13)),
    };
    [element("Arn", arn), element("UserId", &id), element("Account", account)].concat()
}

/// `arn:aws:iam::123456789012:role/some/path/name` -> `arn:aws:sts::123456789012:assumed-role/name`.
fn assumed_role(role_arn: &str) -> Option<String> {
    let mut parts = role_arn.splitn(6, ':');
    let (arn, partition, service, region) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let (account, resource) = (parts.next()?, parts.next()?);
    let name = resource.strip_prefix("role/")?.rsplit('/').next()?;
    let valid = arn == "arn"
        && matches!(partition, "aws" | "aws-cn" | "aws-us-gov" | "aws-iso" | "aws-iso-b" | "aws-eusc")
        && service == "iam"
        && region.is_empty()
        && account.len() == 12
        && account.bytes().all(|byte| byte.is_ascii_digit())
        && (1..=64).contains(&name.len())
        && name.bytes().all(is_session_byte);
    valid.then(|| format!("arn:{partition}:sts::{account}:assumed-role/{name}"))
}

/// Role names and session names share their alphabet.
fn is_session_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"_+=,.@-".contains(&byte)
}

fn invalid(message: String) -> Refusal {
    Refusal::new(StatusCode::BAD_REQUEST, "ValidationError", message)
}

fn role_id(role: &str) -> String {
    format!("AROA{}", base32(digest(role), 13))
}

/// FNV-1a: the same role has the same id in every run.
fn digest(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3))
}

/// Differs from run to run, so that nothing that one run left behind passes in the next.
pub(crate) fn noise(seed: u64) -> u64 {
    RandomState::new().hash_one(seed)
}

/// In the alphabet of real access keys, most significant digit first, padded with `A`.
pub(crate) fn base32(mut value: u64, digits: usize) -> String {
    const ALPHABET: &[u8; 32] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZ234567";
    let mut text = vec![b'A'; digits];
    for digit in text.iter_mut().rev() {
        *digit = ALPHABET[(value % 32) as usize];
        value /= 32;
    }
    String::from_utf8_lossy(&text).into_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parameters(role: &str, session: &str, seconds: &str) -> BTreeMap<String, String> {
        let pairs = [("RoleArn", role), ("RoleSessionName", session), ("DurationSeconds", seconds)];
        pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).into()
    }

    #[test]
    fn the_assumed_role_keeps_the_partition_and_loses_the_path() {
        let request =
            AssumeRole::parse(&parameters("arn:aws-cn:iam::123456789012:role/a/b/web", "web-1", "900")).unwrap();
        let issued = request.issue(33, None).unwrap();
        assert_eq!(issued.assumed_role_arn, "arn:aws-cn:sts::123456789012:assumed-role/web/web-1");
        assert_eq!(issued.access_key, "ASIASTANDINAAAAAAABB");
        assert!(identity_xml(&issued.assumed_role_arn).contains("<Account>123456789012</Account>"));
    }

    #[test]
    fn what_the_real_one_refuses_is_refused() {
        let role = "arn:aws:iam::123456789012:role/web";
        for (role, session, seconds) in [
            ("web", "ab", "900"),
            ("arn:aws:iam::12:role/web", "ab", "900"),
            ("arn:aws:iam::123456789012:user/web", "ab", "900"),
            (role, "a", "900"),
            (role, "a/b", "900"),
            (role, "ab", "899"),
            (role, "ab", "43201"),
            (role, "ab", "soon"),
        ] {
            let refusal = AssumeRole::parse(&parameters(role, session, seconds)).unwrap_err();
            assert_eq!(refusal.code, "ValidationError", "{role} {session} {seconds}");
        }
    }
}
