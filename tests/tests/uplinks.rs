//! Frames that a packet socket writes, past connect(2) and past the cgroup's hooks, do not leave the
//! host for the real service. Here it is on the other side of an uplink, as it is on EC2.

use std::{process::Command, time::Duration};

use anyhow::{Result, ensure};
use metadata_proxy_tests::{
    cloud::Cloud,
    host::{Container, ContainerSpec, Network, TestHost},
    stage::{self, daemon_options},
};

fn run(command: &mut Command) -> Result<()> {
    let output = command.output()?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

fn pins(host: &TestHost) -> Result<Vec<String>> {
    let listed = host.command("ls").arg("/sys/fs/bpf/metadata-proxy/v4/uplinks").output()?;
    Ok(String::from_utf8(listed.stdout)?.lines().map(str::to_owned).collect())
}

fn index_of(host: &TestHost, device: &str) -> Result<String> {
    let shown = host.command("ip").args(["-o", "link", "show", device]).output()?;
    Ok(String::from_utf8(shown.stdout)?.split(':').next().unwrap_or_default().to_owned())
}

/// Writes ten frames with a UDP packet for the address: if asked with VLAN tags of priority only, or from a ring, whose
/// frames lie in pages that a program cannot read before it has them pulled.
const FRAMES: &str = r#"
import errno, mmap, socket, struct, sys, time
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
tags = b"\x81\x00\x00\x00" * {"tagged": 1, "twice": 2, "thrice": 3}.get(sys.argv[3], 0)
frame = target + source + tags + b"\x08\x00" + bytes(header) + payload
ring = None
if sys.argv[3] == "ring":
    raw.setsockopt(263, 10, 1)  # SOL_PACKET, PACKET_VERSION, TPACKET_V2
    raw.setsockopt(263, 13, struct.pack("4I", 4096, 1, 2048, 2))  # PACKET_TX_RING
    ring = mmap.mmap(raw.fileno(), 4096)
for number in range(10):
    if ring:
        slot = number % 2 * 2048
        ring[slot + 32:slot + 32 + len(frame)] = frame
        ring[slot:slot + 8] = struct.pack("2I", 1, len(frame))  # TP_STATUS_SEND_REQUEST
    try:
        raw.send(b"" if ring else frame)
    except OSError as error:
        if error.errno != errno.ENOBUFS:  # what the sender sees of a dropped frame
            raise
print("sent")
"#;

const FORMS: [&str; 5] = ["plain", "tagged", "twice", "thrice", "ring"];

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
    for form in FORMS {
        let open = arrived(&host, &cloud, &format!("open-{form}"), Network::Host, "up0", form).await?;
        ensure!(open >= 10, "only {open} {form} frames of a host-network container arrive without the daemon");
    }

    let mut daemon = host.daemon(daemon_options())?;
    daemon.wait_ready(Duration::from_secs(20)).await?;
    daemon.wait_for("the guard", Duration::from_secs(20), |log| log.contains("guarding uplink up0")).await?;
    for (name, network, device) in [("bridge", Network::Default, "eth0"), ("host", Network::Host, "up0")] {
        for form in FORMS {
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

/// The far side of a network interface: counts the packets for the address that come out of a TAP device.
const WIRE: &str = r#"
import fcntl, os, struct, sys
wire = os.open("/dev/net/tun", os.O_RDWR)
fcntl.ioctl(wire, 0x400454ca, struct.pack("16sH22x", sys.argv[1].encode(), 0x1002))
print("made", flush=True)
while True:
    if b"metadata" in os.read(wire, 2000):
        print("frame", flush=True)
"#;

/// Writes ten frames with a UDP packet for the address.
const BLIND_FRAMES: &str = r#"
import errno, socket, sys
raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW)
raw.bind((sys.argv[1], 0x0800))
packet = bytes.fromhex("4500002400010000401100000a000001a9fea9fe10920050001000006d65746164617461")
for number in range(10):
    try:
        raw.send(bytes(6) + raw.getsockname()[4] + b"\x08\x00" + packet)
    except OSError as error:
        if error.errno != errno.ENOBUFS:  # what the sender sees of a dropped frame
            raise
"#;

/// A network interface that is made on the host and can be given to a container.
struct Interface {
    name: &'static str,
    wire: std::process::Child,
    seen: std::path::PathBuf,
}

impl Interface {
    async fn make(host: &TestHost, name: &'static str) -> Result<Self> {
        let seen = host.directory().join(name);
        let mut wire = host.command("/usr/bin/python3");
        wire.args(["-c", WIRE, name]).stdout(std::fs::File::create(&seen)?);
        let interface = Self { name, wire: wire.spawn()?, seen };
        while interface.lines("made")? == 0 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Ok(interface)
    }

    async fn give_to(&self, host: &TestHost, container: &Container) -> Result<()> {
        let pid = container.pid().await?.to_string();
        run(host.command("ip").args(["link", "set", self.name, "netns", &pid]))?;
        run(host.command("nsenter").args(["-t", &pid, "-n", "ip", "link", "set", self.name, "up"]))
    }

    /// How many frames reach the far side.
    async fn try_from(&self, container: &Container) -> Result<usize> {
        let before = self.lines("frame")?;
        container.exec(["/usr/bin/python3", "-c", BLIND_FRAMES, self.name]).await?.success()?;
        tokio::time::sleep(Duration::from_millis(100)).await;
        Ok(self.lines("frame")? - before)
    }

    fn lines(&self, of: &str) -> Result<usize> {
        Ok(std::fs::read_to_string(&self.seen)?.lines().filter(|line| *line == of).count())
    }
}

impl Drop for Interface {
    fn drop(&mut self) {
        let _ = self.wire.kill();
        let _ = self.wire.wait();
    }
}

/// As that of an ECS task in the network mode `awsvpc`.
#[tokio::test(flavor = "multi_thread")]
async fn an_interface_in_a_containers_own_network_is_guarded() -> Result<()> {
    let host = TestHost::start().await?;
    let task = |name: &'static str| ContainerSpec::resident(name).network(Network::None);
    let old = host.run(task("old")).await?;
    let first = Interface::make(&host, "eni1").await?;
    first.give_to(&host, &old).await?;
    let open = first.try_from(&old).await?;
    ensure!(open == 10, "only {open} frames leave without the daemon");

    let mut daemon = host.daemon(daemon_options())?;
    daemon.wait_ready(Duration::from_secs(20)).await?;
    let new = host.run(task("new")).await?;
    let second = Interface::make(&host, "eni2").await?;
    second.give_to(&host, &new).await?;
    let guarded = |name: &str| format!("guarding uplink {name} in network namespace ");
    let both = |log: &str| log.contains(&guarded("eni1")) && log.contains(&guarded("eni2"));
    daemon.wait_for("the guards", Duration::from_secs(20), both).await?;
    for (interface, container) in [(&first, &old), (&second, &new)] {
        let count = interface.try_from(container).await?;
        ensure!(count == 0, "{count} frames left by {}\n{}", interface.name, daemon.log()?);
    }

    // One that was guarded on the host is so all the way into the container.
    let third = Interface::make(&host, "eni3").await?;
    daemon.wait_for("the guard", Duration::from_secs(20), |log| log.contains("guarding uplink eni3\n")).await?;
    daemon.kill().await?;
    third.give_to(&host, &new).await?;
    for (interface, container) in [(&first, &old), (&second, &new), (&third, &new)] {
        let count = interface.try_from(container).await?;
        ensure!(count == 0, "{count} frames left by {} after the daemon was killed", interface.name);
    }

    // One with another layout of its maps, that cannot know the containers yet, leaves them guarded.
    ensure!(pins(&host)?.len() == 3, "{:?}", pins(&host)?);
    run(host.command("mv").args(["/sys/fs/bpf/metadata-proxy/v4", "/sys/fs/bpf/metadata-proxy/v0"]))?;
    let mut upgraded = host.daemon(daemon_options().arg("--docker-host").arg("unix:///nowhere.sock"))?;
    upgraded.wait_for("its attachment", Duration::from_secs(20), |log| log.contains("attached: ")).await?;
    run(host.command("test").args(["!", "-e", "/sys/fs/bpf/metadata-proxy/v0"]))?;
    for (interface, container) in [(&first, &old), (&second, &new), (&third, &new)] {
        let count = interface.try_from(container).await?;
        ensure!(count == 0, "{count} frames left by {} after an upgrade", interface.name);
    }
    upgraded.kill().await?;

    // The next daemon finds what is guarded, and forgets what is gone with its container.
    drop(second);
    let mut daemon = host.daemon(daemon_options())?;
    daemon.wait_ready(Duration::from_secs(20)).await?;
    daemon.wait_for("the guard", Duration::from_secs(20), |log| log.contains(&guarded("eni1"))).await?;
    ensure!(first.try_from(&old).await? == 0, "frames leave");
    drop((first, third));
    old.remove().await?;
    new.remove().await?;
    for _ in 0..100 {
        if pins(&host)?.is_empty() {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    anyhow::bail!("{:?} are left", pins(&host)?)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_uplink_that_comes_later_is_guarded() -> Result<()> {
    let host = TestHost::start().await?;
    let mut daemon = host.daemon(daemon_options())?;
    daemon.wait_ready(Duration::from_secs(20)).await?;
    // The engine has made a bridge, which is none.
    ensure!(daemon.log()?.matches("no uplink found").count() == 1, "{}", daemon.log()?);
    run(host.command("ip").args(["link", "add", "late0", "type", "veth", "peer", "name", "late1"]))?;
    let guarded = |log: &str| log.contains("guarding uplink late0") && log.contains("guarding uplink late1");
    daemon.wait_for("the guard", Duration::from_secs(20), guarded).await?;
    run(host.command("ip").args(["link", "del", "late0"]))?;
    run(host.command("ip").args(["link", "add", "late0", "type", "veth", "peer", "name", "late1"]))?;
    let again = |log: &str| log.matches("guarding uplink late0").count() == 2;
    daemon.wait_for("the guard of its successor", Duration::from_secs(20), again).await?;

    // As the engine does with the host's end of a container's link: then it leads nowhere by itself.
    let index = index_of(&host, "late1")?;
    ensure!(pins(&host)?.contains(&index), "{index} is not among {:?}", pins(&host)?);
    run(host.command("ip").args(["link", "add", "bridge9", "type", "bridge"]))?;
    run(host.command("ip").args(["link", "set", "late1", "master", "bridge9"]))?;
    for _ in 0..100 {
        if !pins(&host)?.contains(&index) {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    anyhow::bail!("{index} is still among {:?}", pins(&host)?)
}

/// A device that moves into a container takes its guard along, and leaves its index to whatever comes by it.
#[tokio::test(flavor = "multi_thread")]
async fn a_device_with_the_index_of_one_that_has_moved_is_guarded_like_any_other() -> Result<()> {
    let host = TestHost::start().await?;
    let container = host.run(ContainerSpec::resident("task").network(Network::None)).await?;
    let mut daemon = host.daemon(daemon_options())?;
    daemon.wait_ready(Duration::from_secs(20)).await?;
    let moved = Interface::make(&host, "eni1").await?;
    daemon.wait_for("the guard", Duration::from_secs(20), |log| log.contains("guarding uplink eni1\n")).await?;
    let index = index_of(&host, "eni1")?;
    moved.give_to(&host, &container).await?;

    run(host.command("ip").args(["link", "add", "new0", "index", &index, "type", "veth", "peer", "name", "new1"]))?;
    run(host.command("ip").args(["link", "set", "new0", "up"]))?;
    daemon.wait_for("the guard", Duration::from_secs(20), |log| log.contains("guarding uplink new0\n")).await?;
    let probe = std::env::current_exe()?.ancestors().nth(2).map(|debug| debug.join("probe"));
    let said = host.command(probe.unwrap_or_default()).args(["frame-blind", "new0"]).output()?;
    ensure!(String::from_utf8_lossy(&said.stdout).contains("sendto: ENOBUFS"), "a frame leaves by new0: {said:?}");
    ensure!(moved.try_from(&container).await? == 0, "frames leave by the device that has moved");
    Ok(())
}
