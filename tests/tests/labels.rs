//! What a container's labels change for it over the wire.

use anyhow::{Context as _, Result};
use metadata_proxy_tests::{
    host::{Container, ContainerSpec, TestHost},
    stage::{Stage, daemon_options, role_arn},
};

/// Sends each argument as it is, on a connection of its own, and prints what comes back.
const RAW: &str = r#"
import json, socket, sys
answers = []
for request in sys.argv[1:]:
    sock = socket.create_connection(("169.254.169.254", 80), 5)
    sock.sendall(request.encode())
    answer = b""
    while data := sock.recv(65536):
        answer += data
    answers.append(answer.decode())
print(json.dumps(answers))
"#;

async fn raw(container: &Container, requests: &[String]) -> Result<Vec<String>> {
    let command = ["/usr/bin/python3", "-c", RAW].into_iter().chain(requests.iter().map(String::as_str));
    let output = container.exec(command).await?.success()?;
    serde_json::from_str(&output).with_context(|| format!("read {output:?}"))
}

fn get(path: &str, headers: &str) -> String {
    format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}\r\n")
}

/// Status and body.
fn parse(answer: &str) -> (&str, &str) {
    let status = answer.split(' ').nth(1).unwrap_or_default();
    (status, answer.split_once("\r\n\r\n").map_or("", |(_, body)| body))
}

async fn start(settings: &str) -> Result<Stage> {
    let host = TestHost::start().await?;
    let config = host.directory().join("config.toml");
    std::fs::write(&config, settings)?;
    Stage::on(host, daemon_options().arg("--config").arg(config.display().to_string())).await
}

async fn resident(stage: &Stage, name: &str, labels: &[(&str, &str)]) -> Result<Container> {
    let spec = ContainerSpec::on_host(name, ["/usr/bin/sleep", "600"]).label("metadata-proxy.role", &role_arn(name));
    stage.run(labels.iter().fold(spec, |spec, (label, value)| spec.label(label, value))).await
}

const ROLES: &str = "/latest/meta-data/iam/security-credentials/";

#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_requires_imdsv2_is_answered_with_a_token_only() -> Result<()> {
    let stage = Stage::start().await?;
    let strict = resident(&stage, "strict", &[("metadata-proxy.require-imdsv2", "true")]).await?;
    let other = resident(&stage, "other", &[("metadata-proxy.require-imdsv2", "false")]).await?;
    let paths = ["/", ROLES, "/latest/meta-data/iam/security-credentials/strict", "/latest/meta-data/ami-id", "/no"];
    for answer in raw(&strict, &paths.map(|path| get(path, ""))).await? {
        let (head, body) = answer.split_once("\r\n\r\n").context("no head")?;
        let mut lines: Vec<&str> = head.split("\r\n").filter(|line| !line.starts_with("Date: ")).collect();
        lines.sort_unstable();
        let expected = [
            "Connection: close",
            "Content-Length: 0",
            "Content-Type: text/plain",
            "HTTP/1.1 401 Unauthorized",
            "Server: EC2ws",
        ];
        assert_eq!((lines.as_slice(), body), (expected.as_slice(), ""), "{answer}");
    }
    assert!(stage.imds.requests().is_empty());
    let put = "PUT /latest/api/token HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\
        X-aws-ec2-metadata-token-ttl-seconds: 60\r\n\r\n";
    let answers = raw(&strict, &[put.to_owned()]).await?;
    let (status, token) = parse(&answers[0]);
    assert_eq!((status, token.len()), ("200", 56));
    let header = format!("X-aws-ec2-metadata-token: {token}\r\n");
    assert_eq!(parse(&raw(&strict, &[get(ROLES, &header)]).await?[0]), ("200", "strict"));
    assert_eq!(parse(&raw(&other, &[get(ROLES, "")]).await?[0]), ("200", "other"));
    // A bad token is refused also where none is needed.
    assert_eq!(parse(&raw(&other, &[get(ROLES, &header)]).await?[0]), ("401", ""));
    Ok(())
}

const USER_DATA: &str = "/latest/user-data";
const NAME: &str = "/latest/meta-data/tags/instance/Name";
const SECRET_TAG: &str = "/latest/meta-data/tags/instance/secret-tag";
const MAC: &str = "/latest/meta-data/mac";
const HOST_ROLE: &str = "/latest/meta-data/iam/security-credentials/simulated-host-role";

async fn statuses(container: &Container) -> Result<Vec<String>> {
    let paths = [USER_DATA, NAME, SECRET_TAG, MAC, HOST_ROLE, ROLES];
    let answers = raw(container, &paths.map(|path| get(path, ""))).await?;
    Ok(answers.iter().map(|answer| parse(answer).0.to_owned()).collect())
}

const WISHES: [(&str, &str); 3] = [
    ("metadata-proxy.allow-user-data", "true"),
    ("metadata-proxy.upstream-allow", "meta-data/tags/instance/**"),
    ("metadata-proxy.upstream-deny", "meta-data/mac"),
];

#[tokio::test(flavor = "multi_thread")]
async fn where_the_operator_permits_it_labels_show_and_hide_for_that_container_only() -> Result<()> {
    let stage = start("[upstream]\ncontainer-labels = true\ndeny = ['meta-data/tags/instance/secret-tag']\n").await?;
    let (web, other) = tokio::try_join!(resident(&stage, "web", &WISHES), resident(&stage, "other", &[]))?;
    assert_eq!(statuses(&web).await?, ["200", "200", "404", "404", "404", "200"]);
    assert_eq!(statuses(&other).await?, ["404", "404", "404", "200", "404", "200"]);
    for (container, entries) in [(&web, ["tags/", "iam/"]), (&other, ["mac", "iam/"])] {
        let answers = raw(container, &[get("/latest/meta-data/", ""), get("/latest/", "")]).await?;
        let listed: Vec<&str> = parse(&answers[0]).1.lines().collect();
        assert!(entries.iter().all(|entry| listed.contains(entry)), "{}: {listed:?}", container.name());
        assert_eq!(listed.contains(&"tags/"), !listed.contains(&"mac"), "{}: {listed:?}", container.name());
        assert_eq!(answers[1].contains("user-data"), container.name() == "web");
    }
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn without_that_a_label_that_shows_more_refuses_the_role_and_one_that_hides_does_not() -> Result<()> {
    let stage = Stage::start().await?;
    let greedy = resident(&stage, "greedy", &WISHES[..1]).await?;
    let modest = resident(&stage, "modest", &WISHES[2..]).await?;
    assert_eq!(statuses(&greedy).await?, ["401"; 6]);
    assert_eq!(statuses(&modest).await?, ["404", "404", "404", "404", "404", "200"]);
    let log = stage.daemon.log()?;
    assert!(log.contains("does not permit them (container-labels = true in [upstream])"), "{log}");
    assert_eq!(stage.sts.assume_role_calls(&role_arn("greedy")), 0);
    assert!(stage.imds.requests().is_empty(), "{:#?}", stage.imds.requests());
    Ok(())
}
