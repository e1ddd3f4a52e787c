//! `metadata-proxy check` says what a host has, and what it lacks with the remedy.

use std::process::Output;

use anyhow::{Context as _, Result, ensure};
use metadata_proxy_tests::{
    host::{TestHost, program},
    stage::{self, daemon_options},
};

fn check(host: &TestHost, arguments: &[&str]) -> Result<Output> {
    let options = daemon_options();
    let socket = format!("unix://{}", host.engine().socket().display());
    let program = program()?;
    let mut command = host.command(program);
    command.arg("check").arg("--cgroup").arg(host.machine().inner_cgroup()).envs(options.env);
    if !arguments.contains(&"--docker-host") {
        command.args(["--docker-host", &socket]);
    }
    command.args(arguments).output().context("run check")
}

fn lines(output: &Output, status: &str) -> Vec<String> {
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.lines().filter(|line| line.starts_with(status)).map(str::to_owned).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_has_everything_passes() -> Result<()> {
    let host = TestHost::start().await?;
    let _imds = stage::start_imds(&host)?;
    let _sts = stage::start_sts(&host)?;
    let output = check(&host, &[])?;
    ensure!(output.status.success(), "{output:?}");
    ensure!(lines(&output, "ok").len() == 12 && lines(&output, "FAILED").is_empty(), "{output:?}");
    let text = String::from_utf8_lossy(&output.stdout);
    for expected in
        ["cgroup driver cgroupfs", "arn:aws:iam::111122223333:user/metadata-proxy", "this is i-0123456789abcdef0"]
    {
        ensure!(text.contains(expected), "no {expected:?} in:\n{text}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn each_thing_missing_is_named_with_its_remedy() -> Result<()> {
    let host = TestHost::start().await?;
    // Neither the real service nor STS is there, nor this socket, nor this cgroup.
    let output = check(&host, &["--docker-host", "unix:///nowhere.sock", "--exempt-cgroup", "/nowhere"])?;
    ensure!(output.status.code() == Some(1), "{output:?}");
    let failed = lines(&output, "FAILED");
    for (name, remedy) in [
        ("exempt cgroups", "/nowhere"),
        ("Docker", "--docker-host (DOCKER_HOST)"),
        ("STS identity", "STS"),
        ("real service", "--disable-upstream"),
    ] {
        let named = |line: &&String| line.contains(name) && line.contains(remedy);
        ensure!(failed.iter().any(|line| named(&line)), "no {name:?} with {remedy:?} in {failed:#?}");
    }
    ensure!(failed.len() == 4, "{failed:#?}");
    Ok(())
}
