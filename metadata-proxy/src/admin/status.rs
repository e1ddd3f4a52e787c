//! What there is to say of a container. Never a secret: these are shown.

use std::{fs, path::PathBuf};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::conflicts;
use crate::{
    containers::{UserNamespace, cgroup},
    credentials::{Failure, RoleSession, SessionState, Store},
    identity::{self, Said, Verdict},
    workload::{Client, Workload},
};

#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Status {
    pub(crate) id: String,
    pub(crate) name: String,
    /// By its name in the configuration.
    pub(crate) engine: String,
    pub(crate) image: String,
    pub(crate) cgroup: u64,
    /// Below the cgroup2 mount, where its first process is; None if that has ended.
    pub(crate) cgroup_path: Option<PathBuf>,
    pub(crate) pid: u32,
    /// Network mode, as the engine has it.
    pub(crate) network: String,
    /// As `ls -l /proc/PID/ns` shows it.
    pub(crate) network_namespace: Option<PathBuf>,
    pub(crate) user_namespace: UserNamespace,
    /// Where role and options were looked for.
    pub(crate) sources: Vec<Said>,
    /// How the role was decided, step by step.
    pub(crate) reasons: Vec<String>,
    pub(crate) verdict: Outcome,
    /// Its ARN; the bare name while that is pending, and `@instance`.
    pub(crate) role: Option<String>,
    /// Who has named it.
    pub(crate) role_source: Option<String>,
    pub(crate) session: Option<String>,
    /// What STS is asked for beside these, by the names of the labels.
    pub(crate) options: Vec<(String, String)>,
    pub(crate) credentials: Credentials,
    /// What keeps its SDKs from asking.
    #[serde(default)]
    pub(crate) conflicts: Vec<String>,
    /// What to do if this is not what was meant.
    pub(crate) advice: Option<String>,
    pub(crate) requests: u64,
    pub(crate) last_client: Option<Client>,
}

/// What was decided, before STS is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Outcome {
    Role,
    /// AWS has not told yet whose account the role is in.
    Pending,
    /// The real service, and the host's own role.
    Instance,
    NoRole,
    /// By a rule, an option, or what nobody understands.
    Refused,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "state")]
pub(crate) enum Credentials {
    /// None of ours: see the verdict.
    None,
    /// STS has been asked and has not answered yet.
    Pending,
    Valid {
        access_key_id: String,
        expiration: Timestamp,
        renewal: Timestamp,
        /// Why the last attempt to renew them failed.
        trouble: Option<Trouble>,
    },
    /// STS refuses, and says why.
    Refused(Trouble),
    /// STS cannot be reached, or is in trouble.
    Unavailable(Trouble),
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Trouble {
    pub(crate) reason: String,
    /// A refusal is tried again when a client asks after this time.
    pub(crate) next_try: Timestamp,
}

pub(crate) fn of(workload: &Workload, store: &Store) -> Status {
    let container = &workload.container;
    let standing = workload.standing();
    let (decision, role) = (&standing.decision, standing.role());
    let seen = workload.activity.seen();
    let mut options = role.map(|(_, session)| options(session)).unwrap_or_default();
    if decision.require_imdsv2 {
        options.push(("require-imdsv2".to_owned(), "true".to_owned()));
    }
    Status {
        id: container.id.clone(),
        name: container.name.clone(),
        engine: container.engine.clone(),
        image: container.image.clone(),
        cgroup: container.cgroup,
        cgroup_path: cgroup::path_of(container.pid).ok(),
        pid: container.pid,
        network: container.networks.join(", "),
        network_namespace: fs::read_link(format!("/proc/{}/ns/net", container.pid)).ok(),
        user_namespace: container.user_namespace,
        sources: identity::sources(container),
        reasons: decision.reasons.clone(),
        verdict: outcome(&decision.verdict),
        role: match &decision.verdict {
            Verdict::Role { arn, .. } => Some(arn.to_string()),
            Verdict::Pending { name } => Some(name.clone()),
            Verdict::Instance => Some(identity::INSTANCE.to_owned()),
            Verdict::NoRole | Verdict::Refused => None,
        },
        role_source: decision.source.clone(),
        session: role.map(|(_, session)| session.session_name.clone()),
        options,
        credentials: role.map_or(Credentials::None, |(_, session)| credentials(store.state(session))),
        conflicts: conflicts::of(container),
        advice: advice(&decision.verdict).map(str::to_owned),
        requests: seen.requests,
        last_client: seen.last,
    }
}

fn outcome(verdict: &Verdict) -> Outcome {
    match verdict {
        Verdict::Role { .. } => Outcome::Role,
        Verdict::Pending { .. } => Outcome::Pending,
        Verdict::Instance => Outcome::Instance,
        Verdict::NoRole => Outcome::NoRole,
        Verdict::Refused => Outcome::Refused,
    }
}

fn options(session: &RoleSession) -> Vec<(String, String)> {
    let tags: Vec<_> = session.tags.iter().map(|(key, value)| format!("{key}={value}")).collect();
    let all = [
        ("duration", Some(format!("{} s", session.duration.as_secs()))),
        ("external-id", session.external_id.clone()),
        ("policy", session.policy.clone()),
        ("policy-arns", Some(session.policy_arns.join(", "))),
        ("session-tags", Some(tags.join(", "))),
        ("source-identity", session.source_identity.clone()),
    ];
    let given = all.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?)));
    given.filter(|(_, value)| !value.is_empty()).collect()
}

fn credentials(state: SessionState) -> Credentials {
    let refused = matches!(state.failure, Some((Failure::Refused { .. }, _)));
    let trouble = state.failure.map(|(failure, next_try)| Trouble { reason: failure.to_string(), next_try });
    match (state.served, trouble) {
        (Some(served), trouble) => Credentials::Valid {
            access_key_id: served.access_key_id,
            expiration: served.expiration,
            renewal: served.renewal,
            trouble,
        },
        (None, Some(trouble)) if refused => Credentials::Refused(trouble),
        (None, Some(trouble)) => Credentials::Unavailable(trouble),
        (None, None) => Credentials::Pending,
    }
}

/// About decisions; what STS refuses comes with its own.
fn advice(verdict: &Verdict) -> Option<&'static str> {
    match verdict {
        Verdict::Role { .. } | Verdict::Instance => None,
        Verdict::Pending { .. } => Some("see what `metadata-proxy check` says of the STS identity"),
        Verdict::NoRole => Some(
            "to give it a role, create it anew with the label metadata-proxy.role, or set default-role of the daemon or of its rule",
        ),
        Verdict::Refused => Some(
            "correct what the last line above names: labels and variables by creating the container anew, rules by SIGHUP to the daemon",
        ),
    }
}
