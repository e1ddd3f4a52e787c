//! What is no container that an engine has told of, for `ps --all` and `explain`.

use anyhow::{Context as _, bail};
use jiff::Timestamp;

use crate::{containers::cgroup, interceptor::preflight, strangers::Stranger};

pub(super) const HEADER: &str =
    "CGROUP    PROCESS   PROGRAM           NAMESPACES      REQUESTS  LAST                  PATH";

pub(super) fn row(stranger: &Stranger) -> String {
    format!(
        "{:<10}{:<10}{:<18}{:<16}{:>8}  {:<22.0}{}",
        stranger.cgroup,
        stranger.pid,
        stranger.program.as_deref().unwrap_or("-"),
        stranger.namespaces.join(","),
        stranger.requests,
        stranger.last,
        path(stranger),
    )
}

fn path(stranger: &Stranger) -> String {
    stranger.cgroup_path.as_ref().map_or("gone".to_owned(), |path| format!("/{}", path.display()))
}

/// What is asked about by a process or a cgroup.
pub(super) struct Other {
    pid: Option<u32>,
    /// From its own up to the root's child.
    cgroups: Vec<u64>,
}

impl Other {
    /// None: it is a container's name or id.
    pub(super) fn parse(given: &str) -> anyhow::Result<Option<Self>> {
        if let Some(id) = given.strip_prefix("cgroup:") {
            let id = id.parse().with_context(|| format!("{given:?}: expected cgroup: and its id, a number"))?;
            return Ok(Some(Self { pid: None, cgroups: vec![id] }));
        }
        let Some(pid) = given.strip_prefix("pid:") else { return Ok(None) };
        let pid = pid.parse().with_context(|| format!("{given:?}: expected pid: and a process id"))?;
        let path = cgroup::path_of(pid).with_context(|| format!("there is no process {pid}"))?;
        let mount = preflight::cgroup2_mount()?;
        let ancestors = path.ancestors().filter(|path| !path.as_os_str().is_empty());
        let cgroups = ancestors.map(|path| cgroup::id_at(&mount, path)).collect::<anyhow::Result<_>>()?;
        Ok(Some(Self { pid: Some(pid), cgroups }))
    }

    pub(super) fn is_in(&self, cgroup: u64) -> bool {
        self.cgroups.contains(&cgroup)
    }

    pub(super) fn lines(
        &self,
        strangers: &[Stranger],
        host_denied: bool,
        now: Timestamp,
    ) -> anyhow::Result<Vec<(&'static str, String)>> {
        let own = self.cgroups.first().copied().unwrap_or_default();
        let asked = strangers.iter().find(|stranger| stranger.cgroup == own).cloned();
        let found = match (asked, self.pid) {
            (Some(stranger), _) => stranger,
            (None, Some(pid)) => Stranger::look(pid, own, now),
            (None, None) => bail!("nobody in cgroup {own} has asked; `metadata-proxy ps --all` lists who has"),
        };
        let program = found.program.as_deref().unwrap_or("of no name");
        let mut lines = vec![
            ("cgroup", format!("{} ({})", found.cgroup, path(&found))),
            ("process", format!("{}, {program}", found.pid)),
        ];
        let of_host = found.namespaces.is_empty();
        if of_host && found.requests == 0 && !host_denied {
            lines.push(("namespaces", "the host's".to_owned()));
            lines.push(("role", "the host's own: a process of the host keeps the real service".to_owned()));
            return Ok(lines);
        }
        let own = format!("{} of its own", found.namespaces.join(", "));
        lines.push(("namespaces", if of_host { "the host's".to_owned() } else { own }));
        lines.push(match found.requests {
            0 => ("asked", "nothing yet".to_owned()),
            requests => ("asked", format!("{requests} times, first at {}, last at {}", found.first, found.last)),
        });
        let why = if of_host && host_denied { "[host] default is deny" } else { "no engine has told of it" };
        lines.push(("role", format!("none: {why}")));
        lines.push(("remedy", found.advice()));
        Ok(lines)
    }
}
