//! Attaching each program to the cgroup: a new link, or, where the link of an earlier daemon is
//! pinned, an exchange of its program without a moment in between. So it is also with links of
//! another layout: were two sets attached, the second would refuse what the first has redirected.

use std::{
    fs::{self, File},
    os::fd::{AsFd as _, OwnedFd},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use aya::{
    Ebpf,
    programs::{CgroupAttachMode, CgroupSkbAttachType, Program, links::FdLink},
};
use tracing::{debug, warn};

use super::{Error, object::Pins, syscall, uplinks};

/// What notes cgroups as they come and go.
pub(super) const TRACKERS: &[&str] = &["imds_cgroup_gone", "imds_cgroup_made"];
/// What asks for them, in the order of attachment. First the guard: a connection whose redirection is
/// not attached yet is cut rather than let through.
pub(super) const HOOKS: &[&str] =
    &["imds_egress", "imds_sock_ops", "imds_getpeername4", "imds_getpeername6", "imds_connect4", "imds_connect6"];

pub(super) fn attach_all<'a>(
    object: &mut Ebpf,
    programs: impl IntoIterator<Item = &'a &'static str>,
    pins: &Pins,
    cgroup: &Path,
) -> Result<(), Error> {
    let error = |program| move |source| Error::Attach { program, cgroup: cgroup.to_owned(), source };
    let directory = File::open(cgroup).map_err(anyhow::Error::from).map_err(error("anything"))?;
    for name in programs {
        let program = object.program_mut(name).ok_or(Error::Missing(name))?;
        attach(program, &directory, &pins.link(name), pins.earlier_link(name)).map_err(error(name))?;
    }
    Ok(())
}

/// All that the daemon cannot do without.
pub(super) fn needed() -> impl Iterator<Item = &'static &'static str> {
    TRACKERS.iter().chain(HOOKS).chain([&uplinks::PROGRAM])
}

/// Has the kernel verify programs.
pub(super) fn load_all<'a>(
    object: &mut Ebpf,
    programs: impl IntoIterator<Item = &'a &'static str>,
) -> Result<(), Error> {
    for name in programs.into_iter().copied() {
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
        Program::CgroupSockopt(program) => program.load()?,
        _ => bail!("a program of an unexpected type"),
    }
    Ok(())
}

/// `earlier` is where a daemon with another layout has left the link.
fn attach(program: &mut Program, cgroup: &File, pin: &Path, earlier: Option<PathBuf>) -> anyhow::Result<()> {
    let old = pin.exists().then(|| pin.to_owned()).or(earlier);
    // The link of a trace event cannot exchange its program. But both may run at once: what they do to
    // the map, they do twice.
    let trace = matches!(program, Program::TracePoint(_));
    let exchanged = old.filter(|_| !trace).map(|old| exchange(program, &old).map(|()| old));
    match exchanged {
        Some(Ok(old)) => fs::rename(old, pin).context("cannot rename the pinned link")?,
        failed => {
            if let Some(Err(error)) = failed {
                warn!(
                    "{} was no longer attached, and containers may have reached the real service: {error:#}",
                    pin.display()
                );
            }
            let link = new_link(program, cgroup, pin).context(
                "the kernel makes no link; if it says EPERM, a program without BPF_F_ALLOW_MULTI holds this hook: `bpftool cgroup show` names it",
            )?;
            replace(pin, link)?;
        }
    }
    Ok(())
}

/// Connections see the old program or the new one. Fails where somebody has detached the link (`BPF_LINK_DETACH`).
fn exchange(program: &Program, pin: &Path) -> anyhow::Result<()> {
    debug!("exchanging the program of {}", pin.display());
    let link = syscall::open_pin(pin).context("cannot open the pinned link")?;
    syscall::update_link(link.as_fd(), program.fd()?.as_fd()).context("cannot exchange the program")
}

/// As with trace events, the new one runs beside the old one for a moment: what one refuses, both do.
pub(super) fn attach_any(program: &OwnedFd, pin: &Path) -> anyhow::Result<()> {
    let link = syscall::attach_modify_return(program.as_fd()).context("the kernel makes no link")?;
    replace(pin, |new| Ok(syscall::pin(link.as_fd(), new)?))
}

/// Pins a link in the place of one that is of no use any more.
fn replace(pin: &Path, link: impl FnOnce(&Path) -> anyhow::Result<()>) -> anyhow::Result<()> {
    let mut new = pin.as_os_str().to_owned();
    // Names in a bpffs have no dots.
    new.push("_new");
    // Of a daemon that was killed just here.
    let _ = fs::remove_file(&new);
    link(new.as_ref()).context("cannot pin the link")?;
    fs::rename(&new, pin).context("cannot rename the pinned link")
}

/// Puts a link at a path.
type ToPin = Box<dyn FnOnce(&Path) -> anyhow::Result<()>>;

fn new_link(program: &mut Program, cgroup: &File, pin: &Path) -> anyhow::Result<ToPin> {
    // The kernel lets several links share a hook, whatever the mode; and it refuses any other mode
    // for a link with EINVAL.
    let mode = CgroupAttachMode::Single;
    let link: FdLink = match program {
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
        // aya does not give its link away.
        Program::CgroupSockopt(program) => {
            let link = syscall::link_setsockopt(program.fd()?.as_fd(), cgroup.as_fd())?;
            return Ok(Box::new(move |pin| Ok(syscall::pin(link.as_fd(), pin)?)));
        }
        Program::TracePoint(program) => {
            let event = if pin.ends_with("imds_cgroup_made") { "cgroup_mkdir" } else { "cgroup_rmdir" };
            let id =
                program.attach("cgroup", event).context("cannot attach to the trace event (is tracefs mounted?)")?;
            program.take_link(id)?.try_into()?
        }
        _ => bail!("a program of an unexpected type"),
    };
    Ok(Box::new(move |pin| Ok(link.pin(pin).map(drop)?)))
}
