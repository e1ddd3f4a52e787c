//! The composition root: builds everything from the configuration, runs it, and takes it down.

use std::{
    collections::HashSet,
    convert::Infallible,
    path::Path,
    sync::{Arc, RwLock},
    time::Duration,
};

use anyhow::{Context as _, bail};
use jiff::Timestamp;
use metadata_proxy_common::Settings;
use rustix::{
    process::{DumpableBehavior, Resource, Rlimit, getrlimit, set_dumpable_behavior, setrlimit},
    time::{ClockId, clock_getres},
};
use sd_notify::NotifyState;
use tokio::{
    runtime::Runtime,
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
    task::JoinSet,
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tracing::{info, warn};

use crate::{
    admin::{Admin, client},
    audit::Audit,
    check,
    config::{self, BadConfig, Config},
    containers::{Registry, cgroup, docker::Engine},
    credentials::{Aws, Store},
    identity::Home,
    imds::{Imds, Rest},
    interceptor::{self, Interceptor, features, preflight},
    listeners::Listeners,
    log_limit::LogLimit,
    metrics::{self, Metrics},
    netns,
    server::{self, Server},
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
    let fixed = config.fixed();
    let hangup = signal(SignalKind::hangup()).context("cannot wait for SIGHUP")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;

    // A core dump would have every secret in it, and lie on a disk.
    set_dumpable_behavior(DumpableBehavior::NotDumpable).context("cannot rule out core dumps")?;
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

    let worker = netns::Worker::start()?;
    let settings = settings()?;
    let (interceptor, wanted, uplinks) = Interceptor::attach(interceptor::Options {
        cgroup: &cgroup,
        bpffs: &config.bpffs,
        settings,
        debug: tracing::enabled!(target: "metadata_proxy", tracing::Level::DEBUG),
        worker: worker.clone(),
    })?;
    let interceptor = Arc::new(interceptor);
    know_cgroups(&interceptor, &cgroup2, &exempt)?;
    let mut background = JoinSet::new();
    let uplinks = Arc::new(uplinks);
    let guard = uplinks.guard_host().await.context("cannot guard the uplinks")?;
    background.spawn(async { Ok(guard.await) });
    // At boot the engine and its containers come after this, so nothing above may wait for it.
    info!(cgroup = %cgroup.display(), "attached: no container reaches the real metadata service by itself");
    if let Err(error) = sd_notify::notify(&[NotifyState::Ready]) {
        warn!("cannot tell systemd that the programs are attached: {error}");
    }

    let metrics = Metrics::default();
    let audit = config.audit_log.map(|target| Audit::start(target, metrics.audit_lost())).transpose()?.map(Arc::new);
    let aws = Arc::new(Aws::connect(config.imds_endpoint.as_deref()).await?);
    let credentials = Arc::new(Store::new(Arc::clone(&aws), config.credentials));
    let (sender, connections) = mpsc::channel(QUEUE);
    // The host's are guarded already.
    let guard = move |namespace, cookie| {
        (cookie != settings.host_netns)
            .then(|| AbortOnDropHandle::new(tokio::spawn(Arc::clone(&uplinks).guard_in(namespace, cookie))))
    };
    let listeners = Listeners::new(Arc::clone(&interceptor), worker, guard, sender);
    let require_imdsv2 = config.identity.require_imdsv2;
    let workloads = Arc::new(Workloads {
        interceptor: Arc::clone(&interceptor),
        listeners: Arc::clone(&listeners),
        credentials: Arc::clone(&credentials),
        known: RwLock::new(Known { settings: config.identity, home: None }),
        exempt_cgroups: exempt,
    });
    let admit = Arc::clone(&workloads);
    let engine = Engine::new(&config.docker_host, config.trust_image_metadata);
    let registry = Arc::new(Registry::new(engine, cgroup2, move |container| admit.admit(container)));
    tokio::spawn(introduce(aws, Arc::clone(&workloads), Arc::clone(&registry)));
    tokio::spawn(reload_on(hangup, reload, workloads, Arc::clone(&registry), audit.clone(), fixed));
    let (upstream, rest) = match config.upstream {
        Some(config::Upstream::Real { endpoint, policy }) => (Some(Upstream::new(endpoint)), Rest::Real(policy)),
        Some(config::Upstream::Simulated(instance)) => (None, Rest::Simulated(instance)),
        None => (None, Rest::Nothing),
    };
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
        audit: audit.clone(),
        require_imdsv2,
        limits: config.limits,
        metrics,
        usage: server::Usage::default(),
        log: LogLimit::default(),
    });
    let stop = CancellationToken::new();
    let mut server = tokio::spawn(server.run(connections, stop.clone()));

    tokio::spawn(Arc::clone(&admin).serve_unix(Admin::bind(&config.admin_socket)?));
    if let Some(address) = config.metrics_address {
        tokio::spawn(admin.serve_metrics(address));
    }
    // Connections that are held by now do not wait for the engine.
    let held = Arc::clone(&listeners).serve_wanted(wanted);
    background.spawn(async { held.await.context("cannot read the kernel's requests") });
    background.spawn(sweep(Arc::clone(&listeners)));
    background.spawn(async move { Ok(registry.follow().await) });

    // None of these ends by itself.
    let ended = tokio::select! {
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        Some(ended) = background.join_next() => ended.context("a task failed").flatten().map(|never| match never {}),
        ended = &mut server => ended.context("the server failed"),
    };
    background.shutdown().await;
    listeners.shut_down().await;
    stop.cancel();
    if !server.is_finished()
        && let Err(error) = server.await
    {
        warn!("the server ended badly: {error}");
    }
    if let Some(audit) = audit {
        audit.end().await;
    }
    for (counter, value) in interceptor.counters() {
        tracing::debug!(?counter, value, "count");
    }
    if ended.is_ok() {
        info!("ended; the interception stays in force (`metadata-proxy detach` removes it)");
    }
    ended
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
    audit: Option<Arc<Audit>>,
    fixed: config::Fixed,
) {
    while hangup.recv().await.is_some() {
        if let Some(audit) = &audit {
            audit.reopen();
        }
        match reload() {
            Ok(config) => {
                let changed = config.needs_restart(&fixed);
                if !changed.is_empty() {
                    warn!("these settings take a restart to change, and stay as they were: {}", changed.join(", "));
                }
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
async fn sweep(listeners: Arc<Listeners>) -> anyhow::Result<Infallible> {
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
