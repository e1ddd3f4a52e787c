//! What lies in `examples/` does what it says.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use bollard::models::{HostConfig, HostConfigCgroupnsModeEnum};
use metadata_proxy_tests::{
    host::{Container, ContainerSpec, Network, TestHost, program},
    imds::HOST_INSTANCE,
    stage::{self, daemon_options, role_arn},
};
use serde_json::Value;

fn example(name: &str) -> PathBuf {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent().unwrap_or(own).join("examples").join(name)
}

fn variable(name: &str) -> Result<String> {
    std::env::var(name).with_context(|| format!("{name} is not set; start this with `cargo xtask test`"))
}

/// The compose file as Docker Compose would read it, but for variables.
fn compose() -> Result<Value> {
    const TO_JSON: &str = "import json, sys, yaml; print(json.dumps(yaml.safe_load(open(sys.argv[1]))))";
    let python = format!("{}/bin/python3", variable("METADATA_PROXY_PYTHON_CLIENTS")?);
    let output = std::process::Command::new(python).args(["-c", TO_JSON]).arg(example("compose.yaml")).output()?;
    serde_json::from_slice(&output.stdout).with_context(|| format!("{output:?}"))
}

fn texts(value: &Value) -> Vec<String> {
    value.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
}

/// The daemon's service of the compose file, on a test host: its engine instead of the machine's, a cgroup below which it
/// has to stay, and what is built here.
fn daemon_spec(host: &TestHost, service: &Value, arguments: &[&str]) -> Result<ContainerSpec> {
    let binary = program()?.display().to_string();
    let mut command = texts(&service["command"]);
    let cgroup = host.machine().inner_cgroup().display().to_string();
    command.extend(["--cgroup".to_owned(), cgroup]);
    command.extend(arguments.iter().map(|argument| (*argument).to_owned()));
    let mut spec = ContainerSpec::on_host("metadata-proxy", command).network(Network::Host);
    ensure!(service["network_mode"] == "host", "{service:#}");
    spec.host_config = HostConfig {
        cap_add: Some(texts(&service["cap_add"])),
        security_opt: Some(texts(&service["security_opt"])),
        pid_mode: service["pid"].as_str().map(str::to_owned),
        cgroupns_mode: (service["cgroup"] == "host").then_some(HostConfigCgroupnsModeEnum::HOST),
        ..HostConfig::default()
    };
    for volume in texts(&service["volumes"]) {
        spec = match volume.as_str() {
            // Those of the tests are in the environment, and below /usr is the machine's.
            profile if profile.contains(".aws") => spec,
            certificates if certificates.starts_with("/etc/ssl/") => spec,
            program if program.starts_with("../target") => spec.bind(format!("{binary}:/opt/metadata-proxy:ro")),
            socket if socket.starts_with("/var/run/docker.sock:") => {
                spec.bind(format!("{}:/var/run/docker.sock", host.engine().socket().display()))
            }
            other => spec.bind(other),
        };
    }
    spec.cmd[0] = "/opt/metadata-proxy".to_owned();
    // Without a value they are passed on where they are set; what has one is the developer's own.
    let passed_on = service["environment"].as_object().context("no environment")?;
    ensure!(passed_on.keys().eq(["AWS_PROFILE", "AWS_REGION"]) && passed_on["AWS_REGION"].is_null(), "{passed_on:?}");
    Ok(daemon_options().env.iter().fold(spec, |spec, (name, value)| spec.env(name, value)))
}

