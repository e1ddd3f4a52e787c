//! The daemon's ends and beginnings: nobody notices a good one, and no bad one opens the way to the host's role.

use std::{
    future::Future,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use futures_util::future::try_join_all;
use metadata_proxy_tests::{
    host::{Container, ContainerSpec, Daemon, Finished, Network, program},
    imds::HOST_ROLE,
    stage::{Stage, daemon_options, role_arn},
    sts::Fault,
};

const END: Duration = Duration::from_secs(10);
const READY: Duration = Duration::from_secs(20);

/// A container that waits for commands, with the role of its own name.
async fn resident(stage: &Stage, name: &str, network: Network) -> Result<Container> {
    let spec = ContainerSpec::resident(name).network(network);
    stage.run(spec.label("metadata-proxy.role", &role_arn(name))).await
}

/// One on each kind of network that has a way of its own to the host.
async fn everywhere(stage: &Stage) -> Result<Vec<Container>> {
    let networks = [("bridge", Network::Default), ("host", Network::Host), ("none", Network::None)];
    try_join_all(networks.map(|(name, network)| resident(stage, name, network))).await
}

async fn fetch(container: &Container, address: &str) -> Result<Finished> {
    let url = format!("http://{address}/latest/meta-data/iam/security-credentials/");
    container.exec(["/usr/bin/curl", "-sS", "--fail", "--globoff", "--max-time", "9", &url]).await
}

async fn role_of(container: &Container) -> Result<String> {
    fetch(container, "169.254.169.254").await?.success()
}

/// Each is served with its own role.
async fn assert_served(containers: &[Container]) -> Result<()> {
    let roles = try_join_all(containers.iter().map(role_of)).await?;
    for (container, role) in containers.iter().zip(roles) {
        assert_eq!(role, container.name());
    }
    Ok(())
}

/// None gets through to anything, on either address.
async fn assert_cut_off(stage: &Stage, containers: &[Container]) -> Result<()> {
    let attempts = containers.iter().flat_map(|container| {
        ["169.254.169.254", "[fd00:ec2::254]"].map(|address| async move {
            let finished = fetch(container, address).await?;
            // 7: could not connect; 28: gave up.
            ensure!(
                [7, 28].contains(&finished.exit_code) && finished.stdout.is_empty(),
                "{} on {address}: {finished:?}",
                container.name()
            );
            Ok(())
        })
    });
    try_join_all(attempts).await?;
    let requests = stage.imds.requests();
    assert!(requests.is_empty(), "reached the real service: {requests:#?}");
    Ok(())
}

fn kernel() -> (u32, u32) {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|number| number.parse().ok());
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0))
}

async fn start_again(stage: &mut Stage) -> Result<()> {
    stage.daemon = stage.host.daemon(daemon_options())?;
    stage.daemon.wait_ready(READY).await
}

