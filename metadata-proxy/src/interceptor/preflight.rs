//! What must hold before anything is attached; each thing missing is named with its remedy.

use std::{
    fs::{self, File},
    os::{fd::AsFd as _, unix::fs::MetadataExt as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};
use rustix::{
    fs::statfs,
    mount::{MountFlags, mount},
    thread::{CapabilitySet, LinkNameSpaceType, move_into_link_name_space},
};
use tracing::info;

const BPF_FS_MAGIC: u64 = 0xcafe_4a11;
const CGROUP2_MAGIC: u64 = 0x6367_7270;

/// What the daemon needs to do its work, and for what. CAP_BPF is not among it: to the kernel CAP_SYS_ADMIN includes it,
/// and Docker before 23 cannot give it to a container, not even to a privileged one.
const CAPABILITIES: [(CapabilitySet, &str, &str); 3] = [
    (
        CapabilitySet::SYS_ADMIN,
        "CAP_SYS_ADMIN",
        "to load and attach BPF programs, and to enter the containers' network namespaces",
    ),
    (CapabilitySet::NET_ADMIN, "CAP_NET_ADMIN", "to attach network BPF programs"),
    (CapabilitySet::SYS_PTRACE, "CAP_SYS_PTRACE", "to find a container's network namespace in /proc"),
];

pub(crate) fn capabilities() -> anyhow::Result<()> {
    let ours = rustix::thread::capabilities(None).context("cannot read the daemon's own capabilities")?.effective;
    for (capability, name, reason) in CAPABILITIES {
        if !ours.contains(capability) {
            bail!("{name} is missing: the daemon needs it {reason}. Run it as root, in a container with --privileged");
        }
    }
    Ok(())
}

/// The cgroup to attach to: the given one, else the root of the host's cgroup2 hierarchy.
pub(crate) fn cgroup(given: Option<&Path>) -> anyhow::Result<PathBuf> {
    if let Some(path) = given {
        let magic = statfs(path).with_context(|| format!("--cgroup {}: no such directory", path.display()))?.f_type;
        if magic.cast_unsigned() != CGROUP2_MAGIC {
            bail!(
                "--cgroup {} is not in a cgroup2 hierarchy; give a directory below a cgroup2 mount (`findmnt -t cgroup2`)",
                path.display()
            );
        }
        return Ok(path.to_owned());
    }
    let mount = cgroup2_mount()?;
    if !is_root_cgroup(&mount) {
        bail!(
            "{} is not the host's root cgroup: the daemon sees only a part of the hierarchy. Give it the host's (docker run --cgroupns=host, or --pid=host -v /sys/fs/cgroup:/sys/fs/cgroup), or give --cgroup",
            mount.display()
        );
    }
    Ok(mount)
}

/// Where cgroup2 is mounted: /sys/fs/cgroup, or /sys/fs/cgroup/unified on a hybrid host.
pub(crate) fn cgroup2_mount() -> anyhow::Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("cannot read /proc/self/mountinfo")?;
    let visible: Vec<Mount<'_>> = mounts.lines().filter_map(Mount::of_cgroup2).filter(Mount::is_visible).collect();
    // Of several the root, and then the last: a later one may hide an earlier one.
    let whole = visible.iter().rev().filter(|mount| mount.root == "/");
    match whole.max_by_key(|mount| is_root_cgroup(mount.target)) {
        Some(mount) => Ok(mount.target.to_owned()),
        None if visible.is_empty() => bail!(
            "no cgroup2 hierarchy is mounted, and identity rests on it. On a host with cgroup v1 only, boot with systemd.unified_cgroup_hierarchy=1 (or =0 with systemd.legacy_systemd_cgroup_controller=0 for hybrid); elsewhere: mount -t cgroup2 none /sys/fs/cgroup"
        ),
        None => bail!(
            "the cgroup2 mounts here are of another cgroup namespace than /proc/PID/cgroup, so no process would be found in its container. Run the daemon in the host's (docker run --cgroupns=host; where that cannot be said, --pid=host)"
        ),
    }
}

/// The root of a hierarchy has this inode number, and no other cgroup in it.
fn is_root_cgroup(path: &Path) -> bool {
    fs::metadata(path).is_ok_and(|root| root.ino() == 1)
}

/// `36 35 0:31 / /sys/fs/cgroup rw,... shared:9 - cgroup2 cgroup2 rw`
#[derive(Debug, PartialEq, Eq)]
struct Mount<'a> {
    /// Of the hierarchy, as the cgroup namespace of the reader has it: `/` is that namespace's own root, by which
    /// /proc/PID/cgroup names paths, too; `/../..` lies above it.
    root: &'a str,
    target: &'a Path,
}

impl<'a> Mount<'a> {
    fn of_cgroup2(line: &'a str) -> Option<Self> {
        let (mount, filesystem) = line.split_once(" - ")?;
        filesystem.starts_with("cgroup2 ").then_some(())?;
        let mut fields = mount.split(' ').skip(3);
        Some(Self { root: fields.next()?, target: Path::new(fields.next()?) })
    }

    /// Not hidden by a later mount, and a directory: systemd binds a unit's file `memory.pressure` over itself.
    fn is_visible(&self) -> bool {
        let cgroup2 = statfs(self.target).is_ok_and(|fs| fs.f_type.cast_unsigned() == CGROUP2_MAGIC);
        cgroup2 && self.target.is_dir()
    }
}

