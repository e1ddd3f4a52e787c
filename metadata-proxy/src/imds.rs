//! The instance metadata service as its clients know it: from the head of a request to an answer, or to what is needed
//! for one.
//!
//! Nothing here does I/O or reads a clock. [`Imds::route`] decides; the server asks for credentials or asks the real
//! service where it is told to, and comes back with [`iam::respond`] or [`Imds::filter_listing`].

mod glob;
pub(crate) mod iam;
mod listing;
mod path;
mod policy;
pub(crate) mod response;
mod simulated;
mod token;

use http::request::Parts;
use http::{HeaderMap, Method, StatusCode, Uri};
use jiff::Timestamp;

pub(crate) use self::iam::IamRequest;
pub(crate) use self::listing::Forward;
use self::listing::Listing;
use self::path::{CanonicalPath, is_version};
use self::policy::Access;
pub(crate) use self::policy::{PLAIN, Policy, PolicyError, View};
pub(crate) use self::response::Response;
pub(crate) use self::simulated::{Instance, Settings as InstanceSettings};
pub(crate) use self::token::TokenKey;
use self::token::{Session, Ttl};

/// The container that asks.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Caller<'a> {
    /// Its id, for which session tokens are valid.
    pub(crate) id: &'a str,
    /// The bare name of its role: the last component of the ARN's path.
    pub(crate) role: Option<&'a str>,
    /// There are no credentials of that role now: meanwhile no listing leads there.
    pub(crate) failed: bool,
    /// Whether it has to present a session token (IMDSv2 only).
    pub(crate) require_token: bool,
    /// What it shows and hides of the real service for itself.
    pub(crate) view: &'a View,
}

/// What to do about a request.
pub(crate) struct Routed {
    pub(crate) action: Action,
    /// What is left of the valid token that was presented. Whatever the answer, it then carries this:
    /// [`response::echo_token_ttl`].
    pub(crate) token_ttl: Option<u32>,
}

/// How a request is answered.
pub(crate) enum Action {
    /// With this. To a HEAD request, without its body.
    Reply(Response),
    /// With [`iam::respond`], once the credentials of the caller's role have been asked for.
    Iam(IamRequest),
    /// With what the real service says.
    Forward(Forward),
}

/// The service, the same for all containers.
pub(crate) struct Imds {
    tokens: TokenKey,
    rest: Rest,
    started: Timestamp,
}

/// Where everything comes from but session tokens and the `iam` tree, which are ours.
pub(crate) enum Rest {
    /// There is none of it.
    Nothing,
    /// From the real service: what the policy shows of it.
    Real(Policy),
    /// From ourselves: what the operator's view does not hide of it.
    Simulated(Instance, View),
}

/// Whether what is listed there depends on whether there are credentials.
pub(crate) fn lists_credentials(target: &Uri) -> bool {
    CanonicalPath::parse(target)
        .is_ok_and(|path| matches!(path.segments().as_slice(), [_, "meta-data"] | [_, "meta-data", "iam"]))
}

impl Imds {
    /// `started` is the `Last-Modified` of what never changes.
    pub(crate) fn new(tokens: TokenKey, rest: Rest, started: Timestamp) -> Self {
        Self { tokens, rest, started }
    }

    /// Decides on a request. Its body, if any, has no meaning for any path.
    pub(crate) fn route(&self, head: &Parts, caller: &Caller<'_>, now: Timestamp) -> Routed {
        let reply = |response| Routed { action: Action::Reply(response), token_ttl: None };
        let path = match CanonicalPath::parse(&head.uri) {
            Ok(path) => path,
            Err(error) => return reply(response::page(error.status(), now)),
        };
        // Ahead of the check for a token, which is to be had here.
        if let Some(response) = self.token_exchange(head, &path, caller, now) {
            return reply(response);
        }
        let token_ttl = match self.tokens.session(&head.headers, caller.id, now) {
            Session::Valid { remaining } => Some(remaining),
            Session::None if !caller.require_token => None,
            // A bad token is an error also where none is needed: the client wants to be told to get another.
            Session::None | Session::Invalid => {
                return reply(response::empty(StatusCode::UNAUTHORIZED, now));
            }
        };
        let action = match head.method {
            Method::GET | Method::HEAD => self.resolve(&path, caller, now),
            _ => Action::Reply(response::allow(StatusCode::METHOD_NOT_ALLOWED, "GET, HEAD", now)),
        };
        Routed { action, token_ttl }
    }

    /// Takes what the policy denies out of a listing of the real service, and puts the caller's own `iam/` in.
    pub(crate) fn filter_listing(&self, forward: &Forward, body: &str) -> String {
        match &self.rest {
            Rest::Real(policy) => forward.filter(policy, body),
            // Nothing is ever forwarded.
            Rest::Nothing | Rest::Simulated(..) => String::new(),
        }
    }

