//! Requests, connections and bytes that no client sends: each is refused, and disturbs nobody.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use metadata_proxy_tests::{
    host::ContainerSpec,
    stage::{Stage, daemon_options, role_arn},
    talk::{Part, Plan, ask, assert_nothing_upstream, assert_reveals_nothing, converse, head, resident, talk, web},
};

const ROLES: &str = "/latest/meta-data/iam/security-credentials/";
const DOCUMENT: &str = "/latest/meta-data/iam/security-credentials/web";

#[tokio::test(flavor = "multi_thread")]
async fn other_methods_are_refused() -> Result<()> {
    let stage = Stage::start().await?;
    let web = web(&stage).await?;
    for path in [DOCUMENT, "/latest/meta-data/instance-id", "/latest/user-data"] {
        let plans = ["POST", "PUT", "DELETE", "PATCH", "TRACE", "BREW"].map(|method| Plan::request(method, path, &[]));
        for (plan, answer) in plans.iter().zip(ask(&web, &plans).await?) {
            assert_eq!(answer.status, 405, "{plan:?}");
            assert_eq!(answer.header("allow"), Some("GET, HEAD"), "{plan:?}");
            assert_eq!(answer.body, "", "{plan:?}");
        }
    }
    assert_nothing_upstream(&stage);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn connections_live_as_long_as_the_client_says() -> Result<()> {
    let stage = Stage::start().await?;
    let web = web(&stage).await?;
    let get = |headers: &[&str]| head("GET", ROLES, headers);
    let put = head("PUT", "/latest/api/token", &["X-aws-ec2-metadata-token-ttl-seconds: 60", "Content-Length: 0"]);
    let pause = || Part::Pause(0.3);
    let kept = Plan {
        send: vec![
            Part::Bytes(put.clone()),
            pause(),
            Part::Bytes(get(&[])),
            pause(),
            Part::Bytes(head("GET", "/no", &[])),
            pause(),
            Part::Bytes(get(&["Connection: keep-alive"])),
        ],
        ..Plan::bytes("").answers(4)
    };
    let pipelined =
        Plan::bytes([get(&[]), head("GET", "/no", &[]), put, get(&[]), head("DELETE", ROLES, &[])].concat()).answers(5);
    let outcomes = talk(
        &web,
        &[
            kept,
            pipelined,
            Plan::bytes(get(&["Connection: close"]) + &get(&[])).then_closes(),
            Plan::bytes(format!("GET {ROLES} HTTP/1.0\r\n\r\n")).then_closes(),
            Plan::bytes(format!("GET {ROLES} HTTP/1.0\r\nConnection: keep-alive\r\n\r\n")),
        ],
    )
    .await?;
    let seen = |at: usize| outcomes[at].answers.iter().map(|answer| answer.status).collect::<Vec<_>>();
    let end = |at: usize| outcomes[at].end.as_str();
    assert_eq!((seen(0), end(0)), (vec![200, 200, 404, 200], "open"));
    assert_eq!((seen(1), end(1)), (vec![200, 404, 200, 200, 405], "open"));
    assert_eq!(outcomes[1].answers[0].body, "web");
    assert_eq!(outcomes[1].answers[2].body.len(), 56);
    assert_eq!((seen(2), end(2)), (vec![200], "closed"));
    assert_eq!(outcomes[2].answers[0].header("connection"), Some("close"));
    assert_eq!((seen(3), end(3)), (vec![200], "closed"));
    assert_eq!((seen(4), end(4)), (vec![200], "open"));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn half_sent_and_slow_requests_end_in_time_and_disturb_nobody() -> Result<()> {
    let stage = Stage::start().await?;
    let (web, api) = tokio::try_join!(web(&stage), resident(&stage, "api", Some(role_arn("api"))))?;
    ask(&api, &[Plan::get(ROLES)]).await?;

    let watch = |send: Vec<Part>, answers: usize| Plan { send, answers, linger: 6.0, ..Plan::bytes("") };
    let text = |text: &str| Part::Bytes(text.to_owned());
    let drip = (0..20).flat_map(|at| [Part::Bytes(format!("X-{at}: y\r\n")), Part::Pause(0.3)]);
    let whole = head("GET", ROLES, &[]);
    let plans = [
        watch(vec![], 0),
        watch(vec![text("GET /latest/meta-data/iam/secur")], 0),
        watch([text("GET / HTTP/1.1\r\n")].into_iter().chain(drip).collect(), 0),
        // The time begins anew with each request, also for one that never comes.
        watch(vec![Part::Bytes(whole.clone()), Part::Pause(1.0), Part::Bytes(whole.clone())], 2),
        watch(vec![Part::Bytes(whole), text("GET /half")], 1),
    ];
    let other = async {
        let mut slowest = 0_f64;
        for _ in 0..6 {
            let outcome = talk(&api, &[Plan::get(ROLES)]).await?.remove(0);
            ensure!(outcome.answers.first().is_some_and(|answer| answer.body == "api"), "{outcome:?}");
            slowest = slowest.max(outcome.ms);
        }
        Ok(slowest)
    };
    let (outcomes, slowest) = tokio::try_join!(converse(&web, &plans, "together"), other)?;
    for (outcome, (answers, seconds)) in outcomes.iter().zip([(0, 2.0), (0, 2.0), (0, 2.0), (2, 3.0), (1, 2.0)]) {
        assert_eq!(outcome.end, "closed", "{outcome:?}");
        assert_eq!(outcome.answers.len(), answers, "{outcome:?}");
        assert!(outcome.answers.iter().all(|answer| answer.body == "web"), "{outcome:?}");
        let expected = seconds * 1000.0 - 50.0..seconds * 1000.0 + 3000.0;
        // The dripping one notices between two pauses.
        assert!(expected.contains(&outcome.ms), "{outcome:?}");
    }
    assert!(slowest < 1500.0, "another container waited {slowest} ms");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn heads_over_the_limits_are_refused() -> Result<()> {
    let stage = Stage::start().await?;
    let web = web(&stage).await?;
    let many = |count: usize| (0..count).map(|at| format!("X-{at}: y")).collect::<Vec<_>>();
    let get = |headers: &[String]| {
        let headers: Vec<&str> = headers.iter().map(String::as_str).collect();
        head("GET", ROLES, &headers)
    };
    // `Host` is one more.
    let within = [get(&many(63)), get(&[format!("X-Long: {}", "y".repeat(7800))])];
    for answer in ask(&web, &within.map(Plan::bytes)).await? {
        assert_eq!((answer.status, answer.body.as_str()), (200, "web"));
    }
    let long_path = |length: usize| format!("GET /latest/{} HTTP/1.1\r\nHost: x\r\n\r\n", "a".repeat(length));
    let over = [
        (get(&many(64)), 431),
        (get(&many(600)), 431),
        (get(&[format!("X-Long: {}", "y".repeat(8200))]), 431),
        (format!("GET {ROLES} HTTP/1.1\r\nX-Endless: {}", "y".repeat(50_000)), 431),
        (long_path(1100), 414),
        (long_path(9000), 431),
        (long_path(20_000), 431),
    ];
    // Each is followed by a good one, which must find nobody.
    let plans = over.clone().map(|(bytes, _)| Plan::bytes(bytes + &get(&[])).then_closes());
    for ((bytes, status), outcome) in over.iter().zip(talk(&web, &plans).await?) {
        let name = &bytes[..40.min(bytes.len())];
        assert_eq!(outcome.end, "closed", "{name}... of {}: {:?}", bytes.len(), outcome.answers);
        // A client that goes on writing may lose the answer to the reset; it never gets another.
        assert!(outcome.answers.len() <= 1, "{name}: {:?}", outcome.answers);
        match outcome.answers.first() {
            Some(answer) => assert_eq!(answer.status, *status, "{name}... of {}", bytes.len()),
            None => assert!(bytes.len() > 8192, "{name}... of {} was not answered", bytes.len()),
        }
        assert_reveals_nothing(&outcome.got);
    }
    assert_eq!(ask(&web, &[Plan::get(ROLES)]).await?[0].body, "web");
    assert_nothing_upstream(&stage);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn targets_with_a_second_meaning_are_refused() -> Result<()> {
    let stage = Stage::start().await?;
    let web = web(&stage).await?;
    let targets = [
        "http://169.254.169.254/latest/meta-data/iam/security-credentials/",
        "http://169.254.169.254/latest/meta-data/instance-id",
        "http://192.0.2.1:4566/",
        "https://169.254.169.254/",
        "file:///etc/passwd",
        "169.254.169.254:80",
        "169.254.169.254",
        "*",
        "latest/meta-data/instance-id",
        "/latest/%",
        "/latest/%2",
        "/latest/meta-data/%zz",
        "/latest/meta-data/%+1",
        "/latest/meta-data%2finstance-id",
        "/latest/meta-data%2Finstance-id",
        "/latest/meta-data%5cinstance-id",
        "/latest/meta-data\\instance-id",
        "/latest/meta-data/../meta-data/instance-id",
        "/latest/meta-data/./instance-id",
        "/latest/meta-data/placement/%2e%2e/instance-id",
        "/latest/meta-data/placement/.%2E/instance-id",
        "/latest/meta-data/placement/.../instance-id",
        "/..",
        "/../../etc/passwd",
        "/latest/meta-data/instance-id%00",
        "/latest/meta-data/instance-id\0",
        "/latest/meta-data/instance-id%0d%0aX-Injected:%20y",
        "/latest/meta-data/%c0%ae%c0%ae/instance-id",
        "/latest/meta-data/%252e%252e/instance-id",
        "/latest/meta-data/%ff",
        "/latest/meta-data/\u{ff}\u{fe}",
        "/latest/meta-data/\u{c3}\u{a9}",
        "/latest/meta-data/\u{7f}",
        "/latest/meta-data/instance id",
        "/latest/meta-data/<instance-id>",
    ];
    // Each is followed by a good one, which must not be answered on a connection in doubt.
    let spoiled =
        |method: &str, target: &str| Plan::bytes(head(method, target, &[]) + &head("GET", ROLES, &[])).then_closes();
    let mut plans: Vec<Plan> = targets.iter().map(|target| spoiled("GET", target)).collect();
    plans.push(spoiled("CONNECT", "169.254.169.254:80"));
    plans.push(spoiled("CONNECT", "/latest/meta-data/instance-id%2f"));
    plans.push(spoiled("OPTIONS", "*"));
    plans.push(spoiled("PUT", "http://169.254.169.254/latest/api/token"));
    for (plan, outcome) in plans.iter().zip(talk(&web, &plans).await?) {
        let statuses: Vec<u16> = outcome.answers.iter().map(|answer| answer.status).collect();
        assert_eq!(statuses, [400], "{plan:?}");
        assert_eq!(outcome.end, "closed", "{plan:?}");
        assert_reveals_nothing(&outcome.got);
    }
    assert_eq!(ask(&web, &[Plan::get(ROLES)]).await?[0].body, "web");
    assert_nothing_upstream(&stage);
    let asked = stage
        .sts
        .calls()
        .into_iter()
        .filter(|call| !matches!(call.action.as_str(), "AssumeRole" | "GetCallerIdentity"));
    assert_eq!(asked.count(), 0);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_http_is_closed_and_the_daemon_unharmed() -> Result<()> {
    let stage = Stage::start().await?;
    let web = web(&stage).await?;
    let client_hello = "\u{16}\u{3}\u{1}\0\u{c4}\u{1}\0\0\u{c0}\u{3}\u{3}".to_owned() + &"\u{a5}\0\u{ff}".repeat(62);
    let get = |rest: &str| format!("GET {ROLES} HTTP/1.1\r\nHost: x\r\n{rest}");
    let nonsense = [
        client_hello,
        "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\u{4}\0\0\0\0\0".to_owned(),
        "\0".repeat(3000),
        (0..=255).map(char::from).collect::<String>().repeat(10),
        "EHLO example.org\r\n\r\n".to_owned(),
        "GET\r\n\r\n".to_owned(),
        "GET /\r\n\r\n".to_owned(),
        "GET / HTTP/9.9\r\n\r\n".to_owned(),
        "GET / HTTP/0.9\r\n\r\n".to_owned(),
        "GE\u{1}T / HTTP/1.1\r\n\r\n".to_owned(),
        get("no colon\r\n\r\n"),
        get("X-Nul: a\0b\r\n\r\n"),
        get("X Y: z\r\n\r\n"),
        get(": z\r\n\r\n"),
        get("X-A: b\r\n folded\r\n\r\n"),
        get("Content-Length: -1\r\n\r\n"),
        get("Content-Length: many\r\n\r\n"),
        get("Content-Length: 99999999999999999999999\r\n\r\n"),
        get("Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd"),
        get("Transfer-Encoding: gzip\r\n\r\n"),
        get("Transfer-Encoding: chunked, identity\r\n\r\n"),
        format!("GET {ROLES} HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n"),
    ];
    let plans = nonsense.map(|bytes| Plan { answers: 2, ..Plan::bytes(bytes + "\r\n\r\n" + &get("\r\n")) });
    for (plan, outcome) in plans.iter().zip(talk(&web, &plans).await?) {
        assert_eq!(outcome.end, "closed", "{plan:?} {outcome:?}");
        // At once, not by the time limit.
        assert!(outcome.ms < 1900.0, "{plan:?} {outcome:?}");
        assert!(outcome.answers.len() <= 1, "{plan:?} {outcome:?}");
        assert!(outcome.answers.iter().all(|answer| answer.status == 400), "{plan:?} {outcome:?}");
        assert_reveals_nothing(&outcome.got);
    }
    assert_eq!(ask(&web, &[Plan::get(ROLES)]).await?[0].body, "web");
    assert_nothing_upstream(&stage);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_within_a_body_is_never_answered() -> Result<()> {
    let stage = Stage::start().await?;
    let web = web(&stage).await?;
    let inner = head("GET", DOCUMENT, &[]);
    let chunk = format!("{:x}\r\n{inner}\r\n0\r\n\r\n", inner.len());
    let length = format!("Content-Length: {}", inner.len());
    let ttl = "X-aws-ec2-metadata-token-ttl-seconds: 60";
    let chunked = "Transfer-Encoding: chunked";
    // What follows the head, how many answers there may be, and the first one's status.
    let cases = [
        (head("GET", ROLES, &[&length]) + &inner, 1, 200),
        (head("GET", ROLES, &[&length]) + &inner + &head("GET", "/no", &[]), 2, 200),
        (head("PUT", "/latest/api/token", &[ttl, chunked]) + &chunk, 1, 200),
        (head("GET", ROLES, &[chunked]) + "0\r\n\r\n" + &inner, 1, 200),
        // The announced body is larger than anybody will read.
        (head("PUT", "/latest/api/token", &[ttl, "Content-Length: 1000000000"]) + &inner, 1, 200),
        (head("GET", ROLES, &["Expect: 100-continue", "Content-Length: 10"]), 1, 200),
        (head("GET", ROLES, &[&length, "Expect: 100-continue"]) + &inner, 1, 200),
        // Two lengths: the reading of whoever stands between us and the client may differ from ours.
        (head("GET", ROLES, &["Content-Length: 4", chunked]) + "0\r\n\r\n" + &inner, 1, 200),
        (head("GET", ROLES, &[chunked, "Content-Length: 4"]) + "0\r\n\r\n" + &inner, 1, 200),
        (head("GET", ROLES, &[chunked, &length]) + &chunk, 1, 200),
        (head("GET", ROLES, &[chunked]) + "zz\r\n" + &inner, 1, 200),
    ];
    let plans = cases.clone().map(|(bytes, answers, _)| Plan::bytes(bytes).answers(answers).then_closes());
    for ((bytes, most, status), outcome) in cases.iter().zip(talk(&web, &plans).await?) {
        let statuses: Vec<u16> = outcome.answers.iter().map(|answer| answer.status).collect();
        assert_eq!(statuses.first(), Some(status), "{bytes}: {outcome:?}");
        assert!(statuses.len() <= *most, "{bytes}: {statuses:?}");
        assert!(!outcome.got.contains("SecretAccessKey"), "{bytes}: {}", outcome.got);
        if bytes.contains("chunked") {
            assert_eq!(outcome.end, "closed", "{bytes}");
        }
    }
    Ok(())
}

/// Opens 300 connections, asks on each, and keeps those that are answered.
const CROWD: &str = r#"
import socket, sys, time
request = b"GET /latest/meta-data/iam/security-credentials/ HTTP/1.1\r\nHost: x\r\n\r\n"
def connect():
    sock = socket.create_connection(("169.254.169.254", 80), 5)
    try:
        sock.sendall(request)
    except OSError:
        pass
    return sock
def answered(sock):
    try:
        return sock.recv(65536).startswith(b"HTTP/1.1 200")
    except OSError:
        return False
socks = [connect() for _ in range(300)]
served = [answered(sock) for sock in socks]
print("served", sum(served), "closed", served.count(False), flush=True)
time.sleep(6)
for sock in socks:
    sock.close()
time.sleep(0.3)
print("afterwards", answered(connect()))
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_container_with_too_many_connections_harms_only_itself() -> Result<()> {
    // Long enough that none is closed for being idle.
    let stage = Stage::configured(daemon_options(), "[limits]\nconnections = 256\nhead-timeout = '60s'\n").await?;
    let api = resident(&stage, "api", Some(role_arn("api"))).await?;
    let crowd = ContainerSpec::on_host("crowd", ["/usr/bin/python3", "-c", CROWD])
        .label("metadata-proxy.role", &role_arn("crowd"));
    let crowd = stage.run(crowd).await?;
    let full = async {
        crowd.says("served", Duration::from_secs(10)).await?;
        talk(&api, &[Plan::get(ROLES)]).await
    };
    let outcome = tokio::time::timeout(Duration::from_secs(10), full).await.context("no crowd")??.remove(0);
    assert_eq!(outcome.answers[0].body, "api");
    assert!(outcome.ms < 1500.0, "{outcome:?}");
    assert!(!crowd.output().await?.0.contains("afterwards"), "the crowd was gone before the other container asked");
    assert_eq!(stage.finish(&crowd).await?, "served 256 closed 44\nafterwards True\n");
    Ok(())
}