/// Has the calling thread, and those that it starts, see cgroups as the host's first process does.
///
/// With cgroup v2 Docker gives even privileged containers a cgroup namespace of their own, in which /proc/PID/cgroup
/// leads nowhere, and an ECS task definition cannot say otherwise. With the host's processes in sight we go there
/// by ourselves. Without them `host_processes` says what is missing.
pub(crate) fn enter_host_cgroups() -> anyhow::Result<()> {
    if host_processes().is_err() || is_initial("self", "cgroup")? {
        return Ok(());
    }
    let namespace = File::open("/proc/1/ns/cgroup").context("cannot open /proc/1/ns/cgroup")?;
    move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::ControlGroup))
        .context("cannot enter the host's cgroup namespace")
}

/// The programs tell of processes by their ids in the host's initial namespace, and so does the engine.
pub(crate) fn host_processes() -> anyhow::Result<()> {
    if !is_initial("self", "pid")? {
        bail!(
            "the daemon is in a process namespace of its own, and would take one process for another. Run it in the host's (docker run --pid=host)"
        );
    }
    Ok(())
}

/// Whether a process is in the namespace of this kind that the kernel itself has made. Its inode number is the same on
/// every kernel since Linux 3.8 (`PROC_PID_INIT_INO`) and 4.6 (`PROC_CGROUP_INIT_INO`).
fn is_initial(process: &str, kind: &str) -> anyhow::Result<bool> {
    let initial = if kind == "pid" { 0xefff_fffc } else { 0xefff_fffb };
    Ok(namespace(process, kind)?.ino() == initial)
}

/// The namespace that we are in is taken for the host's, and its processes for the host's own.
pub(crate) fn host_network() -> anyhow::Result<()> {
    host_processes().context("whose network namespace this is cannot be told")?;
    if !is_hosts("net")? {
        bail!(
            "the daemon is not in the host's network namespace, and would take its own for it. Run it there (docker run --network=host)"
        );
    }
    Ok(())
}

/// Whether we are in the same namespace as the kernel's own threads, whose first is process 2: unlike the host's first
/// process, it may be looked at everywhere.
fn is_hosts(kind: &str) -> anyhow::Result<bool> {
    Ok(namespace("self", kind)?.ino() == namespace("2", kind)?.ino())
}

fn namespace(process: &str, kind: &str) -> anyhow::Result<fs::Metadata> {
    let path = format!("/proc/{process}/ns/{kind}");
    fs::metadata(&path).with_context(|| format!("cannot look at {path}"))
}

/// Makes sure that there is a bpffs to pin in, as bpftool and Cilium do. Where the `whole_host` is ours, not in a mount
/// namespace of our own: there it would end with us, and the interception with it.
pub(crate) fn bpffs(path: &Path, whole_host: bool) -> anyhow::Result<()> {
    let magic = statfs(path).with_context(|| format!("--bpffs {}: no such directory", path.display()))?.f_type;
    if magic.cast_unsigned() == BPF_FS_MAGIC {
        return Ok(());
    }
    if whole_host && !is_hosts("mnt").unwrap_or(false) {
        bail!(
            "{0} is not a bpffs, and one mounted here would end with the daemon, and the interception with it. On the host: mount -t bpf bpf {0}; and give it to the daemon's container (docker run -v {0}:{0})",
            path.display()
        );
    }
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("bpf", path, "bpf", flags, Some(c"mode=0700")).with_context(|| {
        format!("{0} is not a bpffs and cannot be made one; mount it: mount -t bpf bpf {0}", path.display())
    })?;
    info!("mounted a bpffs on {}", path.display());
    Ok(())
}

/// Makes sure that there is a tracefs, through which the kernel tells of cgroups as they are made.
pub(crate) fn tracefs() -> anyhow::Result<()> {
    const PLACES: [&str; 2] = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];
    if PLACES.iter().any(|place| Path::new(place).join("events/cgroup/cgroup_mkdir").exists()) {
        return Ok(());
    }
    let place = PLACES[0];
    let flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount("tracefs", place, "tracefs", flags, None).with_context(|| {
        format!("no tracefs is mounted, and none can be: mount -t tracefs tracefs {place}. The daemon needs it to know containers in the host's network namespace from their first moment")
    })?;
    info!("mounted a tracefs on {place}");
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_the_cgroup2_mounts_of_hybrid_and_unified_hosts_and_of_units() {
        let mount = |line| Mount::of_cgroup2(line).map(|mount| (mount.root, mount.target.to_str().unwrap()));
        let line = "44 30 0:39 / /sys/fs/cgroup/unified rw,relatime shared:9 - cgroup2 cgroup2 rw";
        assert_eq!(mount(line), Some(("/", "/sys/fs/cgroup/unified")));
        let v1 = "43 30 0:38 / /sys/fs/cgroup/pids rw,relatime shared:8 - cgroup cgroup rw,pids";
        assert_eq!(mount(v1), None);
        let file = "/system.slice/x.service/memory.pressure";
        let line = format!("61 36 0:27 {file} /sys/fs/cgroup{file} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate");
        assert_eq!(Mount::of_cgroup2(&line).map(|mount| mount.root), Some(file));
        let line = "713 700 0:27 /../.. /sys/fs/cgroup rw,nosuid - cgroup2 cgroup rw,nsdelegate";
        assert_eq!(mount(line), Some(("/../..", "/sys/fs/cgroup")));
        // A file is no hierarchy, and neither is a directory elsewhere.
        assert!(!Mount { root: "/", target: Path::new("/proc/self/mountinfo") }.is_visible());
        assert!(!Mount { root: "/", target: Path::new("/proc") }.is_visible());
    }
}
