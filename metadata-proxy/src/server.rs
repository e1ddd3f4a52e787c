//! HTTP over the accepted connections: limits, and the way of a request from its flow to an answer.

use std::{
    collections::HashMap,
    convert::Infallible,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytes::Bytes;
use http::{
    HeaderValue, Request, StatusCode,
    header::{CONNECTION, TRANSFER_ENCODING, USER_AGENT},
    request::Parts,
};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
};
use jiff::Timestamp;
use metadata_proxy_common::Flow;
use secrecy::ExposeSecret as _;
use tokio::{sync::mpsc, time::timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};

use crate::{
    containers::{EngineError, Registry},
    credentials::{Failure, RoleSession, Store},
    identity::{RoleArn, Verdict},
    imds::{
        Action, Caller, Forward, IamRequest, Imds, Response,
        iam::{self, CredentialDocument, IamFailure},
        response,
    },
    listeners::Connection,
    metrics::Metrics,
    upstream::Upstream,
    workload::Workload,
};

/// For the whole head of a request, and between two requests.
const HEADER_TIMEOUT: Duration = Duration::from_secs(2);
/// An SDK's request has about 500 bytes in 10 headers.
const HEAD_LIMIT: usize = 8192;
const HEADERS_LIMIT: usize = 64;
/// Of one cgroup at a time. An SDK has one or two.
const CONNECTIONS_PER_CGROUP: usize = 256;
/// What the daemon's end waits for requests in flight.
const DRAIN: Duration = Duration::from_secs(5);

pub(crate) struct Server {
    pub(crate) registry: Arc<Registry<Workload>>,
    pub(crate) imds: Imds,
    /// Answers whom nobody knows: with session tokens, lest a client fall back, and otherwise with
    /// nothing.
    pub(crate) imds_of_strangers: Imds,
    pub(crate) credentials: Arc<Store>,
    pub(crate) upstream: Option<Upstream>,
    /// Of those whom nobody knows; containers' is decided for each.
    pub(crate) require_imdsv2: bool,
    pub(crate) connections: Arc<ConnectionCount>,
    pub(crate) metrics: Metrics,
}

/// Connections by cgroup.
#[derive(Default)]
pub(crate) struct ConnectionCount(Mutex<HashMap<u64, usize>>);

impl Server {
    /// Serves until told to stop, then lets requests in flight end.
    pub(crate) async fn run(self: Arc<Self>, mut connections: mpsc::Receiver<Connection>, stop: CancellationToken) {
        let graceful = GracefulShutdown::new();
        loop {
            let (connection, flow) = tokio::select! {
                biased; // what has been accepted is served
                Some(accepted) = connections.recv() => accepted,
                () = stop.cancelled() => break,
            };
            let Some(permit) = self.connections.enter(flow.cgroup) else {
                self.metrics.refused_connection();
                debug!(cgroup = flow.cgroup, "closed a connection over the limit of {CONNECTIONS_PER_CGROUP}");
                continue;
            };
            let server = Arc::clone(&self);
            let service = service_fn(move |request| {
                let server = Arc::clone(&server);
                async move { Ok::<_, Infallible>(server.answer(request, &flow).await.map(Full::new)) }
            });
            let http = http1::Builder::new()
                .timer(TokioTimer::new())
                .header_read_timeout(HEADER_TIMEOUT)
                .max_buf_size(HEAD_LIMIT)
                .max_headers(HEADERS_LIMIT)
                .title_case_headers(true)
                .serve_connection(TokioIo::new(connection), service);
            let served = graceful.watch(http);
            tokio::spawn(async move {
                if let Err(error) = served.await {
                    debug!(cgroup = flow.cgroup, "connection ended: {error}");
                }
                drop(permit);
            });
        }
        if timeout(DRAIN, graceful.shutdown()).await.is_err() {
            warn!("ended with requests in flight after {DRAIN:?}");
        }
    }

    async fn answer(&self, request: Request<Incoming>, flow: &Flow) -> Response {
        // The body means nothing on any path; what is left unread of it closes the connection.
        let (head, _body) = request.into_parts();
        let now = Timestamp::now();
        // For each request: a connection may outlive its container, or what has been decided about it.
        let (caller, mut answer) = match self.registry.resolve(flow).await {
            Ok(Some(workload)) => ("container", self.answer_container(&head, &workload, now).await),
            Ok(None) => ("stranger", self.answer_stranger(&head, flow, now)),
            Err(error) => ("unresolved", unknown_for_now(flow, error, now)),
        };
        self.metrics.answered(caller, answer.status());
        if in_doubt(&head, answer.status()) {
            answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
        }
        answer
    }

