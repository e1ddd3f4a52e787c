//! What a container gets over the wire: raw bytes through the kernel's redirection, to the daemon and back.

use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use metadata_proxy_tests::{
    host::{Container, ContainerSpec, METADATA_V4, METADATA_V6},
    imds::{HOST_ACCESS_KEY_PREFIX, HOST_INSTANCE, HOST_ROLE},
    stage::{Stage, daemon_options, role_arn},
};
use serde::{Deserialize, Serialize};

/// Speaks on sockets of its own, byte by byte as it is told, and tells what came back.
const TALK: &str = r#"
import json, socket, sys, threading, time

def parse(data, head):
    answers = []
    while b"\r\n\r\n" in data:
        top, rest = data.split(b"\r\n\r\n", 1)
        line, *lines = top.decode("latin-1").split("\r\n")
        headers = [tuple(line.split(": ", 1)) for line in lines]
        status = int(line.split(" ")[1])
        known = {name.lower(): value for name, value in headers}
        length = 0 if head or status < 200 else int(known["content-length"])
        if len(rest) < length:
            break
        answers.append({"status": status, "headers": headers, "body": rest[:length].decode("latin-1")})
        data = rest[length:]
    return answers

def talk(plan, results, at):
    begin = time.monotonic()
    address = plan["to"]
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    sock.settimeout(5)
    got, answers, peer, end = b"", [], "", "open"
    try:
        sock.connect((address, 80))
        peer = "[%s]:%d" % sock.getpeername()[:2]
        try:
            for part in plan["send"]:
                if isinstance(part, str):
                    sock.sendall(part.encode("latin-1"))
                else:
                    time.sleep(part)
        except OSError:
            pass # what was answered before is still to be read
        while True:
            answers = parse(got, plan["head"])
            enough = len(answers) >= plan["answers"]
            sock.settimeout(plan["linger"] if enough else max(begin + 8 - time.monotonic(), 0.01))
            data = sock.recv(65536)
            if not data:
                end = "closed"
                break
            got += data
    except ConnectionResetError:
        end = "closed"
    except socket.timeout:
        pass
    except OSError as error:
        end = repr(error)
    ms = (time.monotonic() - begin) * 1000
    results[at] = {"got": got.decode("latin-1"), "answers": answers, "end": end, "peer": peer, "ms": ms}

plans = json.loads(sys.argv[1])
results = [None] * len(plans)
threads = [threading.Thread(target=talk, args=(plan, results, at)) for at, plan in enumerate(plans)]
for thread in threads:
    thread.start()
    if sys.argv[2] == "in turn":
        thread.join()
for thread in threads:
    thread.join()
print(json.dumps(results))
"#;

/// One connection: what is sent on it, and how long it is watched.
#[derive(Clone, Debug, Serialize)]
struct Plan {
    to: String,
    send: Vec<Part>,
    /// So many answers are waited for.
    answers: usize,
    /// The answers have no bodies.
    head: bool,
    /// After the last answer, in seconds: for more, or for the end.
    linger: f64,
}

#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
enum Part {
    /// Each character is one byte.
    Bytes(String),
    Pause(f64),
}

#[derive(Debug, Deserialize)]
struct Outcome {
    got: String,
    answers: Vec<Answer>,
    /// `open`, `closed` by the other end, or the error.
    end: String,
    peer: String,
    ms: f64,
}

#[derive(Debug, Deserialize, PartialEq)]
struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    body: String,
}

/// Below the 2 s after which any idle connection ends.
const CLOSES: f64 = 1.2;

impl Plan {
    fn bytes(bytes: impl Into<String>) -> Self {
        let send = vec![Part::Bytes(bytes.into())];
        Self { to: METADATA_V4.to_owned(), send, answers: 1, head: false, linger: 0.0001 }
    }

    fn request(method: &str, path: &str, headers: &[&str]) -> Self {
        Self { head: method == "HEAD", ..Self::bytes(head(method, path, headers)) }
    }

    fn get(path: &str) -> Self {
        Self::request("GET", path, &[])
    }

    fn to(self, address: &str) -> Self {
        Self { to: address.to_owned(), ..self }
    }

    fn answers(self, answers: usize) -> Self {
        Self { answers, ..self }
    }

    /// Watches for the end of the connection that follows the last answer.
    fn then_closes(self) -> Self {
        Self { linger: CLOSES, ..self }
    }
}

impl Answer {
    fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_str())
    }
}

fn head(method: &str, path: &str, headers: &[&str]) -> String {
    let headers: String = headers.iter().map(|header| format!("{header}\r\n")).collect();
    format!("{method} {path} HTTP/1.1\r\nHost: 169.254.169.254\r\n{headers}\r\n")
}

