//! The real metadata service, asked on a container's behalf for what is not secret.
//!
//! Nothing of the container's request but the canonical path goes there, and nothing of the answer
//! but status, type and body comes back.

use std::{
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{
    HeaderMap, HeaderName, HeaderValue, Method, Request, StatusCode, Uri,
    header::{CONTENT_TYPE, ETAG, LAST_MODIFIED, USER_AGENT},
};
use http_body_util::{BodyExt as _, Empty, Limited};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use tokio::time::timeout;
use tracing::debug;

/// The SDKs' own patience is a second.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
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

#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("the real metadata service at {0} does not answer within {TIMEOUT:?}")]
    Timeout(Uri),
    #[error("the real metadata service at {0} refuses us, also with a new session token")]
    Refused(Uri),
    #[error("cannot ask the real metadata service at {uri}: {source}")]
    Failed { uri: Uri, source: Box<dyn std::error::Error + Send + Sync> },
}

impl Error {
    /// What the container is told.
    pub(crate) fn status(&self) -> StatusCode {
        match self {
            Self::Timeout(_) => StatusCode::GATEWAY_TIMEOUT,
            Self::Refused(_) | Self::Failed { .. } => StatusCode::BAD_GATEWAY,
        }
    }
}

/// What came back, and nothing else of it.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: StatusCode,
    pub(crate) headers: HeaderMap,
    pub(crate) body: Bytes,
}

pub(crate) struct Upstream {
    client: Client<HttpConnector, Empty<Bytes>>,
    endpoint: Uri,
    session: Mutex<Option<Session>>,
}

#[derive(Clone)]
struct Session {
    /// None: the service has no session tokens (IMDSv1 only), so none is sent.
    token: Option<HeaderValue>,
    until: Instant,
}

impl Upstream {
    pub(crate) fn new(endpoint: Uri) -> Self {
        let mut connector = HttpConnector::new();
        connector.set_connect_timeout(Some(CONNECT_TIMEOUT));
        // The real service closes after each answer. A connection kept for the next request may be closed
        // just as that is sent, which then fails for no reason that a client could understand.
        let client = Client::builder(TokioExecutor::new()).pool_max_idle_per_host(0).build(connector);
        Self { client, endpoint, session: Mutex::default() }
    }

    /// Fetches a canonical path, also for a HEAD: the length of what is filtered is known only from the whole.
    pub(crate) async fn get(&self, path: &str) -> Result<Answer, Error> {
        let uri = self.uri(path)?;
        let exchange = async {
            let session = self.session().await?;
            let answer = self.ask(&uri, &session).await?;
            if answer.status != StatusCode::UNAUTHORIZED {
                return Ok(answer);
            }
            // The token has been withdrawn, or tokens have become required.
            debug!("the real metadata service refuses our session token; taking another");
            self.forget();
            let session = self.session().await?;
            let answer = self.ask(&uri, &session).await?;
            // To a container this status would say that its own token is bad.
            if answer.status == StatusCode::UNAUTHORIZED {
                return Err(Error::Refused(uri.clone()));
            }
            Ok(answer)
        };
        timeout(TIMEOUT, exchange).await.unwrap_or_else(|_| Err(Error::Timeout(uri.clone())))
    }

    async fn session(&self) -> Result<Session, Error> {
        let known = self.session.lock().unwrap_or_else(PoisonError::into_inner).clone();
        if let Some(session) = known.filter(|session| Instant::now() < session.until) {
            return Ok(session);
        }
        let uri = self.uri("/latest/api/token")?;
        let mut headers = HeaderMap::new();
        headers.insert(TTL, HeaderValue::from(TOKEN_TTL.as_secs()));
        let answer = self.send(&Method::PUT, &uri, headers).await?;
        let session = match answer.status {
            StatusCode::OK if answer.body.len() <= TOKEN_LIMIT => {
                let mut token = HeaderValue::from_maybe_shared(answer.body)
                    .map_err(|error| Error::Failed { uri: uri.clone(), source: error.into() })?;
                token.set_sensitive(true);
                Session { token: Some(token), until: Instant::now() + TOKEN_TTL - TOKEN_MARGIN }
            }
            // No tokens there. Not for ever: a hop limit or a setting may change.
            _ => Session { token: None, until: Instant::now() + TOKEN_MARGIN },
        };
        *self.session.lock().unwrap_or_else(PoisonError::into_inner) = Some(session.clone());
        Ok(session)
    }

    fn forget(&self) {
        *self.session.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    async fn ask(&self, uri: &Uri, session: &Session) -> Result<Answer, Error> {
        let mut headers = HeaderMap::new();
        if let Some(token) = &session.token {
            headers.insert(TOKEN, token.clone());
        }
        self.send(&Method::GET, uri, headers).await
    }

    async fn send(&self, method: &Method, uri: &Uri, headers: HeaderMap) -> Result<Answer, Error> {
        let failed = |source: Box<dyn std::error::Error + Send + Sync>| Error::Failed { uri: uri.clone(), source };
        let mut request = Request::new(Empty::new());
        *request.method_mut() = method.clone();
        *request.uri_mut() = uri.clone();
        *request.headers_mut() = headers;
        request.headers_mut().insert(USER_AGENT, AGENT);
        let response = self.client.request(request).await.map_err(|error| failed(error.into()))?;
        let (head, body) = response.into_parts();
        let body = Limited::new(body, BODY_LIMIT).collect().await.map_err(failed)?.to_bytes();
        let mut headers = HeaderMap::new();
        for name in [CONTENT_TYPE, ETAG, LAST_MODIFIED] {
            if let Some(value) = head.headers.get(&name) {
                headers.insert(name, value.clone());
            }
        }
        Ok(Answer { status: head.status, headers, body })
    }

    fn uri(&self, path: &str) -> Result<Uri, Error> {
        let mut parts = self.endpoint.clone().into_parts();
        let failed = |source| Error::Failed { uri: self.endpoint.clone(), source };
        parts.path_and_query = Some(path.parse().map_err(|error: http::uri::InvalidUri| failed(error.into()))?);
        Uri::from_parts(parts).map_err(|error| failed(error.into()))
    }
}
