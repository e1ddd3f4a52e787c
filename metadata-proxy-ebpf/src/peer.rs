//! getpeername(2) of a redirected connection shows what the client asked for.

use aya_ebpf::programs::SockAddrContext;
use metadata_proxy_common::{Client, LISTENER_V4, VERDICT_REDIRECTED};

use crate::{connect::V4_MAPPED, maps::CLIENTS};

pub fn v4(ctx: &SockAddrContext) {
    // SAFETY: the context outlives the program.
    let addr = unsafe { &mut *ctx.sock_addr };
    // Not only faster: a socket that was redirected once may be connected elsewhere by now.
    if addr.user_ip4 != LISTENER_V4 {
        return;
    }
    if let Some(client) = redirected(ctx) {
        addr.user_ip4 = client.address[3];
        addr.user_port = client.port;
    }
}

pub fn v6(ctx: &SockAddrContext) {
    // SAFETY: the context outlives the program.
    let addr = unsafe { &mut *ctx.sock_addr };
    if addr.user_ip6[3] != LISTENER_V4 || addr.user_ip6[2] != V4_MAPPED {
        return;
    }
    if let Some(client) = redirected(ctx) {
        addr.user_ip6[0] = client.address[0];
        addr.user_ip6[1] = client.address[1];
        addr.user_ip6[2] = client.address[2];
        addr.user_ip6[3] = client.address[3];
        addr.user_port = client.port;
    }
}

#[inline(always)]
fn redirected(ctx: &SockAddrContext) -> Option<&'static Client> {
    // SAFETY: the pointer is null or into the storage of the context's socket.
    let client = unsafe { CLIENTS.get_ptr_mut(ctx).as_ref() }?;
    (client.verdict == VERDICT_REDIRECTED).then_some(client)
}