    fn token_exchange(
        &self,
        head: &Parts,
        path: &CanonicalPath,
        caller: &Caller<'_>,
        now: Timestamp,
    ) -> Option<Response> {
        const METHODS: &str = "OPTIONS, PUT";
        let segments = path.segments();
        let [version, "api", "token"] = segments.as_slice() else {
            return None;
        };
        let put = head.method == Method::PUT;
        let response = match *version {
            "latest" if put => self.grant_token(&head.headers, caller, now),
            "latest" if head.method == Method::OPTIONS => response::allow(StatusCode::OK, METHODS, now),
            "latest" => response::allow(StatusCode::METHOD_NOT_ALLOWED, METHODS, now),
            // Tokens are to be had from `latest` only.
            version if put && is_version(version) => response::page(StatusCode::FORBIDDEN, now),
            _ => return None,
        };
        Some(response)
    }

    fn grant_token(&self, headers: &HeaderMap, caller: &Caller<'_>, now: Timestamp) -> Response {
        // Came through a proxy: maybe one that an outsider talks to.
        if headers.contains_key("x-forwarded-for") {
            return response::page(StatusCode::FORBIDDEN, now);
        }
        match Ttl::requested(headers) {
            Some(ttl) => {
                let token = self.tokens.issue(caller.id, ttl, now);
                response::token(token, ttl.seconds(), now)
            }
            None => response::page(StatusCode::BAD_REQUEST, now),
        }
    }

    fn resolve(&self, path: &CanonicalPath, caller: &Caller<'_>, now: Timestamp) -> Action {
        let segments = path.segments();
        let action = match segments.as_slice() {
            [] => self.list_versions(path, now),
            [version, ..] if !is_version(version) => None,
            [_, "meta-data", "iam", rest @ ..] => self.resolve_iam(rest, caller, now),
            [_, rest @ ..] => self.resolve_other(path, rest, caller, now),
        };
        action.unwrap_or_else(|| Action::Reply(response::not_found(now)))
    }

    fn list_versions(&self, path: &CanonicalPath, now: Timestamp) -> Option<Action> {
        match self.rest {
            Rest::Real(_) => Some(Action::Forward(Forward::new(path.to_target()?, Some(Listing::Versions)))),
            Rest::Nothing | Rest::Simulated(..) => Some(self.document(listing::VERSIONS, now)),
        }
    }

    fn resolve_iam(&self, rest: &[&str], caller: &Caller<'_>, now: Timestamp) -> Option<Action> {
        let role = caller.role?;
        match rest {
            [] if caller.failed => None,
            [] => Some(self.document(listing::IAM, now)),
            ["info"] => Some(Action::Iam(IamRequest::Info)),
            ["security-credentials"] => Some(Action::Iam(IamRequest::RoleList)),
            ["security-credentials", name] if *name == role => Some(Action::Iam(IamRequest::Credentials)),
            // `security-credentials-extended` as well: SDKs then take the classic path.
            _ => None,
        }
    }

    fn resolve_other(
        &self,
        path: &CanonicalPath,
        rest: &[&str],
        caller: &Caller<'_>,
        now: Timestamp,
    ) -> Option<Action> {
        let has_role = caller.role.is_some() && !caller.failed;
        let access = match &self.rest {
            Rest::Real(policy) => policy.access(rest, caller.view),
            Rest::Nothing => Access::Denied,
            Rest::Simulated(instance, view) => {
                let hidden = |path: &[&str]| view.hides(path) || caller.view.hides(path);
                return self.simulate(instance, rest, has_role, hidden, now);
            }
        };
        let listing = match access {
            Access::Denied => {
                return listing::own_listing(rest, has_role).map(|list| self.document(list, now));
            }
            Access::Open => None,
            Access::Filtered => {
                let parent = rest.iter().map(ToString::to_string).collect();
                Some(Listing::Entries { parent, has_role, view: caller.view.clone() })
            }
        };
        Some(Action::Forward(Forward::new(path.to_target()?, listing)))
    }

    fn simulate(
        &self,
        instance: &Instance,
        path: &[&str],
        has_role: bool,
        hidden: impl Fn(&[&str]) -> bool,
        now: Timestamp,
    ) -> Option<Action> {
        if hidden(path) {
            return listing::own_listing(path, has_role).map(|list| self.document(list, now));
        }
        let body = instance.find(path, has_role, hidden)?;
        Some(match path {
            // The real service does not know what is in it either.
            ["user-data"] => Action::Reply(response::octets(body, self.started, now)),
            _ => self.document(body, now),
        })
    }

    fn document(&self, body: impl Into<String>, now: Timestamp) -> Action {
        Action::Reply(response::document(body.into(), self.started, now))
    }
}

#[cfg(test)]
mod tests;
