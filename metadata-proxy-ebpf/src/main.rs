//! The BPF programs of metadata-proxy.
//!
//! They decide only from numbers in their maps: they know no containers, roles or policies, and no
//! credential ever enters them. One file per hook; this one holds the entry points, each a shim, so
//! that what is attached where can be read at a glance.

#![no_std]
#![no_main]

mod cgroup;
mod connect;
mod egress;
mod maps;
mod options;
mod peer;
mod sandbox;
mod sockops;
mod uplink;

use core::ffi::c_void;

use aya_ebpf::{
    macros::{cgroup_skb, cgroup_sock_addr, cgroup_sockopt, classifier, sock_ops, tracepoint},
    programs::{
        FEntryContext, SkBuffContext, SockAddrContext, SockOpsContext, SockoptContext, TcContext, TracePointContext,
    },
};

// A program must not be named like a section ("sockops", "classifier"): the linker takes the two
// for one symbol. Hence the prefix.

#[cgroup_sock_addr(connect4)]
pub fn imds_connect4(ctx: SockAddrContext) -> i32 {
    connect::v4(&ctx) as i32
}

#[cgroup_sock_addr(connect6)]
pub fn imds_connect6(ctx: SockAddrContext) -> i32 {
    connect::v6(&ctx) as i32
}

#[cgroup_sock_addr(getpeername4)]
pub fn imds_getpeername4(ctx: SockAddrContext) -> i32 {
    peer::v4(&ctx);
    1 // the verifier accepts no other value from this hook
}

#[cgroup_sock_addr(getpeername6)]
pub fn imds_getpeername6(ctx: SockAddrContext) -> i32 {
    peer::v6(&ctx);
    1
}

#[sock_ops]
pub fn imds_sock_ops(ctx: SockOpsContext) -> u32 {
    sockops::handle(&ctx);
    1
}

#[cgroup_skb(egress)]
pub fn imds_egress(ctx: SkBuffContext) -> i32 {
    egress::verdict(&ctx) as i32
}

#[classifier]
pub fn imds_uplink(ctx: TcContext) -> i32 {
    uplink::verdict(&ctx)
}

/// Loaded as one that changes what the function returns: there is no macro for such programs, and the one for `fentry`
/// returns 0 whatever it is given.
#[unsafe(no_mangle)]
#[unsafe(link_section = "fentry/security_socket_setsockopt")]
pub extern "C" fn imds_setsockopt_any(ctx: *mut c_void) -> i32 {
    options::asked(&FEntryContext::new(ctx))
}

/// Where the kernel takes no such program.
#[cgroup_sockopt(setsockopt)]
pub fn imds_setsockopt(ctx: SockoptContext) -> i32 {
    options::set(&ctx) as i32
}

#[tracepoint]
pub fn imds_cgroup_made(ctx: TracePointContext) -> u32 {
    cgroup::made(&ctx);
    0
}

#[tracepoint]
pub fn imds_cgroup_gone(ctx: TracePointContext) -> u32 {
    cgroup::removed(&ctx);
    0
}

#[cfg(not(test))]
#[panic_handler]
fn panic(_: &core::panic::PanicInfo<'_>) -> ! {
    loop {}
}

// Some helpers are for GPL-compatible programs only.
#[unsafe(link_section = "license")]
#[unsafe(no_mangle)]
static LICENSE: [u8; 13] = *b"Dual MIT/GPL\0";
