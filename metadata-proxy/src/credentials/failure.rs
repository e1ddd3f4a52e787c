//! Why there are no credentials, in the two kinds that callers must tell apart, and how the SDK's errors map to them.

use std::error::Error;
use std::fmt;

use aws_sdk_sts::error::{ProvideErrorMetadata, SdkError};

use super::RoleSession;

/// `Refused`: the role is not for us, and asking again does not help until somebody changes something.
/// `Unavailable`: nobody has said no, so asking again later may help.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Failure {
    /// `code` is the error code of STS. The message is for operators: it may name the daemon's own identity.
    #[error("{code}: {message}")]
    Refused { code: String, message: String },
    /// `throttled`: the account has made too many calls, whoever made them.
    #[error("{message}")]
    Unavailable { message: String, throttled: bool },
}

impl Failure {
    pub(super) fn unavailable(message: impl Into<String>) -> Self {
        Self::Unavailable { message: message.into(), throttled: false }
    }
}

/// Codes that speak of the daemon's own credentials: the source (a profile, an instance role) may have newer ones by now.
pub(super) const STALE_SOURCE: [&str; 4] =
    ["ExpiredToken", "ExpiredTokenException", "InvalidClientTokenId", "UnrecognizedClientException"];

/// Further codes about the daemon's own credentials or its clock. Neither they nor the stale ones say anything about a role.
const BAD_SOURCE: [&str; 3] = ["IncompleteSignature", "MissingAuthenticationToken", "SignatureDoesNotMatch"];

/// Codes of too many calls, beside those that say `Throttl`.
const THROTTLING: [&str; 3] = ["RequestLimitExceeded", "SlowDown", "TooManyRequests"];

/// Codes of other trouble that passes by itself although their status alone would say "refused".
const TRANSIENT: [&str; 7] = [
    "IDPCommunicationError",
    "InternalError",
    "InternalFailure",
    "PriorRequestNotComplete",
    "RequestExpired",
    "RequestTimeout",
    "ServiceUnavailable",
];

/// What an answer of STS means, from its error code and HTTP status alone.
#[derive(Debug, PartialEq, Eq)]
enum Verdict {
    Refused,
    Transient,
}

fn verdict(code: Option<&str>, status: u16) -> Verdict {
    // Without a code it was not STS that answered but a proxy or a wrong endpoint, which says nothing about the role.
    let Some(code) = code else {
        return Verdict::Transient;
    };
    let transient = throttles(code, status) || TRANSIENT.contains(&base(code)) || is_of_source(code);
    if transient || !(400..500).contains(&status) || status == 408 { Verdict::Transient } else { Verdict::Refused }
}

/// Both spellings are in use: `ThrottlingException` and `Throttling`.
fn base(code: &str) -> &str {
    code.strip_suffix("Exception").unwrap_or(code)
}

fn is_of_source(code: &str) -> bool {
    STALE_SOURCE.contains(&code) || BAD_SOURCE.contains(&base(code))
}

/// Whether an answer says that there were too many calls.
pub(super) fn throttles(code: &str, status: u16) -> bool {
    status == 429 || base(code).contains("Throttl") || THROTTLING.contains(&base(code))
}

/// What a call of STS was about.
#[derive(Clone, Copy)]
pub(super) enum Subject<'a> {
    /// Who the daemon is.
    Caller,
    /// A role, and who the daemon is as far as that is known.
    Role { session: &'a RoleSession, caller: Option<&'a str> },
}

impl fmt::Display for Subject<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Caller => f.write_str("the daemon's own identity"),
            Self::Role { session, .. } => f.write_str(&session.role_arn),
        }
    }
}

