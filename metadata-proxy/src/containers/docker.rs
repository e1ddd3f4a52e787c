//! The Docker API. The only module that knows bollard.

use std::{
    collections::HashMap,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context as _, bail};
use bollard::{
    Docker,
    errors::Error,
    models::{ContainerInspectResponse, ContainerStateStatusEnum, EventMessage, ImageInspect},
    query_parameters::{EventsOptionsBuilder, InspectContainerOptions, ListContainersOptions},
};
use futures_util::{Stream, StreamExt as _, future};
use jiff::Timestamp;
use tracing::{info, warn};

use super::{
    Container, Given, UserNamespace, network,
    socket::{self, Owner},
};

/// An engine that does not answer is as bad as none; SDKs wait a second.
const TIMEOUT: Duration = Duration::from_secs(5);
/// Images whose settings are remembered; a host has some dozens.
const IMAGES: usize = 1024;

/// Where an engine is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct EngineAt {
    pub(crate) name: String,
    /// `unix:///path` or `tcp://host:port`.
    pub(crate) host: String,
    /// One of those that a host may have: it may never come.
    pub(crate) optional: bool,
}

impl EngineAt {
    fn socket(&self) -> Option<&Path> {
        self.host.strip_prefix("unix://").map(Path::new)
    }
}

/// The engine, which need not be there yet: at boot the daemon comes first.
pub(crate) struct Engine {
    at: EngineAt,
    /// Whose its socket is; None: not looked at yet.
    owner: Mutex<Option<Owner>>,
    clients: Mutex<Option<Arc<Clients>>>,
    /// What an image brings counts as if the container's starter had given it.
    trust_images: bool,
    images: Mutex<HashMap<ImageKey, Arc<Given>>>,
    /// Whether it gives containers a user namespace of their own unless told otherwise; None: not asked yet.
    remaps: Mutex<Option<bool>>,
}

/// Id and architecture: such an image never changes.
type ImageKey = (String, Option<String>);

struct Clients {
    docker: Docker,
    /// Without a timeout on the whole: a stream lasts.
    streaming: Docker,
}

/// What a container is before its cgroup is known.
pub(crate) struct Description {
    pub(crate) id: String,
    pub(crate) name: String,
    pub(crate) pid: u32,
    pub(crate) image: String,
    image_id: String,
    /// Where an image is one of several architectures, that of the container.
    architecture: Option<String>,
    networks: Vec<String>,
    /// Whether it is to have a user namespace of its own.
    pub(super) remapped: bool,
    /// The user whose engine it is; None: root's.
    pub(super) of_user: Option<u32>,
    pub(super) from_image: Option<Given>,
    given: Given,
}

impl Given {
    fn new(labels: Option<HashMap<String, String>>, env: Option<Vec<String>>) -> Self {
        let (mut all, mut repeated) = (HashMap::new(), Vec::new());
        for variable in env.unwrap_or_default() {
            // One without a value is to unset it.
            let (name, value) = pair(&variable).map_or((variable, None), |(name, value)| (name, Some(value)));
            if all.insert(name.clone(), value).is_some() {
                repeated.push(name);
            }
        }
        all.retain(|name, _| !repeated.contains(name));
        let env = all.into_iter().filter_map(|(name, value)| Some((name, value?))).collect();
        Self { labels: labels.unwrap_or_default(), env, repeated }
    }

    /// Takes out what the image has brought, which the engine shows among the container's own. What the starter has
    /// repeated word for word looks the same.
    fn take_out(&mut self, image: &Self) -> Self {
        let (labels, env) = (take_out(&mut self.labels, &image.labels), take_out(&mut self.env, &image.env));
        Self { labels, env, repeated: Vec::new() }
    }
}

fn take_out(own: &mut HashMap<String, String>, image: &HashMap<String, String>) -> HashMap<String, String> {
    own.extract_if(|name, value| image.get(name) == Some(value)).collect()
}

impl Description {
    pub(super) fn at(self, cgroup: u64, user_namespace: UserNamespace, engine: &str) -> Container {
        let Self { id, name, pid, image, networks, from_image, given, of_user, .. } = self;
        let Given { labels, env, repeated } = given;
        let engine = engine.to_owned();
        Container {
            id,
            name,
            engine,
            of_user,
            pid,
            cgroup,
            image,
            networks,
            user_namespace,
            from_image,
            labels,
            env,
            repeated,
        }
    }
}

pub(crate) enum Lookup {
    Running(Box<Description>),
    /// Created, and perhaps about to run.
    Starting,
    /// Not there, or no longer running.
    Unknown,
}

#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Event {
    Started(String),
    Stopped(String),
    Renamed(String),
}

