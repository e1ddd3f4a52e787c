//! Connections to the real service, kept for the next question where the service keeps them.

use std::{
    error::Error as _,
    io,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use bytes::Bytes;
use http::{HeaderMap, Request, Response, StatusCode, Uri, uri::Authority};
use http_body_util::{BodyExt as _, Empty, LengthLimitError, Limited};
use hyper::{
    body::{Body as _, Frame, Incoming},
    client::conn::http1::{self, SendRequest},
};
use hyper_util::rt::TokioIo;
use tokio::{net::TcpStream, time::timeout};
use tracing::debug;

use super::Source;

const CONNECT_TIMEOUT: Duration = Duration::from_millis(500);
/// Of connections that nobody needs, so many are kept, and so long.
const IDLE: usize = 16;
const IDLE_TIME: Duration = Duration::from_secs(5);
/// The head of an answer.
const HEAD_LIMIT: usize = 16 << 10;

type Question = Request<Empty<Bytes>>;
type Connection = SendRequest<Empty<Bytes>>;

pub(super) struct Pool {
    host: String,
    port: u16,
    idle: Mutex<Vec<(Connection, Instant)>>,
}

/// An answer of which the body is still to be read.
pub(super) struct Exchange {
    response: Response<Incoming>,
    connection: Connection,
    pool: Arc<Pool>,
}

impl Pool {
    pub(super) fn new(endpoint: &Uri) -> Self {
        let host = endpoint.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
        let port = endpoint.authority().and_then(Authority::port_u16).unwrap_or(80);
        Self { host, port, idle: Mutex::default() }
    }

    pub(super) async fn send(self: &Arc<Self>, question: Question) -> Result<Exchange, Source> {
        if let Some(mut connection) = self.take().await {
            match connection.send_request(question.clone()).await {
                Ok(response) => return Ok(self.exchange(response, connection)),
                // The service may close a kept connection just as we write; it has said nothing, so asking again is
                // no second answer. Asked again is on a new connection, of which the failure is meant for us.
                Err(error) if went_away(&error) => debug!("a kept connection to the real service is gone: {error}"),
                Err(error) => return Err(error.into()),
            }
        }
        let mut connection = self.connect().await?;
        let response = connection.send_request(question).await?;
        Ok(self.exchange(response, connection))
    }

    fn exchange(self: &Arc<Self>, response: Response<Incoming>, connection: Connection) -> Exchange {
        Exchange { response, connection, pool: Arc::clone(self) }
    }

    async fn connect(&self) -> Result<Connection, Source> {
        let connected = timeout(CONNECT_TIMEOUT, TcpStream::connect((self.host.as_str(), self.port))).await;
        let stream = connected.map_err(|_| format!("no connection within {CONNECT_TIMEOUT:?}"))??;
        stream.set_nodelay(true)?;
        let http = http1::Builder::new().max_buf_size(HEAD_LIMIT).handshake(TokioIo::new(stream)).await;
        let (sender, connection) = http?;
        // Its errors arrive at who has asked.
        tokio::spawn(async { drop(connection.await) });
        Ok(sender)
    }

    /// The connection that was used last.
    async fn take(&self) -> Option<Connection> {
        loop {
            let (mut connection, since) = self.idle().pop()?;
            if since.elapsed() >= IDLE_TIME {
                // So are all the others.
                self.idle().clear();
                return None;
            }
            if connection.ready().await.is_ok() {
                return Some(connection);
            }
        }
    }

    fn put(&self, connection: Connection) {
        let mut idle = self.idle();
        idle.retain(|(connection, since)| since.elapsed() < IDLE_TIME && !connection.is_closed());
        if idle.len() < IDLE && !connection.is_closed() {
            idle.push((connection, Instant::now()));
        }
    }

    fn idle(&self) -> MutexGuard<'_, Vec<(Connection, Instant)>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Exchange {
    pub(super) fn status(&self) -> StatusCode {
        self.response.status()
    }

    pub(super) fn headers(&self) -> &HeaderMap {
        self.response.headers()
    }

    /// Known beforehand: a body that ends earlier is an error.
    pub(super) fn length(&self) -> Option<u64> {
        self.response.body().size_hint().exact()
    }

    /// The whole body; None if it is longer than that.
    pub(super) async fn whole(mut self, limit: usize) -> Result<Option<Bytes>, Source> {
        match Limited::new(self.response.body_mut(), limit).collect().await {
            Ok(body) => {
                self.done();
                Ok(Some(body.to_bytes()))
            }
            Err(error) if error.is::<LengthLimitError>() => Ok(None),
            Err(error) => Err(error),
        }
    }

    pub(super) async fn frame(&mut self) -> Option<Result<Frame<Bytes>, hyper::Error>> {
        self.response.body_mut().frame().await
    }

    /// The body has been read to its end.
    pub(super) fn done(self) {
        self.pool.put(self.connection);
    }
}

/// Whether the connection ended before the head of an answer.
fn went_away(error: &hyper::Error) -> bool {
    let kind = error.source().and_then(|source| source.downcast_ref()).map(io::Error::kind);
    error.is_incomplete_message()
        || error.is_canceled()
        || error.is_closed()
        || matches!(kind, Some(io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe))
}
