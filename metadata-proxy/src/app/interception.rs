//! From the configuration to the moment from which no container reaches the real service by itself.
//!
//! At boot the engine and its containers come after this, so nothing here waits for an engine, for AWS or
//! for the network.

use std::{
    convert::Infallible,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use metadata_proxy_common::{HOST_SERVED, Settings, TaskLayout};
use rustix::{
    process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit},
    time::{ClockId, clock_getres},
};
use tokio::task::JoinSet;
use tracing::{info, warn};

use super::systemd;
use crate::{
    config::{Config, Place},
    containers::cgroup,
    exemptions::Exemptions,
    interceptor::{self, Interceptor, Uplinks, WantedEvents, features, preflight},
    netns,
};

/// First SYN timeout of an intercepted connection, and how long it is held at most.
const SYN_TIMEOUT: Duration = Duration::from_millis(8);
const HOLD_BUDGET: Duration = Duration::from_secs(4);

/// Where the kernel does not say how it keeps a task's namespaces.
pub(crate) const SANDBOXES_UNTOLD: &str =
    "a container is told by the name of its cgroup alone, and builds and sandboxes of other kinds have the host's role";

/// What is in force, and what else was found on the way.
pub(super) struct Interception {
    pub(super) interceptor: Arc<Interceptor>,
    pub(super) wanted: WantedEvents,
    pub(super) uplinks: Arc<Uplinks>,
    pub(super) worker: netns::Worker,
    pub(super) host_netns: u64,
    pub(super) cgroup2: PathBuf,
    /// What we are attached to, of which all else is below.
    pub(super) attached: PathBuf,
    pub(super) exemptions: Arc<Exemptions>,
}

pub(super) async fn start(
    config: &Config,
    background: &mut JoinSet<anyhow::Result<Infallible>>,
) -> anyhow::Result<Interception> {
    let Prepared { cgroup, cgroup2, settings, worker } = prepare(&config.place)?;
    let exemptions = Arc::new(Exemptions::new(config.exempt_cgroups.clone(), cgroup2.clone()));
    let host = Some(config.services.host());
    let options = interceptor::Options { host, ..options(&config.place, &cgroup, settings, &worker) };
    let (interceptor, wanted, uplinks) = Interceptor::attach(options, |interceptor| {
        know_cgroups(interceptor, &cgroup2)?;
        exemptions.enact(interceptor);
        interceptor.forget_hosts();
        // Else we would ask ourselves for what the real service is to say.
        let own = cgroup::path_of(std::process::id()).and_then(|path| cgroup::id_at(&cgroup2, &path));
        own.map_or(Ok(()), |own| interceptor.leave_to_host(own))
    })?;
    let interceptor = Arc::new(interceptor);
    let uplinks = Arc::new(uplinks);
    let guard = uplinks.guard_host().await.context("cannot guard the uplinks")?;
    background.spawn(async { Ok(guard.await) });
    info!(cgroup = %cgroup.display(), "attached: no container reaches the real metadata service by itself");
    systemd::ready();
    background.spawn(systemd::watch(worker.clone()));
    Ok(Interception {
        interceptor,
        wanted,
        uplinks,
        worker,
        host_netns: settings.host_netns,
        cgroup2,
        attached: cgroup,
        exemptions,
    })
}

/// The same without a daemon: what is attached stays, and lets no container through to anything.
pub(super) async fn leave(place: &Place) -> anyhow::Result<()> {
    let Prepared { cgroup, cgroup2, settings, worker } = prepare(place)?;
    let (_, _, uplinks) = Interceptor::attach(options(place, &cgroup, settings, &worker), |interceptor| {
        // A daemon that runs has told more of those that it knows.
        let known = interceptor.cgroups();
        let unknown = cgroup::all(&cgroup2).into_iter().filter(|cgroup| !known.contains(cgroup));
        unknown.into_iter().try_for_each(|cgroup| interceptor.add_container(cgroup))
    })?;
    drop(Arc::new(uplinks).guard_host().await.context("cannot guard the uplinks")?);
    info!(cgroup = %cgroup.display(), "attached: no container reaches the real metadata service, and none is served until the daemon runs");
    Ok(())
}

struct Prepared {
    cgroup: PathBuf,
    cgroup2: PathBuf,
    settings: Settings,
    worker: netns::Worker,
}