impl Engine {
    /// Asks nothing yet.
    pub(crate) fn new(at: EngineAt, trust_images: bool) -> Self {
        Self {
            at,
            owner: Mutex::default(),
            clients: Mutex::default(),
            trust_images,
            images: Mutex::default(),
            remaps: Mutex::default(),
        }
    }

    pub(crate) fn host(&self) -> &str {
        &self.at.host
    }

    pub(crate) fn name(&self) -> &str {
        &self.at.name
    }

    /// One that need not be there is not.
    pub(crate) fn is_absent(&self) -> bool {
        self.at.optional && self.at.socket().is_some_and(|path| matches!(socket::identity(path), Ok(None)))
    }

    /// Before it is believed: that its socket is no other engine's, and whose it is.
    pub(super) async fn check(&self, mut earlier: impl Iterator<Item = &Self>) -> anyhow::Result<()> {
        let Some(path) = self.at.socket() else { return Ok(()) };
        let identity = |engine: &Self| engine.at.socket().and_then(|path| socket::identity(path).ok().flatten());
        let own = identity(self);
        if let Some(other) = earlier.find(|other| own.is_some() && identity(other) == own) {
            bail!("its socket {} is that of engine {}", path.display(), other.name());
        }
        let owner = socket::owner(path).await.with_context(|| self.remedy())?;
        if let Owner::User(uid) = owner {
            info!(
                "engine {} is user {uid}'s: its containers get roles by rules that name it, and no others",
                self.name()
            );
        }
        *self.owner.lock().unwrap_or_else(PoisonError::into_inner) = Some(owner);
        Ok(())
    }

    /// Not before it has been looked at; where an operator has given an address, that is the operator's word.
    fn of_user(&self) -> anyhow::Result<Option<u32>> {
        match *self.owner.lock().unwrap_or_else(PoisonError::into_inner) {
            _ if self.at.socket().is_none() => Ok(None),
            Some(Owner::Root) => Ok(None),
            Some(Owner::User(uid)) => Ok(Some(uid)),
            None => bail!("whose engine {} is has not been found out yet", self.name()),
        }
    }

    fn remedy(&self) -> String {
        format!(
            "cannot reach the Docker engine at {}: is it running, and is --docker-host (DOCKER_HOST) right?",
            self.host()
        )
    }

    async fn clients(&self) -> anyhow::Result<Arc<Clients>> {
        let known = self.clients.lock().unwrap_or_else(PoisonError::into_inner).clone();
        match known {
            Some(known) => Ok(known),
            None => self.connect().await,
        }
    }

