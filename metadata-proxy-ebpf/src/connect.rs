//! connect(2) to an IMDS address: a container is sent to the daemon's listener in its own network
//! namespace, a host process keeps the real service.

use aya_ebpf::{
    EbpfContext as _,
    bindings::bpf_sock_addr,
    helpers::generated::{
        bpf_get_current_ancestor_cgroup_id, bpf_get_current_cgroup_id, bpf_get_current_pid_tgid, bpf_get_netns_cookie,
        bpf_setsockopt,
    },
    programs::SockAddrContext,
};
use aya_log_ebpf::debug;
use metadata_proxy_common::{
    CGROUP_EXEMPT, CGROUP_INSTANCE, CGROUP_LEVELS, Client, Counter, Flow, HOST_ASKED, HOST_DENIED, IMDS_PORT, IMDS_V4,
    IMDS_V6, LISTENER_PORT, LISTENER_V4, Settings, VERDICT_APPROVED, VERDICT_REDIRECTED,
};

use crate::{
    cgroup::kind_of_current,
    maps::{CLIENTS, count, is_hosts, listener, settings},
    sandbox,
};

/// Third word of a v4-mapped IPv6 address, `::ffff:a.b.c.d`.
pub const V4_MAPPED: u32 = u32::from_ne_bytes([0, 0, 0xff, 0xff]);

const SOCK_STREAM: u32 = 1;
const SOL_TCP: i32 = 6;
const TCP_SYNCNT: i32 = 7;
/// Linux 6.15 and later.
const TCP_RTO_MAX_MS: i32 = 44;
/// Of a second each, instead of the last pause of two.
const CAPPED_SYN_RETRIES: i32 = 2;

/// What becomes of a connect.
enum Verdict {
    Allow,
    /// The caller gets EPERM.
    Deny,
    /// To this port of the listener's address, host order.
    Redirect(u16),
}

pub fn v4(ctx: &SockAddrContext) -> bool {
    // SAFETY: the context outlives the program.
    let addr = unsafe { &mut *ctx.sock_addr };
    let verdict = match addr.user_ip4 {
        IMDS_V4 => imds(ctx, addr, [0, 0, 0, IMDS_V4]),
        LISTENER_V4 => direct(addr),
        _ => return true,
    };
    match verdict {
        Verdict::Allow => true,
        Verdict::Deny => false,
        Verdict::Redirect(port) => {
            addr.user_ip4 = LISTENER_V4;
            set_port(addr, port);
            true
        }
    }
}

pub fn v6(ctx: &SockAddrContext) -> bool {
    // SAFETY: the context outlives the program.
    let addr = unsafe { &mut *ctx.sock_addr };
    // The last word first, and word by word: the verifier refuses one wide load of the array.
    let last = addr.user_ip6[3];
    if last != IMDS_V4 && last != IMDS_V6[3] && last != LISTENER_V4 {
        return true;
    }
    let address = [addr.user_ip6[0], addr.user_ip6[1], addr.user_ip6[2], last];
    let mapped = address[0] == 0 && address[1] == 0 && address[2] == V4_MAPPED;
    let native = address[0] == IMDS_V6[0] && address[1] == 0 && address[2] == 0 && last == IMDS_V6[3];
    let verdict = if native || (mapped && last == IMDS_V4) {
        imds(ctx, addr, address)
    } else if mapped && last == LISTENER_V4 {
        direct(addr)
    } else {
        return true;
    };
    match verdict {
        Verdict::Allow => true,
        Verdict::Deny => false,
        Verdict::Redirect(port) => {
            addr.user_ip6[0] = 0;
            addr.user_ip6[1] = 0;
            addr.user_ip6[2] = V4_MAPPED;
            addr.user_ip6[3] = LISTENER_V4;
            set_port(addr, port);
            true
        }
    }
}

