//! What goes over the wire between a client and the proxy: read from the loopback of the container's network namespace, where it arrives.

use std::{
    collections::BTreeMap,
    fs::File,
    num::NonZeroU32,
    os::fd::{AsFd as _, OwnedFd},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context as _, Result};
use rustix::{
    io::Errno,
    net::{AddressFamily, Protocol, RecvFlags, SocketFlags, SocketType, recv, socket_with, sockopt},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};

use crate::host::{Container, ContainerSpec, Finished, TestHost};

/// Where the listener is that connections are redirected to.
const LISTENER: [u8; 4] = [127, 169, 254, 169];
const ETH_P_IP: u16 = 0x0800;

/// One connection, each direction's bytes as they were sent.
#[derive(Clone, Debug, Default)]
pub struct Connection {
    requests: Stream,
    answers: Stream,
}

/// By position in the stream; what is sent again falls on itself.
#[derive(Clone, Debug, Default)]
struct Stream {
    begin: u32,
    parts: BTreeMap<u32, Vec<u8>>,
}

impl Connection {
    pub fn requests(&self) -> Vec<u8> {
        self.requests.parts.values().flatten().copied().collect()
    }

    pub fn answers(&self) -> Vec<u8> {
        self.answers.parts.values().flatten().copied().collect()
    }
}

/// Runs a container's command while somebody listens to what it says; until then it waits.
pub async fn overhear(host: &TestHost, mut spec: ContainerSpec) -> Result<(Container, Finished, Vec<Connection>)> {
    let command = std::mem::replace(&mut spec.cmd, ContainerSpec::resident("").cmd);
    let container = host.run(spec).await?;
    let sniffer = Sniffer::start(container.pid().await?)?;
    let finished = container.exec(command).await?;
    Ok((container, finished, sniffer.finish()?))
}

/// Listens until it is asked what it has heard.
pub struct Sniffer {
    stop: Arc<AtomicBool>,
    heard: Arc<AtomicBool>,
    thread: JoinHandle<Vec<Connection>>,
}

impl Sniffer {
    /// In the network namespace of this process.
    pub fn start(pid: u32) -> Result<Self> {
        let path = format!("/proc/{pid}/ns/net");
        let namespace = File::open(&path).with_context(|| format!("opening {path}"))?;
        let stop = Arc::new(AtomicBool::new(false));
        let heard = Arc::new(AtomicBool::new(false));
        let (until, hearing) = (Arc::clone(&stop), Arc::clone(&heard));
        let (ready, opened) = std::sync::mpsc::channel();
        // A thread of its own, which stays in the namespace.
        let thread = thread::spawn(move || {
            let socket = open(&namespace);
            let (socket, result) = match socket {
                Ok(socket) => (Some(socket), Ok(())),
                Err(error) => (None, Err(error)),
            };
            // Whoever waits for it is there until it is told.
            let _told = ready.send(result);
            socket.map(|socket| listen(&socket, &until, &hearing)).unwrap_or_default()
        });
        opened.recv().context("the thread that listens has ended")??;
        Ok(Self { stop, heard, thread })
    }

    /// Whether there has been anything so far.
    pub fn has_heard(&self) -> bool {
        self.heard.load(Ordering::Relaxed)
    }

    /// The connections in the order of their beginning.
    pub fn finish(self) -> Result<Vec<Connection>> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().ok().context("the thread that listens has panicked")
    }
}

fn open(namespace: &File) -> Result<OwnedFd> {
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
        .context("entering the container's network namespace")?;
    let protocol = NonZeroU32::new(u32::from(ETH_P_IP.to_be())).map(Protocol::from_raw);
    let socket = socket_with(AddressFamily::PACKET, SocketType::DGRAM, SocketFlags::CLOEXEC, protocol)
        .context("opening a packet socket")?;
    sockopt::set_socket_timeout(&socket, sockopt::Timeout::Recv, Some(Duration::from_millis(100)))?;
    sockopt::set_socket_recv_buffer_size(&socket, 4 << 20)?;
    Ok(socket)
}

fn listen(socket: &OwnedFd, stop: &AtomicBool, heard: &AtomicBool) -> Vec<Connection> {
    let mut connections = Vec::new();
    let mut by_port = BTreeMap::new();
    let mut buffer = vec![0; 1 << 17];
    loop {
        match recv(socket, &mut buffer[..], RecvFlags::empty()) {
            Ok((_, length)) => {
                let packet = buffer.get(..length).unwrap_or_default();
                // Anything else than TCP over IPv4 is nobody's concern.
                if hear(packet, &mut connections, &mut by_port).is_some() {
                    heard.store(true, Ordering::Relaxed);
                }
            }
            Err(Errno::AGAIN | Errno::INTR) if !stop.load(Ordering::Relaxed) => {}
            Err(_) => return connections,
        }
    }
}

/// Adds one packet to its connection.
fn hear(packet: &[u8], connections: &mut Vec<Connection>, by_port: &mut BTreeMap<u16, usize>) -> Option<()> {
    const TCP: u8 = 6;
    const SYN: u8 = 2;
    let word = |bytes: &[u8], at: usize| Some(u16::from_be_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
    let header = usize::from(packet.first()? & 0xf) * 4;
    let (total, source, target) = (usize::from(word(packet, 2)?), packet.get(12..16)?, packet.get(16..20)?);
    let tcp = packet.get(header..total).filter(|_| packet.get(9) == Some(&TCP))?;
    let (sequence, flags) = (u32::from_be_bytes(tcp.get(4..8)?.try_into().ok()?), *tcp.get(13)?);
    let data = tcp.get(usize::from(tcp.get(12)? >> 4) * 4..)?;
    let to_listener = target == LISTENER;
    let port = if to_listener {
        word(tcp, 0)?
    } else if source == LISTENER {
        word(tcp, 2)?
    } else {
        return None;
    };
    if flags & SYN != 0 && to_listener {
        // The loopback shows each packet twice, and held SYNs come again.
        let known = by_port.get(&port).and_then(|at: &usize| connections.get(*at));
        if known.is_none_or(|known| known.requests.begin != sequence.wrapping_add(1)) {
            by_port.insert(port, connections.len());
            connections.push(Connection::default());
        }
    }
    let Some(connection) = by_port.get(&port).and_then(|at| connections.get_mut(*at)) else {
        return Some(()); // begun before we listened
    };
    let stream = if to_listener { &mut connection.requests } else { &mut connection.answers };
    if flags & SYN != 0 {
        stream.begin = sequence.wrapping_add(1);
    } else if !data.is_empty() {
        stream.parts.insert(sequence.wrapping_sub(stream.begin), data.to_vec());
    }
    Some(())
}