    /// Connects, and agrees on an API version. bollard 0.21 leaves that out of its paths (fussybeaver/bollard#736), so an engine
    /// answers by its own newest.
    async fn connect(&self) -> anyhow::Result<Arc<Clients>> {
        let connect = async {
            let docker = Docker::connect_with_host(self.host())?;
            let docker = docker.with_timeout(TIMEOUT).negotiate_version().await?;
            let streaming = docker.clone().with_timeout(Duration::from_secs(10 * 365 * 24 * 3600));
            Ok::<_, Error>(Arc::new(Clients { docker, streaming }))
        };
        let clients = connect.await.with_context(|| self.remedy())?;
        *self.clients.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&clients));
        Ok(clients)
    }

    /// What it is, in a line.
    pub(crate) async fn describe(&self) -> anyhow::Result<String> {
        let info = self.clients().await?.docker.info().await.context("cannot ask the engine about itself")?;
        let driver = info.cgroup_driver.map(|driver| driver.to_string()).unwrap_or_default();
        let cgroups = info.cgroup_version.map(|version| version.to_string()).unwrap_or_default();
        let version = info.server_version.unwrap_or_default();
        let running = info.containers_running.unwrap_or_default();
        Ok(format!("{version}, cgroup driver {driver}, cgroup version {cgroups}, {running} containers running"))
    }

    /// The ids of all running containers.
    pub(super) async fn running(&self) -> anyhow::Result<Vec<String>> {
        let list = self.clients().await?.docker.list_containers(None::<ListContainersOptions>).await;
        let list = list.context("cannot list containers")?;
        Ok(list.into_iter().filter_map(|container| container.id).collect())
    }

    pub(super) async fn inspect(&self, id: &str) -> anyhow::Result<Lookup> {
        if self.is_absent() {
            return Ok(Lookup::Unknown);
        }
        let found = match self.clients().await?.docker.inspect_container(id, None::<InspectContainerOptions>).await {
            Ok(response) => lookup(response),
            Err(Error::DockerResponseServerError { status_code: 404, .. }) => Lookup::Unknown,
            Err(error) => return Err(error).context("cannot inspect a container"),
        };
        let Lookup::Running(mut description) = found else { return Ok(found) };
        description.of_user = self.of_user()?;
        description.remapped &= description.of_user.is_some() || self.remaps().await?;
        description.from_image = if self.trust_images {
            Some(Given::default())
        } else {
            let image = self.image(&description.image_id, description.architecture.as_ref()).await?;
            image.map(|image| description.given.take_out(&image))
        };
        Ok(Lookup::Running(description))
    }

    /// The settings in an image; None if the engine cannot tell.
    async fn image(&self, id: &str, architecture: Option<&String>) -> anyhow::Result<Option<Arc<Given>>> {
        let images = || self.images.lock().unwrap_or_else(PoisonError::into_inner);
        let key = (id.to_owned(), architecture.cloned());
        let known = images().get(&key).cloned();
        if known.is_some() {
            return Ok(known);
        }
        let settings = match self.clients().await?.docker.inspect_image(id).await {
            Ok(image) => settings_of(image, architecture),
            // Removed by force, or damaged: that container's trouble, not that of all others.
            Err(Error::DockerResponseServerError { status_code, message }) => {
                warn!("the engine does not tell what is in image {id}: {status_code}, {message}");
                return Ok(None);
            }
            Err(error) => return Err(error).context("cannot inspect an image"),
        };
        let Some(settings) = settings.map(Arc::new) else {
            let part = architecture.map(|name| format!("'s part for {name:?}")).unwrap_or_default();
            warn!("the engine does not tell what is in image {id}{part}");
            return Ok(None);
        };
        let mut images = images();
        if images.len() >= IMAGES {
            images.clear();
        }
        images.insert(key, Arc::clone(&settings));
        Ok(Some(settings))
    }

    /// Of the engine as a whole: its settings take a restart of it to change, which breaks the stream of events.
    async fn remaps(&self) -> anyhow::Result<bool> {
        let known = || self.remaps.lock().unwrap_or_else(PoisonError::into_inner);
        let told = *known();
        if let Some(remaps) = told {
            return Ok(remaps);
        }
        let info = self.clients().await?.docker.info().await.context("cannot ask the engine about itself")?;
        let remaps = info.security_options.unwrap_or_default().iter().any(|option| option.contains("name=userns"));
        *known() = Some(remaps);
        Ok(remaps)
    }

    /// Starts, stops and renamings from now on, until the stream breaks.
    pub(super) async fn events(&self) -> anyhow::Result<impl Stream<Item = anyhow::Result<Event>> + use<>> {
        // The engine may be another by now: an older stream has broken.
        let clients = self.connect().await?;
        *self.remaps.lock().unwrap_or_else(PoisonError::into_inner) = None;
        let filters = HashMap::from([("type", vec!["container"]), ("event", vec!["start", "die", "rename"])]);
        // The request is sent when the stream is first asked, so the engine has to look back.
        let now = Timestamp::now();
        let since = format!("{}.{:09}", now.as_second(), now.subsec_nanosecond());
        let options = EventsOptionsBuilder::new().since(&since).filters(&filters).build();
        Ok(clients.streaming.events(Some(options)).filter_map(|message| {
            let message = message.context("the event stream broke");
            future::ready(message.map(event).transpose())
        }))
    }
}

