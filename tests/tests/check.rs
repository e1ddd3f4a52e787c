//! `metadata-proxy check` says what a host has, and what it lacks with the remedy.

use std::process::Output;

use anyhow::{Context as _, Result, ensure};
use metadata_proxy_tests::{
    host::{Machine, TestHost, program},
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

/// Where CI looks at a file: no engine, no STS, no privileges.
#[tokio::test(flavor = "multi_thread")]
async fn a_configuration_file_is_checked_off_the_host_and_without_privileges() -> Result<()> {
    let machine = Machine::start()?;
    let file = machine.directory().join("config.toml");
    let check = |text: &str, arguments: &[&str]| -> Result<Output> {
        std::fs::write(&file, text)?;
        let mut command = machine.command("setpriv");
        command.args(["--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all"]).arg(program()?);
        command.args(["check", "--docker-host", "unix:///nowhere.sock", "--config"]).arg(&file);
        command.args(arguments).output().context("run check")
    };
    let right = "[[rule]]\nname = 'web'\nallow = ['web/*']\n";
    let output = check(right, &["--config-only"])?;
    ensure!(output.status.code() == Some(0), "{output:?}");
    ensure!(lines(&output, "ok") == ["ok      configuration       1 rule"] && output.stderr.is_empty(), "{output:?}");

    let wrong = check("[[rule]]\nname = 'web'\nallow = ['we b']\n", &["--config-only"])?;
    let said = String::from_utf8_lossy(&wrong.stderr);
    ensure!(wrong.status.code() == Some(64), "{wrong:?}");
    ensure!(said.contains("config.toml:1: allow: \"we b\"") && said.lines().count() == 1, "{said}");

    // The host is another matter.
    let host = check(right, &["--disable-upstream"])?;
    ensure!(host.status.code() == Some(1) && !lines(&host, "FAILED").is_empty(), "{host:?}");
    Ok(())
}
