//! `metadata-proxy check` says what a host has, and what it lacks with the remedy.

use std::process::{Command, Output};

use anyhow::{Context as _, Result, ensure};
use jiff::SignedDuration;
use metadata_proxy_tests::{
    host::{ContainerSpec, Machine, Network, TestHost, program},
    stage::{self, daemon_options},
    sts::Fault,
};

fn check(host: &TestHost, arguments: &[&str]) -> Result<Output> {
    let cgroup = host.machine().inner_cgroup().display().to_string();
    check_by(host.command(program()?), host, &[&["--cgroup", &cgroup], arguments].concat())
}

fn check_by(mut command: Command, host: &TestHost, arguments: &[&str]) -> Result<Output> {
    let options = daemon_options();
    let socket = format!("unix://{}", host.engine().socket().display());
    command.arg("check").envs(options.env);
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
    let sts = stage::start_sts(&host)?;
    let output = check(&host, &[])?;
    ensure!(output.status.success(), "{output:?}");
    // What a kernel may lack.
    let warnings = lines(&output, "warning");
    ensure!(warnings.iter().all(|line| line.starts_with("warning socket options")), "{output:?}");
    ensure!(lines(&output, "ok").len() + warnings.len() == 20, "{output:?}");
    let text = String::from_utf8_lossy(&output.stdout);
    for expected in [
        "cgroup driver cgroupfs",
        "arn:aws:iam::111122223333:user/metadata-proxy",
        "this is i-0123456789abcdef0",
        "no uplink found",
        "s of that of STS",
        // As the test host sees it, whatever the machine has.
        " (version 2)\n",
    ] {
        ensure!(text.contains(expected), "no {expected:?} in:\n{text}");
    }
    // It answers all the same, for the SDK corrects its signatures.
    for (ahead, expected) in [(600, " s behind that of STS: set it"), (-600, " s ahead of that of STS: set it")] {
        sts.set_fault(Some(Fault::Clock(SignedDuration::from_secs(ahead))));
        let output = check(&host, &[])?;
        let failed = lines(&output, "FAILED");
        ensure!(matches!(failed.as_slice(), [line] if line.contains("clock") && line.contains(expected)), "{output:?}");
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
        ("engine docker", "--docker-host (DOCKER_HOST)"),
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

/// The test's host is one in namespaces of its own, which is as good as a container without `--network=host`.
#[tokio::test(flavor = "multi_thread")]
async fn namespaces_that_are_not_the_hosts_are_named() -> Result<()> {
    let host = TestHost::start().await?;
    let bpffs = host.directory().join("bpf");
    std::fs::create_dir(&bpffs)?;
    let arguments = ["--bpffs", &bpffs.display().to_string()];
    let failed = lines(&check_by(host.command(program()?), &host, &arguments)?, "FAILED");
    for (name, remedy) in [("host's network", "--network=host"), ("bpffs", "On the host: mount -t bpf bpf")] {
        let named = failed.iter().any(|line| line.contains(name) && line.contains(remedy));
        ensure!(named, "no {name:?} with {remedy:?} in {failed:#?}");
    }
    ensure!(!failed.iter().any(|line| line.contains("host's processes")), "{failed:#?}");
    let mounted = host.command("mountpoint").args(["-q", &bpffs.display().to_string()]).status()?;
    ensure!(!mounted.success(), "it has mounted a bpffs all the same");

    let mut command = host.command("unshare");
    command.args(["--pid", "--fork", "--mount-proc"]).arg(program()?);
    let failed = lines(&check_by(command, &host, &arguments)?, "FAILED");
    for name in ["host's processes", "host's network"] {
        let named = failed.iter().any(|line| line.contains(name) && line.contains("--pid=host"));
        ensure!(named, "no {name:?} with --pid=host in {failed:#?}");
    }
    Ok(())
}

/// As on hosts of other clouds.
#[tokio::test(flavor = "multi_thread")]
async fn a_name_server_at_the_address_of_the_metadata_service_is_named() -> Result<()> {
    let host = TestHost::start().await?;
    let _imds = stage::start_imds(&host)?;
    let _sts = stage::start_sts(&host)?;
    let script = "echo 'nameserver 169.254.169.254' > \"$1\" && mount --bind \"$1\" /etc/resolv.conf";
    let file = host.directory().join("resolv.conf");
    ensure!(host.command("sh").args(["-c", script, "sh"]).arg(file).status()?.success(), "cannot replace resolv.conf");
    let output = check(&host, &[])?;
    let failed = lines(&output, "FAILED");
    let named = |line: &String| line.contains("name servers") && line.contains("daemon.json");
    ensure!(matches!(failed.as_slice(), [line] if named(line)), "{output:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ecs_agent_that_would_lose_its_role_is_named_and_the_example_keeps_it() -> Result<()> {
    let host = TestHost::start().await?;
    let _imds = stage::start_imds(&host)?;
    let _sts = stage::start_sts(&host)?;
    let _agent = host.run(ContainerSpec::resident("ecs-agent").network(Network::Host)).await?;
    let agent = |arguments: &[&str], status: &str| -> Result<String> {
        let output = check(&host, arguments)?;
        ensure!(output.status.success(), "{output:?}");
        let found = lines(&output, status).into_iter().find(|line| line.contains("ECS agent"));
        found.with_context(|| format!("{output:?}"))
    };
    let line = agent(&[], "warning")?;
    ensure!(line.contains("[exempt] containers = [\"ecs-agent\"]"), "{line}");
    let example = concat!(env!("CARGO_MANIFEST_DIR"), "/../examples/ecs/config.toml");
    let line = agent(&["--config", example], "ok")?;
    ensure!(line.contains("ecs-agent keeps the host's role"), "{line}");
    Ok(())
}

/// The kernel of this machine is not locked down; its word for it is.
#[tokio::test(flavor = "multi_thread")]
async fn a_kernel_that_is_locked_down_for_confidentiality_is_named() -> Result<()> {
    let host = TestHost::start().await?;
    let _imds = stage::start_imds(&host)?;
    let _sts = stage::start_sts(&host)?;
    for (mode, lacks) in [("none integrity [confidentiality]", true), ("none [integrity] confidentiality", false)] {
        let script = "mount -t tmpfs none /sys/kernel/security && echo \"$1\" > /sys/kernel/security/lockdown";
        ensure!(host.command("sh").args(["-c", script, "sh", mode]).status()?.success(), "cannot write lockdown");
        let output = check(&host, &[])?;
        let failed = lines(&output, "FAILED");
        let named = failed.iter().any(|line| line.contains("kernel") && line.contains("lockdown=integrity"));
        ensure!(named == lacks && output.status.success() != lacks, "{mode}: {output:?}");
    }
    Ok(())
}
