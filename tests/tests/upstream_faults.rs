//! A real service that keeps connections, closes them at the wrong moment, says too much or stops in the middle.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    net::TcpStream,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use metadata_proxy_tests::{
    host::{Container, ContainerSpec},
    imds::HOST_INSTANCE,
    stage::{Stage, daemon_options, role_arn},
};
use serde::Deserialize;

const ADDRESS: &str = "192.0.2.1:8169";

/// What happens in answer to a request.
#[derive(Clone)]
enum Act {
    Send(Vec<u8>),
    Pause(Duration),
    /// Ends the connection.
    Close,
}

/// Decides about a request: how many this connection had before, and its path.
type Script = fn(usize, &str) -> Vec<Act>;

/// A service that is written for a test, speaks HTTP/1.1 and keeps its connections.
#[derive(Clone, Default)]
struct Service {
    connections: Arc<AtomicUsize>,
    requests: Arc<Mutex<Vec<String>>>,
    /// Being answered, and how many were at most.
    busy: Arc<AtomicUsize>,
    busiest: Arc<AtomicUsize>,
}

impl Service {
    fn start(stage: &Stage, script: Script) -> Result<Self> {
        let listener = stage.bind_tcp(ADDRESS)?;
        listener.set_nonblocking(false)?;
        let service = Self::default();
        let shared = service.clone();
        thread::spawn(move || {
            for connection in listener.incoming().flatten() {
                shared.connections.fetch_add(1, Ordering::Relaxed);
                let service = shared.clone();
                thread::spawn(move || service.serve(&connection, script));
            }
        });
        Ok(service)
    }

    fn connections(&self) -> usize {
        self.connections.load(Ordering::Relaxed)
    }

    fn requests(&self) -> Vec<String> {
        self.requests.lock().expect("a thread has failed").clone()
    }

    fn serve(&self, connection: &TcpStream, script: Script) {
        let mut lines = BufReader::new(connection).lines().map_while(Result::ok);
        for before in 0.. {
            let Some(first) = lines.next() else { return };
            lines.by_ref().take_while(|line| !line.is_empty()).for_each(drop);
            let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
            self.requests.lock().expect("a thread has failed").push(path.clone());
            let acts = if first.starts_with("PUT") { vec![document("token")] } else { script(before, &path) };
            let busy = self.busy.fetch_add(1, Ordering::Relaxed) + 1;
            self.busiest.fetch_max(busy, Ordering::Relaxed);
            let goes_on = carry_out(acts, connection);
            self.busy.fetch_sub(1, Ordering::Relaxed);
            if !goes_on {
                return;
            }
        }
    }
}

/// Whether the connection is to be kept.
fn carry_out(acts: Vec<Act>, mut connection: &TcpStream) -> bool {
    acts.into_iter().all(|act| match act {
        Act::Send(bytes) => connection.write_all(&bytes).is_ok(),
        Act::Pause(time) => {
            thread::sleep(time);
            true
        }
        Act::Close => false,
    })
}

fn announced(length: usize) -> Act {
    Act::Send(format!("HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nContent-Length: {length}\r\n\r\n").into_bytes())
}

fn document(body: &str) -> Act {
    let Act::Send(mut bytes) = announced(body.len()) else { unreachable!("it is sent") };
    bytes.extend(body.as_bytes());
    Act::Send(bytes)
}

fn bytes(count: usize) -> Act {
    Act::Send(vec![b'x'; count])
}

