//! One container does its worst to fill maps, queues and limits; the others are served as ever.

use anyhow::{Context as _, Result, ensure};
use metadata_proxy_tests::{
    host::{ContainerSpec, Network},
    stage::{Stage, daemon_options, role_arn},
};
use serde::Deserialize;

/// As many connections as its descriptors allow, from as many source addresses as loopback has, most of
/// them left half-way, again and again.
const ATTACK: &str = r#"
import random, resource, socket, sys, time
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 20000), hard))
stop, tried, sockets = time.monotonic() + 6, 0, []
while time.monotonic() < stop:
    try:
        for _ in range(500):
            s = socket.socket()
            s.setblocking(False)
            s.bind((f"127.{random.randrange(256)}.{random.randrange(256)}.{random.randrange(1, 255)}", 0))
            s.connect_ex(("169.254.169.254", 80))
            sockets.append(s)
            tried += 1
    except OSError:
        pass
    if len(sockets) > 15000:
        for s in sockets:
            s.close()
        sockets = []
print(tried)
"#;

const CLIENT: &str = r#"
import json, time, urllib.request
LIST = "http://169.254.169.254/latest/meta-data/iam/security-credentials/"
answers, errors, worst = {}, [], 0
stop = time.monotonic() + 5
while time.monotonic() < stop:
    begin = time.monotonic()
    try:
        answer = urllib.request.urlopen(LIST, timeout=5).read().decode()
        answers[answer] = answers.get(answer, 0) + 1
    except Exception as error:
        errors.append(repr(error))
    worst = max(worst, time.monotonic() - begin)
    time.sleep(0.005)
print(json.dumps({"answers": answers, "errors": errors, "worst_ms": worst * 1000}))
"#;

#[derive(Debug, Deserialize)]
struct Report {
    answers: std::collections::BTreeMap<String, usize>,
    errors: Vec<String>,
    worst_ms: f64,
}

/// Asks from one network namespace of its own after the other, and tells how often it was answered with its role.
const NAMESPACES: &str = r#"
import ctypes, fcntl, os, socket, struct, sys
libc = ctypes.CDLL(None)
def ask():
    if libc.unshare(0x40000000):
        raise OSError("unshare")
    sock = socket.socket()
    fcntl.ioctl(sock, 0x8914, struct.pack("16sH14x", b"lo", 0x1)) # SIOCSIFFLAGS, IFF_UP
    sock.settimeout(5)
    sock.connect(("169.254.169.254", 80))
    sock.sendall(b"GET /latest/meta-data/iam/security-credentials/ HTTP/1.0\r\n\r\n")
    answer = b""
    while data := sock.recv(4096):
        answer += data
    sock.close()
    return answer.endswith(b"\r\n\r\n" + sys.argv[2].encode())
print(sum(ask() for _ in range(int(sys.argv[1]))))
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_container_with_a_thousand_networks_of_its_own_leaves_room_for_others() -> Result<()> {
    const MANY: usize = 1100;
    let options = daemon_options().env("METADATA_PROXY_LOG", "info").arg("--metrics-address").arg("127.0.0.1:9465");
    let stage = Stage::start_with(options).await?;
    let spec = |name: &str, count: usize| {
        let mut spec = ContainerSpec::on_host(name, ["/usr/bin/python3", "-c", NAMESPACES, &count.to_string(), name]);
        spec.host_config.cap_add = Some(vec!["SYS_ADMIN".to_owned(), "NET_ADMIN".to_owned()]);
        spec.label("metadata-proxy.role", &role_arn(name))
    };
    let served = |output: String| output.trim().parse::<usize>();
    ensure!(served(stage.finish(&stage.run(spec("many", MANY)).await?).await?)? == MANY, "not all were served");
    ensure!(served(stage.finish(&stage.run(spec("other", 3)).await?).await?)? == 3, "the other suffers");
    let mut ask = stage.command("timeout");
    let metrics = ask.args(["5", "busybox", "wget", "-qO-", "http://127.0.0.1:9465/metrics"]).output()?;
    let metrics = String::from_utf8(metrics.stdout)?;
    let count = |name: &str| metrics.lines().find_map(|line| line.strip_prefix(name)?.trim().parse::<usize>().ok());
    let evicted = count("metadata_proxy_listeners_evicted_total").context("not counted")?;
    let open = count("metadata_proxy_listeners").context("not counted")?;
    ensure!(open <= 1030 && evicted > 0, "{open} open, {evicted} evicted");
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_container_that_floods_costs_no_other_its_identity() -> Result<()> {
    let stage = Stage::start_with(daemon_options().env("METADATA_PROXY_LOG", "info")).await?;
    let spec = |name: &str, script: &str, network: Network| {
        ContainerSpec::on_host(name, ["/usr/bin/python3", "-c", script])
            .network(network)
            .label("metadata-proxy.role", &role_arn(name))
    };
    let attackers = [
        stage.run(spec("attacker", ATTACK, Network::Default)).await?,
        stage.run(spec("host-attacker", ATTACK, Network::Host)).await?,
    ];
    let victims = [
        stage.run(spec("victim", CLIENT, Network::Default)).await?,
        // In the same namespace as one attacker, and so at the same listener.
        stage.run(spec("neighbour", CLIENT, Network::Container("attacker".to_owned()))).await?,
        stage.run(spec("host-victim", CLIENT, Network::Host)).await?,
    ];
    for victim in &victims {
        let output = victim.wait().await?.success()?;
        let report: Report = serde_json::from_str(output.trim()).with_context(|| output.clone())?;
        eprintln!("{}: {:?}, worst {:.0} ms, {:?}", victim.name(), report.answers, report.worst_ms, report.errors);
        let right = report.answers.get(victim.name()).copied().unwrap_or_default();
        // Whoever shares the attacker's namespace shares its listener's queue: late, or not at all, but
        // never with another's role.
        ensure!(report.answers.keys().all(|role| role == victim.name()), "{}: {report:?}", victim.name());
        if victim.name() == "victim" {
            ensure!(report.errors.is_empty() && right > 5, "{}: {report:?}", victim.name());
        }
    }
    for attacker in &attackers {
        let tried: usize = attacker.wait().await?.success()?.trim().parse()?;
        ensure!(tried > 1000, "the attack was none: {tried} connections");
        eprintln!("{}: {tried} connections", attacker.name());
    }
    stage.assert_no_leak()
}
