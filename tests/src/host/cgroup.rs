//! The part of the cgroup2 tree that belongs to one test host: found, made, and removed with all that runs in it.

use std::{
    fs, io,
    path::{Path, PathBuf},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result};

/// Where the machine mounts the cgroup2 tree: `/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` beside cgroup v1.
pub(super) fn mount_point() -> Result<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").context("reading /proc/self/mountinfo")?;
    mounts.lines().find_map(cgroup2_mount).context(
        "cgroup2 is not mounted: mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified",
    )
}

/// `31 23 0:28 / /sys/fs/cgroup rw,relatime shared:9 - cgroup2 cgroup2 rw`; only a mount of the whole tree will do.
fn cgroup2_mount(line: &str) -> Option<PathBuf> {
    let (mount, filesystem) = line.split_once(" - ")?;
    let mut fields = mount.split(' ').skip(3);
    let (root, path) = (fields.next()?, fields.next()?);
    (filesystem.starts_with("cgroup2 ") && root == "/").then(|| PathBuf::from(path))
}

/// Makes `path` with two leaves: a cgroup that hands controllers to its children may hold no processes itself.
pub(super) fn create(path: &Path) -> Result<()> {
    for directory in [path.to_path_buf(), path.join("host"), path.join("containers")] {
        fs::create_dir(&directory).with_context(|| format!("creating the cgroup {}", directory.display()))?;
    }
    Ok(())
}

/// Kills every process below `path` and removes the tree; a tree that is already gone is fine.
pub(super) fn remove(path: &Path) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    while path.exists() {
        // The kernel kills in the background, and a cgroup with a dying process is still busy.
        match kill_and_remove(path) {
            Err(error) if Instant::now() > deadline => {
                return Err(error).with_context(|| format!("removing the cgroup {}", path.display()));
            }
            Err(_) => thread::sleep(Duration::from_millis(2)),
            Ok(()) => {}
        }
    }
    Ok(())
}

fn kill_and_remove(path: &Path) -> io::Result<()> {
    // In kernels since 5.14, which the daemon needs anyway. It takes the whole tree at once: no process escapes by forking.
    fs::write(path.join("cgroup.kill"), "1")?;
    remove_tree(path)
}

fn remove_tree(path: &Path) -> io::Result<()> {
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            remove_tree(&entry.path())?;
        }
    }
    fs::remove_dir(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_whole_cgroup2_tree_is_taken() {
        let mounted = |line| cgroup2_mount(line);
        assert_eq!(
            mounted("41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw"),
            Some("/sys/fs/cgroup/unified".into())
        );
        assert_eq!(
            mounted("30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate"),
            Some("/sys/fs/cgroup".into())
        );
        assert_eq!(mounted("50 31 0:38 /a /mnt rw - cgroup2 cgroup2 rw"), None);
        assert_eq!(mounted("32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu"), None);
        assert_eq!(mounted(""), None);
    }
}
