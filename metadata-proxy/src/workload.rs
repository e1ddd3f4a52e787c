//! A running container and everything the daemon does for it. All of it ends when this is dropped.

use std::{
    net::SocketAddr,
    path::Path,
    sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard},
};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};
use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::{debug, info, warn};

use crate::{
    containers::Container,
    credentials::{Hold, RoleSession, Store},
    exemptions::Exemptions,
    identity::{self, Decision, Home, Lineage, RoleArn, Settings, Verdict},
    interceptor::Interceptor,
    listeners::Listeners,
    log_limit::LogLimit,
};

/// What makes workloads of containers.
pub(crate) struct Workloads {
    pub(crate) interceptor: Arc<Interceptor>,
    pub(crate) listeners: Arc<Listeners>,
    pub(crate) credentials: Arc<Store>,
    pub(crate) known: RwLock<Known>,
    /// Cgroups that keep the real service: a container's may be among them, and our own is.
    pub(crate) exemptions: Arc<Exemptions>,
    pub(crate) lineage: Mutex<Lineage>,
}

/// What decisions are made from, beside the container.
pub(crate) struct Known {
    pub(crate) settings: Settings,
    /// None until AWS has told who the daemon is.
    pub(crate) home: Option<Home>,
}

pub(crate) struct Workload {
    pub(crate) container: Container,
    pub(crate) activity: Activity,
    /// Of what it asks and how that ends.
    pub(crate) log: LogLimit,
    standing: RwLock<Arc<Standing>>,
    _listener: DropGuard,
}

/// What has been decided about a container, and what is done for it.
pub(crate) struct Standing {
    pub(crate) decision: Decision,
    /// Keeps its credentials fetched and renewed.
    _hold: Option<Hold>,
}

impl Standing {
    pub(crate) fn role(&self) -> Option<(&RoleArn, &RoleSession)> {
        match &self.decision.verdict {
            Verdict::Role { arn, session } => Some((arn, session)),
            _ => None,
        }
    }

    /// The bare name of its role, also of one that is not to be had yet.
    pub(crate) fn role_name(&self) -> Option<&str> {
        match &self.decision.verdict {
            Verdict::Role { arn, .. } => Some(arn.name()),
            Verdict::Pending { name } => Some(name),
            Verdict::Instance | Verdict::NoRole | Verdict::Refused => None,
        }
    }
}

impl AsRef<Container> for Workload {
    fn as_ref(&self) -> &Container {
        &self.container
    }
}

