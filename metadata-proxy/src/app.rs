//! The composition root: builds everything from the configuration, runs it, and takes it down.

use std::{
    collections::HashSet,
    path::Path,
    sync::{Arc, RwLock},
    time::Duration,
};

use anyhow::{Context as _, bail};
use jiff::Timestamp;
use metadata_proxy_common::Settings;
use rustix::{
    process::{Resource, Rlimit, getrlimit, setrlimit},
    time::{ClockId, clock_getres},
};
use tokio::{
    runtime::Runtime,
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use crate::{
    admin::{Admin, client},
    check,
    config::{self, BadConfig, Config},
    containers::{Registry, cgroup, docker::Engine},
    credentials::{self, Aws, Store},
    identity::Home,
    imds::{Imds, Rest},
    interceptor::{self, Interceptor, features, preflight},
    listeners::{Listeners, netns},
    metrics::{self, Metrics},
    server::Server,
    token_key,
    upstream::Upstream,
    workload::{Known, Workload, Workloads},
};

type Reloaded = Result<Config, BadConfig>;

/// How long a listener that no container holds stays open unused.
const IDLE: Duration = Duration::from_secs(30);
/// Between two questions who the daemon is, at most.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// Accepted connections that wait for the server to take them.
const QUEUE: usize = 1024;

/// First SYN timeout of an intercepted connection, and how long it is held at most.
const SYN_TIMEOUT: Duration = Duration::from_millis(8);
const HOLD_BUDGET: Duration = Duration::from_secs(4);

/// `reload` reads the configuration anew.
pub(crate) fn run(config: Config, reload: impl Fn() -> Reloaded + Send + 'static) -> anyhow::Result<()> {
    runtime()?.block_on(serve(config, reload))
}

pub(crate) fn check(config: &Config) -> anyhow::Result<()> {
    if !runtime()?.block_on(check::run(config)) {
        bail!("this host lacks something that is needed");
    }
    Ok(())
}

pub(crate) fn ps(socket: &Path, json: bool) -> anyhow::Result<()> {
    runtime()?.block_on(client::ps(socket, json))
}

pub(crate) fn explain(socket: &Path, container: &str) -> anyhow::Result<()> {
    runtime()?.block_on(client::explain(socket, container))
}

fn runtime() -> anyhow::Result<Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start the runtime")
}

pub(crate) fn detach(bpffs: &Path) -> anyhow::Result<()> {
    let removed = runtime()?
        .block_on(interceptor::detach(bpffs))
        .with_context(|| format!("cannot detach from {}", bpffs.display()))?;
    for pin in &removed {
        eprintln!("removed {}", pin.display());
    }
    if removed.is_empty() {
        eprintln!("nothing is attached");
    }
    Ok(())
}

async fn serve(config: Config, reload: impl Fn() -> Reloaded + Send + 'static) -> anyhow::Result<()> {
    let hangup = signal(SignalKind::hangup()).context("cannot wait for SIGHUP")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;

    preflight::capabilities()?;
    features::require()?;
    raise_file_limit();
    let cgroup = preflight::cgroup(config.cgroup.as_deref())?;
    let cgroup2 = preflight::cgroup2_mount()?;
    preflight::bpffs(&config.bpffs)?;
    preflight::tracefs()?;
    let mut exempt: HashSet<u64> =
        config.exempt_cgroups.iter().map(|path| cgroup::id_at(&cgroup2, path)).collect::<Result<_, _>>()?;
    // Else we would ask ourselves for what the real service is to say.
    exempt.extend(cgroup::of_our_container(&cgroup2));
    // Before anything is attached: without an engine nobody could be told apart.
    let engine = Engine::connect(&config.docker_host, config.trust_image_metadata).await?;

    let aws = Arc::new(Aws::connect(config.imds_endpoint.as_deref()).await?);
    let credentials = Arc::new(Store::new(Arc::clone(&aws), credentials::Settings::default()));
    let (interceptor, wanted, uplinks) = Interceptor::attach(&interceptor::Options {
        cgroup: &cgroup,
        bpffs: &config.bpffs,
        settings: settings()?,
        debug: tracing::enabled!(target: "metadata_proxy", tracing::Level::DEBUG),
    })?;
    let interceptor = Arc::new(interceptor);
    know_cgroups(&interceptor, &cgroup2, &exempt)?;

    let (sender, connections) = mpsc::channel(QUEUE);
    let listeners = Listeners::new(Arc::clone(&interceptor), sender)?;
    let require_imdsv2 = config.identity.require_imdsv2;
    let workloads = Arc::new(Workloads {
        interceptor: Arc::clone(&interceptor),
        listeners: Arc::clone(&listeners),
        credentials: Arc::clone(&credentials),
        known: RwLock::new(Known { settings: config.identity, home: None }),
        exempt_cgroups: exempt,
    });
    let admit = Arc::clone(&workloads);
    let registry = Arc::new(Registry::new(engine, cgroup2, move |container| admit.admit(container)));
    tokio::spawn(introduce(aws, Arc::clone(&workloads), Arc::clone(&registry)));
    tokio::spawn(reload_on(hangup, reload, workloads, Arc::clone(&registry)));
    let (upstream, rest) = match config.upstream {
        Some(config::Upstream::Real { endpoint, policy }) => (Some(Upstream::new(endpoint)), Rest::Real(policy)),
        Some(config::Upstream::Simulated(instance)) => (None, Rest::Simulated(instance)),
        None => (None, Rest::Nothing),
    };
    let metrics = Metrics::default();
    let parts = metrics::Parts {
        interceptor: Arc::clone(&interceptor),
        listeners: Arc::clone(&listeners),
        containers: Arc::clone(&registry),
    };
    let admin = Arc::new(Admin {
        containers: Arc::clone(&registry),
        credentials: Arc::clone(&credentials),
        metrics: metrics.registry(parts),
    });
    let server = Arc::new(Server {
        registry: Arc::clone(&registry),
        imds: Imds::new(token_key::of_this_boot()?, rest, Timestamp::now()),
        imds_of_strangers: Imds::new(token_key::of_this_boot()?, Rest::Nothing, Timestamp::now()),
        credentials,
        upstream,
        require_imdsv2,
        connections: Arc::default(),
        metrics,
    });
    let stop = CancellationToken::new();
    let server = tokio::spawn(server.run(connections, stop.clone()));

    // Connections that are held by now do not wait for the snapshot.
    let mut wanted = tokio::spawn(Arc::clone(&listeners).serve_wanted(wanted));
    registry.resync().await.context("cannot ask the engine for its containers")?;
    tokio::spawn(uplinks.start().await.context("cannot guard the uplinks")?);
    tokio::spawn(Arc::clone(&admin).serve_unix(Admin::bind(&config.admin_socket)?));
    if let Some(address) = config.metrics_address {
        tokio::spawn(admin.serve_metrics(address));
    }
    let sweeper = tokio::spawn(sweep(Arc::clone(&listeners)));
    let follower = tokio::spawn(async move { registry.follow().await });
    info!(cgroup = %cgroup.display(), "ready: intercepting the containers of {}", config.docker_host);

    let failed = tokio::select! {
        _ = terminate.recv() => None,
        _ = interrupt.recv() => None,
        ended = &mut wanted => Some(ended),
    };
    follower.abort();
    sweeper.abort();
    wanted.abort();
    listeners.shut_down().await;
    stop.cancel();
    if let Err(error) = server.await {
        warn!("the server ended badly: {error}");
    }
    for (counter, value) in interceptor.counters() {
        tracing::debug!(?counter, value, "count");
    }
    match failed {
        None => info!("ended; the interception stays in force (`metadata-proxy detach` removes it)"),
        Some(ended) => ended.context("the listener task failed")?.context("cannot read the kernel's requests")?,
    }
    Ok(())
}

