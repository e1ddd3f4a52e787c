//! A machine off EC2 that plays an instance: `--simulate`, seen from containers.

use std::{path::Path, process::Command};

use anyhow::{Context as _, Result, ensure};
use metadata_proxy_tests::{
    host::{Container, ContainerSpec, DaemonOptions, TestHost, program},
    stage::{STS_ENDPOINT, Stage, daemon_options, role_arn},
    sts::{BASE_ACCESS_KEY, BASE_SECRET_KEY},
};
use serde_json::Value;

const SETTINGS: &str = r##"
[simulate]
instance-id = "i-0feedfacecafebeef"
region = "eu-west-1"
zone = "eu-west-1c"
account = "210987654321"
instance-type = "t4g.micro"
ami-id = "ami-0feedfacecafebeef"
user-data = "#cloud-config\nruncmd: [date]\n"
tags = { Name = "laptop", "team:env" = "web dev" }

[simulate.extra]
"meta-data/public-ipv4" = "192.0.2.7"
"meta-data/public-keys/0/openssh-key" = "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5 somebody"
"##;

/// Each path over curl, as one would by hand: with a session token, status and type behind the body.
const CURL: &str = r#"
token=$(curl -sf -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 60' http://169.254.169.254/latest/api/token)
for path; do
    curl -s -H "X-aws-ec2-metadata-token: $token" -w '|%{http_code} %{content_type}\n===\n' "http://169.254.169.254$path"
done
"#;

/// The body, and status and type, for each path.
async fn curl(container: &Container, paths: &[&str]) -> Result<Vec<(String, String)>> {
    let command = ["/usr/bin/sh", "-c", CURL, "sh"].into_iter().chain(paths.iter().copied());
    let output = container.exec(command).await?.success()?;
    let answers = output.split("\n===\n").filter_map(|answer| answer.rsplit_once('|'));
    Ok(answers.map(|(body, status)| (body.to_owned(), status.to_owned())).collect())
}

async fn start(settings: &str) -> Result<Stage> {
    Stage::configured(daemon_options(), settings).await
}

async fn resident(stage: &Stage, name: &str, role: Option<&str>) -> Result<Container> {
    let mut spec = ContainerSpec::resident(name);
    if let Some(role) = role {
        spec = spec.label("metadata-proxy.role", &role_arn(role));
    }
    stage.run(spec).await
}

/// Not even for what is harmless.
fn assert_nothing_upstream(stage: &Stage) {
    assert!(stage.imds.requests().is_empty(), "{:#?}", stage.imds.requests());
}

#[tokio::test(flavor = "multi_thread")]
async fn without_settings_containers_see_an_instance_like_any_other() -> Result<()> {
    let stage = Stage::start_with(daemon_options().env("METADATA_PROXY_SIMULATE", "true")).await?;
    let (web, plain) = tokio::try_join!(resident(&stage, "web", Some("web")), resident(&stage, "plain", None))?;
    let (found, text) = ("200 text/plain", |text: &str| text.to_owned());
    let cases = [
        ("/latest/", "dynamic\nmeta-data"),
        ("/latest/meta-data/instance-id", "i-00000000000000001"),
        ("/latest/meta-data/placement/availability-zone/", "us-east-1a"),
        ("/2021-07-15/meta-data/placement/region", "us-east-1"),
        ("//latest/meta-data/services/domain", "amazonaws.com"),
        ("/latest/meta-data/network/interfaces/macs", "02:00:00:00:00:01/"),
        ("/latest/meta-data/iam/security-credentials/", "web"),
    ];
    let answers = curl(&web, &cases.map(|(path, _)| path)).await?;
    for ((path, body), answer) in cases.iter().zip(&answers) {
        assert_eq!(answer, &(text(body), text(found)), "{path}");
    }
    let absent = ["/latest/user-data", "/latest/meta-data/tags/", "/latest/dynamic/instance-identity/pkcs7"];
    for (_, status) in curl(&web, &absent).await? {
        assert_eq!(status, "404 text/html");
    }
    let listings = curl(&plain, &["/latest/meta-data/", "/latest/meta-data/iam/"]).await?;
    ensure!(listings[0].0.contains("\ninstance-id\n") && !listings[0].0.contains("iam"), "{listings:?}");
    assert_eq!(listings[1].1, "404 text/html");
    let listing = curl(&web, &["/latest/meta-data/"]).await?;
    ensure!(listing[0].0.contains("\nhostname\niam/\ninstance-action\n"), "{listing:?}");
    assert_nothing_upstream(&stage);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn settings_of_the_file_are_what_containers_see() -> Result<()> {
    let stage = start(SETTINGS).await?;
    let web = resident(&stage, "web", Some("web")).await?;
    let cases = [
        ("/latest/meta-data/instance-id", "i-0feedfacecafebeef", "text/plain"),
        ("/latest/meta-data/tags/instance/", "Name\nteam:env", "text/plain"),
        ("/latest/meta-data/tags/instance/team%3Aenv", "web dev", "text/plain"),
        ("/latest/meta-data/public-ipv4", "192.0.2.7", "text/plain"),
        ("/latest/user-data", "#cloud-config\nruncmd: [date]\n", "application/octet-stream"),
    ];
    let answers = curl(&web, &cases.map(|(path, _, _)| path)).await?;
    for ((path, body, kind), answer) in cases.iter().zip(&answers) {
        assert_eq!(answer, &((*body).to_owned(), format!("200 {kind}")), "{path}");
    }
    let identity = curl(&web, &["/latest/dynamic/instance-identity/document"]).await?.remove(0).0;
    let identity: Value = serde_json::from_str(&identity)?;
    for (key, value) in [
        ("accountId", "210987654321"),
        ("architecture", "arm64"),
        ("availabilityZone", "eu-west-1c"),
        ("instanceId", "i-0feedfacecafebeef"),
    ] {
        assert_eq!(identity[key], value, "{key}");
    }
    assert_nothing_upstream(&stage);
    Ok(())
}

/// What docker-ec2-metadata did: roles for containers on a developer's machine, assumed with a profile of the developer's.
#[tokio::test(flavor = "multi_thread")]
async fn roles_are_assumed_with_the_developers_profile() -> Result<()> {
    let host = TestHost::start().await?;
    let (config, credentials) = (host.directory().join("aws-config"), host.directory().join("aws-credentials"));
    std::fs::write(&config, format!("[profile dev]\nregion = eu-west-1\nendpoint_url = {STS_ENDPOINT}\n"))?;
    let keys = |profile: &str, key: &str, secret: &str| {
        format!("[{profile}]\naws_access_key_id = {key}\naws_secret_access_key = {secret}\n")
    };
    let of_others = keys("default", "AKIAOFSOMEBODYELSE00", "wrong");
    std::fs::write(&credentials, of_others + &keys("dev", BASE_ACCESS_KEY, BASE_SECRET_KEY))?;
    let options = DaemonOptions::default().arg("--simulate").env("AWS_PROFILE", "dev");
    // An empty variable, as a compose file may pass it on, says nothing.
    let options = options.env("AWS_REGION", "").env("AWS_CONFIG_FILE", config.display().to_string());
    let stage = Stage::on(host, options.env("AWS_SHARED_CREDENTIALS_FILE", credentials.display().to_string())).await?;
    let spec = ContainerSpec::resident("app").env("IAM_ROLE", &role_arn("app"));
    let app = stage.run(spec).await?;
    let paths = ["/latest/meta-data/iam/security-credentials/", "/latest/meta-data/iam/security-credentials/app"];
    let answers = curl(&app, &paths).await?;
    assert_eq!(answers[0].0, "app", "{}", stage.daemon.log()?);
    let document: Value = serde_json::from_str(&answers[1].0)?;
    assert_eq!(stage.role_of(document["AccessKeyId"].as_str().context("no key")?).as_deref(), Some("app"));
    let calls = stage.sts.calls();
    assert!(calls.iter().all(|call| call.region.as_deref() == Some("eu-west-1")), "{calls:#?}");
    assert_nothing_upstream(&stage);
    Ok(())
}

/// The whole of cloud-init's EC2 data source: token, choice of a version, the crawl of all leaves, user-data, identity.
#[tokio::test(flavor = "multi_thread")]
async fn cloud_init_takes_it_for_ec2() -> Result<()> {
    let folder = |variable: &str| {
        std::env::var(variable).with_context(|| format!("{variable} is not set; start this with `cargo xtask test`"))
    };
    let (python, modules) = (folder("METADATA_PROXY_PYTHON_CLIENTS")?, folder("METADATA_PROXY_CLOUD_INIT")?);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients/cloud-init-client.py").display().to_string();
    let stage = start(SETTINGS).await?;
    let spec = ContainerSpec::on_host("cloud-init", [format!("{python}/bin/python3"), "-B".to_owned(), script.clone()])
        .label("metadata-proxy.role", &role_arn("web"))
        .env("PYTHONPATH", &modules);
    let mounts = [&python, &modules, &script].map(|path| format!("{path}:{path}:ro"));
    let container = stage.run(mounts.into_iter().fold(spec, ContainerSpec::bind)).await?;
    let output = stage.finish(&container).await?;
    let seen: Value = serde_json::from_str(&output).with_context(|| format!("read {output:?}"))?;
    for (key, expected) in [
        ("understood", Value::Bool(true)),
        ("token", Value::Bool(true)),
        ("classic", Value::Bool(false)),
        ("instance_id", "i-0feedfacecafebeef".into()),
        ("region", "eu-west-1".into()),
        ("zone", "eu-west-1c".into()),
        ("keys", vec!["ssh-ed25519 AAAAC3NzaC1lZDI1NTE5 somebody"].into()),
        ("user_data", "#cloud-config\nruncmd: [date]\n".into()),
    ] {
        assert_eq!(seen[key], expected, "{key} in {seen:#}");
    }
    ensure!(seen["hostname"].as_str().is_some_and(|name| name.contains("ip-10-0-0-10")), "{seen:#}");
    let meta_data = &seen["meta_data"];
    assert_eq!(meta_data["tags"]["instance"]["team:env"], "web dev");
    assert_eq!(
        meta_data["network"]["interfaces"]["macs"]["02:00:00:00:00:01"]["subnet-id"],
        "subnet-00000000000000001"
    );
    assert_eq!(meta_data["iam"]["info"]["Code"], "Success");
    assert_eq!(seen["identity"]["instanceType"], "t4g.micro");
    let (_, complaints) = container.output().await?;
    assert_eq!(complaints, "", "cloud-init is not content");
    assert_nothing_upstream(&stage);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn check_says_that_no_real_service_is_used() -> Result<()> {
    let stage = Stage::start_with(daemon_options().arg("--simulate")).await?;
    let program = program()?;
    let mut command: Command = stage.command(program);
    let socket = format!("unix://{}", stage.engine().socket().display());
    command.args(["check", "--simulate", "--docker-host", &socket, "--cgroup"]).arg(stage.machine().inner_cgroup());
    let output = command.envs(daemon_options().env).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(text.contains("not used (an instance is simulated)"), "{output:?}");
    assert_nothing_upstream(&stage);
    Ok(())
}
