//! What of the real service's behaviour takes time, restarts or particular clients to see.

use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use metadata_proxy_tests::{
    clients::{
        Client, ClientReport, Programs,
        sniffer::{Connection, overhear},
    },
    host::{Container, Network},
    stage::{Stage, aws_config_client, client_spec, daemon_options, role_arn},
    talk::web,
};

/// Status and body of a request, by curl.
async fn curl(container: &Container, arguments: &[&str]) -> Result<(String, String)> {
    let common = ["/usr/bin/curl", "-s", "--max-time", "8", "-w", "|%{http_code}"];
    let output = container.exec(common.into_iter().chain(arguments.iter().copied())).await?.success()?;
    let (body, status) = output.rsplit_once('|').context("no status")?;
    Ok((status.to_owned(), body.to_owned()))
}

const TOKEN: &str = "http://169.254.169.254/latest/api/token";
const ROLES: &str = "http://169.254.169.254/latest/meta-data/iam/security-credentials/";

async fn token(container: &Container, ttl: u32) -> Result<String> {
    let ttl = format!("X-aws-ec2-metadata-token-ttl-seconds: {ttl}");
    let (status, token) = curl(container, &["-X", "PUT", "-H", &ttl, TOKEN]).await?;
    ensure!(status == "200", "{status}");
    Ok(format!("X-aws-ec2-metadata-token: {token}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_token_ends_with_its_second() -> Result<()> {
    const TTL: u32 = 4;
    let stage = Stage::start().await?;
    let web = web(&stage).await?;
    let before = Instant::now();
    let token = token(&web, TTL).await?;
    let after = Instant::now();
    let mut refused = false;
    // The token was issued between the two, and each answer was given between its own two.
    while !refused {
        let asked = Instant::now();
        let (status, _) = curl(&web, &["-H", &token, ROLES]).await?;
        let answered = Instant::now();
        refused = status == "401";
        ensure!(refused || status == "200", "{status}");
        if refused {
            assert!(answered - before >= Duration::from_secs(TTL.into()), "refused too early");
        } else {
            assert!(asked - after < Duration::from_secs(TTL.into()), "accepted too late");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_token_outlives_the_daemon() -> Result<()> {
    let mut stage = Stage::start_with(daemon_options().arg("--require-imdsv2")).await?;
    let web = web(&stage).await?;
    let token = token(&web, 21600).await?;
    stage.replace_daemon(daemon_options().arg("--require-imdsv2")).await?;
    assert_eq!(curl(&web, &["-H", &token, ROLES]).await?, ("200".to_owned(), "web".to_owned()));
    stage.daemon.kill().await?;
    stage.daemon = stage.host.daemon(daemon_options().arg("--require-imdsv2"))?;
    stage.daemon.wait_ready(Duration::from_secs(20)).await?;
    assert_eq!(curl(&web, &["-H", &token, ROLES]).await?, ("200".to_owned(), "web".to_owned()));
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn http_1_0_gets_the_same_answer_and_the_end_of_the_connection() -> Result<()> {
    let stage = Stage::start().await?;
    let web = web(&stage).await?;
    let (status, text) = curl(&web, &["--http1.0", "-i", ROLES]).await?;
    assert_eq!(status, "200");
    let (head, body) = text.split_once("\r\n\r\n").context("no head")?;
    assert_eq!(body, "web");
    let head = head.to_lowercase();
    assert!(head.contains("\r\ncontent-length: 3") && !head.contains("transfer-encoding"), "{head}");
    assert!(!head.contains("keep-alive"), "{head}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_says_that_he_has_no_more_to_ask_still_gets_his_answer() -> Result<()> {
    // As `nc -N` does. The first is answered at once, the second when the real service has answered.
    const ASK: &str = r#"
import socket
for path in ["iam/security-credentials/", "local-ipv4"]:
    for version in ["1.0", "1.1"]:
        sock = socket.create_connection(("169.254.169.254", 80), 5)
        sock.sendall(b"GET /latest/meta-data/%s HTTP/%s\r\nHost: x\r\n\r\n" % (path.encode(), version.encode()))
        sock.shutdown(socket.SHUT_WR)
        answer = b""
        while data := sock.recv(65536):
            answer += data
        print(answer.rpartition(b"\r\n\r\n")[2].decode())
"#;
    let stage = Stage::start().await?;
    let web = web(&stage).await?;
    let output = web.exec(["/usr/bin/python3", "-c", ASK]).await?.success()?;
    assert_eq!(output.lines().collect::<Vec<_>>(), ["web", "web", "10.0.0.10", "10.0.0.10"]);
    stage.assert_no_leak()
}

/// The address of the other family, in namespaces that have it and in those that have not.
#[tokio::test(flavor = "multi_thread")]
async fn clients_find_the_service_at_its_ipv6_address() -> Result<()> {
    let stage = Stage::start().await?;
    let programs = Programs::from_env(aws_config_client()?)?;
    let others = ["js", "js-v2", "go-v1", "go-v2", "ruby"].map(Client::find);
    // Where there is no IPv6 botocore does not even try: urllib3 looks whether it could bind to `::1`.
    let mut trials = vec![(Client::AWS_CONFIG, "bridge")];
    for client in [Ok(Client::AWS_CONFIG), Ok(Client::BOTO3)].into_iter().chain(others) {
        let client = client?;
        trials.extend([(client, "bridge6"), (client, "host")]);
    }
    for (client, place) in trials {
        let name = format!("{}-{place}", client.name());
        let mut spec = client_spec(&name, client, &programs, 1, None)
            .network(if place == "host" { Network::Host } else { Network::Default })
            .label("metadata-proxy.role", &role_arn(&name))
            .env("AWS_EC2_METADATA_SERVICE_ENDPOINT_MODE", "IPv6");
        if place != "host" {
            // The engine turns it off in the namespaces of networks without it.
            let off = if place == "bridge6" { "0" } else { "1" };
            let settings =
                ["all", "default", "lo"].map(|on| (format!("net.ipv6.conf.{on}.disable_ipv6"), off.to_owned()));
            spec.host_config.sysctls = Some(settings.into());
        }
        let (container, finished, heard) = overhear(&stage, spec).await?;
        let asked = heard.iter().map(Connection::requests).collect::<Vec<_>>().concat();
        container.remove().await?;
        let report = ClientReport::parse(&finished.stdout).with_context(|| format!("{name}: {finished:?}"))?;
        let key = report.access_keys().next().with_context(|| format!("{name}: {report:?}"))?;
        assert_eq!(stage.role_of(key).as_ref(), Some(&name));
        let asked = String::from_utf8_lossy(&asked).to_lowercase();
        ensure!(asked.contains("host: [fd00:ec2::254]") && !asked.contains("169.254"), "{name} asked {asked}");
    }
    stage.assert_no_leak()
}
