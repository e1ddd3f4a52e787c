//! What one container may have: limits that the operator sets and that are counted, and others served as ever while one
//! container does its worst.

use std::{
    collections::BTreeMap,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use metadata_proxy_tests::{
    host::{Container, ContainerSpec},
    imds::Fault,
    stage::{Stage, daemon_options, role_arn},
    sts,
};
use serde::Deserialize;

const METRICS: &str = "127.0.0.1:9464";

async fn start(limits: &str) -> Result<Stage> {
    let options = daemon_options().arg("--metrics-address").arg(METRICS).env("METADATA_PROXY_LOG", "info");
    Stage::configured(options, limits).await
}

async fn resident(stage: &Stage, name: &str) -> Result<Container> {
    stage.run(ContainerSpec::resident(name).label("metadata-proxy.role", &role_arn(name))).await
}

async fn python(container: &Container, script: &str, argument: &str) -> Result<String> {
    container.exec(["/usr/bin/python3", "-c", script, argument]).await?.success()
}

/// How often something was refused, by reason.
fn refused(stage: &Stage) -> Result<BTreeMap<String, u64>> {
    let url = format!("http://{METRICS}/metrics");
    let output = stage.command("timeout").args(["5", "busybox", "wget", "-qO-", &url]).output()?;
    let text = String::from_utf8(output.stdout)?;
    ensure!(output.status.success() && !text.is_empty(), "no metrics");
    let counts = text.lines().filter_map(|line| line.strip_prefix("metadata_proxy_refused_total{reason=\""));
    counts
        .map(|count| {
            let (reason, value) = count.split_once("\"} ").context("no value")?;
            Ok((reason.to_owned(), value.parse()?))
        })
        .collect()
}

/// Everything that the limits below are about, once.
const EXCEED: &str = r#"
import json, socket, threading, time
def connect(data=b""):
    sock = socket.create_connection(("169.254.169.254", 80), 5)
    sock.sendall(data)
    return sock
def status(sock):
    try:
        answer = sock.recv(65536)
    except ConnectionResetError:
        return "closed"
    return int(answer.split(b" ")[1]) if answer else "closed"
def get(path, headers=()):
    lines = ["GET %s HTTP/1.1" % path, "Host: x", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n"
def until(condition):
    stop = time.monotonic() + 5
    while not condition() and time.monotonic() < stop:
        time.sleep(0.02)
ROLES, SLOW = "/latest/meta-data/iam/security-credentials/", "/latest/meta-data/local-ipv4"
seen = {}

sock = connect(get(ROLES, ["X-%d: y" % at for at in range(99)]))
seen["headers"] = status(sock); sock.close(); time.sleep(0.1)
sock = connect(get(ROLES, ["X-%d: y" % at for at in range(100)]))
seen["more headers"] = status(sock); sock.close(); time.sleep(0.1)
sock = connect(get(ROLES, ["X: " + "y" * 16000]))
seen["head"] = status(sock); sock.close(); time.sleep(0.1)
sock = connect(get(ROLES, ["X: " + "y" * 16400]))
seen["larger head"] = status(sock); sock.close(); time.sleep(0.1)
sock = connect(b"\x16\x03\x01 this is no HTTP\r\n\r\n")
seen["nonsense"] = status(sock); sock.close(); time.sleep(0.1)

begin = time.monotonic()
sock = connect(b"GET / HT")
seen["half a head"] = status(sock)
seen["after ms"] = int((time.monotonic() - begin) * 1000); sock.close(); time.sleep(0.1)

# One asks the slow service, first for a token; so only the other is over the limit of one.
first, second = connect(get(SLOW)), connect()
time.sleep(0.2)
second.sendall(get(SLOW))
seen["second request"] = status(second); second.close()
seen["first request"] = status(first); first.close()
third = connect(get(SLOW))
seen["third request"] = status(third); third.close()
time.sleep(0.2)

# One after the other, for one request at a time is the limit, too; a connection too many is closed unasked.
socks = [connect() for _ in range(5)]
def ask(sock):
    try:
        sock.sendall(get(ROLES))
    except OSError:
        return "closed"
    return status(sock)
seen["connections"] = [ask(sock) for sock in socks]
for sock in socks: sock.close()
time.sleep(0.2)
seen["afterwards"] = status(connect(get(ROLES)))
print(json.dumps(seen))
"#;

#[tokio::test(flavor = "multi_thread")]
async fn limits_are_the_operators_and_each_refusal_is_counted() -> Result<()> {
    let limits = "[limits]\nconnections = 3\nrequests = 1\nhead-size = 16384\nheaders = 100\nhead-timeout = '2s'\n";
    let stage = start(limits).await?;
    let (web, api) = tokio::try_join!(resident(&stage, "web"), resident(&stage, "api"))?;
    stage.imds.set_fault(Some(Fault::Delay(Duration::from_millis(600))));
    let seen: serde_json::Value = serde_json::from_str(&python(&web, EXCEED, "").await?)?;
    for (what, expected) in [
        ("headers", 200.into()),
        ("more headers", 431.into()),
        ("head", 200.into()),
        ("larger head", 431.into()),
        ("nonsense", 400.into()),
        ("half a head", "closed".into()),
        ("first request", 200.into()),
        ("second request", 503.into()),
        ("third request", 200.into()),
        ("connections", serde_json::json!([200, 200, 200, "closed", "closed"])),
        ("afterwards", 200.into()),
    ] {
        assert_eq!(seen[what], expected, "{what} in {seen:#}");
    }
    let waited = seen["after ms"].as_u64().context("no time")?;
    assert!((1950..8000).contains(&waited), "{waited} ms");
    let expected = [("connections", 2), ("head_size", 2), ("head_timeout", 1), ("malformed", 1), ("requests", 1)];
    assert_eq!(refused(&stage)?, expected.map(|(reason, count)| (reason.to_owned(), count)).into());

    // The share is each container's own.
    let crowd = "import socket; s = [socket.create_connection(('169.254.169.254', 80), 5) for _ in range(3)]; import time; time.sleep(60)";
    let spec = ContainerSpec::on_host("crowd", ["/usr/bin/python3", "-c", crowd]);
    stage.run(spec.label("metadata-proxy.role", &role_arn("crowd"))).await?;
    for _ in 0..5 {
        assert_eq!(serde_json::from_str::<Latency>(&python(&api, VICTIM, "0.2").await?)?.wrong, 0);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn no_container_fills_the_log() -> Result<()> {
    const REPEAT: &str = "import http.client, sys\n\
        h = http.client.HTTPConnection('169.254.169.254', timeout=10)\n\
        for _ in range(400):\n    h.request('GET', '/latest/meta-data/iam/security-credentials/' + sys.argv[1]); h.getresponse().read()\n";
    let stage = start("").await?;
    let forbidden = role_arn("forbidden");
    stage.sts.set_role_fault(&forbidden, Some(sts::Fault::Refuse));
    let (web, forbidden) = tokio::try_join!(resident(&stage, "web"), resident(&stage, "forbidden"))?;
    for (container, path, words) in [(&web, "web", "handed out"), (&forbidden, "", "no credentials:")] {
        let lines = |log: &str| log.lines().filter(|line| line.contains(words)).map(str::to_owned).collect::<Vec<_>>();
        let before = lines(&stage.daemon.log()?).len();
        let begin = Instant::now();
        python(container, REPEAT, path).await?;
        let most = 20 + usize::try_from(begin.elapsed().as_secs())? + 2;
        let said = lines(&stage.daemon.log()?).len() - before;
        assert!((10..=most).contains(&said), "{words}: {said} lines for 400 requests");
        tokio::time::sleep(Duration::from_secs(2)).await;
        python(container, &REPEAT.replace("400", "1"), path).await?;
        let all = lines(&stage.daemon.log()?);
        let unsaid =
            all.iter().filter_map(|line| line.split_once("unsaid=")?.1.split(' ').next()?.parse::<usize>().ok());
        // Nothing is lost but its own line.
        assert_eq!(unsaid.sum::<usize>() + all.len() - before, 401, "{words}: {all:#?}");
    }
    Ok(())
}

/// One request after the other for so many seconds, each on a connection of its own, as SDKs do.
const VICTIM: &str = r#"
import json, os, sys, time, urllib.request
LIST = "http://169.254.169.254/latest/meta-data/iam/security-credentials/"
times, wrong, mine = [], 0, None
stop = time.monotonic() + float(sys.argv[1])
while time.monotonic() < stop:
    begin = time.monotonic()
    try:
        answer = urllib.request.urlopen(LIST, timeout=5).read()
        mine = mine or answer
        wrong += answer != mine
    except OSError:
        wrong += 1
    times.append((time.monotonic() - begin) * 1000)
    time.sleep(0.005)
times.sort()
print(json.dumps({"count": len(times), "wrong": wrong, "median": times[len(times) // 2], "p95": times[len(times) * 95 // 100]}))
"#;

#[derive(Debug, Deserialize)]
struct Latency {
    count: usize,
    wrong: u32,
    median: f64,
    p95: f64,
}

/// Does one kind of harm until it is stopped; says so when it has begun.
const ATTACK: &str = r#"
import resource, select, socket, sys, time
kind = sys.argv[1]
_, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
def connect():
    sock = socket.create_connection(("169.254.169.254", 80), 5)
    sock.setblocking(False)
    return sock
def send(sock, data):
    try:
        sock.send(data)
        return True
    except BlockingIOError:
        return True
    except OSError:
        return False
GET = b"GET /latest/meta-data/iam/security-credentials/ HTTP/1.1\r\nHost: x\r\n"
if kind == "idle":
    # Ten thousand of them, held, whatever the other end thinks of it.
    socks = [connect() for _ in range(10000)]
    print("begun", len(socks), flush=True)
    while True:
        # Those at the end of the list are the newest: they are renewed, so that the share is always used up.
        for sock in socks[:100]:
            sock.close()
        socks = socks[100:] + [connect() for _ in range(100)]
        time.sleep(0.2)
opening = {"slow-head": GET + b"X-A: ", "slow-body": GET + b"Content-Length: 100000\r\n\r\n", "headers": GET}[kind]
line = {"slow-head": b"y", "slow-body": b"y", "headers": b"X-Header: " + b"y" * 80 + b"\r\n"}[kind]
socks = []
rounds = 0
while True:
    rounds += 1
    socks = [sock for sock in socks if send(sock, line * (200 if kind == "headers" else 1))]
    for _ in range(min(50, 250 - len(socks))):
        sock = connect()
        send(sock, opening)
        socks.append(sock)
    if rounds == 10:
        print("begun", len(socks), flush=True)
    time.sleep(0.05)
"#;

#[tokio::test(flavor = "multi_thread")]
async fn others_are_served_at_their_usual_latency_whatever_one_container_does() -> Result<()> {
    let stage = start("").await?;
    let victim = resident(&stage, "victim").await?;
    let measure = async || -> Result<Latency> { Ok(serde_json::from_str(&python(&victim, VICTIM, "3").await?)?) };
    measure().await?;
    let usual = measure().await?;
    eprintln!("alone: {usual:?}");
    ensure!(usual.wrong == 0 && usual.count > 30, "{usual:?}");
    for kind in ["idle", "slow-head", "slow-body", "headers"] {
        let spec = ContainerSpec::on_host(kind, ["/usr/bin/python3", "-c", ATTACK, kind]);
        let before = refused(&stage)?;
        let attacker = stage.run(spec.label("metadata-proxy.role", &role_arn(kind))).await?;
        attacker.says("begun", Duration::from_secs(40)).await?;
        let meanwhile = measure().await?;
        let complaints = attacker.output().await?.1;
        attacker.remove().await?;
        let after = refused(&stage)?;
        let count = |reason: &str| {
            after.get(reason).copied().unwrap_or_default() - before.get(reason).copied().unwrap_or_default()
        };
        eprintln!("{kind}: {meanwhile:?}, refused {after:?}");
        ensure!(complaints.is_empty(), "{kind}: {complaints}");
        // Generous, for the attacker needs the processors as well; a daemon that waits for it would take seconds.
        ensure!(meanwhile.wrong == 0, "{kind}: {meanwhile:?}");
        ensure!(meanwhile.median < usual.median * 10.0 + 10.0, "{kind}: {meanwhile:?} instead of {usual:?}");
        ensure!(meanwhile.p95 < usual.p95 * 10.0 + 100.0, "{kind}: {meanwhile:?} instead of {usual:?}");
        let expected = match kind {
            "idle" => count("connections") > 5000 && count("head_timeout") >= 512,
            "slow-head" => count("head_timeout") > 100,
            "headers" => count("head_size") > 100,
            // A body is not waited for: the answer ends the connection, which is no refusal.
            _ => true,
        };
        ensure!(expected, "{kind}: {before:?} {after:?}");
    }
    ensure!(stage.daemon.log()?.lines().count() < 200, "the log is full:\n{}", stage.daemon.log()?);
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn hundreds_of_processes_of_one_container_wait_for_the_same_credentials() -> Result<()> {
    const BURST: &str = r#"
import collections, json, socket, threading, time
answers = collections.Counter()
start = threading.Barrier(300)
def ask():
    start.wait()
    try:
        sock = socket.create_connection(("169.254.169.254", 80), 20)
        sock.sendall(b"GET /latest/meta-data/iam/security-credentials/burst HTTP/1.1\r\nHost: x\r\n\r\n")
        answers[sock.recv(65536).split(b" ")[1].decode()] += 1
    except (OSError, IndexError) as error:
        answers[repr(error)] += 1
threads = [threading.Thread(target=ask) for _ in range(300)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(json.dumps(answers))
"#;
    let stage = start("").await?;
    stage.sts.set_fault(Some(sts::Fault::Delay(Duration::from_secs(2))));
    let spec = ContainerSpec::on_host("burst", ["/usr/bin/python3", "-c", BURST]);
    let container = stage.run(spec.label("metadata-proxy.role", &role_arn("burst"))).await?;
    let answers: serde_json::Value = serde_json::from_str(&stage.finish(&container).await?)?;
    ensure!(answers == serde_json::json!({ "200": 300 }), "{answers}");
    ensure!(stage.sts.assume_role_calls(&role_arn("burst")) == 1, "asked more than once");
    stage.assert_no_leak()
}
