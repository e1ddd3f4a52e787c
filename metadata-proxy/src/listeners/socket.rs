//! A listener's socket in the network namespace that the calling thread is in.

use std::{
    collections::HashSet,
    net::{Ipv4Addr, SocketAddrV4, TcpListener},
    os::fd::OwnedFd,
    sync::{Mutex, MutexGuard, PoisonError},
};

use anyhow::Context as _;
use metadata_proxy_common::{LISTENER_OCTETS, LISTENER_PORT};
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, listen, socket_with, sockopt};

use crate::{interceptor::Interceptor, netns};

/// Connections that wait to be accepted, per namespace.
const BACKLOG: i32 = 1024;

pub(super) enum Opened {
    New { listener: TcpListener, netns: u64, port: u16 },
    Already { netns: u64 },
}

/// The namespaces that have a listener, until it is closed for good.
#[derive(Default)]
pub(super) struct Taken(Mutex<HashSet<u64>>);

impl Taken {
    /// `port` is the one to try first, by namespace.
    pub(super) fn open(&self, port: impl Fn(u64) -> Option<u16>, interceptor: &Interceptor) -> anyhow::Result<Opened> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket: OwnedFd =
            socket_with(AddressFamily::INET, SocketType::STREAM, flags, None).context("cannot create a socket")?;
        let netns = netns::cookie(&socket).context("SO_NETNS_COOKIE")?;
        let mut taken = self.lock();
        if taken.contains(&netns) {
            return Ok(Opened::Already { netns });
        }
        sockopt::set_socket_reuseaddr(&socket, true).context("SO_REUSEADDR")?;
        let address = |port| SocketAddrV4::new(Ipv4Addr::from(LISTENER_OCTETS), port);
        // Any port is better than none: somebody may squat on ours, or the daemon before us is still there.
        let wanted = [port(netns).unwrap_or(LISTENER_PORT), LISTENER_PORT, 0];
        let bound = wanted.into_iter().find(|port| bind(&socket, &address(*port)).is_ok());
        bound.context("no port is free")?;
        interceptor.mark_listener(&socket)?;
        listen(&socket, BACKLOG).context("cannot listen")?;
        let listener = TcpListener::from(socket);
        let port = listener.local_addr().context("getsockname")?.port();
        taken.insert(netns);
        Ok(Opened::New { listener, netns, port })
    }

    pub(super) fn closed(&self, netns: u64) {
        self.lock().remove(&netns);
    }

    fn lock(&self) -> MutexGuard<'_, HashSet<u64>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
