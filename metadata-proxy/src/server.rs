//! HTTP over the accepted connections: limits, and the way of a request from its flow to an answer.

mod answer;
mod body;
mod linger;
mod shares;

use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{
    HeaderValue, Request, StatusCode,
    header::{CONNECTION, TRANSFER_ENCODING, USER_AGENT},
    request::Parts,
};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    server::graceful::GracefulShutdown,
};
use jiff::Timestamp;
use metadata_proxy_common::Flow;
use tokio::{sync::mpsc, time::timeout};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use crate::{
    audit::Audit,
    containers::Registry,
    credentials::Store,
    identity::Verdict,
    imds::{Imds, response},
    listeners::Connection,
    log_limit::{Line, LogLimit},
    metrics::Metrics,
    services::{Services, Whose},
    strangers::Strangers,
    upstream::Upstream,
    workload::{Client, Workload},
};
pub(crate) use answer::carry_out;
use body::Body;
use linger::Lingering;
pub(crate) use shares::Limits;
use shares::{Entered, Shares};

/// What the daemon's end waits for requests in flight. Meanwhile the kernel holds new connections, before Linux 6.15 for
/// only two seconds, in which the next daemon has to start as well: one client that does not read its answer must not cost
/// others theirs.
const DRAIN: Duration = Duration::from_millis(1500);

pub(crate) struct Server {
    pub(crate) services: Arc<Services>,
    pub(crate) registry: Arc<Registry<Workload>>,
    pub(crate) imds: Imds,
    /// Answers whom nobody knows: with session tokens, lest a client fall back, and otherwise with
    /// nothing.
    pub(crate) imds_of_strangers: Imds,
    pub(crate) credentials: Arc<Store>,
    pub(crate) upstream: Option<Upstream>,
    pub(crate) audit: Option<Arc<Audit>>,
    /// Of those whom nobody knows; containers' is decided for each.
    pub(crate) require_imdsv2: bool,
    pub(crate) limits: Limits,
    pub(crate) metrics: Metrics,
    pub(crate) usage: Usage,
    pub(crate) strangers: Arc<Strangers>,
    /// Of strangers, and of what fails behind us.
    pub(crate) log: LogLimit,
}

/// What each container has at the moment.
#[derive(Default)]
pub(crate) struct Usage {
    connections: Arc<Shares>,
    requests: Arc<Shares>,
}

/// Who is at the other end of a connection.
#[derive(Clone, Copy)]
struct Peer {
    flow: Flow,
    /// Whose share it has.
    cgroup: u64,
    address: Option<SocketAddr>,
}