/// The failure of a call, worded for the operator.
pub(super) fn from_sdk<E>(error: &SdkError<E>, subject: Subject<'_>) -> Failure
where
    E: ProvideErrorMetadata + Error + 'static,
{
    match error {
        SdkError::ServiceError(answer) => {
            let status = answer.raw().status().as_u16();
            from_answer(answer.err().code(), answer.err().message(), status, subject)
        }
        SdkError::TimeoutError(_) => Failure::unavailable(format!(
            "STS did not answer in time for {subject}; check the network path to it and AWS_ENDPOINT_URL_STS"
        )),
        SdkError::ResponseError(answer) => Failure::unavailable(format!(
            "what answered for {subject} (HTTP {}) is not STS; check AWS_ENDPOINT_URL_STS",
            answer.raw().status().as_u16()
        )),
        other => {
            let remedy = if lacks_source(other) {
                "give the daemon credentials: an instance role, AWS_PROFILE, or AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
            } else {
                "check the network path to STS and AWS_ENDPOINT_URL_STS"
            };
            Failure::unavailable(format!("no call to STS for {subject}: {}; {remedy}", causes(other)))
        }
    }
}

/// Whether the request could not be signed because the chain gave no credentials. The SDK has no type for that which we
/// could match on without another dependency, only its words.
pub(super) fn lacks_source<E: Error + 'static>(error: &SdkError<E>) -> bool {
    let unsigned = match error {
        SdkError::DispatchFailure(failure) => failure.is_other(),
        SdkError::ConstructionFailure(_) => true,
        _ => false,
    };
    unsigned && causes(error).contains("credential")
}

fn from_answer(code: Option<&str>, message: Option<&str>, status: u16, subject: Subject<'_>) -> Failure {
    let said = said(code, message);
    match (verdict(code, status), code) {
        (Verdict::Refused, Some(code)) => Failure::Refused {
            code: code.to_owned(),
            message: format!("STS refused {subject}: {said}{}", remedy(code, subject)),
        },
        (_, code) => {
            let code = code.unwrap_or("no error code");
            if throttles(code, status) {
                let message = format!(
                    "STS throttles the account, asked for {subject}: HTTP {status}, {code}: {said}; it is tried again, more slowly. \
                     If this goes on, look who else calls STS, or lower calls-per-second of [sts]"
                );
                return Failure::Unavailable { message, throttled: true };
            }
            let remedy = if is_of_source(code) {
                "; renew the credentials that the daemon itself uses, and check the host's clock"
            } else {
                ""
            };
            Failure::unavailable(format!("STS failed for {subject}: HTTP {status}, {code}: {said}{remedy}"))
        }
    }
}

/// What to do about it, where we know.
fn remedy(code: &str, subject: Subject<'_>) -> String {
    match code {
        "AccessDenied" | "AccessDeniedException" => match subject {
            Subject::Caller => String::new(),
            Subject::Role { session, caller } => permissions(session, caller),
        },
        "RegionDisabledException" => "; set AWS_REGION to a region that is enabled for the account".to_owned(),
        "PackedPolicyTooLarge" | "PackedPolicyTooLargeException" => {
            "; shorten the session policy and tags".to_owned()
        }
        "ValidationError" => {
            "; check the role, session name, external id and duration (at most 1 h when the daemon itself acts under a role)".to_owned()
        }
        "MalformedPolicyDocument" => "; correct the session policy, of the container or of the rule".to_owned(),
        _ => String::new(),
    }
}

/// Tags and a source identity are actions of their own, in both policies (IAM User Guide, "Pass session tags in AWS STS" and
/// "Monitor and control actions taken with assumed roles").
fn permissions(session: &RoleSession, caller: Option<&str>) -> String {
    let caller = caller.unwrap_or("the daemon's own identity (`aws sts get-caller-identity`)");
    let tags = (!session.tags.is_empty()).then_some("sts:TagSession (it has session tags)");
    let source = session.source_identity.is_some().then_some("sts:SetSourceIdentity (it has a source identity)");
    let actions: Vec<_> = ["sts:AssumeRole"].into_iter().chain(tags).chain(source).collect();
    let external_id = match &session.external_id {
        Some(id) => format!("with the external id {id:?}"),
        None => "without an external id, as the container gives none".to_owned(),
    };
    format!(
        "; the trust policy of {} must allow {} to {caller}, {external_id}, and a policy of that identity must allow the same",
        session.role_arn,
        actions.join(" and ")
    )
}

