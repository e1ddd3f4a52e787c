//! Network namespaces: telling them apart, and working in them on a thread of its own.

use std::{
    collections::HashMap,
    fs::{self, File},
    io,
    os::{
        fd::{AsFd as _, AsRawFd, OwnedFd},
        unix::fs::MetadataExt as _,
    },
    process,
    sync::Arc,
    thread,
};

use anyhow::Context as _;
use rustix::{
    net::{AddressFamily, SocketFlags, SocketType, socket_with},
    process::{Pid, PidfdFlags, pidfd_open},
    thread::{LinkNameSpaceType, move_into_link_name_space},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    runtime::Handle,
    sync::{mpsc, oneshot},
};
use tracing::error;

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
    let flags = SocketFlags::CLOEXEC;
    let socket = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None).context("cannot create a socket")?;
    cookie(&socket).context("the kernel does not tell network namespaces apart (SO_NETNS_COOKIE, Linux 5.14)")
}

/// A hold on a process, which keeps nothing of it but its id.
pub(crate) fn process(pid: u32) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
    Ok(pidfd_open(pid, PidfdFlags::NONBLOCK)?)
}

/// Until that process has ended; at once if it is gone already.
pub(crate) async fn end_of(process: io::Result<OwnedFd>) {
    // SAFETY: an `OwnedFd` keeps its one descriptor open for as long as it lives.
    let watch = |process| unsafe { AsyncFd::register_with_interest(process, Interest::READABLE) };
    if let Ok(process) = process.and_then(|process| watch(process).map_err(|error| error.into_parts().1)) {
        let _ = process.readable().await;
    }
}

/// The user who has made the user namespace of this process (`NS_GET_OWNER_UID`, Linux 4.11); 0 for the host's.
pub(crate) fn user_namespace_owner(pid: u32) -> io::Result<u32> {
    const NS_GET_OWNER_UID: libc::c_ulong = 0xb704;
    let namespace = File::open(format!("/proc/{pid}/ns/user"))?;
    let mut uid: libc::uid_t = 0;
    // SAFETY: the descriptor is open, and the kernel writes one uid to where it is told.
    let result = unsafe { libc::ioctl(namespace.as_raw_fd(), NS_GET_OWNER_UID as _, &raw mut uid) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(uid) }
}

/// A hold on the network namespace of this process.
pub(crate) fn of_process(pid: u32) -> anyhow::Result<File> {
    let path = format!("/proc/{pid}/ns/net");
    File::open(&path).with_context(|| format!("cannot open {path}"))
}

/// The network namespaces that processes are in.
pub(crate) fn all() -> Vec<File> {
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let ids = processes.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    // One that has ended meanwhile is in none.
    let namespaces = ids.filter_map(|pid| of_process(pid).ok());
    let by_inode = namespaces.filter_map(|namespace| Some((namespace.metadata().ok()?.ino(), namespace)));
    by_inode.collect::<HashMap<_, _>>().into_values().collect()
}

type Job = Box<dyn FnOnce() + Send>;

/// Works in other namespaces. Its own thread, because setns(2) moves the calling thread and a runtime's
/// worker must never wake up in a container; and one job at a time, so that two in one namespace cannot
/// race.
#[derive(Clone)]
pub(crate) struct Worker {
    jobs: mpsc::UnboundedSender<Job>,
}

impl Worker {
    pub(crate) fn start() -> anyhow::Result<Self> {
        let (jobs, mut queue) = mpsc::unbounded_channel::<Job>();
        // For sockets that are made there and polled here.
        let runtime = Handle::current();
        let work = move || {
            let _runtime = runtime.enter();
            // Containers that start would never be served again: better that all is started anew.
            let _end = AbortOnPanic;
            while let Some(job) = queue.blocking_recv() {
                job();
            }
        };
        thread::Builder::new().name("netns".into()).spawn(work).context("cannot start a thread")?;
        Ok(Self { jobs })
    }

    /// What `job` returns from this namespace, or from the host's.
    pub(crate) async fn run_in<T: Send + 'static>(
        &self,
        namespace: Option<Arc<File>>,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> anyhow::Result<T> {
        let (reply, done) = oneshot::channel();
        let job = move || {
            // If nobody waits any more, what came of it is dropped.
            let _ = reply.send(match namespace {
                Some(namespace) => within(&namespace, job),
                None => Ok(job()),
            });
        };
        self.jobs.send(Box::new(job)).ok().context("the netns thread has ended")?;
        done.await.context("the netns thread has ended")?
    }
}

fn within<T>(namespace: &File, job: impl FnOnce() -> T) -> anyhow::Result<T> {
    let home = File::open("/proc/thread-self/ns/net").context("cannot open the daemon's own network namespace")?;
    let enter = |namespace: &File| move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network));
    enter(namespace).context("cannot enter the network namespace")?;
    let result = job();
    // Or this thread would keep the namespace alive, and take it for the host's.
    if let Err(error) = enter(&home) {
        error!("cannot return to the host's network namespace: {error}");
        process::abort();
    }
    Ok(result)
}

struct AbortOnPanic;

impl Drop for AbortOnPanic {
    fn drop(&mut self) {
        if thread::panicking() {
            process::abort();
        }
    }
}
