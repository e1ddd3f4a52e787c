//! A stand-in for EC2's instance metadata service: **simulated, and with nothing real in it**.
//!
//! It plays the service of the *host*: what it hands out is the host's own, and no container may ever see it. So it is as generous as can be (any
//! encoding of a path is followed to the document that it might mean), its secrets are unmistakable, and every request is recorded. A leak of the
//! proxy is then a request here, or [`HOST_ACCESS_KEY_PREFIX`] there.

mod state;
mod tree;

use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::{HeaderMap, StatusCode, header};
use hyper::body::Incoming;
use jiff::Timestamp;

use self::state::State;
use crate::sts::server::{Answer, Closed, Connections, Server};
use crate::sts::wire::percent_decode;

/// How every access key begins that this stand-in hands out.
pub const HOST_ACCESS_KEY_PREFIX: &str = "ASIAHOSTSECRET";
/// The access key of the host's own role.
pub const HOST_ACCESS_KEY: &str = "ASIAHOSTSECRET000001";
pub const HOST_ROLE: &str = "simulated-host-role";
pub const HOST_INSTANCE: &str = "i-0123456789abcdef0";
/// What STS says about whoever uses [`HOST_ACCESS_KEY`].
pub const HOST_IDENTITY: &str = "arn:aws:sts::111122223333:assumed-role/simulated-host-role/i-0123456789abcdef0";

/// What goes wrong, for every request, after it was recorded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// The ordinary answer, late.
    Delay(Duration),
    /// This status with an empty body.
    Status(u16),
    /// The connection is closed without an answer.
    Close,
}

/// One request, as it came.
#[derive(Clone, Debug)]
pub struct Request {
    pub number: u64,
    pub method: String,
    /// Raw: neither decoded nor cleaned.
    pub target: String,
    pub headers: HeaderMap,
    pub peer: SocketAddr,
    /// `None` while it is not answered, or when it never was.
    pub status: Option<u16>,
    /// The answer held an access key of the host.
    pub secret: bool,
}

impl Request {
    pub fn user_agent(&self) -> &str {
        self.headers.get(header::USER_AGENT).and_then(|agent| agent.to_str().ok()).unwrap_or_default()
    }

    /// Whether this has anything to do with credentials. On purpose it says yes too often: a false alarm is looked into, a leak that is overlooked
    /// is not.
    pub fn touches_credentials(&self) -> bool {
        let mut target = self.target.to_lowercase();
        // Nested escapes too: whoever forwards may decode once more than we think.
        for _ in 0..3 {
            target = percent_decode(&target).to_lowercase();
        }
        self.secret || ["iam", "credential", "managed-ssh-keys"].iter().any(|word| target.contains(word))
    }
}

pub use self::state::canonical;

/// A running stand-in; dropping it ends it.
#[derive(Debug)]
pub struct Imds {
    state: Arc<Mutex<State>>,
    server: Server,
}

impl Imds {
    /// Serves on listeners that are bound already. IMDSv1 and v2 are both accepted.
    pub fn start(listeners: Vec<TcpListener>) -> anyhow::Result<Self> {
        let state = Arc::new(Mutex::new(State::default()));
        let shared = Arc::clone(&state);
        let server = Server::start("simulated IMDS", listeners, Connections::Close, move |request, peer| {
            answer(Arc::clone(&shared), request, peer)
        })?;
        Ok(Self { state, server })
    }

    /// Where it listens.
    pub fn addresses(&self) -> &[SocketAddr] {
        self.server.addresses()
    }

    /// Every request so far, in order of arrival.
    pub fn requests(&self) -> Vec<Request> {
        lock(&self.state).requests.clone()
    }

    /// The requests that had to do with credentials. Of the containers' there is never one; the daemon's own, when it uses the host's role, tell
    /// themselves apart by [`Request::user_agent`].
    pub fn credential_requests(&self) -> Vec<Request> {
        lock(&self.state).requests.iter().filter(|request| request.touches_credentials()).cloned().collect()
    }

    /// Forgets the requests.
    pub fn clear(&self) {
        lock(&self.state).requests.clear();
    }

    /// Accepts IMDSv2 only, as an instance with `HttpTokens=required`.
    pub fn require_token(&self, require: bool) {
        lock(&self.state).require_token = require;
    }

    /// Gives the host's role this access key, valid until then, as the real service replaces it ahead of its end.
    pub fn set_host_key(&self, access_key: &str, end: Timestamp) {
        lock(&self.state).host_key = Some((access_key.to_owned(), end));
    }

    /// From now on every request goes wrong like this; `None` ends it.
    pub fn set_fault(&self, fault: Option<Fault>) {
        lock(&self.state).fault = fault;
    }

    /// Goes down: open connections break and new ones are refused.
    pub fn stop_listening(&self) -> anyhow::Result<()> {
        self.server.pause()
    }

    /// Comes back, on the same addresses.
    pub fn listen_again(&self) -> anyhow::Result<()> {
        self.server.resume()
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn answer(state: Arc<Mutex<State>>, request: http::Request<Incoming>, peer: SocketAddr) -> Answer {
    let (head, _body) = request.into_parts();
    let (number, fault) = lock(&state).record(&head, peer);
    match fault {
        Some(Fault::Close) => return Err(Closed),
        Some(Fault::Status(status)) => {
            let status = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
            return Ok(lock(&state).conclude(number, state::respond(status, String::new())));
        }
        Some(Fault::Delay(delay)) => tokio::time::sleep(delay).await,
        None => {}
    }
    let mut state = lock(&state);
    let response = state.serve(&head);
    Ok(state.conclude(number, response))
}

#[cfg(test)]
mod tests;
