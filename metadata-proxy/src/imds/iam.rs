//! The `iam` subtree: documents of the container's own role. Nothing of it ever comes from the real service.

use std::fmt::Write as _;

use aws_lc_rs::digest;
use http::StatusCode;
use jiff::Timestamp;

use super::response::{self, Response};

/// A question that takes the role's credentials to answer, with [`respond`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum IamRequest {
    /// `iam/security-credentials/`: the name of the role.
    RoleList,
    /// `iam/security-credentials/<role>`.
    Credentials,
    /// `iam/info`: the instance profile.
    Info,
}

/// Credentials of a role. Not `Debug`, lest they be logged.
#[derive(Clone, Copy)]
pub(crate) struct CredentialDocument<'a> {
    pub(crate) access_key_id: &'a str,
    pub(crate) secret_access_key: &'a str,
    pub(crate) session_token: &'a str,
    pub(crate) last_updated: Timestamp,
    pub(crate) expiration: Timestamp,
}

/// Why there are no credentials. It has no place for a message: what STS says names the host's identity and account, and
/// is for the operator's log alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum IamFailure {
    /// The role can not be assumed, and asking again will not help.
    Refused,
    /// Trouble that may pass, and nothing cached.
    Unavailable,
}

/// Answers for the role with that ARN.
///
/// A known failure shows at the role list already, where clients ask first and where all of them take it well; some abort
/// when the credential document is missing.
pub(crate) fn respond(
    request: IamRequest,
    role_arn: &str,
    outcome: Result<&CredentialDocument<'_>, IamFailure>,
    now: Timestamp,
) -> Response {
    let credentials = match (request, outcome) {
        (_, Ok(credentials)) => credentials,
        (_, Err(IamFailure::Unavailable)) => {
            return response::empty(StatusCode::SERVICE_UNAVAILABLE, now);
        }
        (IamRequest::Credentials, Err(IamFailure::Refused)) => {
            return response::document(refusal(role_arn, now), now, now);
        }
        // No usable role is no role: then there is no instance profile either.
        (IamRequest::RoleList | IamRequest::Info, Err(IamFailure::Refused)) => {
            return response::not_found(now);
        }
    };
    let body = match request {
        // No newline: with one, aws-config panics and CRT asks for an invalid path.
        IamRequest::RoleList => role_name(role_arn).to_owned(),
        IamRequest::Credentials => credential_document(credentials),
        IamRequest::Info => info(role_arn, credentials.last_updated),
    };
    response::document(body, credentials.last_updated, now)
}

/// The bare name of a role, without its path.
fn role_name(arn: &str) -> &str {
    arn.rsplit_once('/').map_or(arn, |(_, name)| name)
}

fn credential_document(credentials: &CredentialDocument<'_>) -> String {
    json(&[
        ("Code", "Success"),
        ("LastUpdated", &utc(credentials.last_updated)),
        ("Type", "AWS-HMAC"),
        ("AccessKeyId", credentials.access_key_id),
        ("SecretAccessKey", credentials.secret_access_key),
        ("Token", credentials.session_token),
        ("Expiration", &utc(credentials.expiration)),
    ])
}

fn refusal(role_arn: &str, now: Timestamp) -> String {
    let message = format!(
        "EC2 cannot assume the role {}. Please see documentation at \
         https://docs.aws.amazon.com/IAM/latest/UserGuide/troubleshoot_iam-ec2.html#troubleshoot_iam-ec2_errors-info-doc.",
        role_name(role_arn)
    );
    json(&[("Code", "AssumeRoleUnauthorizedAccess"), ("Message", &message), ("LastUpdated", &utc(now))])
}

/// A role on EC2 comes in an instance profile, by custom of the same name. Ours is made up from the role.
fn info(role_arn: &str, last_updated: Timestamp) -> String {
    let profile_arn = role_arn.replacen(":role/", ":instance-profile/", 1);
    json(&[
        ("Code", "Success"),
        ("LastUpdated", &utc(last_updated)),
        ("InstanceProfileArn", &profile_arn),
        ("InstanceProfileId", &profile_id(&profile_arn)),
    ])
}

/// Looks like the unique id of an instance profile, and is always the same for the same profile.
fn profile_id(profile_arn: &str) -> String {
    let hash = digest::digest(&digest::SHA256, profile_arn.as_bytes());
    let digits = hash.as_ref().iter().take(17).map(|byte| match byte % 32 {
        letter @ 0..26 => char::from(b'A' + letter),
        digit => char::from(b'2' + (digit - 26)),
    });
    "AIPA".chars().chain(digits).collect()
}

/// botocore takes times in exactly this format, without a fraction.
fn utc(time: Timestamp) -> String {
    time.strftime("%Y-%m-%dT%H:%M:%SZ").to_string()
}

