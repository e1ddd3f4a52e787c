//! The real metadata service, asked on a container's behalf for what is not secret.
//!
//! Nothing of the container's request but the canonical path goes there, and nothing of the answer
//! but status, type and body comes back.

mod constant;
mod direct;
mod pool;
mod relay;
mod slots;

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, Uri,
    header::{ACCEPT_RANGES, CONTENT_TYPE, ETAG, HOST, LAST_MODIFIED, USER_AGENT},
};
use http_body_util::Empty;
use tokio::{
    sync::Mutex,
    time::{Instant, timeout},
};
use tracing::debug;

use constant::Constants;
pub(crate) use direct::pass;
use pool::{Exchange, Pool};
pub(crate) use relay::{Cut, Payload};
use slots::{Slot, Slots};

/// From the question to the head of its answer, and to the end of what is taken whole. The SDKs' own patience is a second.
const TIMEOUT: Duration = Duration::from_secs(2);
/// User-data is at most 16 KiB, and nothing else in the tree is larger than a few.
const BODY_LIMIT: usize = 1 << 20;
const TOKEN_TTL: Duration = Duration::from_secs(21600);
/// A token is renewed so long before its end that no request in flight can outlive it.
const TOKEN_MARGIN: Duration = Duration::from_secs(60);
/// The longest token we would repeat; the real one has 56 characters.
const TOKEN_LIMIT: usize = 1024;

const TOKEN: HeaderName = HeaderName::from_static("x-aws-ec2-metadata-token");
const TTL: HeaderName = HeaderName::from_static("x-aws-ec2-metadata-token-ttl-seconds");
const AGENT: HeaderValue = HeaderValue::from_static(concat!("metadata-proxy/", env!("CARGO_PKG_VERSION")));

type Source = Box<dyn std::error::Error + Send + Sync>;

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("the real metadata service at {0} does not answer within {TIMEOUT:?}")]
    Timeout(Uri),
    #[error("the real metadata service at {0} refuses us, also with a new session token")]
    Refused(Uri),
    #[error("the real metadata service at {0} answers with more than {BODY_LIMIT} bytes")]
    TooLarge(Uri),
    #[error("cannot ask the real metadata service at {uri}: {source}")]
    Failed { uri: Uri, source: Source },
}

impl Error {
    /// What the container is told.
    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Self::Timeout(_) => StatusCode::GATEWAY_TIMEOUT,
            Self::Refused(_) | Self::TooLarge(_) | Self::Failed { .. } => StatusCode::BAD_GATEWAY,
        }
    }
}

/// What came back, and nothing else of it.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) payload: Payload,
}

pub(crate) struct Upstream {
    endpoint: Uri,
    pool: Arc<Pool>,
    slots: Slots,
    /// Locked while a token is fetched: one for all who wait.
    session: Mutex<Option<Session>>,
    constants: Constants,
}

#[derive(Clone)]
struct Session {
    /// None: the service has no session tokens (IMDSv1 only), so none is sent.
    token: Option<HeaderValue>,
    until: Instant,
}

impl Upstream {
    pub(crate) fn new(endpoint: Uri) -> Self {
        let pool = Arc::new(Pool::new(&endpoint));
        Self { endpoint, pool, slots: Slots::new(), session: Mutex::default(), constants: Constants::default() }
    }

    /// Fetches a canonical path, also for a HEAD: the length of what is filtered is known only from the whole.
    /// What is not wanted whole may come as a stream. No asker can hold up the others.
    pub(crate) async fn get(&self, path: &str, whole: bool, asker: u64) -> Result<Answer, Error> {
        if let Some(answer) = self.constants.get(path) {
            return Ok(answer);
        }
        let uri = self.uri(path)?;
        let whole = whole || constant::is_constant(path);
        let asked = timeout(TIMEOUT, self.exchange(&uri, whole, asker)).await;
        let answer = asked.unwrap_or_else(|_| Err(Error::Timeout(uri)))?;
        self.constants.keep(path, &answer);
        Ok(answer)
    }

