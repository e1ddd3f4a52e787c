//! What a request is answered: by the protocol, with credentials, or with what the real service says.

use std::sync::Arc;

use bytes::Bytes;
use http::{HeaderValue, Request, StatusCode, header::CONNECTION, request::Parts};
use hyper::body::Incoming;
use jiff::Timestamp;
use metadata_proxy_common::Flow;
use secrecy::ExposeSecret as _;
use tracing::{debug, info, warn};

use super::{Response, Server, body::Body, shares::Entered};
use crate::{
    audit,
    containers::EngineError,
    credentials::{Credentials, Failure, RoleSession},
    identity::RoleArn,
    imds::{
        self, Action, Caller, Forward, IamRequest, PLAIN, Routed,
        iam::{self, CredentialDocument, IamFailure},
        response,
    },
    log_limit::Line,
    upstream::{self, Answer, Payload},
    workload::{Standing, Workload},
};

impl Server {
    /// For who has the real service: it connected before the kernel knew, or before a rule said so, and its next connection is
    /// let through.
    pub(super) async fn pass(&self, request: Request<Incoming>, now: Timestamp) -> Response<Body> {
        let mut answer = match upstream::pass(request).await {
            Ok(answer) => answer.map(Body::passed),
            Err(error) => self.failed(&error, now),
        };
        answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        answer
    }

    pub(super) async fn answer_container(
        &self,
        head: &Parts,
        workload: &Workload,
        standing: &Standing,
        entered: &Entered,
        now: Timestamp,
    ) -> Response<Body> {
        let failed = match standing.role() {
            Some((_, session)) if imds::lists_credentials(&head.uri) => {
                !entered.apart(self.credentials.has_soon(session)).await
            }
            Some(_) => false,
            // Its account is not known yet.
            None => true,
        };
        let caller = Caller {
            id: &workload.container.id,
            role: standing.role_name(),
            failed,
            require_token: standing.decision.require_imdsv2,
            view: &standing.decision.view,
        };
        let iam = async |request| match standing.role() {
            Some((arn, session)) => {
                let credentials = entered.apart(self.credentials.get(session)).await;
                self.hand_out(request, arn, session, credentials, workload, head.uri.path())
            }
            // Its account is not known yet; without any role there is no such request.
            None => response::empty(StatusCode::SERVICE_UNAVAILABLE, now),
        };
        let forward = async |forward| self.forward(&forward, workload.container.cgroup, now).await;
        let answer = carry_out(self.imds.route(head, &caller, now), iam, forward).await;
        debug!(
            container = workload.container.name,
            method = %head.method,
            path = head.uri.path(),
            status = answer.status().as_u16(),
            "request"
        );
        answer
    }

    fn hand_out(
        &self,
        request: IamRequest,
        arn: &RoleArn,
        session: &RoleSession,
        credentials: Result<Arc<Credentials>, Failure>,
        workload: &Workload,
        path: &str,
    ) -> Response {
        // Taken after the wait.
        let now = Timestamp::now();
        if workload.standing().role() != Some((arn, session)) {
            // Withdrawn meanwhile; asked again, it gets what holds now.
            return response::empty(StatusCode::SERVICE_UNAVAILABLE, now);
        }
        let arn = arn.as_str();
        match credentials {
            Ok(credentials) => {
                if request == IamRequest::Credentials {
                    let container = &workload.container;
                    if let Some(Line { unsaid }) = workload.log.line() {
                        let access_key = &credentials.access_key_id;
                        info!(container = container.name, role = arn, access_key, unsaid, "handed out");
                    }
                    if let Some(audit) = &self.audit {
                        audit.record(&audit::Record {
                            time: now,
                            container_id: &container.id,
                            container_name: &container.name,
                            engine: &container.engine,
                            image: &container.image,
                            role_arn: arn,
                            session_name: &session.session_name,
                            access_key_id: &credentials.access_key_id,
                            path,
                            expiration: credentials.expiration,
                        });
                    }
                }
                let document = CredentialDocument {
                    access_key_id: &credentials.access_key_id,
                    secret_access_key: credentials.secret_access_key.expose_secret(),
                    session_token: credentials.session_token.expose_secret(),
                    last_updated: credentials.last_updated,
                    expiration: credentials.expiration,
                };
                iam::respond(request, arn, Ok(&document), now)
            }
            Err(failure) => {
                if let Some(Line { unsaid }) = workload.log.line() {
                    warn!(container = workload.container.name, role = arn, unsaid, "no credentials: {failure}");
                }
                let failure = match failure {
                    Failure::Refused { .. } => IamFailure::Refused,
                    Failure::Unavailable { .. } => IamFailure::Unavailable,
                };
                iam::respond(request, arn, Err(failure), now)
            }
        }
    }

