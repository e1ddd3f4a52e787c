//! getpeername(2) of a redirected connection shows what the client asked for.

use aya_ebpf::{bindings::bpf_sock_addr, programs::SockAddrContext};
use metadata_proxy_common::{IMDS_PORT, IMDS_V4, LISTENER_V4, VERDICT_REDIRECTED};

use crate::{connect::V4_MAPPED, maps::CLIENTS};

/// An MPTCP socket connects by one that the kernel makes for it, and the state is in that one's storage.
const IPPROTO_MPTCP: u32 = 262;

pub fn v4(ctx: &SockAddrContext) {
    // SAFETY: the context outlives the program.
    let addr = unsafe { &mut *ctx.sock_addr };
    // Not only faster: a socket that was redirected once may be connected elsewhere by now.
    if addr.user_ip4 != LISTENER_V4 {
        return;
    }
    if let Some((address, port)) = asked_for(ctx, addr) {
        addr.user_ip4 = address[3];
        addr.user_port = port;
    }
}

pub fn v6(ctx: &SockAddrContext) {
    // SAFETY: the context outlives the program.
    let addr = unsafe { &mut *ctx.sock_addr };
    if addr.user_ip6[3] != LISTENER_V4 || addr.user_ip6[2] != V4_MAPPED {
        return;
    }
    if let Some((address, port)) = asked_for(ctx, addr) {
        addr.user_ip6[0] = address[0];
        addr.user_ip6[1] = address[1];
        addr.user_ip6[2] = address[2];
        addr.user_ip6[3] = address[3];
        addr.user_port = port;
    }
}

/// The address and the port (network order) that this connection was meant for.
#[inline(always)]
fn asked_for(ctx: &SockAddrContext, addr: &bpf_sock_addr) -> Option<([u32; 4], u32)> {
    // SAFETY: the pointer is null or into the storage of the context's socket.
    match unsafe { CLIENTS.get_ptr_mut(ctx).as_ref() } {
        Some(client) if client.verdict == VERDICT_REDIRECTED => Some((client.address, client.port)),
        Some(_) => None,
        // Nothing else is connected to a listener of ours; whether it was by IPv6 is not known here.
        None if addr.protocol == IPPROTO_MPTCP => Some(([0, 0, V4_MAPPED, IMDS_V4], u32::from(IMDS_PORT.to_be()))),
        None => None,
    }
}
