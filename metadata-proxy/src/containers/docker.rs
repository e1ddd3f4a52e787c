//! The Docker API. The only module that knows bollard.

use std::{collections::HashMap, time::Duration};

use anyhow::Context as _;
use bollard::{
    Docker,
    errors::Error,
    models::{ContainerInspectResponse, ContainerStateStatusEnum, EventMessage},
    query_parameters::{EventsOptionsBuilder, InspectContainerOptions, ListContainersOptions},
};
use futures_util::{Stream, StreamExt as _, future};
use jiff::Timestamp;

use super::Container;

/// An engine that does not answer is as bad as none; SDKs wait a second.
const TIMEOUT: Duration = Duration::from_secs(5);

pub(crate) struct Engine {
    docker: Docker,
    /// Without a timeout on the whole: a stream lasts.
    streaming: Docker,
}

/// What a container is before its cgroup is known.
pub(crate) struct Description {
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) pid: u32,
    labels: HashMap<String, String>,
    env: HashMap<String, String>,
}

impl Description {
    pub(super) fn at(self, cgroup: u64) -> Container {
        let Self { id, name, pid, labels, env } = self;
        Container { id, name, pid, cgroup, labels, env }
    }
}

pub(crate) enum Lookup {
    Running(Description),
    /// Created, and perhaps about to run.
    Starting,
    /// Not there, or no longer running.
    Unknown,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Started(String),
    Stopped(String),
}

impl Engine {
    /// Connects to the engine and agrees on an API version.
    pub(crate) async fn connect(host: &str) -> anyhow::Result<Self> {
        let remedy = || {
            format!(
                "cannot reach the Docker engine at {host}: is it running, and is --docker-host (DOCKER_HOST) right?"
            )
        };
        let docker = Docker::connect_with_host(host).with_context(remedy)?;
        let docker = docker.with_timeout(TIMEOUT).negotiate_version().await.with_context(remedy)?;
        let streaming = docker.clone().with_timeout(Duration::from_secs(10 * 365 * 24 * 3600));
        Ok(Self { docker, streaming })
    }

    /// What it is, in a line.
    pub(crate) async fn describe(&self) -> anyhow::Result<String> {
        let info = self.docker.info().await.context("cannot ask the engine about itself")?;
        let driver = info.cgroup_driver.map(|driver| driver.to_string()).unwrap_or_default();
        let cgroups = info.cgroup_version.map(|version| version.to_string()).unwrap_or_default();
        let version = info.server_version.unwrap_or_default();
        let running = info.containers_running.unwrap_or_default();
        Ok(format!("{version}, cgroup driver {driver}, cgroup version {cgroups}, {running} containers running"))
    }

    /// The ids of all running containers.
    pub(super) async fn running(&self) -> anyhow::Result<Vec<String>> {
        let list = self.docker.list_containers(None::<ListContainersOptions>).await;
        let list = list.context("cannot list containers")?;
        Ok(list.into_iter().filter_map(|container| container.id).collect())
    }

    pub(super) async fn inspect(&self, id: &str) -> anyhow::Result<Lookup> {
        match self.docker.inspect_container(id, None::<InspectContainerOptions>).await {
            Ok(response) => Ok(lookup(response)),
            Err(Error::DockerResponseServerError { status_code: 404, .. }) => Ok(Lookup::Unknown),
            Err(error) => Err(error).context("cannot inspect a container"),
        }
    }

    /// Starts and stops from now on, until the stream breaks.
    pub(super) fn events(&self) -> impl Stream<Item = anyhow::Result<Event>> + use<> {
        let filters = HashMap::from([("type", vec!["container"]), ("event", vec!["start", "die"])]);
        // The request is sent when the stream is first asked, so the engine has to look back.
        let now = Timestamp::now();
        let since = format!("{}.{:09}", now.as_second(), now.subsec_nanosecond());
        let options = EventsOptionsBuilder::new().since(&since).filters(&filters).build();
        self.streaming.events(Some(options)).filter_map(|message| {
            let message = message.context("the event stream broke");
            future::ready(message.map(event).transpose())
        })
    }
}

fn event(message: EventMessage) -> Option<Event> {
    let id = message.actor?.id?;
    match message.action.as_deref()? {
        "start" => Some(Event::Started(id)),
        "die" => Some(Event::Stopped(id)),
        _ => None,
    }
}

fn lookup(response: ContainerInspectResponse) -> Lookup {
    let Some(state) = response.state else { return Lookup::Unknown };
    let pid = state.pid.and_then(|pid| u32::try_from(pid).ok()).filter(|pid| *pid != 0);
    let (Some(pid), Some(true), Some(id)) = (pid, state.running, response.id) else {
        // An exited container may be starting again, and says so only when it runs.
        return match state.status {
            Some(ContainerStateStatusEnum::REMOVING | ContainerStateStatusEnum::DEAD) => Lookup::Unknown,
            _ => Lookup::Starting,
        };
    };
    let config = response.config.unwrap_or_default();
    let name = response.name.unwrap_or_default();
    Lookup::Running(Description {
        name: name.trim_start_matches('/').to_owned(),
        id,
        pid,
        labels: config.labels.unwrap_or_default(),
        env: config.env.unwrap_or_default().iter().filter_map(|variable| pair(variable)).collect(),
    })
}

fn pair(variable: &str) -> Option<(String, String)> {
    let (name, value) = variable.split_once('=')?;
    Some((name.to_owned(), value.to_owned()))
}

#[cfg(test)]
mod tests {
    use bollard::models::{ContainerConfig, ContainerState, EventActor};

    use super::*;

    #[test]
    fn an_environment_variable_is_split_at_its_first_equals_sign() {
        assert_eq!(pair("IAM_ROLE=a=b"), Some(("IAM_ROLE".into(), "a=b".into())));
        assert_eq!(pair("EMPTY="), Some(("EMPTY".into(), String::new())));
        assert_eq!(pair("NOTHING"), None);
    }

    #[test]
    fn a_container_without_a_process_is_only_starting() {
        let state = ContainerState { running: Some(false), pid: Some(0), ..Default::default() };
        let response = ContainerInspectResponse { id: Some("id".into()), state: Some(state), ..Default::default() };
        assert!(matches!(lookup(response), Lookup::Starting));
    }

    #[test]
    fn a_running_container_is_described() {
        let state = ContainerState { running: Some(true), pid: Some(7), ..Default::default() };
        let config = ContainerConfig { env: Some(vec!["IAM_ROLE=r".into()]), ..Default::default() };
        let response = ContainerInspectResponse {
            id: Some("id".into()),
            name: Some("/web".into()),
            state: Some(state),
            config: Some(config),
            ..Default::default()
        };
        let Lookup::Running(description) = lookup(response) else { panic!("not running") };
        assert_eq!((description.name.as_str(), description.pid), ("web", 7));
        assert_eq!(description.env.get("IAM_ROLE").map(String::as_str), Some("r"));
    }

    #[test]
    fn events_that_are_none_of_ours_are_skipped() {
        let message = |action: &str| EventMessage {
            action: Some(action.into()),
            actor: Some(EventActor { id: Some("id".into()), ..Default::default() }),
            ..Default::default()
        };
        assert_eq!(event(message("start")), Some(Event::Started("id".into())));
        assert_eq!(event(message("die")), Some(Event::Stopped("id".into())));
        assert_eq!(event(message("exec_start")), None);
    }
}
