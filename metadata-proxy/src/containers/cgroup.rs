//! From a process to the cgroup of its container.

use std::{
    collections::HashSet,
    fs,
    os::unix::fs::{DirEntryExt as _, MetadataExt as _},
    path::{Path, PathBuf},
};

use anyhow::{Context as _, bail};

/// The id of the container's cgroup, found through its first process.
///
/// The path must name the container: the process may have ended, and its id been given to another.
pub(crate) fn of_container(pid: u32, id: &str, cgroup2: &Path) -> anyhow::Result<u64> {
    let path = path_of(pid)?;
    // The process may have moved below its container's cgroup, as systemd does.
    // The topmost name counts: what lies below a container's cgroup, it names as it likes.
    let own = cut_at(&path, |component| container_id(component).is_some());
    let Some(own) = own.filter(|own| own.iter().next_back().is_some_and(|name| name.to_string_lossy().contains(id)))
    else {
        bail!("process {pid} is in cgroup {}, which is not this container's", path.display());
    };
    id_of(cgroup2, &own)
}

/// The id of the container that this process seems to be in, if its cgroup is still the one the
/// kernel saw. A hint only: a container can name a cgroup below its own as it likes, which is why
/// the topmost name counts.
pub(crate) fn container_hint(pid: u32, cgroup: u64, cgroup2: &Path) -> Option<String> {
    let path = path_of(pid).ok()?;
    if id_of(cgroup2, &path).ok()? != cgroup {
        return None;
    }
    path.iter().find_map(|component| container_id(component.to_str()?)).map(str::to_owned)
}

/// Whether it is a container's, or below one.
pub(crate) fn names_container(path: &Path) -> bool {
    path.iter().any(|name| name.to_str().is_none_or(|name| container_id(name).is_some()))
}

/// The ids of all cgroups that an engine has made for a container, whether it is ours or not. What lies
/// below one is its own.
pub(crate) fn all(cgroup2: &Path) -> HashSet<u64> {
    let mut found = HashSet::new();
    let mut directories = vec![cgroup2.to_owned()];
    while let Some(directory) = directories.pop() {
        // One that is being removed has nothing to say.
        for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
            if !entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                continue;
            }
            if entry.file_name().to_str().and_then(container_id).is_some() {
                found.insert(entry.ino());
            } else {
                directories.push(entry.path());
            }
        }
    }
    found
}

/// The id of our own container's cgroup, if we run in one.
pub(crate) fn of_our_container(cgroup2: &Path) -> Option<u64> {
    let path = path_of(std::process::id()).ok()?;
    id_of(cgroup2, &cut_at(&path, |component| container_id(component).is_some())?).ok()
}

/// The id of the cgroup at this path, absolute or below the mount.
pub(crate) fn id_at(cgroup2: &Path, path: &Path) -> anyhow::Result<u64> {
    if path.starts_with(cgroup2) {
        return id_of(cgroup2, path);
    }
    id_of(cgroup2, path.strip_prefix("/").unwrap_or(path))
}

/// The 64 hexadecimal digits in names such as `<id>`, `docker-<id>.scope`, `libpod-<id>`.
fn container_id(component: &str) -> Option<&str> {
    const DIGITS: usize = 64;
    let digits = |part: &&str| part.len() == DIGITS && part.bytes().all(|byte| byte.is_ascii_hexdigit());
    component.split(['-', '.', ':']).find(digits)
}

/// The path of a process's cgroup below the cgroup2 mount.
pub(crate) fn path_of(pid: u32) -> anyhow::Result<PathBuf> {
    let file = format!("/proc/{pid}/cgroup");
    let text = fs::read_to_string(&file).with_context(|| format!("cannot read {file}"))?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"));
    path.map(PathBuf::from).with_context(|| format!("{file} names no cgroup2 path"))
}

fn cut_at(path: &Path, is_end: impl Fn(&str) -> bool) -> Option<PathBuf> {
    let mut cut = PathBuf::new();
    for component in path {
        cut.push(component);
        if is_end(component.to_str()?) {
            return Some(cut);
        }
    }
    None
}

/// The id of a cgroup is the inode number of its directory.
fn id_of(cgroup2: &Path, path: &Path) -> anyhow::Result<u64> {
    let directory = cgroup2.join(path);
    let metadata = fs::metadata(&directory).with_context(|| format!("cannot find cgroup {}", directory.display()))?;
    Ok(metadata.ino())
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef";

    #[test]
    fn finds_the_container_id_in_every_engines_names() {
        for name in
            [ID.to_owned(), format!("docker-{ID}.scope"), format!("libpod-{ID}.scope"), format!("cri-containerd:{ID}")]
        {
            assert_eq!(container_id(&name), Some(ID), "{name}");
        }
        for name in ["docker", "init.scope", &ID[1..], "user-1000.slice"] {
            assert_eq!(container_id(name), None, "{name}");
        }
    }

    #[test]
    fn cuts_a_nested_path_at_the_container() {
        let nested = PathBuf::from(format!("docker/{ID}/init.scope"));
        assert_eq!(cut_at(&nested, |name| name.contains(ID)), Some(PathBuf::from(format!("docker/{ID}"))));
        assert_eq!(cut_at(Path::new("system.slice/ssh.service"), |name| name.contains(ID)), None);
    }
}
