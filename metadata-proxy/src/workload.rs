//! A running container and everything the daemon does for it. All of it ends when this is dropped.

use std::{
    collections::HashSet,
    sync::{Arc, Mutex, PoisonError},
};

use tokio_util::sync::{CancellationToken, DropGuard};
use tracing::{info, warn};

use crate::{
    containers::Container,
    credentials::{DEFAULT_DURATION, Hold, RoleSession, Store},
    identity::{self, RoleArn},
    interceptor::Interceptor,
    listeners::Listeners,
};

/// What makes workloads of containers.
pub(crate) struct Workloads {
    pub(crate) interceptor: Arc<Interceptor>,
    pub(crate) listeners: Arc<Listeners>,
    pub(crate) credentials: Arc<Store>,
    pub(crate) default_role: Option<RoleArn>,
    /// Names of containers that keep the real service.
    pub(crate) exempt: HashSet<String>,
}

pub(crate) struct Workload {
    pub(crate) container: Container,
    /// None: the container has no role, or one that cannot be.
    pub(crate) role: Option<Role>,
    /// How that was decided.
    pub(crate) reasons: Vec<String>,
    pub(crate) activity: Activity,
    _listener: DropGuard,
}

pub(crate) struct Role {
    pub(crate) arn: RoleArn,
    pub(crate) session: RoleSession,
    /// Keeps its credentials fetched and renewed.
    _hold: Hold,
}

impl Workloads {
    pub(crate) fn admit(&self, container: Container) -> Workload {
        let exempt = self.exempt.contains(&container.name);
        let marked = if exempt {
            info!(container = container.name, "exempt: it keeps the real metadata service");
            self.interceptor.exempt(container.cgroup)
        } else {
            self.interceptor.add_container(container.cgroup)
        };
        if let Err(error) = marked {
            warn!(container = container.name, "cannot tell the kernel whose cgroup {} is: {error}", container.cgroup);
        }
        let (role, reasons) = if exempt {
            (None, vec!["the configuration exempts it: it keeps the real metadata service".to_owned()])
        } else {
            self.role(&container)
        };
        let listener = CancellationToken::new();
        tokio::spawn(hold_listener(Arc::clone(&self.listeners), container.pid, listener.clone()));
        Workload { container, role, reasons, activity: Activity::default(), _listener: listener.drop_guard() }
    }

    fn role(&self, container: &Container) -> (Option<Role>, Vec<String>) {
        let name = &container.name;
        if container.from_image.is_none() {
            let reason = format!(
                "no role: its image {} cannot be inspected, so nobody can tell what it has brought",
                container.image
            );
            warn!(container = name, "{reason}");
            return (None, vec![reason]);
        }
        let chosen = identity::choose_role(&container.labels, &container.env, self.default_role.as_ref());
        let (arn, reason) = match chosen {
            Some((source, Ok(arn))) => (arn, format!("its role comes from {source}")),
            Some((source, Err(error))) => {
                warn!(container = name, "no role, because its {source} is wrong: {error}");
                return (None, vec![format!("no role, because its {source} is wrong: {error}")]);
            }
            None => {
                info!(container = name, "no role");
                return (None, vec!["neither a label nor the environment nor the daemon names a role".to_owned()]);
            }
        };
        info!(container = name, role = %arn, "{reason}");
        let session = RoleSession {
            role_arn: arn.as_str().to_owned(),
            session_name: identity::session_name(name, &container.id),
            external_id: None,
            duration: DEFAULT_DURATION,
        };
        let hold = self.credentials.hold(session.clone());
        (Some(Role { arn, session, _hold: hold }), vec![reason])
    }
}

/// What a container has asked, for those who look.
#[derive(Default)]
pub(crate) struct Activity(Mutex<(u64, Option<String>)>);

impl Activity {
    /// Of what a client says of itself, so much is remembered.
    const AGENT_LIMIT: usize = 80;

    pub(crate) fn saw(&self, agent: Option<&str>) {
        let mut activity = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        activity.0 += 1;
        if let Some(agent) = agent {
            let printable = agent.chars().filter(char::is_ascii_graphic).take(Self::AGENT_LIMIT);
            activity.1 = Some(printable.collect());
        }
    }

    pub(crate) fn seen(&self) -> (u64, Option<String>) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Opens the listener of the container's namespace before it is asked for, and lets it go at the end.
async fn hold_listener(listeners: Arc<Listeners>, pid: u32, end: CancellationToken) {
    match listeners.hold(pid).await {
        Ok(netns) => {
            end.cancelled().await;
            listeners.release(netns);
        }
        // Its first connection asks again.
        Err(error) => warn!("no listener yet in the network namespace of process {pid}: {error:#}"),
    }
}