    async fn forward(&self, forward: &Forward, cgroup: u64, now: Timestamp) -> Response<Body> {
        let Some(upstream) = &self.upstream else { return response::not_found(now).map(Body::from) };
        let Answer { status, headers, payload } = match upstream.get(forward.path(), forward.is_listing(), cgroup).await
        {
            Ok(answer) => answer,
            Err(error) => return self.failed(&error, now),
        };
        let (body, length) = match payload {
            Payload::Stream(stream, length) => (Body::streamed(stream), length),
            Payload::Whole(body) if forward.is_listing() && status == StatusCode::OK => {
                let listing = self.imds.filter_listing(forward, &String::from_utf8_lossy(&body));
                let length = listing.len() as u64;
                (Body::from(Bytes::from(listing)), length)
            }
            Payload::Whole(body) => {
                let length = body.len() as u64;
                (Body::from(body), length)
            }
        };
        response::forwarded(status, headers, body, length, now)
    }

    fn failed(&self, error: &upstream::Error, now: Timestamp) -> Response<Body> {
        if let Some(Line { unsaid }) = self.log.line() {
            warn!(unsaid, "{error}");
        }
        response::empty(error.status(), now).map(Body::from)
    }

    pub(super) fn answer_stranger(&self, head: &Parts, flow: &Flow, now: Timestamp) -> Response {
        if let Some(Line { unsaid }) = self.log.line() {
            let path = head.uri.path();
            info!(cgroup = flow.cgroup, pid = flow.pid, path, unsaid, "refused a process of no known container");
        }
        let id = format!("cgroup {}", flow.cgroup);
        let caller = Caller { id: &id, role: None, failed: false, require_token: self.require_imdsv2, view: &PLAIN };
        match self.imds_of_strangers.route(head, &caller, now).action {
            Action::Reply(answer) => answer,
            Action::Iam(_) | Action::Forward(_) => response::not_found(now),
        }
    }

    /// Not the stranger's answer: the client is to try again.
    pub(super) fn unknown_for_now(&self, flow: &Flow, error: &EngineError, now: Timestamp) -> Response {
        if let Some(Line { unsaid }) = self.log.line() {
            warn!(cgroup = flow.cgroup, pid = flow.pid, unsaid, "cannot tell whose request this is: {error}");
        }
        response::empty(StatusCode::SERVICE_UNAVAILABLE, now)
    }
}

/// Does what [`Imds::route`] has decided, with what it takes of others.
pub(crate) async fn carry_out<B: From<Bytes>>(
    routed: Routed,
    iam: impl AsyncFnOnce(IamRequest) -> Response,
    forward: impl AsyncFnOnce(Forward) -> Response<B>,
) -> Response<B> {
    let mut answer = match routed.action {
        Action::Reply(answer) => answer.map(B::from),
        Action::Iam(request) => iam(request).await.map(B::from),
        Action::Forward(target) => forward(target).await,
    };
    if let Some(ttl) = routed.token_ttl {
        response::echo_token_ttl(answer.headers_mut(), ttl);
    }
    answer
}
