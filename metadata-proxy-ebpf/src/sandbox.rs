//! Whether the current task is in a sandbox, told by what makes it one: namespaces below the host's.
//!
//! In the host's network namespace this tells a container from a host process whoever has made it and whatever its
//! cgroup is called. Neither can be left again: a task's PID namespace is that it was made in, and setns(2) to a user
//! namespace above one's own is refused (`userns_install`).

use aya_ebpf::helpers::{bpf_probe_read_kernel, generated::bpf_get_current_task};
use metadata_proxy_common::TaskLayout;

/// False also where the kernel's layout is not known.
pub fn is_current(layout: &TaskLayout) -> bool {
    // What cannot be read is not taken for the host's.
    layout.thread_pid != 0 && !in_hosts_namespaces(layout).unwrap_or(false)
}

#[inline(always)]
fn in_hosts_namespaces(layout: &TaskLayout) -> Option<bool> {
    // SAFETY: a helper that takes no pointers.
    let task = unsafe { bpf_get_current_task() };
    let pid: u64 = read(task, layout.thread_pid)?;
    let pid_level: u32 = read(pid, layout.pid_level)?;
    let cred: u64 = read(task, layout.cred)?;
    let user_ns: u64 = read(cred, layout.user_ns)?;
    let user_level: u32 = read(user_ns, layout.user_level)?;
    Some(pid_level == 0 && user_level == 0)
}

#[inline(always)]
fn read<T>(structure: u64, offset: u32) -> Option<T> {
    // SAFETY: the helper reads from any address, and says where it cannot; integers may have any value.
    unsafe { bpf_probe_read_kernel((structure + u64::from(offset)) as *const T) }.ok()
}
