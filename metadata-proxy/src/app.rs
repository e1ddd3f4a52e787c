//! The composition root: builds everything from the configuration, runs it, and takes it down.

mod interception;
mod systemd;

use std::{
    convert::Infallible,
    os::unix::net::UnixStream,
    path::Path,
    sync::{Arc, RwLock},
    time::Duration,
};

use anyhow::{Context as _, bail};
use jiff::Timestamp;
use tokio::{
    runtime::Runtime,
    signal::unix::{Signal, SignalKind, signal},
    sync::mpsc,
    task::JoinSet,
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tracing::{debug, info, warn};

use crate::{
    admin::{Admin, about::About, client},
    audit::Audit,
    check,
    config::{self, BadConfig, Config, Place},
    containers::{Registry, docker::Engine, memory::Memory},
    credentials::{Aws, Store},
    exemptions::Exemptions,
    identity::Home,
    imds::{Imds, Rest},
    interceptor::{self, Interceptor, preflight},
    listeners::Listeners,
    log_limit::LogLimit,
    metrics::{self, Metrics},
    server::{self, Server},
    services::Services,
    strangers::Strangers,
    token_key,
    upstream::Upstream,
    workload::{Known, Workload, Workloads},
};

use interception::Interception;
pub(crate) use interception::SANDBOXES_UNTOLD;

type Reloaded = Result<Config, BadConfig>;

/// How long a listener that no container holds stays open unused.
const IDLE: Duration = Duration::from_secs(30);
/// Between two questions who the daemon is, at most.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// Accepted connections that wait for the server to take them.
const QUEUE: usize = 1024;

/// `reload` reads the configuration anew.
pub(crate) fn run(config: Config, reload: impl Fn() -> Reloaded + Send + 'static) -> anyhow::Result<()> {
    see_cgroups(&config.place);
    runtime()?.block_on(serve(config, reload))
}

/// Attaches what `run` attaches, and leaves it to whatever daemon comes.
pub(crate) fn attach(place: &Place) -> anyhow::Result<()> {
    see_cgroups(place);
    runtime()?.block_on(interception::leave(place))
}

pub(crate) fn check(config: &Config, config_only: bool) -> anyhow::Result<()> {
    if config_only {
        check::configuration_only(config);
        return Ok(());
    }
    see_cgroups(&config.place);
    if !runtime()?.block_on(check::run(config)) {
        bail!("this host lacks something that is needed");
    }
    Ok(())
}

/// Before there are threads: each has a cgroup namespace of its own. Below a cgroup that was given it is as it is, unless
/// processes could not be found there. Whether all is in sight then, `preflight` says.
fn see_cgroups(place: &Place) {
    if (place.is_whole_host() || preflight::cgroup2_mount().is_err())
        && let Err(error) = preflight::enter_host_cgroups()
    {
        debug!("{error:#}");
    }
}

pub(crate) fn ps(socket: &Path, json: bool, all: bool) -> anyhow::Result<()> {
    runtime()?.block_on(client::ps(socket, json, all))
}

pub(crate) fn explain(socket: &Path, container: &str) -> anyhow::Result<()> {
    runtime()?.block_on(client::explain(socket, container))
}

fn runtime() -> anyhow::Result<Runtime> {
    tokio::runtime::Builder::new_multi_thread().enable_all().build().context("cannot start the runtime")
}

pub(crate) fn detach(bpffs: &Path, socket: &Path) -> anyhow::Result<()> {
    if UnixStream::connect(socket).is_ok() {
        eprintln!(
            "a daemon is running (it answers at {}): it serves nobody from now on, and guards devices that come; end it first",
            socket.display()
        );
    }
    let done = runtime()?.block_on(interceptor::detach(bpffs));
    for what in &done.removed {
        eprintln!("removed {what}");
    }
    for error in &done.failed {
        eprintln!("{error:#}");
    }
    if !done.failed.is_empty() {
        bail!("not everything could be removed from {} and the network devices", bpffs.display());
    }
    if done.removed.is_empty() {
        eprintln!("nothing is attached");
    }
    Ok(())
}

async fn serve(config: Config, reload: impl Fn() -> Reloaded + Send + 'static) -> anyhow::Result<()> {
    let fixed = config.fixed();
    let hangup = signal(SignalKind::hangup()).context("cannot wait for SIGHUP")?;
    let mut terminate = signal(SignalKind::terminate()).context("cannot wait for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot wait for SIGINT")?;

    let mut background = JoinSet::new();
    let Interception { interceptor, wanted, uplinks, worker, host_netns, cgroup2, attached, exemptions } =
        interception::start(&config, &mut background).await?;

    let (sender, connections) = mpsc::channel(QUEUE);
    // The host's are guarded already.
    let guard = move |namespace, cookie| {
        (cookie != host_netns)
            .then(|| AbortOnDropHandle::new(tokio::spawn(Arc::clone(&uplinks).guard_in(namespace, cookie))))
    };
    let listeners = Listeners::new(Arc::clone(&interceptor), worker, guard, sender);
    // Connections that are held by now are accepted at once, and answered when AWS and the engine are there: they are held for
    // a few seconds only.
    let held = Arc::clone(&listeners).serve_wanted(wanted);
    background.spawn(async { held.await.context("cannot read the kernel's requests") });

    let metrics = Metrics::default();
    let about = Arc::new(About::new(&config));
    let audit = config.audit_log.map(|target| Audit::start(target, metrics.audit_lost())).transpose()?.map(Arc::new);
    let aws = Arc::new(Aws::connect(config.imds_endpoint.as_deref()).await?);
    let credentials = Arc::new(Store::new(Arc::clone(&aws), config.credentials));
    let require_imdsv2 = config.identity.require_imdsv2;
    let workloads = Arc::new(Workloads {
        interceptor: Arc::clone(&interceptor),
        listeners: Arc::clone(&listeners),
        credentials: Arc::clone(&credentials),
        known: RwLock::new(Known { settings: config.identity, home: None }),
        exemptions: Arc::clone(&exemptions),
        lineage: Default::default(),
    });
    let admit = Arc::clone(&workloads);
    let engines = config.engines.into_iter().map(|at| Engine::new(at, config.trust_image_metadata)).collect();
    let looking = Arc::clone(&workloads);
    let memory = Memory::new(move |variable, container| looking.looks_at(variable, container));
    let mount = cgroup2.clone();
    let registry = Registry::new(engines, cgroup2, memory, move |container, before| admit.admit(container, before));
    registry.recall();
    tokio::spawn(introduce(aws, Arc::clone(&workloads), Arc::clone(&registry), Arc::clone(&about)));
    tokio::spawn(reload_on(hangup, reload, workloads, Arc::clone(&registry), audit.clone(), fixed, Arc::clone(&about)));
    let (upstream, rest) = match config.upstream {
        Some(config::Upstream::Real { endpoint, policy }) => (Some(Upstream::new(endpoint)), Rest::Real(policy)),
        Some(config::Upstream::Simulated(instance, view)) => (None, Rest::Simulated(instance, view)),
        None => (None, Rest::Nothing),
    };
    let services = Services::new(config.services, &mount, attached, Arc::clone(&interceptor), Arc::clone(&registry));
    let services = Arc::new(services);
    let strangers = Arc::<Strangers>::default();
    let parts = metrics::Parts {
        interceptor: Arc::clone(&interceptor),
        listeners: Arc::clone(&listeners),
        containers: Arc::clone(&registry),
        strangers: Arc::clone(&strangers),
    };
    let admin = Arc::new(Admin {
        containers: Arc::clone(&registry),
        credentials: Arc::clone(&credentials),
        strangers: Arc::clone(&strangers),
        metrics: metrics.registry(parts),
        about,
    });
    let server = Arc::new(Server {
        registry: Arc::clone(&registry),
        services: Arc::clone(&services),
        imds: Imds::new(token_key::of_this_boot()?, rest, Timestamp::now()),
        imds_of_strangers: Imds::new(token_key::of_this_boot()?, Rest::Nothing, Timestamp::now()),
        credentials,
        upstream,
        audit: audit.clone(),
        require_imdsv2,
        limits: config.limits,
        metrics,
        usage: server::Usage::default(),
        strangers: Arc::clone(&strangers),
        log: LogLimit::default(),
    });
    let stop = CancellationToken::new();
    let mut server = tokio::spawn(server.run(connections, stop.clone()));

    tokio::spawn(Arc::clone(&admin).serve_unix(Admin::bind(&config.admin_socket)?));
    if let Some(address) = config.metrics_address {
        tokio::spawn(admin.serve_metrics(address));
    }
    background.spawn(sweep(Arc::clone(&listeners), exemptions, services, Arc::clone(&interceptor)));
    let remembering = Arc::clone(&registry);
    background.spawn(async move { Ok(remembering.remember().await) });
    let following = Arc::clone(&registry);
    background.spawn(async move { Ok(following.follow().await) });

    // None of these ends by itself.
    let ended = tokio::select! {
        _ = terminate.recv() => Ok(()),
        _ = interrupt.recv() => Ok(()),
        Some(ended) = background.join_next() => ended.context("a task failed").flatten().map(|never| match never {}),
        ended = &mut server => ended.context("the server failed"),
    };
    background.shutdown().await;
    registry.remember_last();
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
        debug!(?counter, value, "count");
    }
    if ended.is_ok() {
        info!("ended; the interception stays in force (`metadata-proxy detach` removes it)");
    }
    ended
}