#[tokio::test(flavor = "multi_thread")]
async fn sigterm_lets_requests_in_flight_end() -> Result<()> {
    let mut stage = Stage::start().await?;
    stage.sts.set_fault(Some(Fault::Delay(Duration::from_millis(2000))));
    let slow = resident(&stage, "slow", Network::Default).await?;
    let request = tokio::spawn(async move { role_of(&slow).await });
    // The call is under way since the container's start, and by then the request is too.
    tokio::time::sleep(Duration::from_millis(1000)).await;
    assert_eq!(stage.sts.assume_role_calls(&role_arn("slow")), 1);
    ensure!(!request.is_finished());
    let begin = Instant::now();
    let status = stage.daemon.terminate(END).await?;
    let took = begin.elapsed();
    assert_eq!(status.code(), Some(0), "{}", stage.daemon.log()?);
    assert_eq!(request.await??, "slow");
    // It waited for that answer, and not for its time limit.
    assert!(took < Duration::from_millis(4500), "{took:?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_idle_daemon_ends_at_once() -> Result<()> {
    let mut stage = Stage::start().await?;
    let bridge = resident(&stage, "bridge", Network::Default).await?;
    assert_eq!(role_of(&bridge).await?, "bridge");
    // An open connection without a request holds nothing up.
    let idle =
        "import socket, time; s = socket.create_connection(('169.254.169.254', 80)); print('open'); time.sleep(9)";
    let idle = stage.run(ContainerSpec::on_host("idle", ["/usr/bin/python3", "-uc", idle])).await?;
    idle.says("open", Duration::from_secs(60)).await?;
    let begin = Instant::now();
    assert_eq!(stage.daemon.terminate(END).await?.code(), Some(0));
    assert!(begin.elapsed() < Duration::from_secs(4), "{:?}", begin.elapsed());

    start_again(&mut stage).await?;
    let pid = stage.daemon.pid().to_string();
    assert!(stage.command("kill").args(["-INT", &pid]).status()?.success());
    assert_eq!(stage.daemon.wait(END).await?.code(), Some(0));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn after_sigterm_no_container_reaches_the_real_service_until_it_is_served_again() -> Result<()> {
    let mut stage = Stage::start().await?;
    let mut containers = everywhere(&stage).await?;
    assert_served(&containers).await?;
    assert_eq!(stage.daemon.terminate(END).await?.code(), Some(0));
    containers.push(resident(&stage, "late", Network::Default).await?);
    assert_cut_off(&stage, &containers).await?;
    start_again(&mut stage).await?;
    assert_served(&containers).await?;
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn after_sigkill_no_container_reaches_the_real_service_until_it_is_served_again() -> Result<()> {
    let mut stage = Stage::start().await?;
    let mut containers = everywhere(&stage).await?;
    assert_served(&containers).await?;
    stage.daemon.kill().await?;
    containers.push(resident(&stage, "late", Network::Default).await?);
    assert_cut_off(&stage, &containers).await?;
    start_again(&mut stage).await?;
    assert_served(&containers).await?;
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_network_container_started_while_the_daemon_is_down_is_cut_off_too() -> Result<()> {
    let mut stage = Stage::start().await?;
    stage.daemon.terminate(END).await?;
    let containers = [resident(&stage, "host", Network::Host).await?];
    assert_cut_off(&stage, &containers).await?;
    start_again(&mut stage).await?;
    assert_served(&containers).await?;
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_waits_for_the_daemon_to_come_back() -> Result<()> {
    let mut stage = Stage::start().await?;
    let containers = everywhere(&stage).await?;
    assert_served(&containers).await?;
    stage.daemon.terminate(END).await?;
    let waiting = containers.clone();
    let requests = tokio::spawn(async move {
        let begin = Instant::now();
        assert_served(&waiting).await.map(|()| begin.elapsed())
    });
    // On kernels that do not let the last pause of the hold be capped, two seconds are too long.
    let away = if kernel() >= (6, 15) { 2600 } else { 1000 };
    tokio::time::sleep(Duration::from_millis(away)).await;
    ensure!(!requests.is_finished(), "answered or refused while there was no daemon: {:?}", requests.await);
    start_again(&mut stage).await?;
    let took = requests.await??;
    assert!(took < Duration::from_secs(9), "{took:?}");
    stage.assert_no_leak()
}

/// Is there before the daemon, on the port that it would take.
const SQUATTER: &str = r#"
import socket, time
sock = socket.socket()
sock.bind(("127.169.254.169", 16925))
sock.listen()
print("bound", flush=True)
time.sleep(600)
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_connection_waits_also_where_somebody_else_has_our_port() -> Result<()> {
    let mut stage = Stage::start().await?;
    stage.daemon.terminate(END).await?;
    let spec = ContainerSpec::on_host("web", ["/usr/bin/python3", "-c", SQUATTER]);
    let web = stage.run(spec.label("metadata-proxy.role", &role_arn("web"))).await?;
    web.says("bound", Duration::from_secs(20)).await?;
    start_again(&mut stage).await?;
    let containers = [web];
    assert_served(&containers).await?;
    stage.daemon.terminate(END).await?;
    let waiting = tokio::spawn(async move { assert_served(&containers).await });
    tokio::time::sleep(Duration::from_millis(500)).await;
    ensure!(!waiting.is_finished(), "answered or refused while there was no daemon");
    start_again(&mut stage).await?;
    waiting.await??;
    stage.assert_no_leak()
}

/// Asks for more and more and reads none of it, until its own end or the other's.
const GREEDY: &str = r#"
import socket, time
sock = socket.socket()
sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
sock.connect(("169.254.169.254", 80))
sock.settimeout(1)
request = b"GET /latest/meta-data/iam/security-credentials/ HTTP/1.1\r\nHost: x\r\n\r\n" * 1000
try:
    while True:
        sock.sendall(request)
except TimeoutError:
    print("stuck", flush=True)
time.sleep(600)
"#;

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_does_not_read_costs_no_other_its_answer_while_the_daemon_is_restarted() -> Result<()> {
    let mut stage = Stage::start().await?;
    let containers = everywhere(&stage).await?;
    assert_served(&containers).await?;
    let greedy = ContainerSpec::on_host("greedy", ["/usr/bin/python3", "-c", GREEDY]);
    let greedy = stage.run(greedy.label("metadata-proxy.role", &role_arn("greedy"))).await?;
    greedy.says("stuck", Duration::from_secs(60)).await?;
    let pid = stage.daemon.pid().to_string();
    assert!(stage.command("kill").args(["-TERM", &pid]).status()?.success());
    // Asked while the daemon waits for the greedy one, and held by the kernel until the next is there.
    tokio::time::sleep(Duration::from_millis(300)).await;
    let waiting = tokio::spawn(async move { assert_served(&containers).await });
    assert_eq!(stage.daemon.wait(END).await?.code(), Some(0));
    start_again(&mut stage).await?;
    waiting.await??;
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_daemon_takes_over_from_one_that_is_running() -> Result<()> {
    let mut stage = Stage::start().await?;
    let containers = everywhere(&stage).await?;
    assert_served(&containers).await?;
    // What an upgrade looks like that starts the new one first.
    let mut second: Daemon = stage.host.daemon(daemon_options())?;
    second.wait_ready(READY).await?;
    assert_served(&containers).await?;
    stage.daemon.terminate(END).await?;
    assert_served(&containers).await?;
    stage.assert_no_leak()
}

async fn detach(stage: &Stage) -> Result<(Option<i32>, String)> {
    let output = stage.command(program()?).arg("detach").output()?;
    Ok((output.status.code(), String::from_utf8(output.stderr)?))
}

#[tokio::test(flavor = "multi_thread")]
async fn detach_removes_everything_and_gives_the_real_service_back() -> Result<()> {
    let mut stage = Stage::start().await?;
    let containers =
        [resident(&stage, "bridge", Network::Default).await?, resident(&stage, "host", Network::Host).await?];
    assert_served(&containers).await?;
    stage.daemon.terminate(END).await?;
    stage.assert_no_leak()?;

    let (code, said) = detach(&stage).await?;
    assert_eq!(code, Some(0), "{said}");
    assert!(!said.contains("a daemon is running"), "{said}");
    for pin in ["imds_connect4", "imds_connect6", "imds_sock_ops", "imds_egress", "LISTENERS"] {
        let line = said.lines().find(|line| line.ends_with(pin));
        assert!(line.is_some_and(|line| line.starts_with("removed /sys/fs/bpf/metadata-proxy/")), "no {pin}: {said}");
    }
    let left = stage.command("ls").arg("/sys/fs/bpf").output()?;
    assert!(!String::from_utf8(left.stdout)?.contains("metadata-proxy"));
    // That they get through now proves that nothing but we held them back.
    for container in &containers {
        assert_eq!(role_of(container).await?, HOST_ROLE);
    }
    assert_eq!(stage.imds.requests().len(), 2);

    let (code, said) = detach(&stage).await?;
    assert_eq!((code, said.as_str()), (Some(0), "nothing is attached\n"));

    stage.imds.clear();
    start_again(&mut stage).await?;
    assert_served(&containers).await?;
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn detach_removes_what_it_can_and_names_the_rest() -> Result<()> {
    // The mount point of another cannot be removed.
    const KEPT: &str = "/sys/fs/bpf/metadata-proxy/v4/links-busy";
    let stage = Stage::start().await?;
    let container = resident(&stage, "host", Network::Host).await?;
    let mount = format!("mkdir {KEPT} && mount --bind {KEPT} {KEPT}");
    assert!(stage.command("sh").args(["-c", &mount]).status()?.success(), "{mount}");
    let (code, said) = detach(&stage).await?;
    assert_eq!(code, Some(1), "{said}");
    for words in [
        "a daemon is running (it answers at /run/metadata-proxy/admin.sock)",
        &format!("cannot remove {KEPT}: "),
        "removed /sys/fs/bpf/metadata-proxy/v4/maps/SETTINGS",
        "not everything could be removed",
    ] {
        assert!(said.contains(words), "no {words:?} in {said}");
    }
    assert_eq!(role_of(&container).await?, HOST_ROLE);
    assert!(stage.command("umount").arg(KEPT).status()?.success());
    assert_eq!(detach(&stage).await?.0, Some(0));
    Ok(())
}

/// Counts the sockets of a process that listen on our address, in whatever network namespace: copies each of its
/// descriptors (`pidfd_getfd`) and asks it.
const LISTENERS: &str = r#"
import ctypes, os, socket, sys
pid = int(sys.argv[1])
pidfd = os.pidfd_open(pid)
count = 0
for fd in os.listdir(f"/proc/{pid}/fd"):
    copy = ctypes.CDLL(None).syscall(438, pidfd, int(fd), 0)
    if copy < 0:
        continue
    try:
        sock = socket.socket(fileno=copy)
        listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
        count += bool(listens and sock.getsockname()[0] == "127.169.254.169")
    except OSError:
        pass
print(count)
"#;

fn listeners(stage: &Stage) -> Result<u32> {
    let pid = stage.daemon.pid().to_string();
    let output = stage.command("/usr/bin/python3").args(["-c", LISTENERS, &pid]).output()?;
    Ok(String::from_utf8(output.stdout)?.trim().parse()?)
}

async fn within<F: Future<Output = Result<bool>>>(limit: Duration, what: &str, check: impl Fn() -> F) -> Result<()> {
    let deadline = Instant::now() + limit;
    while !check().await? {
        ensure!(Instant::now() < deadline, "not within {limit:?}: {what}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn no_listener_keeps_the_network_of_a_dead_container_alive() -> Result<()> {
    let stage = Stage::start().await?;
    let is = |count: u32| {
        let stage = &stage;
        within(
            Duration::from_secs(20),
            "the number of listeners",
            move || async move { Ok(listeners(stage)? == count) },
        )
    };
    is(0).await?;
    let bridge = resident(&stage, "bridge", Network::Default).await?;
    let pod = resident(&stage, "pod", Network::Default).await?;
    let sidecar = resident(&stage, "sidecar", Network::Container("pod".to_owned())).await?;
    let links = |stage: &Stage| -> Result<usize> {
        let output = stage.command("ip").args(["-o", "link", "show", "type", "veth"]).output()?;
        Ok(String::from_utf8(output.stdout)?.lines().count())
    };
    is(2).await?;
    assert_served(&[bridge.clone(), pod.clone(), sidecar.clone()]).await?;
    assert_eq!((listeners(&stage)?, links(&stage)?), (2, 2));

    bridge.stop().await?;
    is(1).await?;
    within(Duration::from_secs(20), "the end of the interface", || async { Ok(links(&stage)? == 1) }).await?;

    // One of two in a namespace: the other is served as before.
    pod.stop().await?;
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_served(std::slice::from_ref(&sidecar)).await?;
    assert_eq!(listeners(&stage)?, 1);
    sidecar.stop().await?;
    is(0).await?;

    // And again, from the start.
    bridge.start().await?;
    assert_served(&[bridge]).await?;
    is(1).await
}
