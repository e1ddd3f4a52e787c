//! An embedded STS: **a stand-in, not the real service**, but with the real wire protocol.
//!
//! AssumeRole issues credentials that nothing accepts but this server, and remembers whose they are; GetCallerIdentity tells. So a test asks of any
//! access key that turns up anywhere: which role, which session? What can go wrong with the real service can be made to go wrong here, while it runs.
//! Signatures are not verified, session tokens are.

pub(crate) mod roles;
mod s3;
pub(crate) mod server;
mod state;
pub(crate) mod wire;

use std::collections::BTreeMap;
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use http::Request;
use http_body_util::BodyExt as _;
use hyper::body::Incoming;
use jiff::SignedDuration;

pub use self::roles::Issued;
use self::server::{Answer, Closed, Connections, Server};
use self::state::State;
use crate::imds;

/// A user's key that this server knows from the start: for a daemon that is given static credentials.
pub const BASE_ACCESS_KEY: &str = "AKIASTANDINBASEUSER0";
pub const BASE_SECRET_KEY: &str = "simulated/base+user/secret/access/key/00";
pub const BASE_IDENTITY: &str = "arn:aws:iam::111122223333:user/metadata-proxy";

/// What goes wrong, for AssumeRole only: whoever checks an identity still gets an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// `AccessDenied`, 403, as when the trust policy does not name the caller. Not worth a retry.
    Refuse,
    /// Policies that allow these actions only: `AccessDenied` for a call that takes another, which is `sts:TagSession` with
    /// tags and `sts:SetSourceIdentity` with a source identity.
    Allow(&'static [&'static str]),
    /// `Throttling`, 400. Worth a retry.
    Throttle,
    /// `InternalFailure`, 500. Worth a retry.
    ServerError,
    /// The same, and afterwards no fault.
    ServerErrorOnce,
    /// Its clock is so far ahead of this machine's, or behind: it refuses signatures that are more than five minutes off with
    /// `SignatureDoesNotMatch`, 403, and each answer's `Date` tells the time. (What it issues still ends by our clock.)
    Clock(SignedDuration),
    /// The ordinary answer, late.
    Delay(Duration),
    /// No answer, ever, on an open connection.
    Hang,
}

/// One call, as it came and as it was answered.
#[derive(Clone, Debug)]
pub struct Call {
    /// Counts from the start, over every [`Sts::clear`].
    pub number: u64,
    pub action: String,
    pub parameters: BTreeMap<String, String>,
    /// Who signed it.
    pub access_key: Option<String>,
    /// For which it is signed.
    pub region: Option<String>,
    pub user_agent: String,
    pub outcome: Outcome,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Not answered yet, or never.
    Open,
    /// AssumeRole: the access key that was issued.
    Issued(String),
    /// GetCallerIdentity: the ARN that was told.
    Identified(String),
    /// The error code.
    Refused(&'static str),
}

/// A running stand-in; dropping it ends it.
#[derive(Debug)]
pub struct Sts {
    state: Arc<Mutex<State>>,
    server: Server,
}

impl Sts {
    /// Serves on a listener that is bound already. [`BASE_ACCESS_KEY`] and the host's role of [`imds`] may assume every role.
    pub fn start(listener: TcpListener) -> anyhow::Result<Self> {
        let state = Arc::new(Mutex::new(State::default()));
        {
            let mut state = lock(&state);
            for (key, arn) in [(BASE_ACCESS_KEY, BASE_IDENTITY), (imds::HOST_ACCESS_KEY, imds::HOST_IDENTITY)] {
                state.identities.insert(key.to_owned(), arn.to_owned());
            }
        }
        let shared = Arc::clone(&state);
        let server = Server::start("simulated STS", vec![listener], Connections::Keep, move |request, _peer| {
            answer(Arc::clone(&shared), request)
        })?;
        Ok(Self { state, server })
    }

    /// Where it listens.
    pub fn address(&self) -> Option<SocketAddr> {
        self.server.addresses().first().copied()
    }

    /// Lets another access key call, as the principal of `arn`.
    pub fn add_identity(&self, access_key: &str, arn: &str) {
        self.lock().identities.insert(access_key.to_owned(), arn.to_owned());
    }

    /// From now on this access key is nobody's, as one that has been deleted.
    pub fn remove_identity(&self, access_key: &str) {
        self.lock().identities.remove(access_key);
    }

    /// Whose credentials are these? The ARN of the assumed role, if they were issued here.
    pub fn identity_of(&self, access_key: &str) -> Option<String> {
        self.lock().issued.get(access_key).map(|issued| issued.assumed_role_arn.clone())
    }

    /// Everything that was issued with this access key.
    pub fn issued(&self, access_key: &str) -> Option<Issued> {
        self.lock().issued.get(access_key).cloned()
    }

    /// Every call so far, in order of arrival.
    pub fn calls(&self) -> Vec<Call> {
        self.lock().calls.clone()
    }

    /// How often AssumeRole was called for this role, whatever became of it.
    pub fn assume_role_calls(&self, role_arn: &str) -> usize {
        let asks = |call: &&Call| {
            call.action == "AssumeRole" && call.parameters.get("RoleArn").is_some_and(|asked| asked == role_arn)
        };
        self.lock().calls.iter().filter(asks).count()
    }

    /// Forgets the calls, but not what was issued.
    pub fn clear(&self) {
        self.lock().calls.clear();
    }

    /// From now on every AssumeRole goes wrong like this; `None` ends it.
    pub fn set_fault(&self, fault: Option<Fault>) {
        self.lock().fault = fault;
    }

    /// The same for one role only, which then goes before [`Self::set_fault`].
    pub fn set_role_fault(&self, role_arn: &str, fault: Option<Fault>) {
        let faults = &mut self.lock().role_faults;
        match fault {
            Some(fault) => faults.insert(role_arn.to_owned(), fault),
            None => faults.remove(role_arn),
        };
    }

    /// Issues credentials with this lifetime, whatever was asked for: below the real service's 15 minutes, so that a test can see them expire.
    pub fn set_lifetime(&self, lifetime: Option<Duration>) {
        self.lock().lifetime = lifetime;
    }

    /// The same for one role only, which then goes before [`Self::set_lifetime`].
    pub fn set_role_lifetime(&self, role_arn: &str, lifetime: Duration) {
        self.lock().role_lifetimes.insert(role_arn.to_owned(), lifetime);
    }

    /// Goes down: open connections break and new ones are refused.
    pub fn stop_listening(&self) -> anyhow::Result<()> {
        self.server.pause()
    }

    /// Comes back, on the same address, knowing what it knew.
    pub fn listen_again(&self) -> anyhow::Result<()> {
        self.server.resume()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        lock(&self.state)
    }
}

fn lock(state: &Mutex<State>) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

async fn answer(state: Arc<Mutex<State>>, request: Request<Incoming>) -> Answer {
    let (head, body) = request.into_parts();
    let body = body.collect().await.map_err(|_broken| Closed)?.to_bytes();
    let (call, fault) = lock(&state).record(&head, &body);
    match fault {
        Some(Fault::Hang) => std::future::pending().await,
        Some(Fault::Delay(delay)) => {
            tokio::time::sleep(delay).await;
            Ok(lock(&state).answer(&call, &head.headers, None))
        }
        fault => Ok(lock(&state).answer(&call, &head.headers, fault.as_ref())),
    }
}

#[cfg(test)]
mod tests;
