//! The Docker API. The only module that knows bollard.

use std::{
    collections::HashMap,
    path::Path,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use anyhow::{Context as _, bail};
use bollard::{
    Docker,
    errors::Error,
    models::EventMessage,
    query_parameters::{EventsOptionsBuilder, InspectContainerOptions, ListContainersOptions},
};
use futures_util::{Stream, StreamExt as _, future};
use jiff::Timestamp;
use tracing::{info, warn};

use super::{
    Container, Given, UserNamespace,
    description::{Lookup, lookup, settings_of},
    on_disk::OnDisk,
    socket::{self, Answering, Owner},
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
    /// Where its files are, as far as that is known.
    on_disk: Mutex<Option<OnDisk>>,
    /// What is there is its own.
    has_our_files: AtomicBool,
}

/// Id and architecture: such an image never changes.
type ImageKey = (String, Option<String>);

struct Clients {
    docker: Docker,
    /// Without a timeout on the whole: a stream lasts.
    streaming: Docker,
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
        let host = ["unix:///var/run/docker.sock", "unix:///run/docker.sock"].contains(&&*at.host);
        Self {
            at,
            on_disk: Mutex::new(host.then(OnDisk::of_the_host)),
            has_our_files: AtomicBool::default(),
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
        let Answering { owner, has_our_files } = socket::owner(path).await.with_context(|| self.remedy())?;
        if let Owner::User(uid) = owner {
            info!(
                "engine {} is user {uid}'s: its containers get roles by rules that name it, and no others",
                self.name()
            );
        }
        *self.owner.lock().unwrap_or_else(PoisonError::into_inner) = Some(owner);
        self.has_our_files.store(has_our_files, Ordering::Relaxed);
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

    /// The first of its running containers that is one of these.
    pub(crate) async fn find(&self, is_it: impl Fn(&Container) -> bool) -> anyhow::Result<Option<Container>> {
        self.check(std::iter::empty()).await?;
        for id in self.running().await? {
            if let Lookup::Running(description) = self.inspect(&id).await? {
                let container = description.at(0, UserNamespace::Host, self.name());
                if is_it(&container) {
                    return Ok(Some(container));
                }
            }
        }
        Ok(None)
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

    /// From its files, while it does not answer. None: there is nothing to be had of this container.
    pub(super) fn lookup_on_disk(&self, id: &str) -> Option<Lookup> {
        let on_disk = self.on_disk.lock().unwrap_or_else(PoisonError::into_inner).clone();
        on_disk
            .filter(|_| self.has_our_files.load(Ordering::Relaxed) && matches!(self.of_user(), Ok(None)))?
            .lookup(id, self.trust_images)
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
        if let Some(root) = info.docker_root_dir.filter(|_| self.at.socket().is_some()) {
            *self.on_disk.lock().unwrap_or_else(PoisonError::into_inner) = Some(OnDisk::at(root.into(), remaps));
        }
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

#[cfg(test)]
mod tests {
    use bollard::models::EventActor;

    use super::*;

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
