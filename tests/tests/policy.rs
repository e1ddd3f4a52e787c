//! The operator's rules: who may have which role, also when they change under running containers.

use std::{
    fs,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use metadata_proxy_tests::{
    host::{Container, ContainerSpec, HostOptions, Network, TestHost, program},
    imds::HOST_ROLE,
    stage::{Stage, config_file, daemon_options, with_config},
    sts::Fault,
};
use rustix::process::{Pid, Signal, kill_process};
use tokio::time::sleep;

const ROLE_LABEL: &str = "metadata-proxy.role";
const ROLE_LIST: &str = "http://169.254.169.254/latest/meta-data/iam/security-credentials/";

/// A stage whose daemon has a configuration file.
struct Ruled {
    stage: Stage,
    file: PathBuf,
}

impl Ruled {
    async fn start(rules: &str) -> Result<Self> {
        Self::on(TestHost::start().await?, rules).await
    }

    async fn on(host: TestHost, rules: &str) -> Result<Self> {
        let base = daemon_options().arg("--role-base").arg("arn:aws:iam::123456789012:role/");
        let (file, options) = (config_file(&host), with_config(&host, base, rules)?);
        Ok(Self { stage: Stage::on(host, options).await?, file })
    }

    /// Another file, and SIGHUP; until the daemon has said `word` once more.
    async fn reload(&mut self, rules: &str, word: &str) -> Result<()> {
        fs::write(&self.file, rules)?;
        let before = self.stage.daemon.log()?.matches(word).count();
        let pid = Pid::from_raw(self.stage.daemon.pid().try_into()?).context("no process id")?;
        kill_process(pid, Signal::HUP)?;
        self.stage.daemon.wait_for(word, Duration::from_secs(20), |log| log.matches(word).count() > before).await
    }

    async fn idle(&self, name: &str, labels: &[(&str, &str)]) -> Result<Container> {
        let spec = ContainerSpec::resident(name);
        self.stage.run(labels.iter().fold(spec, |spec, (label, value)| spec.label(label, value))).await
    }
}

const BY_NAMESPACE: &str =
    "[[rule]]\nuser-namespace = 'own'\nallow = ['web']\n\n[[rule]]\nuser-namespace = 'host'\nallow = ['agent']\n";

/// The role list; the status where there is none.
async fn role(container: &Container) -> Result<String> {
    let curl = ["/usr/bin/curl", "-sS", "--max-time", "20", "-w", "\n%{http_code}", ROLE_LIST];
    let output = container.exec(curl).await?.success()?;
    let (body, status) = output.rsplit_once('\n').context("no status")?;
    Ok(if status == "200" { body.to_owned() } else { status.to_owned() })
}

async fn assert_role(container: &Container, expected: &str) -> Result<()> {
    let role = role(container).await?;
    ensure!(role == expected, "{}: {role} instead of {expected}", container.name());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_user_namespace_that_a_container_has_made_for_itself_matches_nothing() -> Result<()> {
    let mut ruled = Ruled::start(BY_NAMESPACE).await?;
    for (role, expected) in [("web", "404"), ("agent", "agent")] {
        let spec = ContainerSpec::on_host(role, ["/usr/bin/unshare", "--user", "/usr/bin/sleep", "600"]);
        let mut spec = spec.label(ROLE_LABEL, role);
        spec.host_config.cap_add = Some(vec!["SYS_ADMIN".to_owned()]);
        let container = ruled.stage.run(spec).await?;
        let process = format!("/proc/{}/ns/user", container.pid().await?);
        let begin = Instant::now();
        while fs::read_link(&process)? == fs::read_link("/proc/self/ns/user")? {
            ensure!(begin.elapsed() < Duration::from_secs(20), "{role} makes none: {:?}", container.output().await?);
            sleep(Duration::from_millis(10)).await;
        }
        // The daemon looks anew, now that the process is in the other namespace.
        let base = daemon_options().arg("--role-base").arg("arn:aws:iam::123456789012:role/");
        let options = with_config(&ruled.stage, base, BY_NAMESPACE)?;
        ruled.stage.replace_daemon(options).await?;
        assert_role(&container, expected).await?;
    }
    ruled.stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn rules_match_on_whose_user_namespace_a_container_has() -> Result<()> {
    let host = TestHost::start_with(HostOptions { userns_remap: true, ..HostOptions::default() }).await?;
    let ruled = Ruled::on(host, BY_NAMESPACE).await?;
    for (name, userns_mode, role, expected) in [
        ("own-web", None, "web", "web"),
        ("own-agent", None, "agent", "404"),
        ("host-web", Some("host"), "web", "404"),
        ("host-agent", Some("host"), "agent", "agent"),
    ] {
        let mut spec = ContainerSpec::resident(name).label(ROLE_LABEL, role);
        spec.host_config.userns_mode = userns_mode.map(str::to_owned);
        let container = ruled.stage.run(spec).await?;
        let own =
            fs::read_link(format!("/proc/{}/ns/user", container.pid().await?))? != fs::read_link("/proc/self/ns/user")?;
        ensure!(own == userns_mode.is_none(), "{name} is not in the namespace that it is to be in");
        assert_role(&container, expected).await?;
    }
    ruled.stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_names_what_takes_a_restart_and_takes_over_the_rest() -> Result<()> {
    const RULE: &str = "[[rule]]\nname = '*'\nallow = ['web']\n";
    let mut ruled = Ruled::start("[[rule]]\nname = '*'\ndeny = true\n").await?;
    let web = ruled.idle("web", &[(ROLE_LABEL, "web")]).await?;
    assert_role(&web, "404").await?;
    let other = "metrics-address = '127.0.0.1:9999'\n[sts]\ncalls-per-second = 1\n";
    ruled.reload(&format!("{other}{RULE}"), "reloaded").await?;
    let log = ruled.stage.daemon.log()?;
    ensure!(log.contains("take a restart to change, and stay as they were: [sts], metrics-address\n"), "{log}");
    assert_role(&web, "web").await?;
    ruled.reload(RULE, "reloaded").await?;
    ensure!(ruled.stage.daemon.log()?.matches("take a restart").count() == 1, "what is as it was is named");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refusal_is_remembered_for_as_long_as_the_operator_says() -> Result<()> {
    let ruled = Ruled::start("[sts]\nrefusal-memory = '8s'\n").await?;
    let role_arn = metadata_proxy_tests::stage::role_arn("late");
    ruled.stage.sts.set_role_fault(&role_arn, Some(Fault::Refuse));
    let late = ruled.idle("late", &[(ROLE_LABEL, "late")]).await?;
    assert_role(&late, "404").await?;
    ruled.stage.sts.set_role_fault(&role_arn, None);
    assert_role(&late, "404").await?;
    ensure!(ruled.stage.sts.assume_role_calls(&role_arn) == 1, "the refusal is forgotten at once");
    sleep(Duration::from_millis(8100)).await;
    assert_role(&late, "late").await?;
    ensure!(ruled.stage.sts.assume_role_calls(&role_arn) == 2, "more than one attempt");
    Ok(())
}

const RULES: &str = r#"
[[rule]]
label = { team = "banned" }
deny = true

[[rule]]
name = "web-*"
allow = ["web/*"]
default-role = "web/basic"
max-duration = "15m"
policy = '{"Version":"2012-10-17","Statement":[]}'
tags = { team = "web" }

[[rule]]
image = "mp/host"
network = "host"
allow = ["agent"]
"#;

#[tokio::test(flavor = "multi_thread")]
async fn the_first_rule_that_matches_decides() -> Result<()> {
    let ruled = Ruled::start(RULES).await?;
    let started = ruled.idle("web-1", &[]).await?;
    assert_role(&started, "basic").await?;
    let calls = ruled.stage.sts.calls();
    let call = calls.iter().find(|call| call.action == "AssumeRole").context("no AssumeRole")?;
    for (parameter, value) in [
        ("RoleArn", "arn:aws:iam::123456789012:role/web/basic"),
        ("DurationSeconds", "900"),
        ("Policy", r#"{"Version":"2012-10-17","Statement":[]}"#),
        ("Tags.member.1.Key", "team"),
        ("Tags.member.1.Value", "web"),
    ] {
        ensure!(call.parameters.get(parameter).is_some_and(|asked| asked == value), "{parameter}: {call:#?}");
    }
    for (name, labels, expected) in [
        ("web-2", &[(ROLE_LABEL, "web/shop")][..], "shop"),
        ("web-3", &[(ROLE_LABEL, "admin")], "404"),
        ("web-4", &[("team", "banned")], "404"),
        ("web-5", &[("metadata-proxy.duration", "1h")], "404"),
        ("job", &[(ROLE_LABEL, "agent")], "404"),
        ("plain", &[], "404"),
        ("greedy", &[(ROLE_LABEL, "@instance")], "404"),
    ] {
        assert_role(&ruled.idle(name, labels).await?, expected).await?;
    }
    let spec = ContainerSpec::resident("agent").label(ROLE_LABEL, "agent");
    let agent = ruled.stage.run(spec.network(Network::Host)).await?;
    assert_role(&agent, "agent").await?;
    let log = ruled.stage.daemon.log()?;
    for words in
        ["config.toml:6 matches", "does not allow role arn:aws:iam::123456789012:role/admin", "no rule matches it"]
    {
        ensure!(log.contains(words), "no {words:?} in:\n{log}");
    }
    ensure!(ruled.stage.sts.assume_role_calls("arn:aws:iam::123456789012:role/admin") == 0, "STS was asked");
    ruled.stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_hosts_own_role_is_had_by_those_whom_a_rule_allows_it_and_no_longer() -> Result<()> {
    const ALLOWED: &str = "[[rule]]\nname = 'agent'\nallow = ['@instance']\n";
    let mut ruled = Ruled::start(ALLOWED).await?;
    let agent = ruled.idle("agent", &[(ROLE_LABEL, "@instance")]).await?;
    assert_role(&agent, HOST_ROLE).await?;
    let other = ruled.idle("other", &[(ROLE_LABEL, "@instance")]).await?;
    assert_role(&other, "404").await?;
    ruled.reload("[[rule]]\nname = 'agent'\ndeny = true\n", "reloaded").await?;
    assert_role(&agent, "404").await?;
    ruled.reload(ALLOWED, "reloaded").await?;
    assert_role(&agent, HOST_ROLE).await
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_request_of_a_container_with_the_real_service_is_answered_by_that() -> Result<()> {
    // By a tool that asks once: the first connection of a container that the daemon does not know yet.
    const ONCE: &str = "curl -sS --max-time 20 -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' -w ' %{http_code}' \
        http://169.254.169.254/latest/api/token; \
        curl -sS --max-time 20 -w ' %{http_code}' http://169.254.169.254/latest/meta-data/iam/security-credentials/";
    const ALLOWED: &str = "[[rule]]\nname = 'agent-*'\nallow = ['@instance']\n\n[exempt]\ncontainers = ['exempt']\n";
    let mut ruled = Ruled::start(ALLOWED).await?;
    for (number, network) in [Network::Default, Network::Host, Network::Default, Network::Host].into_iter().enumerate()
    {
        let name = if number == 3 { "exempt".to_owned() } else { format!("agent-{number}") };
        let spec = ContainerSpec::on_host(&name, ["/usr/bin/sh", "-c", ONCE]).label(ROLE_LABEL, "@instance");
        let said = ruled.stage.run(spec.network(network)).await?.wait().await?.success()?;
        ensure!(said.contains(" 200") && said.ends_with(&format!("{HOST_ROLE} 200")), "{name}: {said:?}");
    }
    // One whose connection is older than what a rule allows.
    ruled.reload("[[rule]]\nname = '*'\ndeny = true\n", "reloaded").await?;
    let spec = ContainerSpec::on_host("agent-old", ["/usr/bin/python3", "-c", ONE_CONNECTION]);
    let old = ruled.stage.run(spec.label(ROLE_LABEL, "@instance")).await?;
    told(&old, &["404"]).await?;
    ruled.reload(ALLOWED, "reloaded").await?;
    let deadline = Instant::now() + Duration::from_secs(5);
    while !old.output().await?.0.contains(HOST_ROLE) {
        ensure!(Instant::now() < deadline, "{:?}", old.output().await?);
        sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

/// Asks for the role list over one connection that it never opens again, and writes down what changes.
const ONE_CONNECTION: &str = r#"
import http.client, time
connection = http.client.HTTPConnection("169.254.169.254", timeout=10)
connection.connect()
connection.auto_open = 0
last = None
while True:
    connection.request("GET", "/latest/meta-data/iam/security-credentials/")
    answer = connection.getresponse()
    body = answer.read().decode()
    now = body if answer.status == 200 else str(answer.status)
    if now != last:
        print(now, flush=True)
    last = now
    time.sleep(0.02)
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_reload_withdraws_and_gives_at_once_over_connections_that_stay_open() -> Result<()> {
    const ALLOWED: &str = "[[rule]]\nname = '*'\nallow = ['web', 'job']\n";
    let mut ruled = Ruled::start(ALLOWED).await?;
    let spec = ContainerSpec::on_host("web", ["/usr/bin/python3", "-c", ONE_CONNECTION]).label(ROLE_LABEL, "web");
    let web = ruled.stage.run(spec).await?;
    let job = ruled.idle("job", &[(ROLE_LABEL, "job")]).await?;
    assert_role(&job, "job").await?;
    told(&web, &["web"]).await?;

    ruled.reload("[[rule]]\nname = '*'\nallow = ['job']\n", "reloaded").await?;
    told(&web, &["web", "404"]).await?;
    assert_role(&job, "job").await?;
    ensure!(ruled.stage.sts.assume_role_calls("arn:aws:iam::123456789012:role/job") == 1, "what stays was asked again");

    ruled.reload("[[rule]]\nname = '*'\nallow = ['web'\n", "the old configuration stays").await?;
    ensure!(ruled.stage.daemon.log()?.contains("config.toml:3: "), "the mistake is not named");
    assert_role(&job, "job").await?;

    ruled.reload(ALLOWED, "reloaded").await?;
    told_in_the_end(&web, "web").await?;
    ruled.stage.assert_no_leak()
}

async fn told(container: &Container, expected: &[&str]) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let (output, errors) = container.output().await?;
        // While STS has not answered.
        let told: Vec<&str> = output.lines().filter(|line| *line != "503").collect();
        if told == expected {
            return Ok(());
        }
        ensure!(Instant::now() < deadline && errors.is_empty(), "{told:?} instead of {expected:?}: {errors}");
        sleep(Duration::from_millis(50)).await;
    }
}

async fn told_in_the_end(container: &Container, expected: &str) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let (output, errors) = container.output().await?;
        if output.lines().last() == Some(expected) {
            return Ok(());
        }
        ensure!(Instant::now() < deadline && errors.is_empty(), "{output:?}: {errors}");
        sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn check_names_what_is_wrong_in_a_file() -> Result<()> {
    let ruled = Ruled::start(RULES).await?;
    let program = program()?;
    for (text, words) in [
        ("[[rule]]\nname = 'x'\n", ":1: a rule says allow"),
        ("\n[[rule]]\nallow = ['we b']\n", ":2: allow: "),
        ("[[rule]]\nallow = ['web']\nnames = 'x'\n", ":3: unknown field `names`"),
        ("unmatched = 'perhaps'\n", ":1: unknown variant `perhaps`"),
    ] {
        let file = ruled.stage.directory().join("broken.toml");
        fs::write(&file, text)?;
        let output = ruled.stage.command(&program).args(["check", "--config"]).arg(&file).output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.code() == Some(64) && said.contains(&format!("broken.toml{words}")), "{said}");
    }
    let file = ruled.file.display().to_string();
    let output = ruled.stage.command(&program).args(["check", "--config", &file]).output()?;
    let said = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(said.contains("3 rules"), "{said}");
    Ok(())
}

/// As `docker network ls` shows it.
async fn network_id(stage: &Stage, name: &str) -> Result<String> {
    stage.docker().inspect_network(name, None).await?.id.context("a network without an id")
}

const BY_NETWORK: &str = "[[rule]]\nnetwork = 'untrusted'\ndeny = true\n\n[[rule]]\nnetwork = 'shop'\nallow = ['shop']\n\n\
     [[rule]]\nname = '*'\nallow = ['web']\n";

#[tokio::test(flavor = "multi_thread")]
async fn rules_match_a_network_by_its_name_also_where_its_id_was_given() -> Result<()> {
    let ruled = Ruled::start(BY_NETWORK).await?;
    for (network, role, other) in [("untrusted", "404", "404"), ("shop", "shop", "404")] {
        ruled.stage.create_network(network, false).await?;
        let id = network_id(&ruled.stage, network).await?;
        for (at, given) in [network, &id, &id[..12]].into_iter().enumerate() {
            for (asked, expected) in [("shop", role), ("web", other)] {
                let spec = ContainerSpec::resident(&format!("{network}-{at}-{asked}")).label(ROLE_LABEL, asked);
                let container = ruled.stage.run(spec.network(Network::Named(given.to_owned()))).await?;
                assert_role(&container, expected).await?;
            }
        }
    }
    ruled.stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_of_swarm_is_on_the_networks_of_its_service() -> Result<()> {
    let ruled = Ruled::start(BY_NETWORK).await?;
    let host = format!("unix://{}", ruled.stage.engine().socket().display());
    let docker = async |arguments: &str| -> Result<String> {
        let mut command = ruled.stage.command("docker");
        let output = command.env("DOCKER_HOST", &host).args(arguments.split(' ')).output()?;
        ensure!(output.status.success(), "docker {arguments}: {}", String::from_utf8_lossy(&output.stderr));
        Ok(String::from_utf8(output.stdout)?.trim().to_owned())
    };
    docker("swarm init --advertise-addr 127.0.0.1").await?;
    for network in ["untrusted", "shop", "third"] {
        docker(&format!("network create --driver overlay {network}")).await?;
    }
    for (service, networks, asked, expected) in [
        ("denied", "--network untrusted", "web", "404"),
        ("both", "--network untrusted --network shop", "shop", "404"),
        ("shop", "--network shop", "shop", "shop"),
        ("partly", "--network shop --network third", "shop", "404"),
        ("other", "--network third", "web", "web"),
    ] {
        docker(&format!(
            "service create --quiet --detach --name {service} {networks} --container-label {ROLE_LABEL}={asked} \
             --mount type=bind,src=/usr,dst=/usr,ro mp/host /usr/bin/sleep 600"
        ))
        .await?;
        let begin = Instant::now();
        let name = loop {
            let name = docker(&format!("ps --filter name={service}.1 --format {{{{.Names}}}}")).await?;
            if !name.is_empty() {
                break name;
            }
            ensure!(begin.elapsed() < Duration::from_secs(60), "{service}: {}", docker("service ps web").await?);
            sleep(Duration::from_millis(100)).await;
        };
        assert_role(&Container::find(ruled.stage.docker(), &name).await?, expected).await?;
    }
    ruled.stage.assert_no_leak()
}