/// Asks for each path on a connection of its own: what arrives, when, and how it ends.
const READ: &str = r#"
import json, socket, sys, time
results = []
for path in sys.argv[1:]:
    begin = time.monotonic()
    sock = socket.create_connection(("169.254.169.254", 80), 10)
    sock.sendall(b"GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % path.encode())
    got, pieces, end = b"", [], "closed"
    try:
        while data := sock.recv(1 << 20):
            got += data
            pieces.append([(time.monotonic() - begin) * 1000, len(got)])
    except OSError as error:
        end = type(error).__name__
    head, _, body = got.partition(b"\r\n\r\n")
    lines = head.decode("latin-1").lower().split("\r\n")
    results.append({
        "status": int(lines[0].split(" ")[1]) if got else 0,
        "length": next((int(line[16:]) for line in lines if line.startswith("content-length: ")), None),
        "chunked": "transfer-encoding: chunked" in lines,
        "received": len(body), "body": body[:100].decode(), "pieces": pieces, "end": end,
        "ms": (time.monotonic() - begin) * 1000,
    })
print(json.dumps(results))
"#;

#[derive(Debug, Deserialize)]
struct Outcome {
    status: u16,
    length: Option<usize>,
    chunked: bool,
    received: usize,
    body: String,
    /// When, in ms, and how much there was then.
    pieces: Vec<(f64, usize)>,
    end: String,
    ms: f64,
}

async fn read(container: &Container, paths: &[&str]) -> Result<Vec<Outcome>> {
    let command = ["/usr/bin/python3", "-c", READ].into_iter().chain(paths.iter().copied());
    let output = container.exec(command).await?.success()?;
    serde_json::from_str(&output).with_context(|| format!("read {output:?}"))
}

async fn start(script: Script) -> Result<(Stage, Service, Container)> {
    let endpoint = daemon_options().arg("--imds-endpoint").arg(format!("http://{ADDRESS}"));
    let stage = Stage::start_with(endpoint.arg("--allow-user-data")).await?;
    let service = Service::start(&stage, script)?;
    let spec = ContainerSpec::resident("web");
    let web = stage.run(spec.label("metadata-proxy.role", &role_arn("web"))).await?;
    Ok((stage, service, web))
}

const IPV4: &str = "/latest/meta-data/local-ipv4";
const LISTING: &str = "/latest/meta-data/";
const USER_DATA: &str = "/latest/user-data";
const TOKEN: &str = "/latest/api/token";

#[tokio::test(flavor = "multi_thread")]
async fn connections_are_kept_and_one_that_has_gone_stale_costs_no_answer() -> Result<()> {
    // The sixth request on a connection, the token's included, meets its end.
    let script: Script = |before, _| if before < 5 { vec![document("10.0.0.10")] } else { vec![Act::Close] };
    let (_stage, service, web) = start(script).await?;
    for outcome in read(&web, &[IPV4; 4]).await? {
        assert_eq!((outcome.status, outcome.body.as_str()), (200, "10.0.0.10"), "{outcome:?}");
    }
    assert_eq!(service.connections(), 1, "{:?}", service.requests());
    for outcome in read(&web, &[IPV4; 6]).await? {
        assert_eq!((outcome.status, outcome.body.as_str()), (200, "10.0.0.10"), "{outcome:?}");
    }
    // Two requests were asked again.
    assert_eq!(service.connections(), 3);
    let mut expected = vec![TOKEN];
    expected.extend([IPV4; 12]);
    assert_eq!(service.requests(), expected);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_connection_that_fails_is_a_failure_and_not_asked_again() -> Result<()> {
    let (_stage, service, web) = start(|_, _| vec![Act::Close]).await?;
    let outcomes = read(&web, &[IPV4, IPV4]).await?;
    for outcome in &outcomes {
        assert_eq!((outcome.status, outcome.body.as_str()), (502, ""), "{outcome:?}");
        assert!(outcome.ms < 1500.0, "{outcome:?}");
    }
    // The first came over the connection of the token, and once more over one of its own; the second had none to reuse.
    assert_eq!(service.requests(), [TOKEN, IPV4, IPV4, IPV4]);
    assert_eq!(service.connections(), 3);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn nonsense_over_a_kept_connection_is_not_asked_again() -> Result<()> {
    let script: Script = |_, _| vec![Act::Send(b"220 smtp.example.com ESMTP\r\n".to_vec()), Act::Close];
    let (_stage, service, web) = start(script).await?;
    assert_eq!(read(&web, &[IPV4]).await?[0].status, 502);
    assert_eq!(service.requests(), [TOKEN, IPV4]);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn documents_are_passed_on_as_they_come() -> Result<()> {
    const HALF: usize = 400_000;
    let script: Script = |_, _| vec![announced(2 * HALF), bytes(HALF), Act::Pause(Duration::from_secs(1)), bytes(HALF)];
    let (_stage, service, web) = start(script).await?;
    let outcome = read(&web, &[USER_DATA]).await?.remove(0);
    assert_eq!((outcome.status, outcome.length, outcome.received), (200, Some(2 * HALF), 2 * HALF));
    assert!(!outcome.chunked);
    let early = outcome.pieces.iter().filter(|(ms, _)| *ms < outcome.ms - 500.0).map(|(_, received)| *received).max();
    assert!(early.is_some_and(|received| received > HALF / 2), "{:?}", outcome.pieces);
    assert!(outcome.ms > 950.0, "{outcome:?}");
    // It is read to its end, so its connection is kept.
    assert_eq!(read(&web, &[USER_DATA]).await?[0].received, 2 * HALF);
    assert_eq!(service.connections(), 1);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_larger_than_any_document_is_refused() -> Result<()> {
    const MIB: usize = 1 << 20;
    let script: Script = |_, path| match path {
        USER_DATA => vec![announced(MIB + 1), bytes(MIB + 1)],
        // Without an end, and without saying so beforehand.
        LISTING | "/latest/dynamic/fws/x" => {
            let chunk = [format!("{MIB:x}\r\n").into_bytes(), vec![b'x'; MIB], b"\r\n".to_vec()].concat();
            let head = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n".to_vec();
            let chunks = std::iter::repeat_n(Act::Send(chunk), 50);
            [Act::Send(head)].into_iter().chain(chunks).collect()
        }
        "/latest/meta-data/mac" => {
            vec![Act::Send(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n02\r\n0\r\n\r\n".to_vec())]
        }
        "/latest/meta-data/profile" => {
            vec![Act::Send([b"HTTP/1.1 200 OK\r\nX-Long: ".to_vec(), vec![b'x'; MIB]].concat())]
        }
        _ => vec![announced(MIB), bytes(MIB)],
    };
    let (_stage, _service, web) = start(script).await?;
    let refused = [USER_DATA, LISTING, "/latest/dynamic/fws/x", "/latest/meta-data/profile"];
    for (path, outcome) in refused.iter().zip(read(&web, &refused).await?) {
        assert_eq!((outcome.status, outcome.received, outcome.length), (502, 0, Some(0)), "{path}: {outcome:?}");
        assert!(outcome.ms < 1900.0, "{path}: {outcome:?}");
    }
    let taken = read(&web, &[IPV4, "/latest/meta-data/mac"]).await?;
    assert_eq!((taken[0].status, taken[0].received), (200, MIB));
    // Whatever form it came in, containers see the real service's.
    assert_eq!((taken[1].body.as_str(), taken[1].length, taken[1].chunked), ("02", Some(2), false));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_stops_in_the_middle_is_never_taken_for_the_whole() -> Result<()> {
    let script: Script = |_, path| match path {
        "/latest/user-data" | "/latest/meta-data/" => {
            vec![announced(1000), bytes(500), Act::Pause(Duration::from_secs(20))]
        }
        "/latest/meta-data/local-ipv4" | "/latest/dynamic/" => vec![announced(1000), bytes(500), Act::Close],
        // It is taken whole, for it is kept.
        "/latest/meta-data/instance-id" => vec![announced(19), bytes(5), Act::Close],
        _ => vec![document("still there")],
    };
    let (_stage, _service, web) = start(script).await?;
    let paths = [USER_DATA, LISTING, IPV4, "/latest/dynamic/", "/latest/meta-data/instance-id"];
    let outcomes = read(&web, &paths).await?;
    let seen: Vec<_> = outcomes.iter().map(|outcome| (outcome.status, outcome.length)).collect();
    let streamed = (200, Some(1000));
    assert_eq!(seen, [streamed, (504, Some(0)), streamed, (502, Some(0)), (502, Some(0))]);
    // Of what breaks off at once, nothing may arrive.
    assert!(outcomes.iter().all(|outcome| outcome.received <= 500) && outcomes[0].received == 500, "{outcomes:?}");
    for (outcome, slow) in outcomes.iter().zip([true, true, false, false, false]) {
        let expected = if slow { 1900.0..6000.0 } else { 0.0..1500.0 };
        assert!(expected.contains(&outcome.ms), "{outcome:?}");
        assert!(["closed", "ConnectionResetError"].contains(&outcome.end.as_str()), "{outcome:?}");
    }
    assert_eq!(read(&web, &["/latest/meta-data/mac"]).await?[0].body, "still there");
    Ok(())
}

/// Forty at once, before there is a session.
const CROWD: &str = r#"
import threading, urllib.request
bodies = []
def ask():
    bodies.append(urllib.request.urlopen("http://169.254.169.254/latest/meta-data/local-ipv4", timeout=5).read().decode())
threads = [threading.Thread(target=ask) for _ in range(40)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(len(bodies), set(bodies))
"#;

#[tokio::test(flavor = "multi_thread")]
async fn many_at_once_share_one_session() -> Result<()> {
    let script: Script = |_, _| vec![Act::Pause(Duration::from_millis(300)), document("10.0.0.10")];
    let (_stage, service, web) = start(script).await?;
    let output = web.exec(["/usr/bin/python3", "-c", CROWD]).await?.success()?;
    assert_eq!(output.trim(), "40 {'10.0.0.10'}");
    let requests = service.requests();
    assert_eq!(requests.iter().filter(|path| *path == TOKEN).count(), 1, "{requests:?}");
    assert_eq!(requests.len(), 41);
    assert!(service.connections() > 10, "one after the other: {}", service.connections());
    Ok(())
}

/// So many at a time ask again and again until the end of the container; how many do is said when all have begun.
const CROWDING: &str = r#"
import http.client, threading
def ask():
    while True:
        try:
            asking = http.client.HTTPConnection("169.254.169.254", timeout=5)
            asking.request("GET", "/latest/meta-data/public-ipv4")
            asking.getresponse().read()
        except OSError:
            pass
threads = [threading.Thread(target=ask, daemon=True) for _ in range(40)]
for thread in threads: thread.start()
print("begun", flush=True)
for thread in threads: thread.join()
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_crowd_before_a_slow_service_leaves_room_for_others() -> Result<()> {
    let script: Script = |_, _| vec![Act::Pause(Duration::from_millis(500)), document("10.0.0.10")];
    let (stage, service, web) = start(script).await?;
    let crowds = ["crowd-1", "crowd-2", "crowd-3"].map(|name| {
        let spec = ContainerSpec::on_host(name, ["/usr/bin/python3", "-c", CROWDING]);
        stage.run(spec.label("metadata-proxy.role", &role_arn(name)))
    });
    for crowd in futures_util::future::try_join_all(crowds).await? {
        crowd.says("begun", Duration::from_secs(60)).await?;
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    // Each crowd of forty has its share of 32, and waits for the rest.
    for outcome in read(&web, &[IPV4; 5]).await? {
        assert_eq!((outcome.status, outcome.body.as_str()), (200, "10.0.0.10"), "{outcome:?}");
    }
    let busiest = service.busiest.load(Ordering::Relaxed);
    assert!((64..=97).contains(&busiest), "{busiest} at once");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn what_never_changes_is_asked_once_and_everything_else_each_time() -> Result<()> {
    let stage = Stage::start().await?;
    let web = stage.run(ContainerSpec::resident("web")).await?;
    let constant = [
        "/latest/meta-data/instance-id",
        "/latest/meta-data/placement/availability-zone",
        "/latest/meta-data/placement/availability-zone-id",
        "/latest/meta-data/placement/region",
        "/latest/meta-data/services/domain",
        "/1.0/meta-data/instance-id",
    ];
    let changing = [
        IPV4,
        LISTING,
        "/latest/meta-data/instance-type",
        "/latest/meta-data/ami-id",
        "/latest/meta-data/placement/",
        "/latest/dynamic/instance-identity/document",
        // Not there, which may change.
        "/latest/meta-data/spot/instance-action",
        "/2031-12-31/meta-data/instance-id",
    ];
    let all = [&constant[..], &changing].concat();
    let first = read(&web, &all).await?;
    let again = read(&web, &all).await?;
    for ((path, first), again) in all.iter().zip(&first).zip(&again) {
        assert_eq!((first.status, &first.body, first.length), (again.status, &again.body, again.length), "{path}");
        let asked = stage.imds.requests().iter().filter(|request| request.target == *path).count();
        assert_eq!(asked, if constant.contains(path) { 1 } else { 2 }, "{path}");
    }
    stage.imds.stop_listening()?;
    let down = read(&web, &[constant[0], IPV4]).await?;
    assert_eq!((down[0].status, down[0].body.as_str(), down[1].status), (200, HOST_INSTANCE, 502));
    Ok(())
}