/// Finds out who assumes the roles, for as long as it takes: roles that are named without an account
/// wait for it.
async fn introduce(aws: Arc<Aws>, workloads: Arc<Workloads>, registry: Arc<Registry<Workload>>, about: Arc<About>) {
    let mut pause = Duration::from_secs(1);
    let mut told = String::new();
    let identity = loop {
        match aws.caller_identity().await {
            Ok(identity) => break identity,
            Err(failure) => {
                let failure = failure.to_string();
                about.change(|facts| facts.trouble = Some(failure.clone()));
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
    let source = aws.source().await;
    about.change(|facts| {
        facts.identity = Some(identity.arn.clone());
        facts.trouble = None;
        facts.source = source;
    });
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
    about: Arc<About>,
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
                about.change(|facts| (facts.configuration, facts.refused) = (config.in_short(), None));
                workloads.learn(|known| known.settings = config.identity);
                reconsider_all(&workloads, &registry);
            }
            Err(error) => {
                warn!("the old configuration stays in force, for the new one is wrong: {error}");
                about.change(|facts| facts.refused = Some(error.to_string()));
            }
        }
    }
}

fn reconsider_all(workloads: &Workloads, registry: &Registry<Workload>) {
    for workload in registry.all() {
        workloads.reconsider(&workload);
    }
}

/// Gives back what is no longer needed, and sees to what comes without a word.
async fn sweep(
    listeners: Arc<Listeners>,
    exemptions: Arc<Exemptions>,
    services: Arc<Services>,
    interceptor: Arc<Interceptor>,
) -> anyhow::Result<Infallible> {
    loop {
        tokio::time::sleep(IDLE / 3).await;
        listeners.close_idle(IDLE);
        exemptions.look(&interceptor);
        services.look();
    }
}
