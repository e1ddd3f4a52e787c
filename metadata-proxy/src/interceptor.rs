//! The kernel side, as the rest of the daemon sees it. The only module that knows aya.
//!
//! Programs, links and maps are pinned: when the daemon is gone, however it went, the containers'
//! connections to IMDS go on being intercepted and fail, and none reaches the real service.

mod btf;
pub(crate) mod features;
mod link;
mod maps;
mod object;
mod options;
pub(crate) mod preflight;
mod syscall;
mod uplinks;

use std::{
    collections::HashMap,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Mutex,
};

use aya::maps::{Array, HashMap as BpfHashMap, MapData, PerCpuArray, RingBuf, SkStorage};
use metadata_proxy_common::{
    CGROUP_CONTAINER, CGROUP_EXEMPT, CGROUP_INSTANCE, Counter, Flow, HOST_SERVED, LAYOUT_VERSION, Settings, TaskLayout,
    Wanted,
};
use tokio::io::unix::AsyncFd;
use tracing::warn;

use crate::netns;

pub(crate) use object::detach;
pub(crate) use uplinks::{NONE as NO_UPLINKS, Uplinks, on_host as uplinks_on_host};

/// What goes wrong between us and the kernel, for the reader.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error(
        "cannot load the BPF programs into kernel {kernel}: {source}. metadata-proxy needs Linux 5.15 or later with CONFIG_CGROUP_BPF, CONFIG_BPF_SYSCALL and BTF (/sys/kernel/btf/vmlinux)"
    )]
    Load { kernel: String, source: anyhow::Error },
    #[error("cannot attach {program} to cgroup {}: {source:#}", .cgroup.display())]
    Attach { program: &'static str, cgroup: PathBuf, source: anyhow::Error },
    #[error("cannot use the pin directory {}: {source}. It must be on a bpffs (--bpffs)", .path.display())]
    Pin { path: PathBuf, source: std::io::Error },
    #[error("BPF map {map}: {source}")]
    Map { map: &'static str, source: aya::maps::MapError },
    #[error("the BPF object has no {0}; this build is broken")]
    Missing(&'static str),
}

/// Where and how to attach.
pub(crate) struct Options<'a> {
    pub(crate) cgroup: &'a Path,
    /// The mounted bpffs; ours is a directory in it.
    pub(crate) bpffs: &'a Path,
    pub(crate) settings: Settings,
    /// One of the `HOST_*` values; None: as it was.
    pub(crate) host: Option<u32>,
    /// Lets the programs log each connection they touch.
    pub(crate) debug: bool,
    /// For devices in other network namespaces.
    pub(crate) worker: netns::Worker,
}

/// Whether something is left attached, by a daemon or without one.
pub(crate) fn is_attached(bpffs: &Path) -> bool {
    object::is_pinned(bpffs)
}

/// Whether the kernel takes the programs; they are not attached.
pub(crate) fn try_load() -> anyhow::Result<()> {
    let mut object = object::load_unpinned()?;
    Ok(link::load_all(&mut object, link::needed())?)
}

/// The same for what closes ways around the uplinks' guard, which not every kernel takes.
pub(crate) fn try_load_options() -> anyhow::Result<String> {
    options::try_load(&mut object::load_unpinned()?)
}

/// By what sandboxes are told in the host's network namespace.
pub(crate) fn task_layout() -> anyhow::Result<TaskLayout> {
    btf::Btf::of_kernel()?.task_layout()
}

/// The attached programs' maps.
pub(crate) struct Interceptor {
    cgroups: Mutex<BpfHashMap<MapData, u64, u32>>,
    /// Only the programs write it.
    nested: BpfHashMap<MapData, u64, u32>,
    hosts: Mutex<BpfHashMap<MapData, u64, u32>>,
    listeners: Mutex<BpfHashMap<MapData, u64, u32>>,
    accepted: SkStorage<MapData, Flow>,
    ours: Mutex<SkStorage<MapData, u32>>,
    counters: PerCpuArray<MapData, u64>,
}

impl Interceptor {
    /// Loads the programs and attaches them, or takes over from the daemon that was here before. `know` makes
    /// known which cgroups are whose, before anything asks for them.
    pub(crate) fn attach(
        options: Options<'_>,
        know: impl FnOnce(&Self) -> Result<(), Error>,
    ) -> Result<(Self, WantedEvents, Uplinks), Error> {
        let pins = object::Pins::create(options.bpffs, options.cgroup, LAYOUT_VERSION)?;
        let mut object = object::load(&pins, options.debug)?;
        let options_of_any = options::load(&object);

        // Before any program runs: without settings they refuse everything.
        let mut settings: Array<MapData, Settings> = maps::take(&mut object, "SETTINGS")?;
        let host = options.host.or_else(|| Some(settings.get(&0, 0).ok()?.host));
        let all = Settings { host: host.unwrap_or(HOST_SERVED), ..options.settings };
        settings.set(0, all, 0).map_err(maps::error("SETTINGS"))?;

        let interceptor = Self {
            cgroups: Mutex::new(maps::take(&mut object, "CGROUPS")?),
            nested: maps::take(&mut object, "NESTED")?,
            hosts: Mutex::new(maps::take(&mut object, "HOSTS")?),
            listeners: Mutex::new(maps::take(&mut object, "LISTENERS")?),
            accepted: maps::take(&mut object, "ACCEPTED")?,
            ours: Mutex::new(maps::take(&mut object, "OURS")?),
            counters: maps::take(&mut object, "COUNTERS")?,
        };
        let wanted = WantedEvents::new(maps::take(&mut object, "WANTED")?)?;
        link::load_all(&mut object, link::needed())?;
        link::attach_all(&mut object, link::TRACKERS, &pins, options.cgroup)?;
        know(&interceptor)?;
        if pins.earlier_link("imds_egress").is_some() {
            // What the new programs redirect and the old guard does not know is held, until the new one lets it
            // through; the other way round it would be lost.
            link::attach_all(&mut object, link::HOOKS.iter().rev(), &pins, options.cgroup)?;
        } else {
            link::attach_all(&mut object, link::HOOKS, &pins, options.cgroup)?;
        }
        options::attach(&mut object, options_of_any, &pins, options.cgroup);
        object::follow_log(&mut object);
        let uplinks = Uplinks::new(object, pins, options.worker);
        Ok((interceptor, wanted, uplinks))
    }

    /// Who opened this accepted connection. None if the kernel has no record of it: refuse it.
    pub(crate) fn flow_of(&self, connection: &impl AsRawFd) -> Option<Flow> {
        self.accepted.get(connection, 0).ok()
    }

    /// Marks a socket, before it listens, as ours: connections are let through to no other.
    pub(crate) fn mark_listener(&self, socket: &impl AsRawFd) -> Result<(), Error> {
        maps::lock(&self.ours).insert(socket, 1, 0).map_err(maps::error("OURS"))
    }

    /// From now on new connections to this listener are held.
    pub(crate) fn unmark_listener(&self, socket: &impl AsRawFd) {
        if let Err(error) = maps::lock(&self.ours).remove(socket) {
            warn!("BPF map OURS: cannot remove a listener's mark: {error}");
        }
    }

    /// From now on connections in this namespace go to this port.
    pub(crate) fn set_listener(&self, netns: u64, port: u16) -> Result<(), Error> {
        maps::lock(&self.listeners).insert(netns, u32::from(port), 0).map_err(maps::error("LISTENERS"))
    }

    /// Takes that back, unless another daemon has taken over since.
    pub(crate) fn forget_listener(&self, netns: u64, port: u16) {
        let mut listeners = maps::lock(&self.listeners);
        if listeners.get(&netns, 0).is_ok_and(|published| published == u32::from(port)) {
            maps::remove(&mut listeners, "LISTENERS", netns);
        }
    }

    /// The listeners of the daemon before us, alive or dead.
    pub(crate) fn listeners(&self) -> HashMap<u64, u16> {
        let listeners = maps::lock(&self.listeners);
        let entries = listeners.iter().filter_map(Result::ok);
        entries.filter_map(|(netns, port)| Some((netns, u16::try_from(port).ok()?))).collect()
    }

    /// Intercept this cgroup's connections also in the host's network namespace, until it is removed.
    pub(crate) fn add_container(&self, cgroup: u64) -> Result<(), Error> {
        maps::lock(&self.cgroups).insert(cgroup, CGROUP_CONTAINER, 0).map_err(maps::error("CGROUPS"))
    }

    /// Let this cgroup's connections through to the real service, in every network namespace.
    pub(crate) fn exempt(&self, cgroup: u64) -> Result<(), Error> {
        maps::lock(&self.cgroups).insert(cgroup, CGROUP_EXEMPT, 0).map_err(maps::error("CGROUPS"))
    }

    /// The same for that of a container, until somebody says otherwise.
    pub(crate) fn give_instance(&self, cgroup: u64) -> Result<(), Error> {
        maps::lock(&self.cgroups).insert(cgroup, CGROUP_INSTANCE, 0).map_err(maps::error("CGROUPS"))
    }

    /// Let connections of this very cgroup's own processes through to the real service: nobody has a role there.
    pub(crate) fn leave_to_host(&self, cgroup: u64) -> Result<(), Error> {
        maps::lock(&self.hosts).insert(cgroup, 1, 0).map_err(maps::error("HOSTS"))
    }

    /// What a daemon with other services has found out.
    pub(crate) fn forget_hosts(&self) {
        let mut hosts = maps::lock(&self.hosts);
        let known: Vec<u64> = hosts.keys().filter_map(Result::ok).collect();
        known.into_iter().for_each(|cgroup| maps::remove(&mut hosts, "HOSTS", cgroup));
    }

    pub(crate) fn has_instance(&self, cgroup: u64) -> bool {
        maps::lock(&self.cgroups).get(&cgroup, 0).is_ok_and(|kind| kind == CGROUP_INSTANCE)
    }

    pub(crate) fn forget_cgroup(&self, cgroup: u64) {
        maps::remove(&mut maps::lock(&self.cgroups), "CGROUPS", cgroup);
    }

    /// The cgroups that the kernel knows, containers' and exempt ones.
    pub(crate) fn cgroups(&self) -> Vec<u64> {
        maps::lock(&self.cgroups).keys().filter_map(Result::ok).collect()
    }

    /// How many cgroups that containers have made the kernel keeps in mind.
    pub(crate) fn nested_cgroups(&self) -> usize {
        self.nested.keys().filter_map(Result::ok).count()
    }

    /// What the programs have counted since they were first attached.
    pub(crate) fn counters(&self) -> Vec<(Counter, u64)> {
        let read = |counter: &Counter| {
            let values = self.counters.get(&(*counter as u32), 0);
            (*counter, values.map_or(0, |values| values.iter().sum()))
        };
        Counter::ALL.iter().map(read).collect()
    }
}

/// The stream of namespaces that need a listener.
pub(crate) struct WantedEvents {
    ready: AsyncFd<OwnedFd>,
    ring: RingBuf<MapData>,
}

impl WantedEvents {
    fn new(ring: RingBuf<MapData>) -> Result<Self, Error> {
        let fd = |source: std::io::Error| Error::Map { map: "WANTED", source: aya::maps::MapError::IoError(source) };
        // A duplicate, so that reading the ring does not need the reactor's guard.
        let copy = rustix::io::dup(&ring).map_err(|error| fd(error.into()))?;
        let ready = maps::readable(copy).map_err(fd)?;
        Ok(Self { ready, ring })
    }

    /// The next namespace and a process in it. Cancel safe.
    pub(crate) async fn next(&mut self) -> std::io::Result<(u64, u32)> {
        loop {
            if let Some(entry) = self.ring.next() {
                match maps::read::<Wanted>(&entry) {
                    Some(wanted) => return Ok((wanted.netns, wanted.pid)),
                    None => warn!("the kernel sent a request of {} bytes that is none of ours", entry.len()),
                }
                continue;
            }
            self.ready.readable().await?.clear_ready();
        }
    }
}
