//! Who asks and is no container that an engine has told of, for those who look: a sandbox of some other tool, or of an
//! engine that is not followed.

use std::{
    collections::HashMap,
    fs,
    path::{Path, PathBuf},
    sync::{Mutex, MutexGuard, PoisonError},
};

use jiff::Timestamp;
use metadata_proxy_common::Flow;
use serde::{Deserialize, Serialize};

use crate::containers::cgroup;

/// Cgroups that are remembered; the one that has asked least lately is forgotten first.
const MOST: usize = 256;
/// What tells a sandbox.
const NAMESPACES: [&str; 3] = ["net", "pid", "user"];

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Stranger {
    pub(crate) cgroup: u64,
    /// Below the cgroup2 mount; None if it was gone when we looked.
    pub(crate) cgroup_path: Option<PathBuf>,
    /// The process that has asked last.
    pub(crate) pid: u32,
    pub(crate) program: Option<String>,
    /// Those that are not the host's, in which the daemon is.
    pub(crate) namespaces: Vec<String>,
    pub(crate) requests: u64,
    pub(crate) first: Timestamp,
    pub(crate) last: Timestamp,
}

impl Stranger {
    /// What a process is now.
    pub(crate) fn look(pid: u32, cgroup: u64, now: Timestamp) -> Self {
        let of = |process: &str, kind: &str| fs::read_link(format!("/proc/{process}/ns/{kind}")).ok();
        let foreign = |kind: &&str| {
            let own = of(&pid.to_string(), kind);
            own.is_some() && own != of("self", kind)
        };
        let program = fs::read_to_string(format!("/proc/{pid}/comm")).ok();
        Self {
            cgroup,
            cgroup_path: cgroup::path_of(pid).ok(),
            pid,
            program: program.map(|name| name.trim_end().to_owned()),
            namespaces: NAMESPACES.iter().filter(|kind| foreign(kind)).map(|kind| (*kind).to_owned()).collect(),
            requests: 0,
            first: now,
            last: now,
        }
    }

    /// Why nobody knows it, as far as its cgroup tells, and what to do.
    pub(crate) fn advice(&self) -> String {
        let path = self.cgroup_path.as_deref().unwrap_or(Path::new("")).display().to_string();
        let engine = |what: &str, how: &str| {
            format!("{what}, and no engine that is followed knows it: {how}; `metadata-proxy check` lists the engines")
        };
        if path.contains("libpod") {
            engine(
                "it looks like podman's",
                "systemctl enable --now podman.socket, or give the socket by --docker-host",
            )
        } else if path.contains("buildkit") {
            "it looks like a step of a build, which has no role: hand credentials to builds as secrets".to_owned()
        } else if path.contains("kubepods") || path.contains("cri-containerd") {
            "it looks like a pod of Kubernetes, which this is not for: see EKS Pod Identity or IRSA".to_owned()
        } else if path.contains("docker") {
            engine("it looks like Docker's", "give its socket by --docker-host")
        } else if self.namespaces.is_empty() {
            format!(
                "a process of the host, to which [host] default = \"deny\" gives nothing: name its unit in [[service]], with role = \"@instance\" for the host's own role, or --exempt-cgroup /{path}"
            )
        } else {
            format!(
                "a sandbox, or a process in a namespace of its own, that no engine knows: if it may have the host's role, --exempt-cgroup /{path}"
            )
        }
    }
}

#[derive(Default)]
pub(crate) struct Strangers(Mutex<HashMap<u64, Stranger>>);

impl Strangers {
    pub(crate) fn saw(&self, flow: &Flow, now: Timestamp) {
        let mut all = self.lock();
        if all.len() >= MOST && !all.contains_key(&flow.cgroup) {
            let oldest = all.values().min_by_key(|stranger| stranger.last).map(|stranger| stranger.cgroup);
            oldest.and_then(|cgroup| all.remove(&cgroup));
        }
        let stranger = all.entry(flow.cgroup).or_insert_with(|| Stranger::look(flow.pid, flow.cgroup, now));
        stranger.requests += 1;
        (stranger.pid, stranger.last) = (flow.pid, now);
    }

    /// It has been announced by now.
    pub(crate) fn forget(&self, cgroup: u64) {
        self.lock().remove(&cgroup);
    }

    /// Those that have asked last come first.
    pub(crate) fn all(&self) -> Vec<Stranger> {
        let mut all: Vec<_> = self.lock().values().cloned().collect();
        all.sort_by_key(|stranger| std::cmp::Reverse(stranger.last));
        all
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Stranger>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn flow(cgroup: u64) -> Flow {
        Flow { cgroup, ancestors: [0; 8], netns: 1, pid: std::process::id(), host: 0 }
    }

    #[test]
    fn who_has_asked_least_lately_is_forgotten_first() {
        let strangers = Strangers::default();
        for cgroup in 0..MOST as u64 + 10 {
            strangers.saw(&flow(cgroup), Timestamp::from_second(cgroup as i64).unwrap());
        }
        strangers.saw(&flow(20), Timestamp::from_second(1000).unwrap());
        let all = strangers.all();
        assert_eq!((all.len(), all[0].cgroup, all[0].requests), (MOST, 20, 2));
        assert!(all.iter().all(|stranger| stranger.cgroup >= 10));
        strangers.forget(20);
        assert_eq!(strangers.all().len(), MOST - 1);
    }

    #[test]
    fn what_might_be_missing_is_told_by_the_cgroup() {
        let advice = |path: &str| {
            let stranger = Stranger::look(1, 1, Timestamp::UNIX_EPOCH);
            Stranger { cgroup_path: Some(path.into()), namespaces: vec!["pid".to_owned()], ..stranger }.advice()
        };
        for (path, words) in [
            ("machine.slice/libpod-0a.scope", "podman.socket"),
            ("docker/buildkit/0a", "a step of a build"),
            ("system.slice/docker-0a.scope", "--docker-host"),
            ("kubepods.slice/cri-containerd-0a.scope", "Kubernetes"),
            ("machine.slice/machine-debian.scope", "--exempt-cgroup /machine.slice/machine-debian.scope"),
        ] {
            assert!(advice(path).contains(words), "{path}: {}", advice(path));
        }
    }
}