/// A connect to an IMDS address.
#[inline(always)]
fn imds(ctx: &SockAddrContext, addr: &bpf_sock_addr, address: [u32; 4]) -> Verdict {
    let Some(settings) = settings() else {
        return Verdict::Deny;
    };
    let mut flow = current_flow(ctx);
    let host = match kind_of_current() {
        Some(CGROUP_EXEMPT | CGROUP_INSTANCE) => true,
        Some(_) => false,
        // In any other namespace it must be somebody's container, before anyone has told us; in the host's, what is in
        // further namespaces of its own.
        None if flow.netns != settings.host_netns || sandbox::is_current(&settings.task) => false,
        None => {
            let ours = settings.host == HOST_DENIED || settings.host == HOST_ASKED && is_service_port(addr);
            flow.host = u32::from(ours && !is_hosts(flow.cgroup));
            flow.host == 0
        }
    };
    let mut client = Client {
        flow,
        verdict: if host { VERDICT_APPROVED } else { VERDICT_REDIRECTED },
        port: addr.user_port,
        address,
    };
    if !remember(ctx, &mut client) {
        return Verdict::Deny;
    }
    if host {
        count(Counter::Approved);
        return Verdict::Allow;
    }
    // Only the service's own port is there; failing at once beats a timeout.
    if !is_service_port(addr) {
        count(Counter::Guarded);
        debug!(
            ctx,
            "refused port {} of an IMDS address to cgroup {}",
            u16::from_be(addr.user_port as u16),
            flow.cgroup
        );
        return Verdict::Deny;
    }
    count(Counter::Redirected);
    be_patient(ctx, settings);
    // Whether anybody listens there is found out when the SYN leaves.
    let port = listener(flow.netns).map_or(LISTENER_PORT, |port| port as u16);
    debug!(ctx, "redirected cgroup {} pid {} netns {} to port {}", flow.cgroup, flow.pid, flow.netns, port);
    Verdict::Redirect(port)
}

#[inline(always)]
fn is_service_port(addr: &bpf_sock_addr) -> bool {
    addr.type_ == SOCK_STREAM && addr.user_port == u32::from(IMDS_PORT.to_be())
}

/// A connect straight to the listener's address has not passed the redirection, so nobody knows who
/// it is; and in a namespace that two containers share, it could be taken for the other.
#[inline(always)]
fn direct(addr: &bpf_sock_addr) -> Verdict {
    if addr.type_ != SOCK_STREAM {
        return Verdict::Allow;
    }
    count(Counter::Direct);
    Verdict::Deny
}

#[inline(always)]
fn current_flow(ctx: &SockAddrContext) -> Flow {
    let mut ancestors = [0; CGROUP_LEVELS];
    // SAFETY: helpers that take no pointers but the context.
    unsafe {
        let mut level = 0;
        while level < CGROUP_LEVELS {
            ancestors[level] = bpf_get_current_ancestor_cgroup_id(level as i32 + 1);
            level += 1;
        }
        Flow {
            cgroup: bpf_get_current_cgroup_id(),
            ancestors,
            netns: bpf_get_netns_cookie(ctx.as_ptr()),
            pid: (bpf_get_current_pid_tgid() >> 32) as u32,
            host: 0,
        }
    }
}

/// Puts the verdict into the socket's own storage, over that of an earlier connect.
#[inline(always)]
fn remember(ctx: &SockAddrContext, client: &mut Client) -> bool {
    // SAFETY: the pointer is null or into the storage of the context's socket.
    unsafe {
        let stored = CLIENTS.get_or_insert_ptr_mut(ctx, Some(client));
        if stored.is_null() {
            return false;
        }
        *stored = *client;
    }
    true
}

/// How often the connection retries its SYN while it is held. The pauses double, so that the second
/// half of the wait would be a single one; where the kernel lets us, it repeats the SYN each second
/// there. Failing to say so only shortens the wait, so the last result does not matter.
#[inline(always)]
fn be_patient(ctx: &SockAddrContext, settings: &Settings) {
    let set = |option: i32, mut value: i32| {
        let value = core::ptr::from_mut(&mut value).cast();
        // SAFETY: the value lives on our stack and its size is told.
        unsafe { bpf_setsockopt(ctx.as_ptr(), SOL_TCP, option, value, 4) }
    };
    // A second is the least that it takes.
    let capped = set(TCP_RTO_MAX_MS, 1000) == 0;
    let more = if capped { CAPPED_SYN_RETRIES } else { 0 };
    set(TCP_SYNCNT, settings.syn_retries as i32 + more);
}

/// As a whole word: the verifier refuses a store to half of the field.
#[inline(always)]
fn set_port(addr: &mut bpf_sock_addr, port: u16) {
    addr.user_port = u32::from(port.to_be());
}