/// As the compose file finds out.
async fn until_healthy(daemon: &Container, service: &Value) -> Result<()> {
    let mut check = texts(&service["healthcheck"]["test"]);
    ensure!(check.len() > 1 && check.remove(0) == "CMD", "{service:#}");
    check[0] = "/opt/metadata-proxy".to_owned();
    for _ in 0..200 {
        if daemon.exec(check.clone()).await?.exit_code == 0 {
            return Ok(());
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    let (_, log) = daemon.output().await?;
    anyhow::bail!("the daemon is not healthy: {log}")
}

async fn app(host: &TestHost, name: &str) -> Result<Container> {
    let spec = ContainerSpec::resident(name);
    host.run(spec.label("metadata-proxy.role", &role_arn("app"))).await
}

async fn get(container: &Container, path: &str) -> Result<String> {
    let url = format!("http://169.254.169.254/latest/meta-data/{path}");
    container.exec(["/usr/bin/curl", "-sf", "--max-time", "5", &url]).await?.success()
}

const ROLES: &str = "iam/security-credentials/";

#[tokio::test(flavor = "multi_thread")]
async fn the_compose_files_daemon_serves_containers_and_outlives_its_own() -> Result<()> {
    let service = compose()?["services"]["metadata-proxy"].take();
    let host = TestHost::start().await?;
    let (imds, sts) = (stage::start_imds(&host)?, stage::start_sts(&host)?);
    let daemon = host.run(daemon_spec(&host, &service, &[])?).await?;
    until_healthy(&daemon, &service).await?;

    let web = app(&host, "web").await?;
    assert_eq!(get(&web, ROLES).await?, "app");
    let document = get(&web, &format!("{ROLES}app")).await?;
    let document: Value = serde_json::from_str(&document)?;
    let issued = sts.issued(document["AccessKeyId"].as_str().unwrap_or_default()).context("not of STS")?;
    assert_eq!(issued.role_arn, role_arn("app"));
    assert_eq!(get(&web, "instance-id").await?, "i-00000000000000001");
    let (_, log) = daemon.output().await?;
    assert!(!log.contains("session tokens end"), "no place for their key: {log}");

    // Recreated, as by an upgrade; in between nothing falls through to the real service.
    daemon.remove().await?;
    let closed = get(&web, "instance-id").await;
    assert!(closed.is_err(), "{closed:?}");
    let daemon = host.run(daemon_spec(&host, &service, &[])?).await?;
    until_healthy(&daemon, &service).await?;
    assert_eq!(get(&web, ROLES).await?, "app");
    assert!(imds.requests().is_empty(), "{:#?}", imds.requests());
    Ok(())
}

/// Off and on EC2 alike: its own container is no container to the daemon.
#[tokio::test(flavor = "multi_thread")]
async fn a_daemon_in_a_container_keeps_the_real_service() -> Result<()> {
    let mut service = compose()?["services"]["metadata-proxy"].take();
    service["command"] = serde_json::json!(["metadata-proxy", "run"]);
    let host = TestHost::start().await?;
    let (imds, _sts) = (stage::start_imds(&host)?, stage::start_sts(&host)?);
    let daemon = host.run(daemon_spec(&host, &service, &[])?).await?;
    until_healthy(&daemon, &service).await?;
    let web = app(&host, "web").await?;
    assert_eq!(get(&web, "instance-id").await?, HOST_INSTANCE);
    assert_eq!(get(&daemon, "instance-id").await?, HOST_INSTANCE);
    // The second is the daemon's own program asking as any host process would.
    let agents: Vec<String> = imds.requests().iter().map(|seen| seen.user_agent().to_owned()).collect();
    assert!(agents.iter().any(|agent| agent.starts_with("metadata-proxy/")), "{agents:?}");
    assert!(agents.iter().any(|agent| agent.starts_with("curl/")), "{agents:?}");
    assert_eq!(get(&web, ROLES).await?, "app");
    Ok(())
}

/// What the unit leaves to the daemon is enough: its capabilities, a /sys that cannot be written to but for the bpffs, a
/// read-only /usr. What systemd does by seccomp is not tried here.
#[tokio::test(flavor = "multi_thread")]
async fn the_daemon_runs_with_what_the_unit_leaves_to_it() -> Result<()> {
    const HARDEN: &str = r#"
set -e
mount -o remount,bind,ro /sys
mount --bind -o ro /usr /usr
exec setpriv --no-new-privs --inh-caps -all --bounding-set "$1" "$2" run --simulate --cgroup "$3" --docker-host "$4"
"#;
    let unit = std::fs::read_to_string(example("metadata-proxy.service"))?;
    let capabilities =
        unit.lines().find_map(|line| line.strip_prefix("CapabilityBoundingSet=")).context("no such line")?;
    let capabilities =
        capabilities.to_lowercase().split(' ').map(|name| name.replace("cap_", ",+")).collect::<String>();
    let host = TestHost::start().await?;
    let (imds, _sts) = (stage::start_imds(&host)?, stage::start_sts(&host)?);
    let log = host.directory().join("hardened.log");
    let mut daemon = host
        .command("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-c", HARDEN, "sh"])
        .args([format!("-all{capabilities}"), program()?.display().to_string()])
        .arg(host.machine().inner_cgroup())
        .arg(format!("unix://{}", host.engine().socket().display()))
        .envs(daemon_options().env)
        .stderr(std::fs::File::create(&log)?)
        .spawn()?;
    let outcome = async {
        for _ in 0..200 {
            if std::fs::read_to_string(&log)?.contains("ready: ") {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
        let web = app(&host, "web").await?;
        assert_eq!(get(&web, ROLES).await?, "app");
        assert_eq!(get(&web, "instance-id").await?, "i-00000000000000001");
        anyhow::Ok(())
    };
    let outcome = outcome.await;
    daemon.kill()?;
    daemon.wait()?;
    outcome.with_context(|| std::fs::read_to_string(&log).unwrap_or_default())?;
    assert!(imds.requests().is_empty(), "{:#?}", imds.requests());
    Ok(())
}

#[test]
fn the_compose_files_app_needs_a_label_and_nothing_else() -> Result<()> {
    let compose = compose()?;
    let app = compose["services"]["app"].as_object().context("no app")?;
    assert!(app["labels"]["metadata-proxy.role"].is_string());
    assert_eq!(app["depends_on"]["metadata-proxy"]["condition"], "service_healthy");
    for special in ["networks", "network_mode", "ports", "extra_hosts", "privileged", "cap_add", "volumes"] {
        assert!(!app.contains_key(special), "{special}");
    }
    assert!(compose.get("networks").is_none());
    Ok(())
}