    async fn exchange(&self, uri: &Uri, whole: bool, asker: u64) -> Result<Answer, Error> {
        let slot = self.slots.take(asker).await.map_err(|error| failed(uri, error))?;
        let session = self.session().await?;
        let mut exchange = self.ask(uri, &session).await?;
        if exchange.status() == StatusCode::UNAUTHORIZED {
            // The token has been withdrawn, or tokens have become required.
            debug!("the real metadata service refuses our session token; taking another");
            // Unless somebody else has by now.
            self.session.lock().await.take_if(|known| known.token == session.token);
            let session = self.session().await?;
            exchange = self.ask(uri, &session).await?;
            // To a container this status would say that its own token is bad.
            if exchange.status() == StatusCode::UNAUTHORIZED {
                return Err(Error::Refused(uri.clone()));
            }
        }
        answer(uri, exchange, whole, slot).await
    }

    async fn session(&self) -> Result<Session, Error> {
        let mut known = self.session.lock().await;
        if let Some(session) = known.as_ref().filter(|session| Instant::now() < session.until) {
            return Ok(session.clone());
        }
        let uri = self.uri("/latest/api/token")?;
        let exchange = self.send(Method::PUT, &uri, TTL, Some(HeaderValue::from(TOKEN_TTL.as_secs()))).await?;
        let status = exchange.status();
        let body = exchange.whole(TOKEN_LIMIT).await.map_err(|error| failed(&uri, error))?;
        let session = match body {
            // Trouble, which says nothing about tokens.
            _ if status.is_server_error() => return Err(failed(&uri, format!("it answers {status}"))),
            Some(body) if status == StatusCode::OK => {
                let mut token = HeaderValue::from_maybe_shared(body).map_err(|error| failed(&uri, error))?;
                token.set_sensitive(true);
                Session { token: Some(token), until: Instant::now() + TOKEN_TTL - TOKEN_MARGIN }
            }
            // No tokens there. Not for ever: a hop limit or a setting may change.
            _ => Session { token: None, until: Instant::now() + TOKEN_MARGIN },
        };
        *known = Some(session.clone());
        Ok(session)
    }

    async fn ask(&self, uri: &Uri, session: &Session) -> Result<Exchange, Error> {
        self.send(Method::GET, uri, TOKEN, session.token.clone()).await
    }

    async fn send(
        &self,
        method: Method,
        uri: &Uri,
        name: HeaderName,
        value: Option<HeaderValue>,
    ) -> Result<Exchange, Error> {
        let mut request = Request::new(Empty::<Bytes>::new());
        *request.method_mut() = method;
        let target = uri.path_and_query().map_or("/", http::uri::PathAndQuery::as_str);
        *request.uri_mut() = target.parse().map_err(|error| failed(uri, error))?;
        let host = uri.authority().map_or("", http::uri::Authority::as_str);
        request.headers_mut().insert(HOST, host.parse().map_err(|error| failed(uri, error))?);
        request.headers_mut().insert(USER_AGENT, AGENT);
        if let Some(value) = value {
            request.headers_mut().insert(name, value);
        }
        Pool::send(&self.pool, request).await.map_err(|source| Error::Failed { uri: uri.clone(), source })
    }

    fn uri(&self, path: &str) -> Result<Uri, Error> {
        let mut parts = self.endpoint.clone().into_parts();
        parts.path_and_query = Some(path.parse().map_err(|error| failed(&self.endpoint, error))?);
        Uri::from_parts(parts).map_err(|error| failed(&self.endpoint, error))
    }
}

fn failed(uri: &Uri, source: impl Into<Source>) -> Error {
    Error::Failed { uri: uri.clone(), source: source.into() }
}

async fn answer(uri: &Uri, exchange: Exchange, whole: bool, slot: Slot) -> Result<Answer, Error> {
    let status = exchange.status();
    let mut headers = HeaderMap::new();
    for name in [CONTENT_TYPE, ACCEPT_RANGES, ETAG, LAST_MODIFIED] {
        if let Some(value) = exchange.headers().get(&name) {
            headers.insert(name, value.clone());
        }
    }
    let payload = match exchange.length() {
        Some(length) if length > BODY_LIMIT as u64 => return Err(Error::TooLarge(uri.clone())),
        Some(length) if !whole && length > 0 => relay::start(exchange, length, slot),
        // Without a length beforehand a client could take a part for the whole; the real service always says it.
        _ => {
            let body = exchange.whole(BODY_LIMIT).await.map_err(|error| failed(uri, error))?;
            Payload::Whole(body.ok_or_else(|| Error::TooLarge(uri.clone()))?)
        }
    };
    Ok(Answer { status, headers, payload })
}

#[cfg(test)]
mod tests;
