//! What there is to say of a container. Never a secret: these are shown.

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use crate::{
    credentials::{Failure, SessionState, Store},
    workload::Workload,
};

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Status {
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) cgroup: u64,
    pub(crate) pid: u32,
    pub(crate) role: Option<String>,
    pub(crate) session: Option<String>,
    /// How the role was decided, step by step.
    pub(crate) reasons: Vec<String>,
    pub(crate) credentials: Credentials,
    pub(crate) requests: u64,
    /// The User-Agent of its last request.
    pub(crate) last_client: Option<String>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "state")]
pub(crate) enum Credentials {
    /// The container has no role.
    None,
    /// STS has been asked and has not answered yet.
    Pending,
    Valid {
        expiration: Timestamp,
        /// Why the last attempt to renew them failed.
        trouble: Option<String>,
    },
    /// STS refuses, and says why.
    Refused { reason: String },
    /// STS cannot be reached, or is in trouble.
    Unavailable { reason: String },
}

pub(crate) fn of(workload: &Workload, store: &Store) -> Status {
    let container = &workload.container;
    let standing = workload.standing();
    let role = standing.role();
    let credentials = role.map_or(Credentials::None, |(_, session)| credentials(store.state(session)));
    let (requests, last_client) = workload.activity.seen();
    Status {
        id: container.id.clone(),
        name: container.name.clone(),
        cgroup: container.cgroup,
        pid: container.pid,
        role: role.map(|(arn, _)| arn.to_string()),
        session: role.map(|(_, session)| session.session_name.clone()),
        reasons: standing.decision.reasons.clone(),
        credentials,
        requests,
        last_client,
    }
}

fn credentials(state: SessionState) -> Credentials {
    match (state.expiration, state.failure) {
        (Some(expiration), failure) => {
            Credentials::Valid { expiration, trouble: failure.map(|failure| failure.to_string()) }
        }
        (None, Some(failure @ Failure::Refused { .. })) => Credentials::Refused { reason: failure.to_string() },
        (None, Some(failure @ Failure::Unavailable { .. })) => Credentials::Unavailable { reason: failure.to_string() },
        (None, None) => Credentials::Pending,
    }
}
