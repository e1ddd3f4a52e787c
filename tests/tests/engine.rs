//! The container engine in trouble and at ease, and whom a connection belongs to.

use std::{
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bollard::query_parameters::RenameContainerOptionsBuilder;
use metadata_proxy_tests::{
    host::{Container, ContainerSpec, HostOptions, Network, TestHost},
    stage::{Stage, daemon_options, role_arn},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        UnixListener, UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    task::JoinHandle,
    time::{sleep, timeout},
};

const ROLE_LABEL: &str = "metadata-proxy.role";
const SWIPELY_LABEL: &str = "com.swipely.iam-docker.iam-profile";
/// What comes by itself comes by then, also on a busy machine.
const SOON: Duration = Duration::from_secs(30);
const ROLE_LIST: &str = "http://169.254.169.254/latest/meta-data/iam/security-credentials/";

/// One answer to a request for the role list.
#[derive(Debug, Clone, PartialEq)]
struct Answer {
    /// 0 without any answer.
    status: u16,
    took: Duration,
    /// Its last line.
    body: String,
}

/// What curl is told to write behind each body.
const FORMAT: &str = " %{http_code} %{time_total}\\n";

impl Answer {
    fn parse(line: &str) -> Option<Self> {
        let mut fields = line.rsplitn(3, ' ');
        let took = Duration::try_from_secs_f64(fields.next()?.parse().ok()?).ok()?;
        let status = fields.next().filter(|status| status.len() == 3)?.parse().ok()?;
        Some(Self { status, took, body: fields.next()?.to_owned() })
    }

    fn all(text: &str) -> Vec<Self> {
        text.lines().filter_map(Self::parse).collect()
    }

    fn is(&self, role: &str) -> bool {
        self.status == 200 && self.body == role
    }
}

fn idle(name: &str) -> ContainerSpec {
    ContainerSpec::resident(name)
}

fn idle_as(name: &str, role: &str) -> ContainerSpec {
    idle(name).label(ROLE_LABEL, &role_arn(role))
}

/// One request for the role list, by a process of its own in the container.
async fn ask(container: &Container) -> Result<Answer> {
    let finished = container.exec(["/usr/bin/curl", "-s", "--max-time", "20", "-w", FORMAT, ROLE_LIST]).await?;
    Answer::all(&finished.stdout).pop().with_context(|| format!("{}: {finished:?}", container.name()))
}

async fn ask_until_served(container: &Container, role: &str, limit: Duration) -> Result<()> {
    let deadline = Instant::now() + limit;
    loop {
        let answer = ask(container).await?;
        ensure!(answer.status != 200 || answer.body == role, "{} got {answer:?}", container.name());
        if answer.status == 200 {
            return Ok(());
        }
        ensure!(Instant::now() < deadline, "{}: after {limit:?} still {answer:?}", container.name());
        sleep(Duration::from_millis(100)).await;
    }
}

/// A container that asks all the time, and writes its answers to a file: the engine's own logs pause with the engine.
struct Asker {
    container: Container,
    role: String,
    answers: PathBuf,
}

impl Asker {
    async fn start(host: &TestHost, name: &str, network: Network) -> Result<Self> {
        let directory = host.directory().join(name);
        fs::create_dir(&directory)?;
        let script =
            format!("while :; do curl -s --max-time 10 -w '{FORMAT}' {ROLE_LIST} >> /tmp/answers; sleep 0.05; done");
        let spec = ContainerSpec::on_host(name, ["/usr/bin/sh", "-c", &script])
            .label(ROLE_LABEL, &role_arn(name))
            .bind(format!("{}:/tmp", directory.display()))
            .network(network);
        let container = host.run(spec).await?;
        Ok(Self { container, role: name.to_owned(), answers: directory.join("answers") })
    }

    fn answers(&self) -> Vec<Answer> {
        Answer::all(&fs::read_to_string(&self.answers).unwrap_or_default())
    }

    /// Waits for so many more answers, and gives them.
    async fn more(&self, count: usize) -> Result<Vec<Answer>> {
        let (before, deadline) = (self.answers().len(), Instant::now() + Duration::from_secs(20));
        loop {
            let answers = self.answers().split_off(before);
            if answers.len() >= count {
                return Ok(answers);
            }
            ensure!(Instant::now() < deadline, "{} gets no more answers than {answers:?}", self.role);
            sleep(Duration::from_millis(20)).await;
        }
    }

    fn all_served(&self, answers: &[Answer]) -> Result<()> {
        let wrong: Vec<_> = answers.iter().filter(|answer| !answer.is(&self.role)).collect();
        ensure!(wrong.is_empty(), "{} was answered {wrong:?}", self.role);
        Ok(())
    }
}

/// Between the daemon and the engine, to be in their way.
struct Relay {
    socket: PathBuf,
    mode: watch::Sender<Mode>,
    generation: watch::Sender<u32>,
    /// The id of a container that the engine fails to describe.
    broken: watch::Sender<Option<String>>,
    task: JoinHandle<()>,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Mode {
    Pass,
    /// Whatever comes is passed on later.
    Delay(Duration),
    /// Nothing is passed on.
    Hang,
    /// New connections are closed at once.
    Refuse,
}

impl Relay {
    fn start(host: &TestHost) -> Result<Self> {
        let socket = host.directory().join("relay.sock");
        let listener = UnixListener::bind(&socket)?;
        let engine = host.engine().socket().to_owned();
        let (mode, generation) = (watch::Sender::new(Mode::Pass), watch::Sender::new(0));
        let broken = watch::Sender::new(None);
        let (modes, generations, breaks) = (mode.clone(), generation.clone(), broken.clone());
        let task = tokio::spawn(async move {
            while let Ok((client, _)) = listener.accept().await {
                if *modes.borrow() != Mode::Refuse {
                    let mut cut = generations.subscribe();
                    let relayed = relay(client, engine.clone(), modes.subscribe(), breaks.borrow().clone());
                    tokio::spawn(async move {
                        tokio::select! { _ = cut.changed() => {}, () = relayed => {} }
                    });
                }
            }
        });
        Ok(Self { socket, mode, generation, broken, task })
    }

    /// Before an engine with one container.
    async fn with_known() -> Result<(Self, Stage, Container)> {
        let host = TestHost::start().await?;
        let relay = Self::start(&host)?;
        let stage = relay.stage(host).await?;
        let known = stage.run(idle_as("known", "known")).await?;
        Ok((relay, stage, known))
    }

    fn set(&self, mode: Mode) {
        self.mode.send_replace(mode);
    }

    /// Ends all connections.
    fn cut(&self) {
        self.generation.send_modify(|generation| *generation += 1);
    }

    async fn stage(&self, host: TestHost) -> Result<Stage> {
        Stage::on(host, daemon_options().arg(format!("--docker-host=unix://{}", self.socket.display()))).await
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
        self.cut();
    }
}

async fn relay(mut client: UnixStream, engine: PathBuf, mode: watch::Receiver<Mode>, broken: Option<String>) {
    let Ok(mut engine) = UnixStream::connect(engine).await else { return };
    if let Some(id) = broken {
        // The daemon's client sends a request's head at once, and each on a connection of its own.
        let mut head = vec![0; 4096];
        let Ok(length) = client.read(&mut head).await else { return };
        if String::from_utf8_lossy(&head[..length]).contains(&format!("/containers/{id}/json")) {
            let answer = b"HTTP/1.1 500 Internal Server Error\r\nContent-Type: application/json\r\n\
                Content-Length: 20\r\nConnection: close\r\n\r\n{\"message\":\"broken\"}";
            let _ = client.write_all(answer).await;
            return;
        }
        if engine.write_all(&head[..length]).await.is_err() {
            return;
        }
    }
    let ((from_client, to_client), (from_engine, to_engine)) = (client.into_split(), engine.into_split());
    tokio::join!(pump(from_client, to_engine, mode.clone()), pump(from_engine, to_client, mode));
}

async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut mode: watch::Receiver<Mode>) {
    let mut buffer = vec![0; 65536];
    while let Ok(length @ 1..) = from.read(&mut buffer).await {
        let Ok(mode) = mode.wait_for(|mode| *mode != Mode::Hang).await.map(|mode| *mode) else { return };
        if let Mode::Delay(delay) = mode {
            sleep(delay).await;
        }
        if to.write_all(&buffer[..length]).await.is_err() {
            return;
        }
    }
    // Its end is the other's as well.
}

async fn wait_for_call(stage: &Stage, role: &str, limit: Duration) -> Result<()> {
    let deadline = Instant::now() + limit;
    while stage.sts.assume_role_calls(&role_arn(role)) == 0 {
        ensure!(Instant::now() < deadline, "{role} was not assumed within {limit:?}");
        sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_that_outlive_a_restart_of_the_engine_are_served_all_the_time() -> Result<()> {
    let stage = Stage::on(
        TestHost::start_with(HostOptions { live_restore: true, ..HostOptions::default() }).await?,
        daemon_options(),
    )
    .await?;
    let asker = Asker::start(&stage, "lasting", Network::Default).await?;
    asker.all_served(&asker.more(3).await?)?;
    let pid = asker.container.pid().await?;
    stage.engine().stop().await?;
    asker.all_served(&asker.more(20).await?)?;
    stage.engine().resume().await?;
    asker.all_served(&asker.more(20).await?)?;
    ensure!(asker.container.pid().await? == pid, "the container did not outlive the engine");

    // The daemon follows the engine again: this one never asks by itself.
    let silent = stage.run(idle_as("silent", "silent")).await?;
    wait_for_call(&stage, "silent", SOON).await?;
    ensure!(ask(&silent).await?.is("silent"), "a new container is not served");
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_started_after_a_restart_of_the_engine_are_served() -> Result<()> {
    let stage = Stage::start().await?;
    let asker = Asker::start(&stage, "stopped", Network::Default).await?;
    asker.all_served(&asker.more(3).await?)?;
    stage.engine().restart().await?;
    ensure!(asker.container.pid().await? == 0, "the container has outlived the engine");

    let early = Asker::start(&stage, "early", Network::Default).await?;
    early.all_served(&early.more(3).await?)?;
    early.all_served(&early.answers())?;
    asker.container.start().await?;
    asker.all_served(&asker.more(3).await?)?;
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn known_containers_are_served_while_the_engine_is_dead() -> Result<()> {
    let stage = Stage::start().await?;
    let asker = Asker::start(&stage, "orphan", Network::Default).await?;
    let on_host = Asker::start(&stage, "orphan-host", Network::Host).await?;
    asker.more(3).await?;
    on_host.more(3).await?;
    stage.imds.clear();
    stage.engine().kill().await?;
    // Long enough for several attempts to reach the engine.
    sleep(Duration::from_secs(2)).await;
    for asker in [&asker, &on_host] {
        asker.all_served(&asker.more(20).await?)?;
    }
    stage.engine().resume().await?;
    let new = Asker::start(&stage, "newborn", Network::Default).await?;
    new.more(3).await?;
    new.all_served(&new.answers())?;
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_that_were_there_before_the_daemon_are_served() -> Result<()> {
    let host = TestHost::start().await?;
    let bridged = host.run(idle_as("older", "older")).await?;
    let on_host = host.run(idle_as("older-host", "older-host").network(Network::Host)).await?;
    let stage = Stage::on(host, daemon_options()).await?;
    for (container, role) in [(&bridged, "older"), (&on_host, "older-host")] {
        let answer = ask(container).await?;
        ensure!(answer.is(role), "{role}: {answer:?}");
    }
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_started_without_a_daemon_wait_for_it_and_never_reach_the_real_service() -> Result<()> {
    started_without_a_daemon(Network::Default).await
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_on_the_hosts_network_started_without_a_daemon_never_reach_the_real_service() -> Result<()> {
    started_without_a_daemon(Network::Host).await
}

async fn started_without_a_daemon(network: Network) -> Result<()> {
    let mut stage = Stage::start().await?;
    let before = Asker::start(&stage, "before", network.clone()).await?;
    before.more(3).await?;
    stage.imds.clear();
    let ended = stage.daemon.terminate(Duration::from_secs(15)).await?;
    ensure!(ended.success(), "{ended}");

    let between = Asker::start(&stage, "between", network).await?;
    sleep(Duration::from_millis(500)).await;
    stage.assert_no_leak()?;
    stage.daemon = stage.host.daemon(daemon_options())?;
    stage.daemon.wait_ready(Duration::from_secs(20)).await?;
    for asker in [&before, &between] {
        let answers = asker.more(5).await?;
        asker.all_served(&answers)?;
        let failed = asker.answers().iter().filter(|answer| !answer.is(&asker.role)).count();
        ensure!(failed == 0, "{}: a second without a daemon broke {failed} requests: {answers:?}", asker.role);
    }
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_started_while_the_event_stream_is_broken_are_found() -> Result<()> {
    let (relay, stage, known) = Relay::with_known().await?;
    wait_for_call(&stage, "known", SOON).await?;

    relay.set(Mode::Refuse);
    relay.cut();
    let silent = stage.run(idle_as("silent", "silent")).await?;
    let asking = stage.run(idle_as("asking", "asking")).await?;
    let refused = ask(&asking).await?;
    ensure!(refused.status == 503 && refused.took < Duration::from_secs(4), "{refused:?}");
    ensure!(ask(&known).await?.is("known"), "a known container suffers");
    ensure!(stage.sts.assume_role_calls(&role_arn("silent")) == 0, "the relay is not in the way");

    relay.set(Mode::Pass);
    // Found because it asks, without waiting for the next attempt to follow the engine.
    let found = ask(&asking).await?;
    ensure!(found.is("asking") && found.took < Duration::from_secs(3), "{found:?}");
    // And this one because the daemon looks.
    wait_for_call(&stage, "silent", SOON).await?;
    ensure!(ask(&silent).await?.is("silent"), "found, but not served");

    // A stream that is cut and comes back at once loses nothing either.
    relay.cut();
    let after = stage.run(idle_as("after", "after")).await?;
    wait_for_call(&stage, "after", SOON).await?;
    // What has ended meanwhile is forgotten, too.
    relay.set(Mode::Refuse);
    relay.cut();
    silent.remove().await?;
    relay.set(Mode::Pass);
    let gone = format!("container stopped id=\"{}\"", &silent.id()[..12]);
    let deadline = Instant::now() + Duration::from_secs(8);
    while !stage.daemon.log()?.contains(&gone) {
        ensure!(Instant::now() < deadline, "{gone} is not in the log:\n{}", stage.daemon.log()?);
        sleep(Duration::from_millis(50)).await;
    }
    ensure!(ask(&after).await?.is("after"), "no longer served");
    stage.assert_no_leak()
}

/// Who answers for it has other files, of which nothing is believed. (See `engine_disk`.)
#[tokio::test(flavor = "multi_thread")]
async fn an_engine_that_hangs_or_is_slow_delays_only_whom_nobody_knows_yet() -> Result<()> {
    let (relay, stage, known) = Relay::with_known().await?;
    ensure!(ask(&known).await?.is("known"), "not served");

    relay.set(Mode::Hang);
    let new = stage.run(idle_as("new", "new")).await?;
    let (waiting, served) = tokio::join!(ask(&new), async {
        sleep(Duration::from_secs(1)).await;
        ask(&known).await
    });
    let (waiting, served) = (waiting?, served?);
    ensure!(served.is("known") && served.took < Duration::from_secs(2), "{served:?}");
    ensure!(waiting.status == 503 && waiting.took < Duration::from_secs(9), "{waiting:?}");
    relay.set(Mode::Pass);
    ask_until_served(&new, "new", SOON).await?;
    let silent = stage.run(idle_as("silent", "silent")).await?;
    wait_for_call(&stage, "silent", SOON).await?;

    relay.set(Mode::Delay(Duration::from_millis(700)));
    let late = stage.run(idle_as("late", "late")).await?;
    let first = ask(&late).await?;
    ensure!(first.status == 503 || first.is("late"), "{first:?}");
    ensure!(first.took < Duration::from_secs(9), "{first:?}");
    ask_until_served(&late, "late", SOON).await?;
    // A busy machine may be late once, the engine is each time.
    let times = [ask(&known).await?.took, ask(&known).await?.took, ask(&known).await?.took];
    ensure!(times.iter().any(|took| *took < Duration::from_millis(600)), "a known container waits: {times:?}");
    relay.set(Mode::Pass);
    let last = stage.run(idle_as("last", "last")).await?;
    ask_until_served(&last, "last", SOON).await?;
    drop(silent);
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_network_of_a_dead_container_is_given_back_also_where_the_engine_does_not_tell() -> Result<()> {
    let (relay, stage, known) = Relay::with_known().await?;
    ensure!(ask(&known).await?.is("known"), "not served");
    relay.set(Mode::Hang);
    known.remove().await?;
    let closed = |log: &str| log.contains("closing the listener in network namespace");
    let Stage { mut daemon, .. } = stage;
    daemon.wait_for("the end of its listener", SOON, closed).await?;
    // Its process has ended, so it is no longer known either.
    daemon.wait_for("its end", SOON, |log| log.contains("container stopped")).await?;
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_the_engine_cannot_describe_is_nobody_elses_trouble() -> Result<()> {
    let host = TestHost::start().await?;
    let broken = host.run(idle_as("broken", "broken")).await?;
    let sound = host.run(idle_as("sound", "sound")).await?;
    let relay = Relay::start(&host)?;
    relay.broken.send_replace(Some(broken.id().to_owned()));
    let stage = relay.stage(host).await?;
    // Known from the first look, without asking.
    wait_for_call(&stage, "sound", SOON).await?;
    ensure!(ask(&sound).await?.is("sound"), "not served");
    let refused = ask(&broken).await?;
    ensure!(refused.status == 503 && refused.took < Duration::from_secs(4), "{refused:?}");
    // And the events of others still come.
    let new = stage.run(idle_as("new", "new")).await?;
    wait_for_call(&stage, "new", SOON).await?;
    ensure!(ask(&new).await?.is("new"), "not served");
    relay.broken.send_replace(None);
    ensure!(ask(&broken).await?.is("broken"), "not served after all");
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_malformed_role_is_that_containers_error_alone() -> Result<()> {
    let stage = Stage::start().await?;
    // What was meant to restrict does not fall back to something else.
    let wrong = idle("typo").label(ROLE_LABEL, "arn:aws:iam::1234:role/short").env("IAM_ROLE", &role_arn("other"));
    let wrong = stage.run(wrong).await?;
    let right = stage.run(idle_as("right", "right")).await?;
    let answer = ask(&wrong).await?;
    ensure!(answer.status == 404, "{answer:?}");
    ensure!(ask(&right).await?.is("right"), "another container suffers");
    let log = stage.daemon.log()?;
    let line = log.lines().find(|line| line.contains("typo") && line.contains("arn:aws:iam::1234:role/short"));
    let line = line.with_context(|| format!("nothing of it in the log:\n{log}"))?;
    ensure!(line.contains("WARN") && line.contains("12 digits") && line.contains(ROLE_LABEL), "no reason in {line}");
    ensure!(stage.sts.assume_role_calls(&role_arn("other")) == 0, "another role was assumed");
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_source_that_names_a_role_decides() -> Result<()> {
    let with_flag = daemon_options().arg("--default-role").arg(role_arn("from-flag"));
    let mut stage = Stage::start_with(with_flag.env("DEFAULT_IAM_ROLE", role_arn("from-variable"))).await?;
    let (own, swipely) = ((ROLE_LABEL, role_arn("own")), (SWIPELY_LABEL, role_arn("swipely")));
    let (role, profile) = (("IAM_ROLE", role_arn("role")), ("IAM_PROFILE", role_arn("profile")));
    let mut containers = Vec::new();
    for (name, labels, env) in [
        ("own", vec![&own, &swipely], vec![&role, &profile]),
        ("swipely", vec![&swipely], vec![&role, &profile]),
        ("role", vec![], vec![&profile, &role]),
        ("profile", vec![], vec![&profile]),
        ("bare", vec![], vec![]),
    ] {
        let spec = labels.into_iter().fold(idle(name), |spec, (name, value)| spec.label(name, value));
        let spec = env.into_iter().fold(spec, |spec, (name, value)| spec.env(name, value));
        containers.push(stage.run(spec).await?);
    }
    let empty = stage.run(idle("empty").label(ROLE_LABEL, "").env("IAM_ROLE", &role_arn("set"))).await?;
    ensure!(ask(&empty).await?.is("set"), "an empty label counts for something");

    for (options, default) in [
        (None, Some("from-flag")),
        (Some(daemon_options().env("DEFAULT_IAM_ROLE", role_arn("from-variable"))), Some("from-variable")),
        (Some(daemon_options()), None),
    ] {
        if let Some(options) = options {
            stage.replace_daemon(options).await?;
        }
        for container in &containers {
            let expected = if container.name() == "bare" { default } else { Some(container.name()) };
            let answer = ask(container).await?;
            let good = expected.map_or(answer.status == 404, |role| answer.is(role));
            ensure!(good, "{} with default {default:?}: {answer:?}", container.name());
        }
    }
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_keeps_its_role_under_another_name_and_a_new_one_of_that_name_has_its_own() -> Result<()> {
    let mut stage = Stage::start().await?;
    let first = stage.run(idle_as("web", "first")).await?;
    ensure!(ask(&first).await?.is("first"), "not served");
    let options = RenameContainerOptionsBuilder::new().name("web-old").build();
    stage.docker().rename_container("web", options).await?;
    stage.daemon.wait_for("the new name", SOON, |log| log.contains("container=\"web-old\"")).await?;
    let second = stage.run(idle_as("web", "second")).await?;
    for _ in 0..3 {
        ensure!(ask(&first).await?.is("first"), "renamed, and no longer served");
        ensure!(ask(&second).await?.is("second"), "taken for its namesake");
    }

    // Another cgroup and process each time, the same container.
    for _ in 0..5 {
        first.stop().await?;
        first.start().await?;
        let answer = ask(&first).await?;
        ensure!(answer.is("first"), "started again: {answer:?}");
    }
    // The same name, and most likely the same address.
    for number in 0..5 {
        let role = format!("next-{number}");
        let recreated = stage.run(idle_as("recreated", &role)).await?;
        let answer = ask(&recreated).await?;
        ensure!(answer.is(&role), "expected {role}: {answer:?}");
        recreated.remove().await?;
    }
    stage.assert_no_leak()
}

/// Moves itself, step by step, into a cgroup below its own and asks from there; cgroup2 is mounted anew, as its own cgroup.
fn nesting(name: &str, role: &str, steps: &str) -> ContainerSpec {
    let script = format!(
        "set -e; sleep 1; mkdir /cg; mount -t cgroup2 none /cg; cd /cg; \
         for step in {steps}; do mkdir $step; cd $step; echo $$ > cgroup.procs; done; \
         grep -q '/{}$' /proc/self/cgroup; timeout 5 wget -qO- {ROLE_LIST}",
        steps.rsplit(' ').next().unwrap_or_default(),
    );
    let mut spec = ContainerSpec::busybox(name, ["sh", "-c", &script]).label(ROLE_LABEL, &role_arn(role));
    // What it takes of a privileged container, which needs more than every machine's root can give.
    spec.host_config.cap_add = Some(vec!["SYS_ADMIN".into()]);
    spec.host_config.security_opt = Some(vec!["seccomp=unconfined".into(), "apparmor=unconfined".into()]);
    spec
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_in_a_cgroup_below_its_containers_is_the_containers() -> Result<()> {
    let stage = Stage::start().await?;
    let other = stage.run(idle_as("other", "other")).await?;
    ensure!(ask(&other).await?.is("other"), "not served");
    let deep = "a b c d e f g h i j k l";
    for (number, (steps, network)) in [
        ("child", Network::Default),
        // Below what the kernel side remembers of the path.
        (deep, Network::None),
        (deep, Network::Host),
        // It can name its own cgroups as it likes.
        (other.id(), Network::Default),
        (other.id(), Network::Host),
    ]
    .into_iter()
    .enumerate()
    {
        let role = format!("nested-{number}");
        let container = stage.run(nesting(&role, &role, steps).network(network.clone())).await?;
        let answer = stage.finish(&container).await?;
        ensure!(answer == role, "in {steps} on {network:?}: {answer}");
        stage.assert_no_leak().with_context(|| format!("in {steps} on {network:?}"))?;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_executed_in_a_container_is_the_containers() -> Result<()> {
    let stage = Stage::start().await?;
    let one = stage.run(idle_as("one", "one")).await?;
    let shared = Network::Container("one".into());
    let two = stage.run(idle_as("two", "two").network(shared)).await?;
    let three = stage.run(idle_as("three", "three").network(Network::Host)).await?;
    ensure!(ask(&three).await?.is("three"), "not served");
    for _ in 0..5 {
        for (container, role) in [(&one, "one"), (&two, "two"), (&three, "three")] {
            let answer = ask(container).await?;
            ensure!(answer.is(role), "{role}: {answer:?}");
        }
    }
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_process_of_no_container_in_another_network_namespace_gets_nothing() -> Result<()> {
    let stage = Stage::start_with(daemon_options().arg("--default-role").arg(role_arn("default"))).await?;
    let container = stage.run(idle_as("somebody", "somebody")).await?;
    ensure!(ask(&container).await?.is("somebody"), "not served");
    let request = |path: &str| format!("curl -s --max-time 5 -w '\\n%{{http_code}}\\n' {ROLE_LIST}{path};");
    let script = ["", "somebody", "default", "../info"].map(request).concat();
    let begin = Instant::now();
    let output = stage
        .command("unshare")
        .args(["--net", "sh", "-c", &format!("ip link set lo up && {{ {script} }}")])
        .output()?;
    let output = String::from_utf8(output.stdout)?;
    let statuses: Vec<&str> = output.lines().filter(|line| line.len() == 3).collect();
    ensure!(statuses == ["404"; 4], "{output}");
    ensure!(!output.contains("AccessKeyId") && !output.contains("somebody"), "{output}");
    ensure!(begin.elapsed() < Duration::from_secs(8), "it took {:?}", begin.elapsed());
    let reached = stage.imds.requests();
    ensure!(reached.is_empty(), "the real service was reached: {reached:#?}");
    ensure!(stage.sts.assume_role_calls(&role_arn("default")) == 0, "a role was assumed for it");
    // Nor does a namespace that it shares with a container make it one.
    let namespace = format!("--net=/proc/{}/ns/net", container.pid().await?);
    let output = stage.command("nsenter").args([&namespace, "sh", "-c", &script]).output()?;
    let output = String::from_utf8(output.stdout)?;
    ensure!(!output.contains("AccessKeyId") && output.matches("404").count() >= 4, "{output}");
    let reached = stage.imds.requests();
    ensure!(reached.is_empty(), "the real service was reached: {reached:#?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn two_containers_in_one_network_namespace_get_their_own_under_load() -> Result<()> {
    const REQUESTS: usize = 1500;
    let stage = Stage::start().await?;
    let pod = stage.run(idle_as("pod", "pod")).await?;
    let mut containers = Vec::new();
    for role in ["left", "right"] {
        // What follows `#` is not sent. Without kept connections, so that source ports are used again and again.
        let url = format!("{ROLE_LIST}{role}#[1-{REQUESTS}]");
        let curl = ["/usr/bin/curl", "-s", "-Z", "--parallel-immediate", "--parallel-max", "8", "--max-time", "60"];
        let curl = curl.into_iter().chain(["-H", "Connection: close", &url]);
        let spec = ContainerSpec::on_host(role, curl).label(ROLE_LABEL, &role_arn(role));
        containers.push(stage.run(spec.network(Network::Container("pod".into()))).await?);
    }
    let mut all_keys = Vec::new();
    for container in &containers {
        let output = timeout(Duration::from_secs(60), stage.finish(container)).await??;
        let mut keys: Vec<&str> =
            output.split("\"AccessKeyId\" : \"").skip(1).filter_map(|rest| rest.split('"').next()).collect();
        ensure!(keys.len() == REQUESTS, "{}: {} answers to {REQUESTS} requests", container.name(), keys.len());
        keys.sort_unstable();
        keys.dedup();
        let roles: Vec<_> = keys.iter().map(|key| stage.role_of(key)).collect();
        ensure!(roles == [Some(container.name().to_owned())], "{} got keys of {roles:?}", container.name());
        all_keys.extend(keys.into_iter().map(str::to_owned));
    }
    ensure!(ask(&pod).await?.is("pod"), "the namespace's first container suffers");
    ensure!(all_keys.len() == 2, "{all_keys:?}");
    stage.assert_no_leak()
}
