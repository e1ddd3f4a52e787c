//! Attaching each program to the cgroup: a new link, or, where the link of an earlier daemon is
//! pinned, an exchange of its program without a moment in between.

use std::{
    fs::{self, File},
    os::fd::AsFd as _,
    path::Path,
};

use anyhow::{Context as _, bail};
use aya::{
    Ebpf,
    programs::{CgroupAttachMode, CgroupSkbAttachType, Program, TracePoint, links::FdLink},
};
use tracing::debug;

use super::{Error, object::Pins, syscall, uplinks};

/// In the order of attachment. Cgroups first, so that none is missed; then the guard: a connection
/// whose redirection is not attached yet is cut rather than let through.
const PROGRAMS: [&str; 8] = [
    "imds_cgroup_gone",
    "imds_cgroup_made",
    "imds_egress",
    "imds_sock_ops",
    "imds_getpeername4",
    "imds_getpeername6",
    "imds_connect4",
    "imds_connect6",
];

pub(super) fn attach_all(object: &mut Ebpf, pins: &Pins, cgroup: &Path) -> Result<(), Error> {
    let directory = File::open(cgroup).map_err(|error| Error::Attach {
        program: "anything",
        cgroup: cgroup.to_owned(),
        source: error.into(),
    })?;
    load_all(object)?;
    for name in PROGRAMS {
        let program = object.program_mut(name).ok_or(Error::Missing(name))?;
        attach(program, &directory, &pins.link(name)).map_err(|source| Error::Attach {
            program: name,
            cgroup: cgroup.to_owned(),
            source,
        })?;
    }
    Ok(())
}

/// Has the kernel verify all programs.
pub(super) fn load_all(object: &mut Ebpf) -> Result<(), Error> {
    for name in PROGRAMS.into_iter().chain([uplinks::PROGRAM]) {
        let program = object.program_mut(name).ok_or(Error::Missing(name))?;
        load(program).map_err(|source| super::object::load_error(source.context(name)))?;
    }
    Ok(())
}

fn load(program: &mut Program) -> anyhow::Result<()> {
    match program {
        Program::CgroupSockAddr(program) => program.load()?,
        Program::CgroupSkb(program) => program.load()?,
        Program::SockOps(program) => program.load()?,
        Program::TracePoint(program) => program.load()?,
        Program::SchedClassifier(program) => program.load()?,
        _ => bail!("a program of an unexpected type"),
    }
    Ok(())
}

fn attach(program: &mut Program, cgroup: &File, pin: &Path) -> anyhow::Result<()> {
    if let Program::TracePoint(program) = program {
        return attach_tracepoint(program, pin);
    }
    if pin.exists() {
        debug!("exchanging the program of {}", pin.display());
        let link = syscall::open_pin(pin).context("cannot open the pinned link")?;
        return syscall::update_link(link.as_fd(), program.fd()?.as_fd()).context("cannot exchange the program");
    }
    let link = new_link(program, cgroup).context(
        "the kernel makes no link; if it says EPERM, a program without BPF_F_ALLOW_MULTI holds this hook: `bpftool cgroup show` names it",
    )?;
    link.pin(pin).context("cannot pin the link")?;
    Ok(())
}

fn new_link(program: &mut Program, cgroup: &File) -> anyhow::Result<FdLink> {
    // The kernel lets several links share a hook, whatever the mode; and it refuses any other mode
    // for a link with EINVAL.
    let mode = CgroupAttachMode::Single;
    Ok(match program {
        Program::CgroupSockAddr(program) => {
            let id = program.attach(cgroup, mode)?;
            program.take_link(id)?.try_into()?
        }
        Program::CgroupSkb(program) => {
            let id = program.attach(cgroup, CgroupSkbAttachType::Egress, mode)?;
            program.take_link(id)?.try_into()?
        }
        Program::SockOps(program) => {
            let id = program.attach(cgroup, mode)?;
            program.take_link(id)?.try_into()?
        }
        _ => bail!("a program of an unexpected type"),
    })
}

/// The link of a trace event cannot exchange its program. But both may run at once: what they do to
/// the map, they do twice.
fn attach_tracepoint(program: &mut TracePoint, pin: &Path) -> anyhow::Result<()> {
    let event = if pin.ends_with("imds_cgroup_made") { "cgroup_mkdir" } else { "cgroup_rmdir" };
    let id = program.attach("cgroup", event).context("cannot attach to the trace event (is tracefs mounted?)")?;
    let link: FdLink = program.take_link(id)?.try_into()?;
    // Names in a bpffs have no dots.
    let new = pin.with_file_name(format!("{event}_new"));
    // Of a daemon that was killed just here.
    let _ = fs::remove_file(&new);
    link.pin(&new).context("cannot pin the link")?;
    fs::rename(&new, pin).context("cannot replace the pinned link")?;
    Ok(())
}