async fn talk(container: &Container, plans: &[Plan]) -> Result<Vec<Outcome>> {
    converse(container, plans, "in turn").await
}

async fn converse(container: &Container, plans: &[Plan], order: &str) -> Result<Vec<Outcome>> {
    let plan = serde_json::to_string(plans)?;
    let output = container.exec(["/usr/bin/python3", "-c", TALK, &plan, order]).await?.success()?;
    serde_json::from_str(&output).with_context(|| format!("read {output:?}"))
}

/// The answer to each, one connection each.
async fn ask(container: &Container, plans: &[Plan]) -> Result<Vec<Answer>> {
    let outcomes = talk(container, plans).await?;
    let first = |(plan, mut outcome): (&Plan, Outcome)| {
        ensure!(outcome.answers.len() == 1, "{plan:?} got {outcome:?}");
        Ok(outcome.answers.remove(0))
    };
    plans.iter().zip(outcomes).map(first).collect()
}

async fn token(container: &Container, ttl: &str) -> Result<String> {
    let ttl = format!("X-aws-ec2-metadata-token-ttl-seconds: {ttl}");
    let mut answers = ask(container, &[Plan::request("PUT", "/latest/api/token", &[&ttl])]).await?;
    Ok(answers.remove(0).body)
}

fn with_token(path: &str, token: &str) -> Plan {
    Plan::request("GET", path, &[&format!("X-aws-ec2-metadata-token: {token}")])
}

/// A container that waits for commands.
async fn resident(stage: &Stage, name: &str, role: Option<String>) -> Result<Container> {
    let mut spec = ContainerSpec::on_host(name, ["/usr/bin/sleep", "600"]);
    if let Some(role) = role {
        spec = spec.label("metadata-proxy.role", &role);
    }
    stage.run(spec).await
}

async fn web(stage: &Stage) -> Result<Container> {
    resident(stage, "web", Some(role_arn("web"))).await
}

const ROLES: &str = "/latest/meta-data/iam/security-credentials/";
const DOCUMENT: &str = "/latest/meta-data/iam/security-credentials/web";
const TTL: &str = "x-aws-ec2-metadata-token-ttl-seconds";

/// The whole of what a container may see of a refused request.
fn assert_reveals_nothing(got: &str) {
    let hostname = std::fs::read_to_string("/proc/sys/kernel/hostname").expect("the name of the machine");
    let words =
        [HOST_ACCESS_KEY_PREFIX, "SIMULATED", HOST_INSTANCE, HOST_ROLE, "metadata-proxy", "hyper", hostname.trim()];
    for word in words {
        assert!(!got.to_lowercase().contains(&word.to_lowercase()), "{word:?} in {got:?}");
    }
}

fn assert_nothing_upstream(stage: &Stage) {
    let requests = stage.imds.requests();
    assert!(requests.is_empty(), "{requests:#?}");
}

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
        let expected = seconds * 1000.0 - 50.0..seconds * 1000.0 + 1500.0;
        // The dripping one notices between two pauses.
        assert!(expected.contains(&outcome.ms), "{outcome:?}");
    }
    assert!(slowest < 500.0, "another container waited {slowest} ms");
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
        assert!(outcome.ms < 1500.0, "{plan:?} {outcome:?}");
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
begin = time.monotonic()
socks = [connect() for _ in range(300)]
served = [answered(sock) for sock in socks]
took = time.monotonic() - begin
print("served", sum(served), "closed", served.count(False), flush=True)
assert took < 1.8, took # or the first would have been closed for being idle
time.sleep(1)
for sock in socks:
    sock.close()
time.sleep(0.3)
print("afterwards", answered(connect()))
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_container_with_too_many_connections_harms_only_itself() -> Result<()> {
    let stage = Stage::start().await?;
    let api = resident(&stage, "api", Some(role_arn("api"))).await?;
    let crowd = ContainerSpec::on_host("crowd", ["/usr/bin/python3", "-c", CROWD])
        .label("metadata-proxy.role", &role_arn("crowd"));
    let crowd = stage.run(crowd).await?;
    let full = async {
        while !crowd.output().await?.0.contains("served") {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        talk(&api, &[Plan::get(ROLES)]).await
    };
    let outcome = tokio::time::timeout(Duration::from_secs(10), full).await.context("no crowd")??.remove(0);
    assert_eq!(outcome.answers[0].body, "api");
    assert!(outcome.ms < 500.0, "{outcome:?}");
    assert!(!crowd.output().await?.0.contains("afterwards"), "the crowd was gone before the other container asked");
    assert_eq!(stage.finish(&crowd).await?, "served 256 closed 44\nafterwards True\n");
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
