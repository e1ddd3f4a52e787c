//! Two moments in the life of a TCP socket: its first SYN timeout, and its acceptance by a listener.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB, BPF_SOCK_OPS_TIMEOUT_INIT, bpf_sock_ops},
    helpers::generated::bpf_get_netns_cookie,
    programs::SockOpsContext,
};
use metadata_proxy_common::{Counter, FlowKey, LISTENER_V4, VERDICT_REDIRECTED};

use crate::maps::{FLOWS, client_of, count, set_flow, settings};

pub fn handle(ctx: &SockOpsContext) {
    // SAFETY: the context outlives the program.
    let ops = unsafe { &*ctx.ops };
    match ops.op {
        BPF_SOCK_OPS_TIMEOUT_INIT => short_timeout(ctx, ops),
        BPF_SOCK_OPS_PASSIVE_ESTABLISHED_CB => hand_over(ctx, ops),
        _ => {}
    }
}

/// A held SYN is retried after milliseconds, not after the usual second.
#[inline(always)]
fn short_timeout(ctx: &SockOpsContext, ops: &bpf_sock_ops) {
    // SAFETY: `sk` of the context.
    let client = unsafe { client_of(ops.__bindgen_anon_2.sk) };
    // It may have been disconnected and be on its way to somebody else.
    if ops.remote_ip4 == LISTENER_V4
        && client.is_some_and(|client| client.verdict == VERDICT_REDIRECTED)
        && let Some(settings) = settings()
    {
        ctx.set_reply(settings.syn_timeout);
    }
}

/// Moves the flow onto the accepted socket, where the daemon finds it by file descriptor.
#[inline(always)]
fn hand_over(ctx: &SockOpsContext, ops: &bpf_sock_ops) {
    if ops.local_ip4 != LISTENER_V4 {
        return;
    }
    // SAFETY: reads the context's own socket.
    let netns = unsafe { bpf_get_netns_cookie(ctx.as_ptr()) };
    // Nothing has been received yet but the SYN.
    let sequence = ops.rcv_nxt.wrapping_sub(1);
    let key = FlowKey { netns, address: ops.remote_ip4, port: u32::from_be(ops.remote_port), sequence, pad: 0 };
    // SAFETY: `sk` of the context, checked before use. A copy of the flow is taken at once; only the
    // socket that has sent the SYN could have overwritten it.
    unsafe {
        let sk = ops.__bindgen_anon_2.sk;
        if sk.is_null() {
            return;
        }
        let Some(flow) = FLOWS.get(&key) else {
            count(Counter::Unknown);
            return;
        };
        set_flow(sk, *flow);
    }
    // Fails only if it is gone already.
    let _ = FLOWS.remove(&key);
    count(Counter::Accepted);
}
