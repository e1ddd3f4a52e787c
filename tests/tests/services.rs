//! Services of the host with roles of their own, and hosts whose own processes have nothing.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use metadata_proxy_tests::{
    host::{ContainerSpec, Network, program},
    stage::{Stage, daemon_options, role_arn, with_config},
};

const HOST_ROLE: &str = "simulated-host-role";
const SERVICES: &str = "role-base = 'arn:aws:iam::123456789012:role/'
[[service]]
unit = 'backup.service'
role = 'backup'
session-name = '{service.unit}'
[[service]]
unit = 'app@*.service'
role = 'app'
[[service]]
unit = 'agent.service'
role = '@instance'
[[service]]
unit = 'none.service'
[[service]]
cgroup = '/custom/job'
role = 'job'
";

/// Asks as a process of this cgroup, by the test host's root of them: the role list, its status, or nothing.
fn ask_in(stage: &Stage, cgroup: &str, before: &str) -> Result<String> {
    const ROLES: &str = "http://169.254.169.254/latest/meta-data/iam/security-credentials/";
    let root = stage.machine().inner_cgroup().display().to_string();
    let script = format!(
        "mkdir -p {root}/{cgroup} && echo $$ > {root}/{cgroup}/cgroup.procs &&
         {before} curl -s --max-time 8 -w ' %{{http_code}}' {ROLES}"
    );
    let output = stage.command("sh").args(["-c", &script]).output()?;
    Ok(String::from_utf8(output.stdout)?)
}

fn said(stage: &Stage, arguments: &[&str]) -> Result<String> {
    let output = stage.command(program()?).args(arguments).output()?;
    Ok(String::from_utf8(output.stdout)?)
}

#[tokio::test(flavor = "multi_thread")]
async fn services_have_roles_of_their_own_and_the_rest_of_the_host_keeps_the_real_service() -> Result<()> {
    let stage = Stage::configured(daemon_options(), SERVICES).await?;
    let host = format!("{HOST_ROLE} 200");
    for (cgroup, expected) in [
        ("system.slice/backup.service", "backup 200"),
        ("system.slice/backup.service/worker", "backup 200"),
        ("system.slice/app.slice/app@1.service", "app 200"),
        ("custom/job/deep", "job 200"),
        ("system.slice/agent.service", &host),
        ("system.slice/other.service", &host),
        // Names that others give do not count.
        ("system.slice/other.service/backup.service", &host),
        ("user.slice/user@1.service/backup.service", &host),
    ] {
        for time in 1..=2 {
            let answer = ask_in(&stage, cgroup, "")?;
            ensure!(answer == expected, "{cgroup}, time {time}: {answer:?}\n{}", stage.daemon.log()?);
        }
    }
    ensure!(ask_in(&stage, "system.slice/none.service", "")?.ends_with(" 404"), "a service without a role has one");
    // In a network of its own it is the same service; nobody else is.
    let private = "exec unshare --net sh -c 'ip link set lo up; exec \"$@\"' -";
    ensure!(ask_in(&stage, "system.slice/backup.service", private)? == "backup 200", "PrivateNetwork");
    // Started anew, it is another cgroup at the same place.
    let units = stage.machine().inner_cgroup().join("system.slice/backup.service");
    let removed = stage.command("rmdir").arg(units.join("worker")).arg(&units).status()?;
    ensure!(removed.success() && ask_in(&stage, "system.slice/backup.service", "")? == "backup 200", "started anew");
    let sessions = stage.sts.calls().into_iter().filter_map(|call| call.parameters.get("RoleSessionName").cloned());
    let sessions: Vec<_> = sessions.collect();
    ensure!(sessions.contains(&"backup.service".to_owned()), "{sessions:?}");
    let shown = said(&stage, &["ps"])?;
    for name in ["backup.service", "app@1.service", "agent.service", "none.service", "job"] {
        ensure!(shown.lines().any(|line| line.contains(name) && line.contains("systemd")), "no {name} in\n{shown}");
    }
    ensure!(!shown.contains("other.service") && shown.matches("backup.service ").count() == 1, "{shown}");
    let explained = said(&stage, &["explain", "backup.service"])?;
    ensure!(explained.contains("role/backup") && explained.contains("[[service]] role"), "{explained}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_that_is_denied_has_what_is_listed_and_its_containers_what_they_have() -> Result<()> {
    let config = format!("{SERVICES}\n[host]\ndefault = 'deny'\n[exempt]\ncgroups = ['/free.service']\n");
    let mut stage = Stage::configured(daemon_options(), &config).await?;
    let web =
        stage.run(ContainerSpec::resident("web").network(Network::Host).label("metadata-proxy.role", "web")).await?;
    for (cgroup, expected) in
        [("system.slice/backup.service", "backup 200"), ("system.slice/agent.service", "simulated-host-role 200")]
    {
        let answer = ask_in(&stage, cgroup, "")?;
        ensure!(answer == expected, "{cgroup}: {answer:?}\n{}", stage.daemon.log()?);
    }
    let denied = ask_in(&stage, "system.slice/other.service", "")?;
    ensure!(denied.ends_with(" 404"), "{denied}");
    let other_port = stage.command("curl").args(["-s", "-m", "3", "http://169.254.169.254:8080/"]).status()?;
    ensure!(!other_port.success(), "another port of the service");
    ensure!(stage.role_list_of(web.pid().await?, 5)? == "web", "a container");
    let shown = said(&stage, &["ps", "--all"])?;
    ensure!(shown.contains("/system.slice/other.service"), "{shown}");

    // Without a daemon it is denied as well, and a service has nothing rather than the host's.
    stage.daemon.terminate(Duration::from_secs(15)).await?;
    for cgroup in ["system.slice/new.service", "system.slice/backup.service", "system.slice/app@2.service"] {
        let answer = ask_in(&stage, cgroup, "")?;
        ensure!(!answer.contains("200"), "{cgroup}: {answer}");
    }
    let options = with_config(&stage.host, daemon_options(), "")?;
    stage.daemon = stage.host.daemon(options)?;
    stage.daemon.wait_ready(Duration::from_secs(20)).await?;
    let answer = ask_in(&stage, "system.slice/other.service", "")?;
    ensure!(answer == "simulated-host-role 200", "no longer denied: {answer:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_within_a_service_is_neithers() -> Result<()> {
    let stage = Stage::configured(
        daemon_options(),
        "[[service]]\ncgroup = '/containers'\nrole = 'arn:aws:iam::123456789012:role/all'\n",
    )
    .await?;
    ensure!(ask_in(&stage, "containers/own", "")? == "all 200", "the service itself");
    let inside = stage.run(ContainerSpec::resident("inside").label("metadata-proxy.role", &role_arn("inside"))).await?;
    let answer = stage.role_list_of(inside.pid().await?, 5)?;
    ensure!(answer.contains("404"), "{answer}\n{}", stage.daemon.log()?);
    let id = "0123456789abcdef".repeat(4);
    let unknown = ask_in(&stage, &format!("containers/{id}"), "")?;
    ensure!(unknown.ends_with(" 404"), "{unknown}");
    let log = stage.daemon.log()?;
    log.contains("within the cgroup of a [[service]]").then_some(()).context("nothing is said of it")?;
    Ok(())
}
