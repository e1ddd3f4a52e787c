//! What an engine says of a container, and what the container is: where the two differ.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bollard::{models::ContainerCreateBody, query_parameters::RenameContainerOptionsBuilder};
use metadata_proxy_tests::{
    host::{BUSYBOX, ContainerSpec, HostOptions, Network, SLOW_RUNTIME, TestHost, program},
    stage::{Stage, daemon_options, role_arn},
    talk::{Plan, ask},
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{UnixListener, UnixStream},
    time::sleep,
};

const ROLE: &str = "metadata-proxy.role";

#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_takes_long_to_start_is_no_stranger() -> Result<()> {
    // From its first moment on, each answer on a line.
    const ASK: &str = "for n in 1 2 3 4 5 6 7 8; do curl -s --max-time 20 -o /dev/null -w '%{http_code}\\n' \
        http://169.254.169.254/latest/meta-data/iam/security-credentials/; done; sleep 2; \
        curl -s --max-time 20 http://169.254.169.254/latest/meta-data/iam/security-credentials/";
    let stage = Stage::start().await?;
    for (name, network) in [("slow", Network::Default), ("slow-host", Network::Host)] {
        let mut spec = ContainerSpec::on_host(name, ["/usr/bin/sh", "-c", ASK]).label(ROLE, &role_arn(name));
        spec.host_config.runtime = Some(SLOW_RUNTIME.to_owned());
        let said = stage.run(spec.network(network)).await?.wait().await?.success()?;
        let answers: Vec<_> = said.lines().collect();
        let expected = |answer: &&str| ["200", "503", name].contains(answer);
        ensure!(answers.last() == Some(&name) && answers.iter().all(expected), "{answers:?}\n{}", stage.daemon.log()?);
    }
    stage.assert_no_leak()
}