type Response<B = Bytes> = http::Response<B>;

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
            // Nested cgroups share what their container has.
            let cgroup = self.registry.find(&flow).map_or(flow.cgroup, |workload| workload.container.cgroup);
            let limit = self.limits.connections;
            let Some(connected) = self.usage.connections.enter(cgroup, limit) else {
                self.refused("connections", limit, &flow);
                continue;
            };
            let server = Arc::clone(&self);
            let peer = Peer { flow, cgroup, address: connection.peer_addr().ok() };
            let service = service_fn(move |request| {
                let server = Arc::clone(&server);
                async move { Ok::<_, Infallible>(server.admit(request, &peer).await) }
            });
            let connection = TokioIo::new(Lingering::new(connection, connected));
            let served = graceful.watch(http(&self.limits).serve_connection(connection, service));
            let server = Arc::clone(&self);
            tokio::spawn(async move {
                if let Err(error) = served.await {
                    debug!(cgroup, "connection ended: {error}");
                    if let Some(limit) = limit_of(&error) {
                        server.metrics.refused(limit);
                    }
                }
            });
        }
        if timeout(DRAIN, graceful.shutdown()).await.is_err() {
            warn!("ended with requests in flight after {DRAIN:?}");
        }
    }

    async fn admit(&self, request: Request<Incoming>, peer: &Peer) -> Response<Body> {
        let limit = self.limits.requests;
        let Some(entered) = self.usage.requests.enter(peer.cgroup, limit) else {
            self.refused("requests", limit, &peer.flow);
            return response::empty(StatusCode::SERVICE_UNAVAILABLE, Timestamp::now()).map(Body::from);
        };
        self.answer(request, peer, &entered).await.map(|body| body.of(entered))
    }

    fn refused(&self, what: &'static str, limit: usize, flow: &Flow) {
        self.metrics.refused(what);
        let workload = self.registry.find(flow);
        let (log, container) = match &workload {
            Some(workload) => (&workload.log, workload.container.name.as_str()),
            None => (&self.log, "none"),
        };
        if let Some(Line { unsaid }) = log.line() {
            warn!(container, cgroup = flow.cgroup, unsaid, "refused what is over its limit of {limit} {what}");
        }
    }

    async fn answer(&self, request: Request<Incoming>, peer: &Peer, entered: &Entered) -> Response<Body> {
        // To us the body means nothing on any path; what is left unread of it closes the connection.
        let (head, body) = request.into_parts();
        let now = Timestamp::now();
        let flow = &peer.flow;
        // For each request: a connection may outlive its container, or what has been decided about it.
        let resolved = match self.services.whose(flow) {
            Whose::Workload => self.registry.resolve(flow).await,
            Whose::Denied => Ok(None),
            Whose::Host => {
                let answer = self.pass(Request::from_parts(head.clone(), body), now).await;
                self.metrics.answered("host", answer.status());
                return answer;
            }
            Whose::Gone => {
                self.metrics.answered("unresolved", StatusCode::SERVICE_UNAVAILABLE);
                return response::empty(StatusCode::SERVICE_UNAVAILABLE, now).map(Body::from);
            }
        };
        let (caller, mut answer) = match resolved {
            Ok(Some(workload)) => {
                let user_agent = head.headers.get(USER_AGENT).and_then(|agent| agent.to_str().ok()).map(str::to_owned);
                let Flow { pid, cgroup, .. } = *flow;
                workload.activity.saw(Client { time: now, user_agent, address: peer.address, pid, cgroup });
                let standing = workload.standing();
                let answer = match standing.decision.verdict {
                    Verdict::Instance => self.pass(Request::from_parts(head.clone(), body), now).await,
                    _ => self.answer_container(&head, &workload, &standing, entered, now).await,
                };
                ("container", answer)
            }
            Ok(None) => {
                self.strangers.saw(flow, now);
                ("stranger", self.answer_stranger(&head, flow, now).map(Body::from))
            }
            Err(error) => ("unresolved", self.unknown_for_now(flow, &error, now).map(Body::from)),
        };
        self.metrics.answered(caller, answer.status());
        close_in_doubt(&head, &mut answer);
        answer
    }
}

/// HTTP as containers may speak it.
pub(crate) fn http(limits: &Limits) -> http1::Builder {
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new())
        // Whoever says that he has no more to ask still wants his answer: `nc -N` and other plain clients.
        .half_close(true)
        .header_read_timeout(limits.head_timeout)
        .max_buf_size(limits.head_size)
        .max_headers(limits.headers)
        .title_case_headers(true);
    http
}

/// Which limit has ended a connection.
fn limit_of(error: &hyper::Error) -> Option<&'static str> {
    match error {
        error if error.is_timeout() => Some("head_timeout"),
        error if error.is_parse_too_large() => Some("head_size"),
        error if error.is_parse() => Some("malformed"),
        _ => None,
    }
}

/// Ends the connection where the request, and so what follows it, may have been meant otherwise.
///
/// A body in chunks may have come with a `Content-Length` as well, which hyper then hides from us: RFC 9112, section 6.1,
/// wants such a connection closed. No SDK sends any body.
pub(crate) fn close_in_doubt<B>(head: &Parts, answer: &mut Response<B>) {
    let refused = matches!(answer.status(), StatusCode::BAD_REQUEST | StatusCode::URI_TOO_LONG);
    if refused || head.headers.contains_key(TRANSFER_ENCODING) {
        answer.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
}
