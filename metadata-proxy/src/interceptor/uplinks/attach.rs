//! The program on a device, and off it.
//!
//! Linux 6.6 and later: tcx links, pinned by interface index. Before: clsact filters, which stay by
//! themselves and have to be removed by hand.

use std::{
    collections::HashSet,
    fs::{self, File},
    io,
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::Path,
    sync::{Arc, PoisonError},
};

use anyhow::Context as _;
use aya::programs::{
    LinkOrder, ProgramError, SchedClassifier, TcAttachType,
    links::FdLink,
    tc::{NlOptions, SchedClassifierLink, TcAttachOptions, TcError, TcHandle, qdisc_add_clsact, qdisc_detach_program},
};
use rtnetlink::new_multicast_connection;
use tokio_util::task::AbortOnDropHandle;
use tracing::debug;

use super::{PROGRAM, Uplinks, devices};
use crate::{
    interceptor::{object::Detached, syscall},
    netns,
};

/// The place of our filter among those of others: before them, for one that accepts ends the chain. By it
/// the next daemon finds the filter to exchange its program.
const PRIORITY: u16 = 1;
const HANDLE: TcHandle = TcHandle::new(0, 0x6d70);

impl Uplinks {
    /// On a thread that is in the device's namespace.
    pub(super) fn attach(&self, name: &str, pin: &str) -> anyhow::Result<()> {
        let pin = self.pins.uplinks().join(pin);
        let mut object = self.object.lock().unwrap_or_else(PoisonError::into_inner);
        let program = object.program_mut(PROGRAM).context("this build has no uplink program")?;
        let program: &mut SchedClassifier = program.try_into()?;
        if !self.tcx {
            return attach_filter(program, name);
        }
        if pin.exists() {
            let link = syscall::open_pin(&pin).context("cannot open the pinned link")?;
            match syscall::update_link(link.as_fd(), program.fd()?.as_fd()) {
                Ok(()) if is_on(name, program)? => return Ok(()),
                // The device has gone to another namespace with its link, and its index here to another device.
                Ok(()) => keep_aside(&pin).context("cannot rename the pin of a device that has moved")?,
                Err(error) => {
                    debug!("{}: {error}", pin.display());
                    fs::remove_file(&pin).context("cannot remove the pin of a device that is gone")?;
                }
            }
        }
        let options = TcAttachOptions::TcxOrder(LinkOrder::default());
        let id = match program.attach_with_options(name, TcAttachType::Egress, options) {
            Ok(id) => id,
            // This very program has come with the device, by the link from when it was in another namespace.
            Err(ProgramError::SyscallError(error)) if error.io_error.kind() == io::ErrorKind::AlreadyExists => {
                return Ok(());
            }
            Err(error) => return Err(error.into()),
        };
        FdLink::try_from(program.take_link(id)?)?.pin(&pin).context("cannot pin the link")?;
        Ok(())
    }

    /// Removes the pins of devices that are gone, and of those that are `others` in the namespace of this prefix.
    pub(super) fn remove_stale(&self, prefix: &str, others: &HashSet<u32>) {
        for entry in fs::read_dir(self.pins.uplinks()).into_iter().flatten().flatten() {
            let (pin, name) = (entry.path(), entry.file_name());
            let index = name.to_str().and_then(|name| name.strip_prefix(prefix)?.parse().ok());
            let dead = || syscall::open_pin(&pin).and_then(|link| syscall::is_dead(link.as_fd()));
            if index.is_some_and(|index| others.contains(&index)) || dead().is_ok_and(|dead| dead) {
                let _ = fs::remove_file(pin);
            }
        }
    }
}

/// Whether the program runs on this device.
fn is_on(name: &str, program: &SchedClassifier) -> anyhow::Result<bool> {
    let own = program.info()?.id();
    let (_, programs) = SchedClassifier::query_tcx(name, TcAttachType::Egress)?;
    Ok(programs.iter().any(|program| program.id() == own))
}

/// By a name that is no device's; it goes when its device does.
fn keep_aside(pin: &Path) -> io::Result<()> {
    let mut aside = pin.as_os_str().to_owned();
    while Path::new(&aside).exists() {
        aside.push("_moved");
    }
    fs::rename(pin, aside)
}

/// Exchanges the program of a filter that is there, or adds one, which has no link to pin.
fn attach_filter(program: &mut SchedClassifier, name: &str) -> anyhow::Result<()> {
    let egress = TcAttachType::Egress;
    let _ = qdisc_add_clsact(name); // else it is there
    let old = SchedClassifierLink::attached(name, egress, PRIORITY, HANDLE, None).context("no such device")?;
    let id = match program.attach_to_link(old) {
        Ok(id) => id,
        Err(_) => {
            let options = NlOptions { priority: PRIORITY, handle: HANDLE, classid: None };
            program.attach_with_options(name, egress, TcAttachOptions::Netlink(options))?
        }
    };
    // Dropping it would detach the filter.
    std::mem::forget(program.take_link(id)?);
    Ok(())
}

/// Removes the filters that have no link, wherever they are; where there are none, there is nothing to do.
pub(in crate::interceptor) async fn remove_filters(done: &mut Detached) {
    let worker = match netns::Worker::start() {
        Ok(worker) => worker,
        Err(error) => return done.failed.push(error),
    };
    for namespace in netns::all() {
        if let Err(error) = remove_filters_in(Arc::new(namespace), &worker, done).await {
            done.failed.push(error.context("cannot look for filters in a network namespace"));
        }
    }
}

async fn remove_filters_in(namespace: Arc<File>, worker: &netns::Worker, done: &mut Detached) -> anyhow::Result<()> {
    let inode = namespace.metadata()?.ino();
    let connect = || new_multicast_connection(&[]);
    let (connection, handle, _) = worker.run_in(Some(Arc::clone(&namespace)), connect).await??;
    let _connection = AbortOnDropHandle::new(tokio::spawn(connection));
    for name in devices::list(&handle, true).await?.0.into_values() {
        let filter = format!("the filter on {name} in network namespace {inode}");
        let remove = move || qdisc_detach_program(&name, TcAttachType::Egress, PROGRAM);
        match worker.run_in(Some(Arc::clone(&namespace)), remove).await? {
            Ok(()) => done.removed.push(filter),
            // Most have none; and some go meanwhile, with theirs.
            Err(TcError::IoError(error))
                if error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV) => {}
            Err(error) => done.failed.push(anyhow::Error::from(error).context(format!("cannot remove {filter}"))),
        }
    }
    Ok(())
}
