//! `cargo xtask bench`: what the interception costs, as ratios within one run: a request to the daemon
//! against one to a bare hyper server; the first connection in a network namespace that nobody knows; a
//! connect and a packet to anywhere else with our programs attached and without.
//!
//! Started as `bench client TARGET COUNT` it is the client that measures.
#![expect(clippy::print_stdout, reason = "what it shows is its standard output")]

use std::{
    convert::Infallible,
    env,
    io::{Read as _, Write as _},
    net::{TcpStream, UdpSocket},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use bytes::Bytes;
use http_body_util::Full;
use hyper::{server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use metadata_proxy_tests::{
    host::{Container, ContainerSpec, Network, program},
    stage::{Stage, daemon_options, role_arn},
};

const BARE: &str = "127.0.0.1:9000";
const IMDS: &str = "169.254.169.254:80";
const LIST: &str = "/latest/meta-data/iam/security-credentials/";
const REQUESTS: usize = 4000;
const CONNECTS: usize = 200_000;
const NAMESPACES: usize = 200;

/// First connections, each in a network namespace of its own that is made for it: how long connect(2) took
/// in milliseconds (p50, p99, worst), and how often the SYN was repeated at most.
const DIALS: &str = r#"
import ctypes, fcntl, socket, struct, sys, time
libc = ctypes.CDLL(None, use_errno=True)
times, repeats = [], []
for _ in range(int(sys.argv[1])):
    if libc.unshare(0x40000000):
        raise OSError(ctypes.get_errno(), "unshare")
    s = socket.socket()
    fcntl.ioctl(s, 0x8914, struct.pack("16sh22x", b"lo", 1))
    begin = time.perf_counter()
    s.connect(("169.254.169.254", 80))
    times.append((time.perf_counter() - begin) * 1e3)
    repeats.append(struct.unpack_from("I", s.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 232), 100)[0])
    s.close()
times.sort()
print(times[len(times) // 2], times[len(times) * 99 // 100], times[-1], max(repeats))
"#;

fn main() -> Result<()> {
    let arguments: Vec<String> = env::args().skip(1).collect();
    match arguments.iter().map(String::as_str).collect::<Vec<_>>().as_slice() {
        ["client", call @ ("connect" | "option" | "packet"), count] => unrelated(call, count.parse()?),
        ["client", target, count] => requests(target, count.parse()?),
        [] => tokio::runtime::Runtime::new()?.block_on(compare()),
        _ => anyhow::bail!("usage: bench [client TARGET COUNT]"),
    }
}

async fn compare() -> Result<()> {
    // Not at debug, where it logs each request; but it has to say that it is ready.
    let quiet = daemon_options().env("METADATA_PROXY_LOG", "warn,metadata_proxy::containers=info");
    let stage = Stage::start_with(quiet).await?;
    let listener = tokio::net::TcpListener::from_std(stage.bind_tcp(BARE)?)?;
    tokio::spawn(bare_server(listener));

    println!("a request on a connection of its own, from a host-network container, p50 and p99 in microseconds");
    let bare = in_container(&stage, "bare", BARE, REQUESTS).await?;
    let ours = in_container(&stage, "ours", IMDS, REQUESTS).await?;
    println!("  bare hyper server    {:>8.1} {:>8.1}", bare[0], bare[1]);
    println!(
        "  metadata-proxy       {:>8.1} {:>8.1}   ratio {:.2} {:.2}",
        ours[0],
        ours[1],
        ours[0] / bare[0],
        ours[1] / bare[1]
    );

    println!("the first connection in a new network namespace, p50, p99 and worst in milliseconds");
    for (name, busy) in [("else idle", 0), ("under load", 4)] {
        let load = (0..busy).map(|number| busy_client(&stage, number)).collect::<Vec<_>>();
        let load = futures_util::future::try_join_all(load).await?;
        let first = first_connections(&stage, &format!("first-{busy}")).await?;
        println!(
            "  {name:<20} {:>8.1} {:>8.1} {:>8.1}   SYN repeated {} times at most",
            first[0], first[1], first[2], first[3]
        );
        ensure!(first[2] < 250.0 && first[3] <= 3.0, "a client that waits 250 ms, as Go does, would have given up");
        for client in load {
            client.remove().await?;
        }
    }

    println!("what has nothing to do with the service, as a host process, in microseconds");
    let Stage { mut daemon, sts: _sts, imds: _imds, host } = stage;
    // The programs stay; what is left of the daemon would only add noise.
    daemon.terminate(Duration::from_secs(10)).await?;
    let run = |target: &str, count: usize| {
        measure(host.command(env::current_exe()?).args(["client", target, &count.to_string()]))
    };
    let kinds = [
        ("connect(2) of a UDP socket", "connect", CONNECTS),
        ("setsockopt(2)", "option", CONNECTS),
        ("a packet of a UDP socket", "packet", CONNECTS),
        ("a TCP connection with a request", BARE, REQUESTS),
    ];
    let all = || kinds.iter().map(|(_, target, count)| run(target, *count)).collect::<Result<Vec<_>>>();
    let with = all()?;
    ensure!(host.command(program()?).arg("detach").output()?.status.success(), "detach");
    for (((name, ..), with), without) in kinds.iter().zip(with).zip(all()?) {
        println!("  {name}: attached {:.3}, detached {:.3}, ratio {:.3}", with[0], without[0], with[0] / without[0]);
    }
    Ok(())
}

async fn bare_server(listener: tokio::net::TcpListener) {
    while let Ok((stream, _)) = listener.accept().await {
        let answer = |_| async { Ok::<_, Infallible>(http::Response::new(Full::new(Bytes::from_static(b"bench")))) };
        tokio::spawn(http1::Builder::new().serve_connection(TokioIo::new(stream), service_fn(answer)));
    }
}

async fn in_container(stage: &Stage, name: &str, target: &str, count: usize) -> Result<Vec<f64>> {
    let own = env::current_exe()?;
    let own = own.to_str().context("a path that is no text")?;
    let spec = ContainerSpec::on_host(name, [own, "client", target, &count.to_string()])
        .network(Network::Host)
        .bind(format!("{own}:{own}:ro"))
        .label("metadata-proxy.role", &role_arn("bench"));
    numbers(&stage.finish(&stage.run(spec).await?).await?)
}

async fn busy_client(stage: &Stage, number: usize) -> Result<Container> {
    let script = format!("while :; do curl -s http://{IMDS}{LIST} http://{IMDS}{LIST} http://{IMDS}{LIST}; done");
    let spec = ContainerSpec::on_host(&format!("busy-{number}"), ["/usr/bin/sh", "-c", &script]);
    stage.run(spec.label("metadata-proxy.role", &role_arn("bench"))).await
}

async fn first_connections(stage: &Stage, name: &str) -> Result<Vec<f64>> {
    let mut spec = ContainerSpec::on_host(name, ["/usr/bin/python3", "-c", DIALS, &NAMESPACES.to_string()]);
    spec.host_config.cap_add = Some(vec!["SYS_ADMIN".into(), "NET_ADMIN".into()]);
    // Docker's default profile keeps unshare(2) from whoever has no CAP_SYS_ADMIN; AppArmor from all.
    spec.host_config.security_opt = Some(vec!["apparmor=unconfined".into()]);
    numbers(&stage.finish(&stage.run(spec).await?).await?)
}

fn measure(command: &mut std::process::Command) -> Result<Vec<f64>> {
    let output = command.output()?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    numbers(&String::from_utf8_lossy(&output.stdout))
}

fn numbers(text: &str) -> Result<Vec<f64>> {
    text.split_whitespace().map(|number| Ok(number.parse()?)).collect()
}

fn requests(target: &str, count: usize) -> Result<()> {
    let mut times = Vec::with_capacity(count);
    let request = format!("GET {LIST} HTTP/1.1\r\nHost: bench\r\nConnection: close\r\n\r\n");
    // The first waits for the listener and for STS.
    for number in 0..=count {
        let begin = Instant::now();
        let mut stream = TcpStream::connect(target).with_context(|| format!("connect to {target}"))?;
        stream.write_all(request.as_bytes())?;
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer)?;
        if number > 0 {
            times.push(begin.elapsed());
        }
        ensure!(answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
    }
    times.sort();
    let at = |part: usize| times.get(count * part / 100).map_or(0.0, |time| time.as_secs_f64() * 1e6);
    println!("{} {}", at(50), at(99));
    Ok(())
}

fn unrelated(call: &str, count: usize) -> Result<()> {
    const ROUNDS: usize = 20;
    let (socket, other) = (UdpSocket::bind("127.0.0.1:0")?, UdpSocket::bind("127.0.0.1:0")?);
    let to = other.local_addr()?;
    let once: Box<dyn Fn() -> std::io::Result<()>> = match call {
        "connect" => Box::new(|| socket.connect("127.0.0.1:9")),
        "option" => Box::new(|| socket.set_broadcast(true)),
        // What the other does not read is dropped.
        _ => Box::new(|| socket.send_to(b"0", to).map(drop)),
    };
    let mut best = f64::MAX;
    // The quietest round: on a busy machine the others measure that.
    for _ in 0..ROUNDS {
        let begin = Instant::now();
        for _ in 0..count / ROUNDS {
            once()?;
        }
        best = best.min(begin.elapsed().as_secs_f64() * 1e6 / (count / ROUNDS) as f64);
    }
    println!("{best}");
    Ok(())
}
