//! Frames that a packet socket writes, past connect(2) and past the cgroup's hooks, do not leave the
//! host for the real service. Here it is on the other side of an uplink, as it is on EC2.

use std::{process::Command, time::Duration};

use anyhow::{Result, ensure};
use metadata_proxy_tests::{
    cloud::Cloud,
    host::{ContainerSpec, Network, TestHost},
    stage::{self, daemon_options},
};

fn run(command: &mut Command) -> Result<()> {
    let output = command.output()?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Writes ten frames with a UDP packet for the address, if asked with a VLAN tag of priority only.
const FRAMES: &str = r#"
import errno, socket, struct, sys, time
device = sys.argv[1]
route = [line.split() for line in open("/proc/net/route")][1:]
gateway = next((r[2] for r in route if r[0] == device and r[1] == "00000000"), None)
address = socket.inet_ntoa(struct.pack("<I", int(gateway, 16))) if gateway else "198.51.100.2"
probe = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
probe.connect((address, 9))
own = probe.getsockname()[0]
mac = None
while mac is None:
    probe.send(b"x")
    time.sleep(0.05)
    mac = next((l.split()[3] for l in open("/proc/net/arp") if l.split()[0] == address and l.split()[3] != "00:00:00:00:00:00"), None)
target = bytes.fromhex(mac.replace(":", ""))
raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
raw.bind((device, int(sys.argv[2], 16)))
source = raw.getsockname()[4]
payload = struct.pack("!HHHH", 4242, 80, 16, 0) + b"metadata"
header = bytearray(struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(payload), 1, 0, 64, 17, 0, socket.inet_aton(own), socket.inet_aton("169.254.169.254")))
total = sum(struct.unpack("!10H", header))
total = (total & 0xffff) + (total >> 16)
header[10:12] = struct.pack("!H", 0xffff ^ ((total & 0xffff) + (total >> 16)))
for number in range(10):
    tag = b"\x81\x00\x00\x00" if sys.argv[3] == "tagged" else b""
    try:
        raw.send(target + source + tag + b"\x08\x00" + bytes(header) + payload)
    except OSError as error:
        if error.errno != errno.ENOBUFS:  # what the sender sees of a dropped frame
            raise
print("sent")
"#;

async fn send_frames(host: &TestHost, name: &str, network: Network, device: &str, form: &str) -> Result<()> {
    // The protocol that the kernel is told is a lie, the bytes are not.
    let spec = ContainerSpec::on_host(name, ["/usr/bin/python3", "-c", FRAMES, device, "1234", form]).network(network);
    let container = host.run(spec).await?;
    let output = container.wait().await?.success()?;
    ensure!(output.trim() == "sent", "{name}: {output}");
    container.remove().await
}

async fn arrived(
    host: &TestHost,
    cloud: &Cloud,
    name: &str,
    network: Network,
    device: &str,
    form: &str,
) -> Result<u64> {
    // The datagrams that resolve the gateway's address count, where the gateway is the cloud itself.
    let before = cloud.received()?;
    send_frames(host, name, network, device, form).await?;
    tokio::time::sleep(Duration::from_millis(100)).await;
    Ok(cloud.received()? - before)
}

#[tokio::test(flavor = "multi_thread")]
async fn frames_of_packet_sockets_do_not_leave_the_host() -> Result<()> {
    let host = TestHost::start().await?;
    let _sts = stage::start_sts(&host)?;
    let cloud = Cloud::make(&host)?;
    // That they would, or the rest of this proves nothing.
    let open = arrived(&host, &cloud, "open-bridge", Network::Default, "eth0", "plain").await?;
    ensure!(open >= 10, "only {open} frames of a bridge container arrive without the daemon");
    let open = arrived(&host, &cloud, "open-host", Network::Host, "up0", "plain").await?;
    ensure!(open >= 10, "only {open} frames of a host-network container arrive without the daemon");

    let mut daemon = host.daemon(daemon_options())?;
    daemon.wait_ready(Duration::from_secs(20)).await?;
    daemon.wait_for("the guard", Duration::from_secs(5), |log| log.contains("guarding uplink up0")).await?;
    for (name, network, device) in [("bridge", Network::Default, "eth0"), ("host", Network::Host, "up0")] {
        for form in ["plain", "tagged"] {
            let count = arrived(&host, &cloud, &format!("{name}-{form}"), network.clone(), device, form).await?;
            // On up0 the gateway is the cloud: the datagrams that find its address are seen there.
            let innocent = if device == "up0" { 3 } else { 0 };
            ensure!(count <= innocent, "{count} {form} frames of a {name} container left the host\n{}", daemon.log()?);
        }
    }

    // The host's own connections do leave.
    let before = cloud.received()?;
    let _refused =
        host.command("timeout").args(["2", "busybox", "wget", "-qO-", "http://169.254.169.254/"]).output()?;
    ensure!(cloud.received()? > before, "a host process no longer reaches the real service");

    // And the guard outlives the daemon.
    daemon.kill().await?;
    let count = arrived(&host, &cloud, "orphan", Network::Default, "eth0", "plain").await?;
    ensure!(count == 0, "{count} frames left the host after the daemon was killed");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn an_uplink_that_comes_later_is_guarded() -> Result<()> {
    let host = TestHost::start().await?;
    let mut daemon = host.daemon(daemon_options())?;
    daemon.wait_ready(Duration::from_secs(20)).await?;
    run(host.command("ip").args(["link", "add", "late0", "type", "veth", "peer", "name", "late1"]))?;
    let guarded = |log: &str| log.contains("guarding uplink late0") && log.contains("guarding uplink late1");
    daemon.wait_for("the guard", Duration::from_secs(5), guarded).await?;
    run(host.command("ip").args(["link", "del", "late0"]))?;
    run(host.command("ip").args(["link", "add", "late0", "type", "veth", "peer", "name", "late1"]))?;
    let again = |log: &str| log.matches("guarding uplink late0").count() == 2;
    daemon.wait_for("the guard of its successor", Duration::from_secs(5), again).await
}
