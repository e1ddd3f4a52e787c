//! What a container gets over the wire is what the real service would say.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context as _, Result, ensure};
use metadata_proxy_tests::{
    host::{ContainerSpec, METADATA_V4, METADATA_V6},
    stage::{Stage, daemon_options, role_arn},
    talk::{Plan, ask, assert_nothing_upstream, head, resident, talk, token, web, with_token},
};

const ROLES: &str = "/latest/meta-data/iam/security-credentials/";
const DOCUMENT: &str = "/latest/meta-data/iam/security-credentials/web";
const TTL: &str = "x-aws-ec2-metadata-token-ttl-seconds";

#[tokio::test(flavor = "multi_thread")]
async fn session_tokens_are_exchanged_as_by_the_real_service() -> Result<()> {
    let stage = Stage::start().await?;
    let web = web(&stage).await?;
    let put = |path: &str, headers: &[&str]| Plan::request("PUT", path, headers);
    let six_hours = "X-aws-ec2-metadata-token-ttl-seconds: 21600";
    let cases = [
        (put("/latest/api/token", &[six_hours]), 200),
        (put("/latest/api/token", &["x-aws-ec2-metadata-token-ttl-seconds: 1"]), 200),
        (put("//latest//api/token/", &[six_hours]), 200),
        (put("/latest/api/token", &[]), 400),
        (put("/latest/api/token", &["X-aws-ec2-metadata-token-ttl-seconds: 0"]), 400),
        (put("/latest/api/token", &["X-aws-ec2-metadata-token-ttl-seconds: 21601"]), 400),
        (put("/latest/api/token", &["X-aws-ec2-metadata-token-ttl-seconds: six hours"]), 400),
        (put("/latest/api/token", &["X-aws-ec2-metadata-token-ttl-seconds: -1"]), 400),
        (put("/latest/api/token", &[six_hours, six_hours]), 400),
        (put("/latest/api/token", &[six_hours, "X-Forwarded-For: 192.0.2.7"]), 403),
        (put("/2021-07-15/api/token", &[six_hours]), 403),
        (put("/1.0/api/token", &[six_hours]), 403),
        (Plan::request("GET", "/latest/api/token", &[six_hours]), 405),
        (Plan::request("HEAD", "/latest/api/token", &[]), 405),
        (Plan::request("POST", "/latest/api/token", &[six_hours]), 405),
        (Plan::request("DELETE", "/latest/api/token", &[]), 405),
        (Plan::request("OPTIONS", "/latest/api/token", &[]), 200),
    ];
    let plans: Vec<Plan> = cases.iter().map(|(plan, _)| plan.clone()).collect();
    let answers = ask(&web, &plans).await?;
    for ((plan, status), answer) in cases.iter().zip(&answers) {
        assert_eq!(answer.status, *status, "{plan:?}: {answer:?}");
        assert_eq!(answer.header("server"), Some("EC2ws"));
        if *status == 405 {
            assert_eq!(answer.header("allow"), Some("OPTIONS, PUT"), "{plan:?}");
            assert_eq!((answer.header("content-length"), answer.body.as_str()), (Some("0"), ""), "{plan:?}");
        }
    }
    for (answer, ttl) in answers.iter().zip(["21600", "1", "21600"]) {
        assert_eq!(answer.header(TTL), Some(ttl));
        assert_eq!(answer.header("content-type"), Some("text/plain"));
        assert_eq!(answer.body.len(), 56);
        assert!(answer.body.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_=".contains(&byte)));
    }
    assert_ne!(answers[0].body, answers[2].body);

    // Remaining, not granted: a second later it is less.
    tokio::time::sleep(Duration::from_millis(1100)).await;
    let (valid, expired) = (&answers[0].body, &answers[1].body);
    let used = ask(
        &web,
        &[
            with_token(ROLES, valid),
            with_token(ROLES, expired),
            with_token(ROLES, "AQAAANJc0000000000000000000000000000000000000000000000=="),
            with_token(ROLES, ""),
            with_token("/latest/meta-data/nothing-there", valid),
            Plan::get(ROLES),
        ],
    )
    .await?;
    assert_eq!(used.iter().map(|answer| answer.status).collect::<Vec<_>>(), [200, 401, 401, 401, 404, 200]);
    for answer in [&used[0], &used[4]] {
        let left: u32 = answer.header(TTL).context("no remaining lifetime")?.parse()?;
        assert!((21_500..21_600).contains(&left), "{left}");
    }
    for answer in &used[1..4] {
        assert_eq!(answer.header("content-type"), Some("text/plain"));
        assert_eq!((answer.header("content-length"), answer.body.as_str()), (Some("0"), ""));
    }
    assert_eq!(used[5].header(TTL), None);
    assert_nothing_upstream(&stage);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_token_of_one_container_is_refused_to_another() -> Result<()> {
    let stage = Stage::start().await?;
    let (web, api) = tokio::try_join!(web(&stage), resident(&stage, "api", Some(role_arn("api"))))?;
    let of_web = token(&web, "300").await?;
    let of_api = token(&api, "300").await?;
    let answers = ask(&api, &[with_token(ROLES, &of_web), with_token(ROLES, &of_api)]).await?;
    assert_eq!((answers[0].status, answers[0].body.as_str()), (401, ""));
    assert_eq!((answers[1].status, answers[1].body.as_str()), (200, "api"));
    let answers = ask(&web, &[with_token(ROLES, &of_web)]).await?;
    assert_eq!((answers[0].status, answers[0].body.as_str()), (200, "web"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn where_tokens_are_required_nothing_is_answered_without() -> Result<()> {
    let stage = Stage::start_with(daemon_options().arg("--require-imdsv2")).await?;
    let (web, plain) = tokio::try_join!(web(&stage), resident(&stage, "plain", None))?;
    let paths = ["/", "/latest", "/latest/meta-data/instance-id", ROLES, DOCUMENT, "/nothing"];
    let plans: Vec<Plan> = paths.iter().map(|path| Plan::get(path)).collect();
    for container in [&web, &plain] {
        for (path, answer) in paths.iter().zip(ask(container, &plans).await?) {
            assert_eq!(answer.status, 401, "{path}");
            assert_eq!(answer.header("content-type"), Some("text/plain"), "{path}");
            assert_eq!((answer.header("content-length"), answer.body.as_str()), (Some("0"), ""), "{path}");
        }
    }
    assert_nothing_upstream(&stage);
    let token = token(&web, "21600").await?;
    let answers = ask(&web, &[with_token(ROLES, &token), with_token(DOCUMENT, &token)]).await?;
    assert_eq!(answers[0].body, "web");
    assert!(answers[1].body.starts_with("{\n  \"Code\" : \"Success\","));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_credential_document_is_that_of_the_real_service_byte_for_byte() -> Result<()> {
    let stage = Stage::start().await?;
    let web = web(&stage).await?;
    let answer = ask(&web, &[Plan::get(DOCUMENT)]).await?.remove(0);
    let value = |name: &str| {
        let (_, rest) = answer.body.split_once(&format!("\"{name}\" : \""))?;
        rest.split_once('"').map(|(value, _)| value)
    };
    let issued = stage.sts.issued(value("AccessKeyId").context("no key")?).context("not issued by STS")?;
    assert_eq!(issued.role_arn, role_arn("web"));
    let updated = value("LastUpdated").context("no time")?;
    let written = jiff::civil::DateTime::strptime("%Y-%m-%dT%H:%M:%SZ", updated)?;
    let age = jiff::Timestamp::now().duration_since(written.to_zoned(jiff::tz::TimeZone::UTC)?.timestamp());
    assert!((0..20).contains(&age.as_secs()), "{updated}");
    let expected = format!(
        "{{\n  \"Code\" : \"Success\",\n  \"LastUpdated\" : \"{updated}\",\n  \"Type\" : \"AWS-HMAC\",\n  \
         \"AccessKeyId\" : \"{}\",\n  \"SecretAccessKey\" : \"{}\",\n  \"Token\" : \"{}\",\n  \
         \"Expiration\" : \"{}\"\n}}",
        issued.access_key,
        issued.secret_key,
        issued.session_token,
        issued.expiration.strftime("%Y-%m-%dT%H:%M:%SZ"),
    );
    assert_eq!(answer.body, expected);

    assert_eq!(answer.status, 200);
    // As they are written on the wire, in the real service's order.
    let names: Vec<&str> = answer.headers.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!(names, ["Content-Type", "Accept-Ranges", "Last-Modified", "Content-Length", "Date", "Server"]);
    assert_eq!(answer.header("content-type"), Some("text/plain"));
    assert_eq!(answer.header("accept-ranges"), Some("none"));
    assert_eq!(answer.header("server"), Some("EC2ws"));
    assert_eq!(answer.header("content-length"), Some(expected.len().to_string().as_str()));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_iam_tree_has_the_containers_own_role_in_every_version_and_spelling() -> Result<()> {
    let stage = Stage::start().await?;
    // The name is the last part of the path.
    let web = resident(&stage, "web", Some("arn:aws-cn:iam::123456789012:role/team/a/web".to_owned())).await?;
    let mut cases: Vec<(String, u16, &str)> = Vec::new();
    let versions = "latest 1.0 2007-01-19 2007-03-01 2007-08-29 2007-10-10 2007-12-15 2008-02-01 2008-09-01 2009-04-04 \
        2011-01-01 2011-05-01 2012-01-12 2014-02-25 2014-11-05 2015-10-20 2016-04-19 2016-06-30 2016-09-02 2018-03-28 \
        2018-08-17 2018-09-24 2019-10-01 2020-10-27 2021-01-03 2021-03-23 2021-07-15 2022-07-09 2022-09-24 2024-04-11 \
        2031-12-31";
    for version in versions.split_whitespace() {
        cases.push((format!("/{version}/meta-data/iam/security-credentials/"), 200, "web"));
        cases.push((format!("/{version}/meta-data/iam/security-credentials/web"), 200, "{\n  \"Code\" : \"Success\","));
    }
    for (path, status, body) in [
        ("/latest/meta-data/iam", 200, "info\nsecurity-credentials/"),
        ("/latest/meta-data/iam/", 200, "info\nsecurity-credentials/"),
        ("/latest/meta-data/iam/security-credentials", 200, "web"),
        ("//latest/meta-data///iam/security-credentials//", 200, "web"),
        ("/latest/meta-data/%69am/security%2Dcredentials/", 200, "web"),
        ("/latest/meta-data/iam/security-credentials/?x=/../y", 200, "web"),
        ("/latest/meta-data/iam/security-credentials/web/", 200, "{\n  \"Code\" : \"Success\","),
        ("//latest/meta-data/iam/security-credentials/web", 200, "{\n  \"Code\" : \"Success\","),
        ("/latest/meta-data/iam/info", 200, "{\n  \"Code\" : \"Success\","),
        ("/latest/meta-data/iam/info/", 200, "{\n  \"Code\" : \"Success\","),
        ("/latest/meta-data/iam/security-credentials/api", 404, "<?xml"),
        ("/latest/meta-data/iam/security-credentials/WEB", 404, "<?xml"),
        ("/latest/meta-data/iam/security-credentials/team/a/web", 404, "<?xml"),
        ("/latest/meta-data/iam/security-credentials/simulated-host-role", 404, "<?xml"),
        ("/latest/meta-data/iam/security-credentials-extended/", 404, "<?xml"),
        ("/latest/meta-data/iam/security-credentials/web/more", 404, "<?xml"),
        ("/latest/meta-data/iam/nothing", 404, "<?xml"),
        ("/latest/iam/security-credentials/", 404, "<?xml"),
        ("/other/meta-data/iam/security-credentials/", 404, "<?xml"),
    ] {
        cases.push((path.to_owned(), status, body));
    }
    // All on one connection.
    let requests: String = cases.iter().map(|(path, ..)| head("GET", path, &[])).collect();
    let outcome = talk(&web, &[Plan::bytes(requests).answers(cases.len())]).await?.remove(0);
    assert_eq!(outcome.answers.len(), cases.len());
    for ((path, status, body), answer) in cases.iter().zip(&outcome.answers) {
        assert_eq!(answer.status, *status, "{path}: {answer:?}");
        match *body {
            "web" | "info\nsecurity-credentials/" => assert_eq!(answer.body, *body, "{path}"),
            _ => assert!(answer.body.starts_with(body), "{path}: {answer:?}"),
        }
        if *status == 404 {
            assert_eq!((answer.header("content-type"), answer.body.len()), (Some("text/html"), 339), "{path}");
        }
    }
    let info = outcome.answers.iter().find(|answer| answer.body.contains("InstanceProfileArn")).context("no info")?;
    let info: serde_json::Value = serde_json::from_str(&info.body)?;
    assert_eq!(info["InstanceProfileArn"], "arn:aws-cn:iam::123456789012:instance-profile/team/a/web");
    assert!(info["InstanceProfileId"].as_str().unwrap().starts_with("AIPA"));
    assert_eq!(info.as_object().unwrap().len(), 4);
    assert_eq!(stage.sts.assume_role_calls("arn:aws-cn:iam::123456789012:role/team/a/web"), 1);
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_without_a_role_sees_no_iam() -> Result<()> {
    let stage = Stage::start().await?;
    let plain = resident(&stage, "plain", None).await?;
    let paths = [
        "/latest/meta-data/iam",
        "/latest/meta-data/iam/",
        "/latest/meta-data/iam/info",
        "/latest/meta-data/iam/security-credentials",
        ROLES,
        DOCUMENT,
        "/1.0/meta-data/iam/security-credentials/simulated-host-role",
    ];
    let plans: Vec<Plan> = paths.iter().map(|path| Plan::get(path)).collect();
    for (path, answer) in paths.iter().zip(ask(&plain, &plans).await?) {
        assert_eq!((answer.status, answer.body.len()), (404, 339), "{path}");
    }
    let answers = ask(&plain, &[Plan::get("/latest/meta-data/"), Plan::get("/latest/meta-data")]).await?;
    for listing in answers {
        let entries: Vec<&str> = listing.body.lines().collect();
        assert!(entries.contains(&"instance-id"), "{entries:?}");
        assert!(!listing.body.contains("iam"), "{entries:?}");
    }
    assert!(!token(&plain, "300").await?.is_empty());
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn head_tells_what_get_would_and_sends_no_body() -> Result<()> {
    let stage = Stage::start().await?;
    let web = web(&stage).await?;
    for path in [ROLES, DOCUMENT, "/latest/meta-data/", "/latest/meta-data/instance-id", "/latest/meta-data/no"] {
        let get = Plan::get(path);
        // Whatever came after the head would be seen before the end.
        let head = Plan::request("HEAD", path, &["Connection: close"]).then_closes();
        let mut outcomes = talk(&web, &[get, head]).await?;
        let (head, get) = (outcomes.remove(1), outcomes.remove(0));
        assert!(head.got.ends_with("\r\n\r\n"), "{path}: {head:?}");
        assert_eq!(head.end, "closed");
        let (head, get) = (&head.answers[0], &get.answers[0]);
        assert_eq!(head.status, get.status, "{path}");
        for name in ["content-length", "content-type", "server", "last-modified", "accept-ranges"] {
            assert_eq!(head.header(name), get.header(name), "{path} {name}");
        }
        assert_eq!(head.header("content-length"), Some(get.body.len().to_string().as_str()), "{path}");
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_address_of_the_service_is_served_and_shown_as_the_peer() -> Result<()> {
    let stage = Stage::start().await?;
    let web = web(&stage).await?;
    let mapped = format!("::ffff:{METADATA_V4}");
    let addresses = [METADATA_V4, mapped.as_str(), METADATA_V6];
    let plans = addresses.map(|address| Plan::get(ROLES).to(address));
    for (address, outcome) in addresses.iter().zip(talk(&web, &plans).await?) {
        assert_eq!(outcome.answers.first().map(|answer| answer.body.as_str()), Some("web"), "{address}: {outcome:?}");
        assert_eq!(outcome.peer, format!("[{address}]:80"));
    }
    assert_nothing_upstream(&stage);
    Ok(())
}

/// Asks again over a connection that was left alone, at any moment around its end.
const REUSE: &str = r#"
import collections, json, socket, threading, time
REQUEST = b"GET /latest/meta-data/iam/security-credentials/ HTTP/1.1\r\nHost: x\r\n\r\n"
seen = collections.Counter()
def ask(pause):
    sock = socket.create_connection(("169.254.169.254", 80), 10)
    sock.sendall(REQUEST)
    sock.recv(65536)
    time.sleep(pause)
    try:
        # In two segments, as some clients do.
        sock.sendall(REQUEST[:20])
        time.sleep(0.005)
        sock.sendall(REQUEST[20:])
        answer = sock.recv(65536)
        seen["200" if b" 200 OK" in answer else "end" if answer == b"" else repr(answer)] += 1
    except OSError as error:
        seen[repr(error)] += 1
threads = [threading.Thread(target=ask, args=(1.6 + at * 0.005,)) for at in range(200)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps(seen))
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_that_is_used_again_as_it_ends_is_not_reset() -> Result<()> {
    let stage = Stage::start().await?;
    let spec = ContainerSpec::on_host("again", ["/usr/bin/python3", "-c", REUSE]);
    let again = stage.run(spec.label("metadata-proxy.role", &role_arn("again"))).await?;
    let seen: BTreeMap<String, usize> = serde_json::from_str(&stage.finish(&again).await?)?;
    let count = |what: &str| seen.get(what).copied().unwrap_or_default();
    ensure!(count("200") > 0 && count("end") > 0 && count("200") + count("end") == 200, "{seen:?}");
    stage.assert_no_leak()
}
