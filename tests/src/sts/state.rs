//! What the embedded STS remembers, and what it answers from that.

use std::collections::HashMap;
use std::time::Duration;

use bytes::Bytes;
use http::request::Parts;
use http::{HeaderMap, Response, StatusCode, header};
use http_body_util::Full;
use jiff::civil::DateTime;
use jiff::tz::TimeZone;
use jiff::{SignedDuration, Timestamp};

use super::roles::{self, AssumeRole, Issued};
use super::wire::{self, Refusal};
use super::{Call, Fault, Outcome, s3};

#[derive(Debug, Default)]
pub(super) struct State {
    /// Keys that were not issued here, and who they are.
    pub(super) identities: HashMap<String, String>,
    pub(super) issued: HashMap<String, Issued>,
    pub(super) calls: Vec<Call>,
    /// Counted apart from `calls`, which can be cleared.
    serial: u64,
    pub(super) fault: Option<Fault>,
    pub(super) role_faults: HashMap<String, Fault>,
    pub(super) lifetime: Option<Duration>,
    pub(super) role_lifetimes: HashMap<String, Duration>,
}

impl State {
    /// Records a call before anything can go wrong with it, and finds out what is to go wrong.
    pub(super) fn record(&mut self, head: &Parts, body: &Bytes) -> (Call, Option<Fault>) {
        let (headers, mut parameters) = (&head.headers, wire::form(body));
        let path = head.uri.path();
        if s3::is_one(&head.method, path) {
            parameters =
                [("Action".to_owned(), format!("s3:{}", head.method)), ("Key".to_owned(), path.to_owned())].into();
            parameters.extend(wire::form(head.uri.query().unwrap_or_default().as_bytes()));
        } else if let Some(query) = head.uri.query() {
            // As signers without a body send it.
            parameters.extend(wire::form(query.as_bytes()));
        }
        let user_agent = headers.get(header::USER_AGENT).map(header::HeaderValue::as_bytes).unwrap_or_default();
        self.serial += 1;
        let signer = wire::signer(headers);
        let call = Call {
            number: self.serial,
            action: parameters.remove("Action").unwrap_or_default(),
            parameters,
            access_key: signer.as_ref().map(|(key, _)| key.clone()),
            region: signer.map(|(_, region)| region),
            user_agent: String::from_utf8_lossy(user_agent).into_owned(),
            outcome: Outcome::Open,
        };
        self.calls.push(call.clone());
        if call.action != "AssumeRole" {
            // A clock is wrong for everybody.
            return (call, self.fault.clone().filter(|fault| matches!(fault, Fault::Clock(_))));
        }
        let role = call.parameters.get("RoleArn").cloned().unwrap_or_default();
        let mut fault = self.role_faults.get(&role).or(self.fault.as_ref()).cloned();
        if fault == Some(Fault::ServerErrorOnce) {
            if self.role_faults.remove(&role).is_none() {
                self.fault = None;
            }
            fault = Some(Fault::ServerError);
        }
        (call, fault)
    }

    /// Answers a call and completes its record.
    pub(super) fn answer(&mut self, call: &Call, headers: &HeaderMap, fault: Option<&Fault>) -> Response<Full<Bytes>> {
        let result = match fault {
            Some(Fault::Refuse) => Err(self.denied(call, "sts:AssumeRole")),
            Some(Fault::Allow(actions)) => {
                match roles::actions(&call.parameters).find(|action| !actions.contains(action)) {
                    Some(action) => Err(self.denied(call, action)),
                    None => self.perform(call, headers),
                }
            }
            Some(Fault::Throttle) => Err(Refusal::new(StatusCode::BAD_REQUEST, "Throttling", "Rate exceeded")),
            Some(Fault::ServerError | Fault::ServerErrorOnce) => {
                let message = "We encountered an internal error. Please try again.";
                Err(Refusal::new(StatusCode::INTERNAL_SERVER_ERROR, "InternalFailure", message))
            }
            Some(Fault::Clock(ahead)) => {
                check_signing_time(headers, Timestamp::now() + *ahead).and_then(|()| self.perform(call, headers))
            }
            // The caller has seen to these: they are about when to answer, not what.
            Some(Fault::Delay(_) | Fault::Hang) | None => self.perform(call, headers),
        };
        let is_s3 = call.action.starts_with("s3:");
        let request_id = format!("00000000-0000-4000-8000-{:012x}", call.number);
        let (outcome, mut response) = match result {
            Ok((Outcome::Identified(arn), _)) if is_s3 => {
                let key = call.access_key.as_deref().unwrap_or_default();
                let asks = |what| call.parameters.contains_key(what);
                let object = match (asks("location"), asks("prefix")) {
                    (true, _) => s3::location(),
                    (_, true) => s3::list(&arn, key),
                    _ => s3::object(&arn, key),
                };
                (Outcome::Identified(arn), object)
            }
            Err(refusal) if is_s3 => (Outcome::Refused(refusal.code), s3::refuse(&refusal)),
            Ok((outcome, xml)) => (outcome, wire::answer(&call.action, &xml, &request_id)),
            Err(refusal) => (Outcome::Refused(refusal.code), wire::refuse(&refusal, &request_id)),
        };
        if let Some(Fault::Clock(ahead)) = fault {
            let date = (Timestamp::now() + *ahead).strftime("%a, %d %b %Y %H:%M:%S GMT").to_string();
            response.headers_mut().extend(date.parse().ok().map(|date| (header::DATE, date)));
        }
        // Gone when somebody cleared the records in the meantime.
        if let Some(recorded) = self.calls.iter_mut().rev().find(|recorded| recorded.number == call.number) {
            recorded.outcome = outcome;
        }
        response
    }

