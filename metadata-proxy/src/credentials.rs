//! Credentials of roles: assumed with STS, kept in memory, renewed ahead of time.
//!
//! ```text
//! hold / get ──> store: one entry per RoleSession ──> keeper: one task per entry ──> turns ──> Sts (sts.rs: aws-sdk-sts)
//! ```
//!
//! Invariants:
//! - This is the only module that knows the AWS SDK.
//! - One entry has one keeper, and only the keeper calls STS for it: however many ask, one call is in flight, and an asker
//!   that goes away takes nothing with it.
//! - Credentials leave the module only while they are valid by the monotonic *and* by the wall clock.
//! - Secrets stay inside [`SecretString`]: neither `Debug` nor a log line can print them, and dropping the last reference
//!   wipes them; not the copies in the SDK's buffers, nor those in answers (docs/credentials.md).

mod clock;
mod entry;
mod failure;
#[cfg(test)]
mod fleet;
mod keeper;
mod source;
mod store;
mod sts;
#[cfg(test)]
mod tests;
mod turns;

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use jiff::Timestamp;
use secrecy::SecretString;

pub(crate) use clock::TOLERANCE as CLOCK_TOLERANCE;
pub(crate) use failure::Failure;
pub(crate) use store::{Hold, Settings, Store};
pub(crate) use sts::Aws;
pub(crate) use turns::Limits;

/// What STS grants when nobody asks for anything else.
pub(crate) const DEFAULT_DURATION: Duration = Duration::from_secs(3600);

/// What distinguishes one set of credentials from another; the key of the cache.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(crate) struct RoleSession {
    pub(crate) role_arn: String,
    pub(crate) session_name: String,
    pub(crate) external_id: Option<String>,
    /// A session policy, as JSON, and the ARNs of managed ones: the session can do what both the role and these allow.
    pub(crate) policy: Option<String>,
    pub(crate) policy_arns: Vec<String>,
    /// Keys and values.
    pub(crate) tags: Vec<(String, String)>,
    pub(crate) source_identity: Option<String>,
    /// STS takes 900 s to 43,200 s, and at most 3,600 s when the daemon itself acts under a role.
    pub(crate) duration: Duration,
}

impl RoleSession {
    /// Without any option.
    #[cfg(test)]
    pub(crate) fn plain(role_arn: &str, session_name: &str) -> Self {
        Self {
            role_arn: role_arn.to_owned(),
            session_name: session_name.to_owned(),
            external_id: None,
            policy: None,
            policy_arns: Vec::new(),
            tags: Vec::new(),
            source_identity: None,
            duration: DEFAULT_DURATION,
        }
    }
}

/// One set of temporary credentials. `Debug` shows no secret, because `SecretString` does not.
#[derive(Clone, Debug)]
pub(crate) struct Credentials {
    pub(crate) access_key_id: String,
    pub(crate) secret_access_key: SecretString,
    pub(crate) session_token: SecretString,
    pub(crate) last_updated: Timestamp,
    pub(crate) expiration: Timestamp,
}

/// What there is to say of a role session.
#[derive(Debug, Default)]
pub(crate) struct SessionState {
    pub(crate) served: Option<Served>,
    /// Of the last attempt to get or renew them, and when the next one may be.
    pub(crate) failure: Option<(Failure, Timestamp)>,
}

/// The credentials that are served now.
#[derive(Debug)]
pub(crate) struct Served {
    pub(crate) access_key_id: String,
    pub(crate) expiration: Timestamp,
    pub(crate) renewal: Timestamp,
}

/// Whoever turns a role into credentials: STS, or a stand-in for it in tests and simulations.
pub(crate) trait Sts: Send + Sync + 'static {
    /// One attempt; the caller decides when to try again.
    fn assume<'a>(&'a self, session: &'a RoleSession) -> AssumeFuture<'a>;
}

impl<S: Sts> Sts for Arc<S> {
    fn assume<'a>(&'a self, session: &'a RoleSession) -> AssumeFuture<'a> {
        (**self).assume(session)
    }
}

/// Boxed, so that the store is one type whatever stands behind it.
pub(crate) type AssumeFuture<'a> = Pin<Box<dyn Future<Output = Result<Credentials, Failure>> + Send + 'a>>;

/// The wall clock, an argument so that a virtual day can be simulated. Waiting is measured with `tokio::time`.
pub(crate) type Clock = Arc<dyn Fn() -> Timestamp + Send + Sync>;