fn event(message: EventMessage) -> Option<Event> {
    let id = message.actor?.id?;
    match message.action.as_deref()? {
        "start" => Some(Event::Started(id)),
        "die" => Some(Event::Stopped(id)),
        "rename" => Some(Event::Renamed(id)),
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
    let host = response.host_config.unwrap_or_default();
    let connected = response.network_settings.and_then(|settings| settings.networks).unwrap_or_default();
    let connected = connected.into_iter().map(|(name, network)| (name, network.network_id.unwrap_or_default()));
    let given = Given::new(config.labels, config.env);
    let mode = host.network_mode.unwrap_or_default();
    let platform = response.image_manifest_descriptor.and_then(|manifest| manifest.platform);
    Lookup::Running(Box::new(Description {
        name: name.trim_start_matches('/').to_owned(),
        id,
        pid,
        image: config.image.unwrap_or_default(),
        image_id: response.image.unwrap_or_default(),
        architecture: platform.and_then(|platform| platform.architecture),
        remapped: host.userns_mode.as_deref() != Some("host"),
        of_user: None,
        networks: network::names(mode, &given.labels, &connected.collect()),
        from_image: None,
        given,
    }))
}

/// What an image brings; None if that is not told, or of another part than the container's. With the containerd image
/// store an engine answers without a configuration, or with an empty one, where it has nothing of an image for its own
/// platform, and a container can be of another than it shows. An image may name no architecture; of one of which something
/// is told, the layers are.
fn settings_of(image: ImageInspect, architecture: Option<&String>) -> Option<Given> {
    let shown = image.architecture.unwrap_or_default();
    let config = image.config?;
    let layers = image.root_fs.and_then(|root| root.layers).unwrap_or_default();
    let told = !shown.is_empty() || !layers.is_empty();
    let same = architecture.is_none_or(|architecture| *architecture == shown);
    (told && same).then(|| Given::new(config.labels, config.env))
}

fn pair(variable: &str) -> Option<(String, String)> {
    let (name, value) = variable.split_once('=')?;
    Some((name.to_owned(), value.to_owned()))
}

#[cfg(test)]
mod tests {
    use bollard::models::{ContainerConfig, ContainerState, EventActor, HostConfig, ImageConfig, ImageInspectRootFs};

    use super::*;

    #[test]
    fn an_environment_variable_is_split_at_its_first_equals_sign() {
        assert_eq!(pair("IAM_ROLE=a=b"), Some(("IAM_ROLE".into(), "a=b".into())));
        assert_eq!(pair("EMPTY="), Some(("EMPTY".into(), String::new())));
        assert_eq!(pair("NOTHING"), None);
    }

    #[test]
    fn a_variable_that_is_there_twice_is_none() {
        let given = |env: &[&str]| Given::new(None, Some(env.iter().map(|&variable| variable.to_owned()).collect()));
        let twice = given(&["IAM_ROLE=a", "PATH=/bin", "IAM_ROLE=b", "IAM_POLICY", "IAM_ROLE=a"]);
        assert_eq!(twice.env.keys().collect::<Vec<_>>(), ["PATH"]);
        assert_eq!(twice.repeated[0], "IAM_ROLE");
        assert!(!twice.repeated.contains(&"IAM_POLICY".to_owned()));
        assert_eq!(given(&["IAM_ROLE", "IAM_ROLE=a"]).repeated, ["IAM_ROLE"]);
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
        assert_eq!(description.given.env.get("IAM_ROLE").map(String::as_str), Some("r"));
    }

    #[test]
    fn what_the_image_brings_is_taken_out_and_what_the_starter_changes_stays() {
        let settings = |role: &str, path: &str| {
            let labels = HashMap::from([("metadata-proxy.role".to_owned(), role.to_owned())]);
            Given::new(Some(labels), Some(vec![format!("IAM_ROLE={role}"), format!("PATH={path}")]))
        };
        let image = settings("admin", "/bin");
        let mut own = settings("admin", "/usr/bin");
        let taken = own.take_out(&image);
        assert_eq!(taken.labels, image.labels);
        assert_eq!(taken.env.into_iter().collect::<Vec<_>>(), [("IAM_ROLE".to_owned(), "admin".to_owned())]);
        assert!(own.labels.is_empty());
        assert_eq!(own.env.keys().collect::<Vec<_>>(), ["PATH"]);
        let mut own = settings("web", "/usr/bin");
        assert_eq!(own.take_out(&image), Given::default());
        assert_eq!((own.labels.len(), own.env.len()), (1, 2));
    }

    #[test]
    fn an_image_of_which_nothing_is_told_is_not_taken_for_one_that_brings_nothing() {
        let role = || HashMap::from([("metadata-proxy.role".to_owned(), "admin".to_owned())]);
        let image = |architecture: &str, config: Option<ImageConfig>| ImageInspect {
            architecture: Some(architecture.to_owned()),
            config,
            ..Default::default()
        };
        let config = || Some(ImageConfig { labels: Some(role()), ..Default::default() });
        let (own, other) = ("amd64".to_owned(), "arm64".to_owned());
        for architecture in [None, Some(&own)] {
            let settings = settings_of(image("amd64", config()), architecture).unwrap();
            assert_eq!(settings.labels, role());
        }
        assert!(settings_of(image("amd64", config()), Some(&other)).is_none());
        assert!(settings_of(image("amd64", None), None).is_none());
        assert!(settings_of(image("", Some(ImageConfig::default())), None).is_none());
        assert!(settings_of(ImageInspect { config: config(), ..Default::default() }, None).is_none());
        // One that names no architecture, and is there.
        let layers = ImageInspectRootFs { layers: Some(vec!["sha256:0".into()]), ..Default::default() };
        let unnamed = || ImageInspect { root_fs: Some(layers.clone()), ..image("", config()) };
        assert_eq!(settings_of(unnamed(), None).unwrap().labels, role());
        assert!(settings_of(unnamed(), Some(&own)).is_none());
    }

    #[test]
    fn a_container_is_remapped_unless_it_says_otherwise() {
        let lookup_with = |mode: Option<&str>| {
            let state = ContainerState { running: Some(true), pid: Some(7), ..Default::default() };
            let host = HostConfig { userns_mode: mode.map(str::to_owned), ..Default::default() };
            let (id, state, host_config) = (Some("id".to_owned()), Some(state), Some(host));
            match lookup(ContainerInspectResponse { id, state, host_config, ..Default::default() }) {
                Lookup::Running(description) => description.remapped,
                _ => panic!("not running"),
            }
        };
        assert_eq!([None, Some(""), Some("host")].map(lookup_with), [true, true, false]);
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
