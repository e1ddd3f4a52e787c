//! Every packet that leaves a socket: *hold* an intercepted SYN until its namespace has a listener,
//! and *guard* the IMDS addresses against whatever connect(2) has not approved.

use aya_ebpf::{
    bindings::{__sk_buff, BPF_F_CURRENT_NETNS, bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1},
    helpers::generated::{bpf_sk_lookup_tcp, bpf_sk_release},
    programs::SkBuffContext,
};
use metadata_proxy_common::{Counter, FlowKey, IMDS_PORT, IMDS_V4, IMDS_V6, LISTENER_V4, VERDICT_REDIRECTED};

use crate::maps::{FLOWS, client_of_packet, count, is_approved, is_ours, load, want_listener};

const ETH_P_IP: u32 = 0x0800_u16.to_be() as u32;
const ETH_P_IPV6: u32 = 0x86dd_u16.to_be() as u32;
const IPPROTO_TCP: u8 = 6;
/// Version 4 and a header of five words: no IP options.
const PLAIN_IPV4: u8 = 0x45;
/// All but the flag that forbids fragments.
const FRAGMENT: u16 = 0xbfff_u16.to_be();
const TCP_SYN: u8 = 0x02;
const TCP_ACK: u8 = 0x10;

/// Whether the packet may leave.
///
/// The destination is read from the packet, because a raw or unconnected socket has no peer; and
/// straight from its linear part, which costs less than half of a helper call.
pub fn verdict(ctx: &SkBuffContext) -> bool {
    // SAFETY: the context outlives the program.
    let skb = unsafe { &*ctx.skb.skb };
    match skb.protocol {
        ETH_P_IP => v4(skb),
        ETH_P_IPV6 => v6(skb),
        _ => true,
    }
}

#[inline(always)]
fn v4(skb: &__sk_buff) -> bool {
    let Some(destination) = load::<u32>(skb, 16) else {
        return true; // shorter than an IP header: it goes nowhere
    };
    match destination {
        IMDS_V4 => is_answer_v4(skb) || guard(skb),
        LISTENER_V4 => to_listener(skb),
        _ => true,
    }
}

#[inline(always)]
fn v6(skb: &__sk_buff) -> bool {
    match load::<u32>(skb, 36) {
        Some(last) if last == IMDS_V6[3] => {}
        _ => return true,
    }
    if load::<u32>(skb, 24) == Some(IMDS_V6[0]) && load::<u32>(skb, 28) == Some(0) && load::<u32>(skb, 32) == Some(0) {
        return is_answer_v6(skb) || guard(skb);
    }
    true
}

/// An answer of a stand-in that has the service's address on this host's own loopback device: a client there connects
/// from the very address that it connects to. Whatever else has the service's address on both ends comes from no
/// connect(2) that we have approved; nothing of it leaves the host (`uplink`), nor gets to the service's port here.
#[inline(always)]
fn is_answer(skb: &__sk_buff, ports: usize) -> bool {
    let port = IMDS_PORT.to_be();
    load::<u16>(skb, ports) == Some(port) && load::<u16>(skb, ports + 2).is_some_and(|to| to != port)
}

#[inline(always)]
fn is_answer_v4(skb: &__sk_buff) -> bool {
    load::<u32>(skb, 12) == Some(IMDS_V4)
        && load::<u8>(skb, 0) == Some(PLAIN_IPV4)
        && load::<u8>(skb, 9) == Some(IPPROTO_TCP)
        && load::<u16>(skb, 6).is_some_and(|fragment| fragment & FRAGMENT == 0)
        && is_answer(skb, 20)
}

#[inline(always)]
fn is_answer_v6(skb: &__sk_buff) -> bool {
    load::<u32>(skb, 20) == Some(IMDS_V6[3])
        && load::<u32>(skb, 8) == Some(IMDS_V6[0])
        && load::<u32>(skb, 12) == Some(0)
        && load::<u32>(skb, 16) == Some(0)
        && load::<u8>(skb, 6) == Some(IPPROTO_TCP)
        && is_answer(skb, 40)
}

/// Default deny: only sockets that connect(2) has approved talk to the real service.
#[inline(always)]
fn guard(skb: &__sk_buff) -> bool {
    // SAFETY: `sk` of the context.
    let approved = unsafe { is_approved(skb.__bindgen_anon_2.sk) };
    if !approved {
        count(Counter::Guarded);
    }
    approved
}

/// A packet to the listener's address. Only intercepted connections get there, and a SYN only when
/// the daemon listens on the very port: what squats on the address never sees a client.
#[inline(always)]
fn to_listener(skb: &__sk_buff) -> bool {
    if load::<u8>(skb, 9) != Some(IPPROTO_TCP) {
        return true;
    }
    // SAFETY: `sk` of the context.
    let Some(client) = (unsafe { client_of_packet(skb.__bindgen_anon_2.sk) }) else {
        return false;
    };
    if client.verdict != VERDICT_REDIRECTED || load::<u8>(skb, 0) != Some(PLAIN_IPV4) {
        return false;
    }
    let (Some(source), Some(port), Some(sequence), Some(flags)) =
        (load::<u32>(skb, 12), load::<u16>(skb, 22), load::<u32>(skb, 24), load::<u8>(skb, 33))
    else {
        return false;
    };
    if flags & (TCP_SYN | TCP_ACK) != TCP_SYN {
        return true; // an established connection lives on while the daemon drains
    }
    if !we_listen(skb, port) {
        count(Counter::Held);
        want_listener(&client.flow);
        return false;
    }
    // Here and not at connect time: the source port is known only now, and on loopback the handshake
    // completes before this call returns.
    let sequence = u32::from_be(sequence);
    let key = FlowKey { netns: client.flow.netns, address: source, port: skb.local_port, sequence, pad: 0 };
    FLOWS.insert(&key, &client.flow, 0).is_ok()
}

/// Whether the daemon listens on this port (network order) of the packet's network namespace. Asked of
/// the kernel's own table of sockets, which no killed daemon can leave stale.
#[inline(always)]
fn we_listen(skb: &__sk_buff, port: u16) -> bool {
    // No source, so that only a listener can match, never a connection.
    let mut tuple = bpf_sock_tuple__bindgen_ty_1__bindgen_ty_1 { saddr: 0, daddr: LISTENER_V4, sport: 0, dport: port };
    // SAFETY: an IPv4 tuple of the size told; the socket is given back on the one path that has it.
    unsafe {
        let sk = bpf_sk_lookup_tcp(
            core::ptr::from_ref(skb).cast_mut().cast(),
            core::ptr::from_mut(&mut tuple).cast(),
            size_of_val(&tuple) as u32,
            BPF_F_CURRENT_NETNS as i64 as u64,
            0,
        );
        if sk.is_null() {
            return false;
        }
        let ours = is_ours(sk);
        bpf_sk_release(sk.cast());
        ours
    }
}