    fn perform(&mut self, call: &Call, headers: &HeaderMap) -> Result<(Outcome, String), Refusal> {
        let caller = self.caller(call, headers)?;
        match call.action.as_str() {
            "AssumeRole" => {
                let request = AssumeRole::parse(&call.parameters)?;
                let role = call.parameters.get("RoleArn").map(String::as_str).unwrap_or_default();
                let lifetime = self.role_lifetimes.get(role).copied().or(self.lifetime);
                let issued = request
                    .issue(self.issued.len() as u64 + 1, lifetime)
                    .ok_or_else(|| self.denied(call, "sts:AssumeRole"))?;
                let (key, xml) = (issued.access_key.clone(), issued.xml());
                self.issued.insert(key.clone(), issued);
                Ok((Outcome::Issued(key), xml))
            }
            "GetCallerIdentity" | "s3:GET" | "s3:HEAD" => {
                Ok((Outcome::Identified(caller.clone()), roles::identity_xml(&caller)))
            }
            action => {
                let version = call.parameters.get("Version").map(String::as_str).unwrap_or_default();
                let message = format!("Could not find operation {action} for version {version}");
                Err(Refusal::new(StatusCode::BAD_REQUEST, "InvalidAction", message))
            }
        }
    }

    /// Who signed, by the access key; the token has to be the one that was issued with it.
    fn caller(&self, call: &Call, headers: &HeaderMap) -> Result<String, Refusal> {
        let unknown = || {
            Refusal::new(
                StatusCode::FORBIDDEN,
                "InvalidClientTokenId",
                "The security token included in the request is invalid.",
            )
        };
        let key = call.access_key.as_deref().ok_or_else(|| {
            Refusal::new(StatusCode::FORBIDDEN, "MissingAuthenticationToken", "Request is missing Authentication Token")
        })?;
        if let Some(arn) = self.identities.get(key) {
            return Ok(arn.clone());
        }
        let issued = self.issued.get(key).ok_or_else(unknown)?;
        let token = headers.get("x-amz-security-token").map(header::HeaderValue::as_bytes);
        if token != Some(issued.session_token.as_bytes()) {
            return Err(unknown());
        }
        if issued.expiration <= Timestamp::now() {
            return Err(Refusal::new(
                StatusCode::FORBIDDEN,
                "ExpiredToken",
                "The security token included in the request is expired",
            ));
        }
        Ok(issued.assumed_role_arn.clone())
    }

    fn denied(&self, call: &Call, action: &str) -> Refusal {
        let caller =
            call.access_key.as_ref().and_then(|key| self.identities.get(key)).map_or("anonymous", String::as_str);
        let role = call.parameters.get("RoleArn").map(String::as_str).unwrap_or_default();
        let message = format!("User: {caller} is not authorized to perform: {action} on resource: {role}");
        Refusal::new(StatusCode::FORBIDDEN, "AccessDenied", message)
    }
}

/// What STS thinks of the time at which a request says that it was signed.
fn check_signing_time(headers: &HeaderMap, now: Timestamp) -> Result<(), Refusal> {
    const TOLERANCE: SignedDuration = SignedDuration::from_mins(5);
    let signed = headers.get("x-amz-date").and_then(|date| date.to_str().ok());
    let signed = signed.and_then(|date| DateTime::strptime("%Y%m%dT%H%M%SZ", date).ok()?.to_zoned(TimeZone::UTC).ok());
    let signed = signed.map(|signed| signed.timestamp()).ok_or_else(|| {
        Refusal::new(StatusCode::BAD_REQUEST, "IncompleteSignature", "Date must be in ISO-8601 'basic format'.")
    })?;
    if now.duration_since(signed).abs() <= TOLERANCE {
        return Ok(());
    }
    let message = if signed < now {
        format!("Signature expired: {signed} is now earlier than {} ({now} - 5 min.)", now - TOLERANCE)
    } else {
        format!("Signature not yet current: {signed} is still later than {} ({now} + 5 min.)", now + TOLERANCE)
    };
    Err(Refusal::new(StatusCode::FORBIDDEN, "SignatureDoesNotMatch", message))
}
