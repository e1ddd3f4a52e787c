//! Frames that leave the host: those to an IMDS address go only if they are an approved socket's own.
//!
//! A packet socket (AF_PACKET, which Docker's default capabilities allow) writes whole frames, past
//! connect(2) and past the cgroup's egress hook. Here they have to come through.

use aya_ebpf::{bindings::__sk_buff, helpers::generated::bpf_skb_pull_data, programs::TcContext};
use metadata_proxy_common::{Counter, IMDS_V4, IMDS_V6};

use crate::maps::{count, is_approved, load};

/// On to the next program, if there is one: what we do not drop is not ours to decide.
const NEXT: i32 = -1;
const DROP: i32 = 2;

const ETHERNET: usize = 14;
const VLAN_TAG: usize = 4;
const ETHERTYPE_VLAN: u16 = 0x8100_u16.to_be();
const ETHERTYPE_QINQ: u16 = 0x88a8_u16.to_be();
const ETHERTYPE_IPV4: u16 = 0x0800_u16.to_be();
const ETHERTYPE_IPV6: u16 = 0x86dd_u16.to_be();
/// Through the destination of an IPv6 header behind two tags.
const HEADERS: u32 = (ETHERNET + 2 * VLAN_TAG + 40) as u32;

/// Frames of Ethernet devices: the daemon attaches this to no others.
pub fn verdict(ctx: &TcContext) -> i32 {
    // SAFETY: the context outlives the program.
    let skb = unsafe { &mut *ctx.skb.skb };
    if !may_be_to_imds(skb) {
        return NEXT;
    }
    // One that came in by another device was forwarded: no socket of this host speaks for it.
    // SAFETY: `sk` of the context.
    if skb.ingress_ifindex == 0 && unsafe { is_approved(skb.__bindgen_anon_2.sk) } {
        return NEXT;
    }
    count(Counter::Guarded);
    DROP
}

/// Told from the bytes alone: who writes frames chooses what the kernel takes their protocol for, and
/// how much of them lies where a program can read it without being asked. What cannot be read, or has
/// more tags than anyone needs, may be to anybody.
#[inline(always)]
fn may_be_to_imds(skb: &mut __sk_buff) -> bool {
    let length = skb.len.min(HEADERS);
    if (skb.data as usize) + (length as usize) > skb.data_end as usize {
        // SAFETY: the context's own packet; its pointers are read anew below.
        if unsafe { bpf_skb_pull_data(core::ptr::from_mut(skb), length) } != 0 {
            return true;
        }
    }
    const ONCE: usize = ETHERNET + VLAN_TAG;
    const TWICE: usize = ONCE + VLAN_TAG;
    if !is_tagged::<ETHERNET>(skb) {
        is_to_imds::<ETHERNET>(skb)
    } else if !is_tagged::<ONCE>(skb) {
        is_to_imds::<ONCE>(skb)
    } else {
        is_tagged::<TWICE>(skb) || is_to_imds::<TWICE>(skb)
    }
}

/// Whether a tag begins where an IP header would.
#[inline(always)]
fn is_tagged<const IP: usize>(skb: &__sk_buff) -> bool {
    matches!(load::<u16>(skb, IP - 2), Some(ETHERTYPE_VLAN | ETHERTYPE_QINQ))
}

#[inline(always)]
fn is_to_imds<const IP: usize>(skb: &__sk_buff) -> bool {
    match load::<u16>(skb, IP - 2) {
        Some(ETHERTYPE_IPV4) => load::<u32>(skb, IP + 16) == Some(IMDS_V4),
        Some(ETHERTYPE_IPV6) => {
            load::<u32>(skb, IP + 36) == Some(IMDS_V6[3])
                && load::<u32>(skb, IP + 24) == Some(IMDS_V6[0])
                && load::<u32>(skb, IP + 28) == Some(0)
                && load::<u32>(skb, IP + 32) == Some(0)
        }
        _ => false,
    }
}
