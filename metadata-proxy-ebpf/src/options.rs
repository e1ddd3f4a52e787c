//! Socket options by which frames leave past the guard of the uplinks: refused to containers.
//!
//! A packet socket with PACKET_QDISC_BYPASS, and the transmit ring of an AF_XDP socket, hand frames to the device itself
//! (`__dev_direct_xmit`), past every tc program. Not only in the host's network namespace: others can have a device of
//! the host's, too.

use aya_ebpf::{
    helpers::generated::bpf_get_current_ancestor_cgroup_id,
    programs::{FEntryContext, SockoptContext},
};
use metadata_proxy_common::{CGROUP_CONTAINER, Counter};

use crate::{
    cgroup::kind_of_current,
    maps::{count, settings},
    sandbox,
};

const SOL_PACKET: i32 = 263;
const PACKET_QDISC_BYPASS: i32 = 20;
const SOL_XDP: i32 = 283;
const XDP_TX_RING: i32 = 3;
const EPERM: i32 = 1;

/// Where the kernel asks its security modules, which it does for every process on every way to set an option: 0, or the
/// error that the caller gets. It runs for the whole host, so whose it is is asked here.
pub fn asked(ctx: &FEntryContext) -> i32 {
    if !is_dangerous(ctx.arg(1), ctx.arg(2)) {
        return 0;
    }
    let ours = settings().is_none_or(|settings| {
        // SAFETY: a helper that takes no pointers.
        let top = unsafe { bpf_get_current_ancestor_cgroup_id(settings.cgroup_level as i32) };
        top == settings.cgroup
    });
    if ours && is_refused() { -EPERM } else { 0 }
}

/// The hook of cgroups, which 32-bit programs pass (`do_sock_setsockopt`): whether the option may be set.
pub fn set(ctx: &SockoptContext) -> bool {
    // SAFETY: the context outlives the program.
    let option = unsafe { &mut *ctx.sockopt };
    // Take the value as the caller has it: the kernel has only seen its first page.
    option.optlen = 0;
    !(is_dangerous(option.level, option.optname) && is_refused())
}

#[inline(always)]
fn is_dangerous(level: i32, name: i32) -> bool {
    matches!((level, name), (SOL_PACKET, PACKET_QDISC_BYPASS) | (SOL_XDP, XDP_TX_RING))
}

fn is_refused() -> bool {
    let container = settings().is_none_or(|settings| match kind_of_current() {
        Some(kind) => kind == CGROUP_CONTAINER,
        None => sandbox::is_current(&settings.task),
    });
    if container {
        count(Counter::OptionsRefused);
    }
    container
}
