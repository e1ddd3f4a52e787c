//! Network namespaces: entering them, on a thread of its own, and telling them apart.

use std::{
    collections::{HashMap, HashSet},
    fs::File,
    io,
    net::{Ipv4Addr, SocketAddrV4, TcpListener},
    os::fd::{AsFd, AsRawFd, OwnedFd},
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    thread,
};

use anyhow::Context as _;
use metadata_proxy_common::{LISTENER_OCTETS, LISTENER_PORT};
use rustix::{
    net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};
use tokio::sync::{mpsc, oneshot};
use tracing::error;

/// Connections that wait to be accepted, per namespace.
const BACKLOG: i32 = 1024;

/// The cookie of the network namespace a socket belongs to: unique until the host's next boot,
/// unlike the inode number (`SO_NETNS_COOKIE`, Linux 5.14).
pub(crate) fn cookie(socket: &impl AsRawFd) -> io::Result<u64> {
    let mut cookie = 0_u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the option is a u64 and its size is told.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            core::ptr::from_mut(&mut cookie).cast(),
            &raw mut length,
        )
    };
    if result == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

/// The cookie of the namespace that the calling thread is in.
pub(crate) fn current_cookie() -> anyhow::Result<u64> {
    let socket = tcp_socket()?;
    cookie(&socket).context("the kernel does not tell network namespaces apart (SO_NETNS_COOKIE, Linux 5.14)")
}

pub(crate) enum Opened {
    New { listener: TcpListener, netns: u64, port: u16 },
    Already { netns: u64 },
}

/// Opens listeners in other namespaces. Its own thread, because setns(2) moves the calling thread
/// and a runtime's worker must never wake up in a container; and one at a time, so that two requests
/// for one namespace cannot race.
pub(crate) struct Worker {
    requests: mpsc::UnboundedSender<(u32, oneshot::Sender<anyhow::Result<Opened>>)>,
    open: Arc<Mutex<HashSet<u64>>>,
}

impl Worker {
    /// `ports` are tried first, by namespace; `mark` gets each socket before it listens.
    pub(crate) fn start(
        ports: HashMap<u64, u16>,
        mark: impl Fn(&OwnedFd) -> anyhow::Result<()> + Send + 'static,
    ) -> anyhow::Result<Self> {
        let home = File::open("/proc/thread-self/ns/net").context("cannot open the daemon's own network namespace")?;
        let (requests, mut queue) = mpsc::unbounded_channel::<(u32, oneshot::Sender<_>)>();
        let open = Arc::<Mutex<HashSet<u64>>>::default();
        let known = Arc::clone(&open);
        let work = move || {
            while let Some((pid, reply)) = queue.blocking_recv() {
                let opened = open_in(pid, &mut lock(&known), &ports, &mark);
                // Or this thread would keep the namespace alive.
                if let Err(error) = move_into_link_name_space(home.as_fd(), Some(LinkNameSpaceType::Network)) {
                    error!("cannot return to the host's network namespace: {error}");
                }
                // The asker may have given up; then the listener is closed with the reply.
                if let Err(Ok(Opened::New { netns, .. })) = reply.send(opened) {
                    lock(&known).remove(&netns);
                }
            }
        };
        thread::Builder::new().name("netns".into()).spawn(work).context("cannot start a thread")?;
        Ok(Self { requests, open })
    }

    /// A listener in the network namespace of this process.
    pub(crate) async fn open(&self, pid: u32) -> anyhow::Result<Opened> {
        let (reply, opened) = oneshot::channel();
        self.requests.send((pid, reply)).ok().context("the netns thread has ended")?;
        opened.await.context("the netns thread has ended")?
    }

    /// The listener of this namespace has been closed.
    pub(crate) fn closed(&self, netns: u64) {
        lock(&self.open).remove(&netns);
    }
}

fn lock(open: &Mutex<HashSet<u64>>) -> MutexGuard<'_, HashSet<u64>> {
    open.lock().unwrap_or_else(PoisonError::into_inner)
}

fn open_in(
    pid: u32,
    open: &mut HashSet<u64>,
    ports: &HashMap<u64, u16>,
    mark: &dyn Fn(&OwnedFd) -> anyhow::Result<()>,
) -> anyhow::Result<Opened> {
    let path = format!("/proc/{pid}/ns/net");
    let namespace = File::open(&path).with_context(|| format!("cannot open {path}"))?;
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))
        .with_context(|| format!("cannot enter {path}"))?;
    let socket = tcp_socket()?;
    let netns = cookie(&socket).context("SO_NETNS_COOKIE")?;
    if open.contains(&netns) {
        return Ok(Opened::Already { netns });
    }
    sockopt::set_socket_reuseaddr(&socket, true).context("SO_REUSEADDR")?;
    let address = |port| SocketAddrV4::new(Ipv4Addr::from(LISTENER_OCTETS), port);
    // Any port is better than none: somebody may squat on ours, or the daemon before us is still there.
    let wanted = [ports.get(&netns).copied().unwrap_or(LISTENER_PORT), LISTENER_PORT, 0];
    let taken = wanted.into_iter().find(|port| bind(&socket, &address(*port)).is_ok());
    taken.context("no port is free")?;
    mark(&socket)?;
    listen(&socket, BACKLOG).context("cannot listen")?;
    let listener = TcpListener::from(socket);
    let port = listener.local_addr().context("getsockname")?.port();
    open.insert(netns);
    Ok(Opened::New { listener, netns, port })
}

fn tcp_socket() -> anyhow::Result<OwnedFd> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    socket_with(AddressFamily::INET, SocketType::STREAM, flags, None).context("cannot create a socket")
}