/// As with whatever starts a container's process before the engine says that it runs.
#[tokio::test(flavor = "multi_thread")]
async fn a_process_of_a_container_that_is_not_said_to_run_is_told_to_try_again_and_no_stranger() -> Result<()> {
    const ASK: &str = "curl -s --max-time 10 -o /dev/null -w '%{http_code}' \
        http://169.254.169.254/latest/meta-data/iam/security-credentials/";
    let stage = Stage::start().await?;
    let body = ContainerCreateBody {
        image: Some(BUSYBOX.to_owned()),
        cmd: Some(vec!["true".to_owned()]),
        ..Default::default()
    };
    let id = stage.docker().create_container(None, body).await?.id;
    let cgroup = format!("/sys/fs/cgroup/{}/containers/{id}", stage.host.machine().name());
    let ask = || -> Result<String> {
        let script = format!("mkdir -p {cgroup} && echo $$ > {cgroup}/cgroup.procs && exec {ASK}");
        let output = stage.command("timeout").args(["12", "sh", "-c", &script]).output()?;
        Ok(String::from_utf8(output.stdout)?)
    };
    ensure!(ask()? == "503", "it was answered {}", ask()?);
    stage.docker().remove_container(&id, None).await?;
    ensure!(ask()? == "404", "without its container it was answered {}", ask()?);
    ensure!(stage.command("rmdir").arg(&cgroup).status()?.success(), "rmdir");
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_is_renamed_while_sts_is_away_keeps_its_credentials() -> Result<()> {
    const DOCUMENT: &str = "/latest/meta-data/iam/security-credentials/web";
    let rules = "[[rule]]\nname = '*-admin'\ndeny = true\n\n[[rule]]\nname = '*'\nallow = ['arn:*']\n";
    let stage = Stage::configured(daemon_options(), rules).await?;
    let web = stage.run(ContainerSpec::resident("web").label(ROLE, &role_arn("web"))).await?;
    let key = async || -> Result<(u16, String)> {
        let answer = ask(&web, &[Plan::get(DOCUMENT)]).await?.pop().context("no answer")?;
        let key = answer.body.split('"').skip_while(|word| *word != "AccessKeyId").nth(2).unwrap_or_default();
        Ok((answer.status, key.to_owned()))
    };
    let rename = async |name: &str, word: &str| -> Result<()> {
        let options = RenameContainerOptionsBuilder::new().name(name).build();
        stage.docker().rename_container(web.id(), options).await?;
        let begin = Instant::now();
        while !stage.daemon.log()?.contains(word) {
            ensure!(begin.elapsed() < Duration::from_secs(20), "no {word:?} in {}", stage.daemon.log()?);
            sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    };
    let first = key().await?;
    stage.sts.stop_listening()?;
    rename("shop", "session shop-").await?;
    ensure!(key().await? == first && first.0 == 200, "{:?} after {first:?}", key().await?);
    // What the new name forbids is lost all the same.
    rename("shop-admin", "denies it any role").await?;
    ensure!(key().await?.0 == 404, "{:?}", key().await?);
    rename("shop", "session shop-").await?;
    stage.sts.listen_again()?;
    // As soon as there are others, it has those of its new name.
    let begin = Instant::now();
    let own = loop {
        let (status, key) = key().await?;
        let session = stage.sts.issued(&key).map(|issued| issued.session_name).unwrap_or_default();
        if session.starts_with("shop-") {
            break key;
        }
        ensure!(begin.elapsed() < Duration::from_secs(60), "{status} {session}");
        sleep(Duration::from_millis(100)).await;
    };
    ensure!(own != first.1, "the same credentials");
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn credentials_of_a_dead_container_are_dropped_although_the_engine_says_that_it_runs() -> Result<()> {
    let stage = Stage::start().await?;
    let web = stage.run(ContainerSpec::resident("web").label(ROLE, &role_arn("web"))).await?;
    let pid = web.pid().await?;
    let explained = || -> Result<String> {
        let output = stage.command(program()?).args(["explain", "web"]).output()?;
        Ok(String::from_utf8(output.stdout)?)
    };
    let until = async |word: &str| -> Result<()> {
        let begin = Instant::now();
        while !explained()?.contains(word) {
            ensure!(begin.elapsed() < Duration::from_secs(20), "no {word:?} in {}", explained()?);
            sleep(Duration::from_millis(20)).await;
        }
        Ok(())
    };
    until("credentials  ASIA").await?;
    stage.engine().deafen().await?;
    ensure!(stage.command("kill").args(["-9", &pid.to_string()]).status()?.success(), "kill");
    let begin = Instant::now();
    while !explained()?.is_empty() {
        ensure!(begin.elapsed() < Duration::from_secs(20), "still known: {}", explained()?);
        sleep(Duration::from_millis(20)).await;
    }
    // The engine has not told.
    ensure!(web.pid().await? == pid, "the engine knows");
    ensure!(stage.sts.assume_role_calls(&role_arn("web")) == 1, "its role was assumed again");
    Ok(())
}

/// With live-restore containers outlive the engine, and the daemon may be replaced meanwhile.
#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_that_starts_while_the_engine_is_away_knows_whom_the_one_before_has_known() -> Result<()> {
    const SECRET: &str = "not-for-the-file";
    let host = TestHost::start_with(HostOptions { live_restore: true, ..HostOptions::default() }).await?;
    let mut stage = Stage::on(host, daemon_options()).await?;
    let labelled = ContainerSpec::resident("web").label(ROLE, &role_arn("web")).env("PASSWORD", SECRET);
    let (web, job) = (
        stage.run(labelled).await?,
        stage.run(ContainerSpec::resident("job").env("IAM_ROLE", &role_arn("job")).network(Network::Host)).await?,
    );
    let gone = stage.run(ContainerSpec::resident("gone").label(ROLE, &role_arn("gone"))).await?;
    let pid = gone.pid().await?;
    let kept = format!("/proc/{}/root/run/metadata-proxy/containers.json", stage.machine().holder());
    let begin = Instant::now();
    let text = loop {
        let text = std::fs::read_to_string(&kept).unwrap_or_default();
        if ["web", "job", "gone"].iter().all(|name| text.contains(&role_arn(name))) {
            break text;
        }
        ensure!(begin.elapsed() < Duration::from_secs(10), "not kept: {text}");
        sleep(Duration::from_millis(50)).await;
    };
    ensure!(!text.contains(SECRET), "{text}");

    let (asks_web, asks_job) = (web.pid().await?, job.pid().await?);
    stage.engine().stop().await?;
    stage.daemon.terminate(Duration::from_secs(15)).await?;
    ensure!(stage.command("kill").args(["-9", &pid.to_string()]).status()?.success(), "kill");
    stage.daemon = stage.host.daemon(daemon_options())?;
    stage.daemon.wait_for("what is known", Duration::from_secs(20), |log| log.contains("containers=2")).await?;
    // The engine that would run a program in them is away.
    for (name, pid) in [("web", asks_web), ("job", asks_job)] {
        let begin = Instant::now();
        while stage.role_list_of(pid, 5)? != name {
            ensure!(begin.elapsed() < Duration::from_secs(20), "{name}: {:?}", stage.role_list_of(pid, 5)?);
            sleep(Duration::from_millis(50)).await;
        }
    }
    stage.engine().resume().await?;
    stage.daemon.wait_ready(Duration::from_secs(30)).await?;
    ensure!(stage.role_list_of(asks_web, 5)? == "web" && stage.role_list_of(asks_job, 5)? == "job", "changed");
    ensure!(stage.sts.assume_role_calls(&role_arn("web")) == 2, "once for each daemon");
    stage.assert_no_leak()
}

/// The request lines that pass between the daemon and the engine.
fn record(host: &TestHost) -> Result<(PathBuf, Arc<Mutex<Vec<String>>>)> {
    let (socket, engine) = (host.directory().join("recorder.sock"), host.engine().socket().to_owned());
    let listener = UnixListener::bind(&socket)?;
    let lines = Arc::<Mutex<Vec<String>>>::default();
    let record = Arc::clone(&lines);
    tokio::spawn(async move {
        while let Ok((mut client, _)) = listener.accept().await {
            let (engine, record) = (engine.clone(), Arc::clone(&record));
            tokio::spawn(async move {
                // The daemon's client sends a head at once, and each on a connection of its own.
                let mut head = vec![0; 4096];
                let length = client.read(&mut head).await?;
                let line = String::from_utf8_lossy(&head[..length]).lines().next().unwrap_or_default().to_owned();
                record.lock().unwrap_or_else(PoisonError::into_inner).push(line);
                let mut engine = UnixStream::connect(engine).await?;
                engine.write_all(&head[..length]).await?;
                tokio::io::copy_bidirectional(&mut client, &mut engine).await
            });
        }
    });
    Ok((socket, lines))
}

#[tokio::test(flavor = "multi_thread")]
async fn the_version_of_the_api_is_agreed_on_anew_when_the_engine_comes_back() -> Result<()> {
    let host = TestHost::start().await?;
    let (socket, lines) = record(&host)?;
    let stage = Stage::on(host, daemon_options().arg(format!("--docker-host=unix://{}", socket.display()))).await?;
    stage.engine().restart().await?;
    // The daemon follows it again: this one never asks by itself.
    let web = stage.run(ContainerSpec::resident("web").label(ROLE, &role_arn("web"))).await?;
    let begin = Instant::now();
    while stage.sts.assume_role_calls(&role_arn("web")) == 0 {
        ensure!(begin.elapsed() < Duration::from_secs(30), "{}", stage.daemon.log()?);
        sleep(Duration::from_millis(20)).await;
    }
    let lines = lines.lock().unwrap_or_else(PoisonError::into_inner).clone();
    let streams: Vec<_> = lines.iter().enumerate().filter(|(_, line)| line.contains("/events?")).collect();
    ensure!(streams.len() >= 2, "{lines:#?}");
    let agreed = |range: &[String]| range.iter().any(|line| line.starts_with("GET /version HTTP"));
    ensure!(agreed(&lines[..streams[0].0]) && agreed(&lines[streams[0].0..streams[1].0]), "{lines:#?}");
    // What is asked goes without a version, or with one that this engine has (Docker 20.10: 1.41).
    let version = |line: &String| Some(line.split_once("/v1.")?.1.split_once('/')?.0.parse::<u32>());
    for line in &lines {
        ensure!(version(line).is_none_or(|version| version.is_ok_and(|version| version <= 41)), "{line}");
    }
    drop(web);
    stage.assert_no_leak()
}