    async fn answer_container(&self, head: &Parts, workload: &Workload, now: Timestamp) -> Response {
        workload.activity.saw(head.headers.get(USER_AGENT).and_then(|agent| agent.to_str().ok()));
        let standing = workload.standing();
        if standing.decision.verdict == Verdict::Instance {
            // It connected before the kernel knew, or before a rule said so; its next connection is let through.
            let mut answer = response::empty(StatusCode::SERVICE_UNAVAILABLE, now);
            answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
            return answer;
        }
        let caller = Caller {
            id: &workload.container.id,
            role: standing.role_name(),
            require_token: standing.decision.require_imdsv2,
        };
        let routed = self.imds.route(head, &caller, now);
        let mut answer = match (routed.action, standing.role()) {
            (Action::Reply(answer), _) => answer,
            (Action::Iam(request), Some((arn, session))) => self.hand_out(request, arn, session, workload).await,
            // A role whose account is not known yet; without any role there is no such request.
            (Action::Iam(_), None) => response::empty(StatusCode::SERVICE_UNAVAILABLE, now),
            (Action::Forward(forward), _) => self.forward(&forward, now).await,
        };
        if let Some(ttl) = routed.token_ttl {
            response::echo_token_ttl(answer.headers_mut(), ttl);
        }
        debug!(
            container = workload.container.name,
            method = %head.method,
            path = head.uri.path(),
            status = answer.status().as_u16(),
            "request"
        );
        answer
    }

    async fn hand_out(
        &self,
        request: IamRequest,
        arn: &RoleArn,
        session: &RoleSession,
        workload: &Workload,
    ) -> Response {
        let credentials = self.credentials.get(session).await;
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
                    info!(container = container.name, role = arn, access_key = credentials.access_key_id, "handed out");
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
                warn!(container = workload.container.name, role = arn, "no credentials: {failure}");
                let failure = match failure {
                    Failure::Refused { .. } => IamFailure::Refused,
                    Failure::Unavailable { .. } => IamFailure::Unavailable,
                };
                iam::respond(request, arn, Err(failure), now)
            }
        }
    }

    async fn forward(&self, forward: &Forward, now: Timestamp) -> Response {
        let Some(upstream) = &self.upstream else { return response::not_found(now) };
        let answer = match upstream.get(forward.path()).await {
            Ok(answer) => answer,
            Err(error) => {
                warn!("{error}");
                return response::empty(error.status(), now);
            }
        };
        let mut body = answer.body;
        if forward.is_listing() && answer.status == StatusCode::OK {
            body = Bytes::from(self.imds.filter_listing(forward, &String::from_utf8_lossy(&body)));
        }
        response::forwarded(answer.status, answer.headers, body, now)
    }

    fn answer_stranger(&self, head: &Parts, flow: &Flow, now: Timestamp) -> Response {
        info!(cgroup = flow.cgroup, pid = flow.pid, path = head.uri.path(), "refused a process of no known container");
        let id = format!("cgroup {}", flow.cgroup);
        let caller = Caller { id: &id, role: None, require_token: self.require_imdsv2 };
        match self.imds_of_strangers.route(head, &caller, now).action {
            Action::Reply(answer) => answer,
            Action::Iam(_) | Action::Forward(_) => response::not_found(now),
        }
    }
}

/// Whether the request, and so what follows it on the connection, may have been meant otherwise.
///
/// A body in chunks may have come with a `Content-Length` as well, which hyper then hides from us: RFC 9112, section 6.1,
/// wants such a connection closed. No SDK sends any body.
fn in_doubt(head: &Parts, status: StatusCode) -> bool {
    matches!(status, StatusCode::BAD_REQUEST | StatusCode::URI_TOO_LONG) || head.headers.contains_key(TRANSFER_ENCODING)
}

/// Not the stranger's answer: the client is to try again.
fn unknown_for_now(flow: &Flow, error: EngineError, now: Timestamp) -> Response {
    warn!(cgroup = flow.cgroup, pid = flow.pid, "cannot tell whose request this is: {error}");
    response::empty(StatusCode::SERVICE_UNAVAILABLE, now)
}

impl ConnectionCount {
    /// None: this cgroup has its share.
    fn enter(self: &Arc<Self>, cgroup: u64) -> Option<Entered> {
        let mut counts = self.lock();
        let count = counts.entry(cgroup).or_default();
        if *count >= CONNECTIONS_PER_CGROUP {
            return None;
        }
        *count += 1;
        Some(Entered { counts: Arc::clone(self), cgroup })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, usize>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One connection, until it is dropped.
struct Entered {
    counts: Arc<ConnectionCount>,
    cgroup: u64,
}

impl Drop for Entered {
    fn drop(&mut self) {
        let mut counts = self.counts.lock();
        if let Some(count) = counts.get_mut(&self.cgroup) {
            *count -= 1;
            if *count == 0 {
                counts.remove(&self.cgroup);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_cgroup_has_its_share_of_connections_and_no_more() {
        let counts = Arc::<ConnectionCount>::default();
        let mut entered: Vec<_> = (0..CONNECTIONS_PER_CGROUP).map(|_| counts.enter(1).unwrap()).collect();
        assert!(counts.enter(1).is_none());
        assert!(counts.enter(2).is_some());
        entered.pop();
        assert!(counts.enter(1).is_some());
        drop(entered);
        assert!(counts.lock().is_empty());
    }
}