/// Finds out who assumes the roles, for as long as it takes: roles that are named without an account
/// wait for it.
async fn introduce(aws: Arc<Aws>, workloads: Arc<Workloads>, registry: Arc<Registry<Workload>>) {
    let mut pause = Duration::from_secs(1);
    let mut told = String::new();
    let identity = loop {
        match aws.caller_identity().await {
            Ok(identity) => break identity,
            Err(failure) => {
                let failure = failure.to_string();
                if failure != told {
                    warn!("the daemon has no identity at AWS, so no container gets credentials: {failure}");
                    told = failure;
                }
            }
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    };
    info!(account = identity.account, "assuming roles as {}", identity.arn);
    workloads.learn(|known| known.home = Home::of_caller(&identity.arn));
    reconsider_all(&workloads, &registry);
}

/// Takes over who may have which role. The rest of the configuration is about what has been built already.
async fn reload_on(
    mut hangup: Signal,
    reload: impl Fn() -> Reloaded,
    workloads: Arc<Workloads>,
    registry: Arc<Registry<Workload>>,
) {
    while hangup.recv().await.is_some() {
        match reload() {
            Ok(config) => {
                info!(rules = config.identity.rules.rules.len(), "reloaded roles and rules");
                workloads.learn(|known| known.settings = config.identity);
                reconsider_all(&workloads, &registry);
            }
            Err(error) => warn!("the old configuration stays in force, for the new one is wrong: {error}"),
        }
    }
}

fn reconsider_all(workloads: &Workloads, registry: &Registry<Workload>) {
    for workload in registry.all() {
        workloads.reconsider(&workload);
    }
}

/// Gives back what is no longer needed.
async fn sweep(listeners: Arc<Listeners>) {
    loop {
        tokio::time::sleep(IDLE / 3).await;
        listeners.close_idle(IDLE);
    }
}

/// The containers' cgroups that were there before the programs: from then on the kernel itself notes
/// them as they come and go.
fn know_cgroups(interceptor: &Interceptor, cgroup2: &Path, exempt: &HashSet<u64>) -> anyhow::Result<()> {
    // In this order: one that is made meanwhile is in neither, and stays.
    let known = interceptor.cgroups();
    let existing = cgroup::all(cgroup2);
    for cgroup in known.into_iter().filter(|cgroup| !existing.contains(cgroup)) {
        interceptor.forget_cgroup(cgroup);
    }
    for cgroup in existing {
        interceptor.add_container(cgroup)?;
    }
    for cgroup in exempt {
        interceptor.exempt(*cgroup)?;
    }
    Ok(())
}

/// One listener per namespace and some connections each: more than the customary 1024 descriptors.
fn raise_file_limit() {
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }) {
        warn!("cannot raise the limit of open files from {:?}: {error}", limit.current);
    }
}

fn settings() -> anyhow::Result<Settings> {
    // The kernel counts the timeout in ticks, and the coarse clock advances once a tick.
    let tick = Duration::try_from(clock_getres(ClockId::MonotonicCoarse)).unwrap_or(Duration::from_millis(4));
    let (syn_timeout, syn_retries) = patience(tick);
    Ok(Settings { host_netns: netns::current_cookie()?, syn_timeout, syn_retries })
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