fn prepare(place: &Place) -> anyhow::Result<Prepared> {
    // A core dump would have every secret in it, and lie on a disk.
    set_dumpable_behavior(DumpableBehavior::NotDumpable).context("cannot rule out core dumps")?;
    preflight::capabilities()?;
    features::require()?;
    raise_file_limit();
    let cgroup = preflight::cgroup(place.cgroup.as_deref())?;
    let cgroup2 = preflight::cgroup2_mount()?;
    if place.is_whole_host() {
        preflight::host_processes()?;
        preflight::host_network()?;
    }
    preflight::bpffs(&place.bpffs, place.is_whole_host())?;
    preflight::tracefs()?;
    let settings = settings(&cgroup, &cgroup2)?;
    Ok(Prepared { cgroup, cgroup2, settings, worker: netns::Worker::start()? })
}

fn options<'a>(
    place: &'a Place,
    cgroup: &'a Path,
    settings: Settings,
    worker: &netns::Worker,
) -> interceptor::Options<'a> {
    let debug = tracing::enabled!(target: "metadata_proxy", tracing::Level::DEBUG);
    interceptor::Options { cgroup, bpffs: &place.bpffs, settings, host: None, debug, worker: worker.clone() }
}

/// The containers' cgroups that were there before the programs: from then on the kernel itself notes
/// them as they come and go.
fn know_cgroups(interceptor: &Interceptor, cgroup2: &Path) -> Result<(), interceptor::Error> {
    // In this order: one that is made meanwhile is in neither, and stays.
    let known = interceptor.cgroups();
    let existing = cgroup::all(cgroup2);
    for cgroup in known.into_iter().filter(|cgroup| !existing.contains(cgroup)) {
        interceptor.forget_cgroup(cgroup);
    }
    // Those that have the real service by what the engine has told keep it until the engine tells otherwise, for it may
    // not be there, and agents are not to be refused with every restart.
    existing
        .into_iter()
        .filter(|cgroup| !interceptor.has_instance(*cgroup))
        .try_for_each(|cgroup| interceptor.add_container(cgroup))
}

/// One listener per namespace and some connections each: more than the customary 1024 descriptors.
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }) {
        warn!("cannot raise the limit of open files from {:?}: {error}", limit.current);
    }
}

fn settings(cgroup: &Path, cgroup2: &Path) -> anyhow::Result<Settings> {
    let task = interceptor::task_layout().unwrap_or_else(|error| {
        warn!("in the host's network, {SANDBOXES_UNTOLD}: {error:#}");
        TaskLayout::default()
    });
    let below = cgroup.strip_prefix(cgroup2).unwrap_or(Path::new(""));
    // The kernel counts the timeout in ticks, and the coarse clock advances once a tick.
    let tick = Duration::try_from(clock_getres(ClockId::MonotonicCoarse)).unwrap_or(Duration::from_millis(4));
    let (syn_timeout, syn_retries) = patience(tick);
    Ok(Settings {
        host_netns: netns::current_cookie()?,
        cgroup: cgroup::id_at(cgroup2, below)?,
        cgroup_level: below.iter().count() as u32,
        syn_timeout,
        syn_retries,
        task,
        host: HOST_SERVED,
        pad: 0,
    })
}

/// The first SYN timeout in ticks, and after how many retries, each waiting twice as long as the one
/// before, the budget is spent. Two ticks at least: the first may be over at once.
fn patience(tick: Duration) -> (u32, u32) {
    let tick = tick.max(Duration::from_micros(100));
    let ticks = u32::try_from(SYN_TIMEOUT.as_nanos().div_ceil(tick.as_nanos())).unwrap_or(2).max(2);
    let mut retries = 0;
    let mut waited = tick * ticks;
    let mut next = waited * 2;
    while waited < HOLD_BUDGET {
        waited += next;
        next *= 2;
        retries += 1;
    }
    (ticks, retries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_hold_lasts_for_seconds_at_every_tick_rate() {
        assert_eq!(patience(Duration::from_millis(1)), (8, 8));
        assert_eq!(patience(Duration::from_millis(4)), (2, 8));
        assert_eq!(patience(Duration::from_millis(10)), (2, 7));
    }
}