/// The service's own words, on one line and not too long.
fn said(code: Option<&str>, message: Option<&str>) -> String {
    // This message may quote the signed request, session token included.
    if code == Some("SignatureDoesNotMatch") {
        return "the signature does not match".to_owned();
    }
    one_line(message.unwrap_or("no message"), 400)
}

/// `outer: inner: innermost`; the SDK's own Display stops at the outermost.
fn causes(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    one_line(&text, 800)
}

fn one_line(text: &str, longest: usize) -> String {
    let words: Vec<_> = text.split_whitespace().collect();
    words.join(" ").chars().take(longest).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn refusals_are_told_from_trouble_that_passes() {
        let refused = [
            ("AccessDenied", 403),
            ("MalformedPolicyDocument", 400),
            ("PackedPolicyTooLarge", 400),
            ("PackedPolicyTooLargeException", 400),
            ("ValidationError", 400),
            ("RegionDisabledException", 403),
        ];
        for (code, status) in refused {
            assert_eq!(verdict(Some(code), status), Verdict::Refused, "{code}");
        }
        let throttling = [
            (Some("Throttling"), 400),
            (Some("ThrottlingException"), 400),
            (Some("ThrottledException"), 400),
            (Some("RequestThrottled"), 400),
            (Some("RequestLimitExceeded"), 503),
            (Some("TooManyRequestsException"), 400),
            (Some("Unheard"), 429),
        ];
        let other = [
            (Some("IDPCommunicationError"), 400),
            (Some("ExpiredToken"), 403),
            (Some("ExpiredTokenException"), 400),
            (Some("InvalidClientTokenId"), 403),
            (Some("SignatureDoesNotMatch"), 403),
            (Some("InternalFailure"), 500),
            (Some("AccessDenied"), 502),
            (None, 503),
            (None, 403),
            (None, 301),
        ];
        for (codes, expected) in [(&throttling[..], true), (&other, false)] {
            for (code, status) in codes {
                let failure = from_answer(*code, None, *status, Subject::Caller);
                let Failure::Unavailable { throttled, .. } = failure else { panic!("{code:?} {status}: {failure}") };
                assert_eq!(throttled, expected, "{code:?} {status}");
            }
        }
    }

    #[test]
    fn a_refusal_says_what_to_do() {
        let plain = RoleSession::plain("arn:aws:iam::1:role/web", "s");
        let denied = |session: &RoleSession| {
            let subject = Subject::Role { session, caller: Some("arn:daemon") };
            from_answer(Some("AccessDenied"), Some("not\n  authorized"), 403, subject).to_string()
        };
        let text = denied(&plain);
        assert!(text.starts_with("AccessDenied: STS refused arn:aws:iam::1:role/web: not authorized;"), "{text}");
        assert!(text.contains("the trust policy of arn:aws:iam::1:role/web must allow sts:AssumeRole to arn:daemon"));
        assert!(!text.contains("sts:TagSession") && !text.contains("sts:SetSourceIdentity"), "{text}");
        let text = denied(&RoleSession {
            external_id: Some("x1".into()),
            tags: vec![("team".into(), "a".into())],
            source_identity: Some("alice".into()),
            ..plain.clone()
        });
        for part in ["sts:TagSession", "sts:SetSourceIdentity", "the external id \"x1\""] {
            assert!(text.contains(part), "no {part} in {text}");
        }
    }

    #[test]
    fn trouble_of_the_daemons_own_credentials_comes_with_its_remedy() {
        for code in STALE_SOURCE.iter().chain(&BAD_SOURCE) {
            let text = from_answer(Some(code), Some("no"), 403, Subject::Caller).to_string();
            assert!(
                text.contains(code) && text.contains("renew the credentials that the daemon itself uses"),
                "{text}"
            );
        }
    }

    #[test]
    fn a_quoted_request_is_not_repeated() {
        let quoted = Some("The Canonical String should have been 'x-amz-security-token:SECRET'");
        let failure = from_answer(Some("SignatureDoesNotMatch"), quoted, 403, Subject::Caller);
        assert!(!failure.to_string().contains("SECRET"));
    }
}