impl Workload {
    /// What holds now; another decision may follow at any time.
    pub(crate) fn standing(&self) -> Arc<Standing> {
        Arc::clone(&self.standing.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Workloads {
    /// `before` is the same container, which may have been renamed.
    pub(crate) fn admit(&self, mut container: Container, before: Option<&Workload>) -> Workload {
        if !container.service {
            self.lineage.lock().unwrap_or_else(PoisonError::into_inner).trace(&mut container);
        }
        let before = before.map(Workload::standing);
        let standing = RwLock::new(Arc::new(self.enact(&container, self.decide(&container), before.as_deref())));
        let listener = CancellationToken::new();
        tokio::spawn(hold_listener(Arc::clone(&self.listeners), container.pid, listener.clone()));
        let (activity, log) = Default::default();
        Workload { container, activity, log, standing, _listener: listener.drop_guard() }
    }

    /// Decides anew about a running container.
    pub(crate) fn reconsider(&self, workload: &Workload) {
        let container = &workload.container;
        // Locked before anything is read, so that of two who do this the later has the last word.
        let mut standing = workload.standing.write().unwrap_or_else(PoisonError::into_inner);
        let decision = self.decide(container);
        if decision != standing.decision {
            *standing = Arc::new(self.enact(container, decision, Some(&standing)));
        }
    }

    /// For the decisions from now on; those made before are to be reconsidered.
    pub(crate) fn learn(&self, change: impl FnOnce(&mut Known)) {
        let mut known: RwLockWriteGuard<'_, Known> = self.known.write().unwrap_or_else(PoisonError::into_inner);
        change(&mut known);
    }

    fn decide(&self, container: &Container) -> Decision {
        if self.exemptions.contains(container.cgroup) {
            let reasons = vec!["its cgroup is exempt: it keeps the real metadata service".to_owned()];
            let source = Some(identity::EXEMPT.to_owned());
            return Decision { source, reasons, ..Decision::new(Verdict::Instance) };
        }
        let known = self.known();
        identity::decide(container, &known.settings, known.home.as_ref())
    }

    /// Whether a decision may depend on this variable.
    pub(crate) fn looks_at(&self, variable: &str, container: &Container) -> bool {
        identity::looks_at(variable, container, &self.known().settings)
    }

    fn known(&self) -> RwLockReadGuard<'_, Known> {
        self.known.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn enact(&self, container: &Container, decision: Decision, before: Option<&Standing>) -> Standing {
        let marked = match decision.verdict {
            Verdict::Instance => self.interceptor.give_instance(container.cgroup),
            _ => self.interceptor.add_container(container.cgroup),
        };
        if let Err(error) = marked {
            warn!(container = container.name, "cannot tell the kernel whose cgroup {} is: {error}", container.cgroup);
        }
        report(&container.name, &decision);
        let hold = match &decision.verdict {
            Verdict::Role { session, .. } => {
                let before = before.and_then(Standing::role).map(|(_, session)| session);
                Some(self.credentials.hold_after(session.clone(), before))
            }
            _ => None,
        };
        Standing { decision, _hold: hold }
    }
}

fn report(container: &str, decision: &Decision) {
    let reasons = decision.reasons.join("; ");
    match &decision.verdict {
        Verdict::Role { arn, .. } => info!(container, role = %arn, "{reasons}"),
        Verdict::Pending { name } => info!(container, role = name, "no credentials yet: {reasons}"),
        Verdict::Instance => info!(container, "it keeps the real metadata service: {reasons}"),
        Verdict::NoRole => info!(container, "no role: {reasons}"),
        Verdict::Refused => warn!(container, "no role: {reasons}"),
    }
}

/// What a container has asked, for those who look.
#[derive(Default)]
pub(crate) struct Activity(Mutex<Seen>);

#[derive(Default, Clone)]
pub(crate) struct Seen {
    pub(crate) requests: u64,
    pub(crate) last: Option<Client>,
}

/// Who has asked, as the kernel saw it when it connected; the user agent is what it says of itself.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct Client {
    pub(crate) time: Timestamp,
    pub(crate) user_agent: Option<String>,
    /// In the container's network namespace.
    pub(crate) address: Option<SocketAddr>,
    pub(crate) pid: u32,
    pub(crate) cgroup: u64,
}

impl Activity {
    /// Of what a client says of itself, so much is remembered.
    const AGENT_LIMIT: usize = 80;

    pub(crate) fn saw(&self, mut client: Client) {
        let printable = |agent: String| agent.chars().filter(char::is_ascii_graphic).take(Self::AGENT_LIMIT).collect();
        client.user_agent = client.user_agent.map(printable);
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        seen.requests += 1;
        seen.last = Some(client);
    }

    pub(crate) fn seen(&self) -> Seen {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Opens the listener of the container's namespace before it is asked for, and lets it go with the container, for it keeps
/// the namespace.
async fn hold_listener(listeners: Arc<Listeners>, pid: u32, end: CancellationToken) {
    match listeners.hold(pid).await {
        Ok(netns) => {
            end.cancelled().await;
            listeners.release(netns);
        }
        Err(error) if !Path::new(&format!("/proc/{pid}")).exists() => debug!("process {pid} has ended: {error:#}"),
        // Its first connection asks again.
        Err(error) => warn!("no listener yet in the network namespace of process {pid}: {error:#}"),
    }
}