/// An object of strings in the layout of the real service, whose clients include some that compare text.
fn json(members: &[(&str, &str)]) -> String {
    let mut text = String::from("{");
    for (at, (name, value)) in members.iter().enumerate() {
        text.push_str(if at == 0 { "\n" } else { ",\n" });
        text.push_str("  \"");
        text.push_str(name);
        text.push_str("\" : \"");
        for char in value.chars() {
            match char {
                '"' | '\\' => text.extend(['\\', char]),
                '\0'..' ' => {
                    // Writing to a string does not fail.
                    let _ = write!(text, "\\u{:04x}", u32::from(char));
                }
                _ => text.push(char),
            }
        }
        text.push('"');
    }
    text.push_str("\n}");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    const ARN: &str = "arn:aws-cn:iam::123456789012:role/team/app-1";

    fn now() -> Timestamp {
        "2021-09-20T22:00:00Z".parse().unwrap()
    }

    fn answer(request: IamRequest, failure: Option<IamFailure>) -> (u16, String) {
        let credentials = CredentialDocument {
            access_key_id: "ASIAIOSFODNN7EXAMPLE",
            secret_access_key: "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
            session_token: "IQoJb3JpZ2luX2VjEAoaCXVzLXdlc3QtMiJ+/=",
            last_updated: "2021-09-20T21:42:26.987Z".parse().unwrap(),
            expiration: "2021-09-21T04:16:53.5Z".parse().unwrap(),
        };
        let response = respond(request, ARN, failure.map_or(Ok(&credentials), Err), now());
        let body = String::from_utf8(response.body().to_vec()).unwrap();
        (response.status().as_u16(), body)
    }

    #[test]
    fn credential_document_is_that_of_the_real_service_byte_for_byte() {
        let expected = r#"{
  "Code" : "Success",
  "LastUpdated" : "2021-09-20T21:42:26Z",
  "Type" : "AWS-HMAC",
  "AccessKeyId" : "ASIAIOSFODNN7EXAMPLE",
  "SecretAccessKey" : "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
  "Token" : "IQoJb3JpZ2luX2VjEAoaCXVzLXdlc3QtMiJ+/=",
  "Expiration" : "2021-09-21T04:16:53Z"
}"#;
        assert_eq!(answer(IamRequest::Credentials, None), (200, expected.into()));
    }

    #[test]
    fn role_list_is_the_bare_name() {
        assert_eq!(answer(IamRequest::RoleList, None), (200, "app-1".into()));
    }

    #[test]
    fn info_names_an_instance_profile_of_the_same_path() {
        let (status, body) = answer(IamRequest::Info, None);
        let id = profile_id("arn:aws-cn:iam::123456789012:instance-profile/team/app-1");
        assert_eq!(status, 200);
        assert_eq!(
            body,
            format!(
                r#"{{
  "Code" : "Success",
  "LastUpdated" : "2021-09-20T21:42:26Z",
  "InstanceProfileArn" : "arn:aws-cn:iam::123456789012:instance-profile/team/app-1",
  "InstanceProfileId" : "{id}"
}}"#
            )
        );
        assert_eq!(id.len(), 21);
        assert!(id.starts_with("AIPA"));
        assert!(id.bytes().all(|b| b.is_ascii_uppercase() || (b'2'..=b'7').contains(&b)));
        assert_ne!(id, profile_id("arn:aws-cn:iam::123456789012:instance-profile/team/app-2"));
    }

    #[test]
    fn refusal_shows_at_the_role_list_and_reveals_nothing() {
        let refused = Some(IamFailure::Refused);
        assert_eq!(answer(IamRequest::RoleList, refused).0, 404);
        assert_eq!(answer(IamRequest::Info, refused).0, 404);
        let (status, body) = answer(IamRequest::Credentials, refused);
        assert_eq!(status, 200);
        assert!(body.starts_with(
            "{\n  \"Code\" : \"AssumeRoleUnauthorizedAccess\",\n  \"Message\" : \"EC2 cannot assume the role app-1. "
        ));
        assert!(body.ends_with("\",\n  \"LastUpdated\" : \"2021-09-20T22:00:00Z\"\n}"));
        assert!(!body.contains("123456789012"));
    }

    #[test]
    fn passing_trouble_is_an_empty_5xx_everywhere() {
        for request in [IamRequest::RoleList, IamRequest::Credentials, IamRequest::Info] {
            assert_eq!(answer(request, Some(IamFailure::Unavailable)), (503, String::new()));
        }
    }

    #[test]
    fn values_can_not_leave_their_string() {
        assert_eq!(json(&[("A", "a\"b\\c\nd")]), "{\n  \"A\" : \"a\\\"b\\\\c\\u000ad\"\n}");
    }
}
