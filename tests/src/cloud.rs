//! The network beyond the host: a namespace at the far end of the uplink, where the service is, as on EC2.

use std::{
    fs::{self, File},
    net::TcpListener,
    os::fd::AsFd as _,
    path::PathBuf,
    process::{Child, Command},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::{
    host::{METADATA_V4, METADATA_V6, TestHost},
    imds::Imds,
};

/// The host's own end is `up0`. The service's addresses move from the host's loopback to the other side.
const HOST: [&str; 7] = [
    "address del 169.254.169.254/32 dev lo",
    "address del fd00:ec2::254/128 dev lo",
    "address add 198.51.100.1/24 dev up0",
    "address add 2001:db8:9::1/64 dev up0 nodad",
    "link set up0 up",
    "route add 169.254.169.254/32 via 198.51.100.2",
    "route add fd00:ec2::254/128 via 2001:db8:9::2",
];
const BEYOND: [&str; 8] = [
    "link set lo up",
    "link set cloud0 up",
    "address add 198.51.100.2/24 dev cloud0",
    "address add 2001:db8:9::2/64 dev cloud0 nodad",
    "address add 169.254.169.254/32 dev lo",
    "address add fd00:ec2::254/128 dev lo nodad",
    "route add default via 198.51.100.1",
    "route add default via 2001:db8:9::1",
];

pub struct Cloud {
    process: Child,
}

impl Cloud {
    pub fn make(host: &TestHost) -> Result<Self> {
        let process = host.command("unshare").args(["--net", "sleep", "600"]).spawn().context("starting unshare")?;
        let cloud = Self { process };
        cloud.wait_for_namespace(host)?;
        let pid = cloud.process.id().to_string();
        let link = format!("link add up0 type veth peer name cloud0 netns {pid}");
        run(host.command("ip").args(link.split(' ')))?;
        // Both ends up before the routes through them.
        let beyond = |line: &str| run(host.command("nsenter").args(["-t", &pid, "-n", "ip"]).args(line.split(' ')));
        BEYOND[..6].iter().try_for_each(|line| beyond(line))?;
        HOST.iter().try_for_each(|line| run(host.command("ip").args(line.split(' '))))?;
        BEYOND[6..].iter().try_for_each(|line| beyond(line))?;
        run(host.command("sh").args(["-c", "echo 1 > /proc/sys/net/ipv6/conf/all/forwarding"]))?;
        Ok(cloud)
    }

    fn wait_for_namespace(&self, host: &TestHost) -> Result<()> {
        let of = |process: &str| fs::read_link(format!("/proc/{process}/ns/net"));
        let others = [of("self")?, of(&host.machine().holder().to_string())?];
        let deadline = Instant::now() + Duration::from_secs(5);
        while others.contains(&of(&self.process.id().to_string()).context("the cloud's process is gone")?) {
            ensure!(Instant::now() < deadline, "no namespace beyond the host");
            thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    /// The stand-in for the real service.
    pub fn start_imds(&self) -> Result<Imds> {
        let listen = || {
            let addresses = [format!("{METADATA_V4}:80"), format!("[{METADATA_V6}]:80")];
            addresses.iter().map(TcpListener::bind).collect::<std::io::Result<Vec<_>>>()
        };
        let listeners = self.inside(listen)?.context("listening beyond the host")?;
        listeners.iter().try_for_each(|listener| listener.set_nonblocking(true))?;
        Imds::start(listeners)
    }

    /// IPv4 packets that have arrived beyond the host (`InReceives` of /proc/net/snmp).
    pub fn received(&self) -> Result<u64> {
        let text = fs::read_to_string(format!("/proc/{}/net/snmp", self.process.id()))?;
        let values = text.lines().filter_map(|line| line.strip_prefix("Ip: ")).nth(1).context("no Ip: line")?;
        Ok(values.split(' ').nth(2).context("no InReceives")?.parse()?)
    }

    /// Runs this in the namespace, on a thread of its own.
    pub fn inside<T: Send>(&self, run: impl FnOnce() -> T + Send) -> Result<T> {
        let path = PathBuf::from(format!("/proc/{}/ns/net", self.process.id()));
        let namespace = File::open(&path).with_context(|| format!("opening {}", path.display()))?;
        let enter = || {
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
            Ok::<_, rustix::io::Errno>(run())
        };
        match thread::scope(|scope| scope.spawn(enter).join()) {
            Ok(result) => result.context("entering the namespace beyond the host"),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

impl Drop for Cloud {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn run(command: &mut Command) -> Result<()> {
    let output = command.output()?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
