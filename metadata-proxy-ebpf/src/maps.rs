//! The maps, and the few things that several hooks do.

use core::ffi::c_void;

use aya_ebpf::{
    bindings::{__sk_buff, BPF_SK_STORAGE_GET_F_CREATE, bpf_sock},
    btf_maps::SkStorage,
    helpers::generated::{bpf_sk_fullsock, bpf_sk_storage_get},
    macros::{btf_map, map},
    maps::{Array, HashMap, LruHashMap, PerCpuArray, RingBuf},
};
use metadata_proxy_common::{Client, Counter, Flow, FlowKey, Settings, VERDICT_APPROVED, Wanted};

#[map]
static SETTINGS: Array<Settings> = Array::with_max_entries(1, 0);

/// Cgroup id -> `CGROUP_*`. Containers enter when the kernel makes their cgroup (see `cgroup`) or when
/// the daemon learns of them.
#[map]
pub static CGROUPS: HashMap<u64, u32> = HashMap::with_max_entries(16384, 0);

/// The same for those that processes of containers make: of an engine in a container, or to fill this.
#[map]
pub static NESTED: HashMap<u64, u32> = HashMap::with_max_entries(4096, 0);

/// Ids of the host's cgroups whose own processes keep the real service, because no service has a role there; not of those
/// below.
#[map]
pub static HOSTS: HashMap<u64, u32> = HashMap::with_max_entries(8192, 0);

/// Network namespace cookie -> port of the daemon's listener there, host order: a hint, for a daemon
/// that was killed leaves it behind. Whether it listens is asked of the listener itself.
#[map]
static LISTENERS: HashMap<u64, u32> = HashMap::with_max_entries(16384, 0);

/// Marks the daemon's listening sockets. The mark vanishes with the socket, however that ends, and
/// nobody else can set it.
#[btf_map]
static OURS: SkStorage<u32> = SkStorage::new();

/// Flows between their SYN and their acceptance: on loopback a matter of microseconds. The kernel
/// drops the oldest when it is full; the daemon refuses a connection whose flow is gone.
#[map]
pub static FLOWS: LruHashMap<FlowKey, Flow> = LruHashMap::with_max_entries(16384, 0);

/// Namespaces that need a listener.
#[map]
static WANTED: RingBuf = RingBuf::with_byte_size(1 << 16, 0);

#[map]
static COUNTERS: PerCpuArray<u64> = PerCpuArray::with_max_entries(Counter::ALL.len() as u32, 0);

/// State of client sockets that asked for an IMDS address.
#[btf_map]
pub static CLIENTS: SkStorage<Client> = SkStorage::new();

/// Flow of the connections that a listener has accepted; read by the daemon.
#[btf_map]
static ACCEPTED: SkStorage<Flow> = SkStorage::new();

pub fn settings() -> Option<&'static Settings> {
    SETTINGS.get(0)
}

/// What is known of this very cgroup.
pub fn cgroup_kind(cgroup: u64) -> Option<u32> {
    // SAFETY: an aligned u32, which a concurrent update replaces as a whole.
    unsafe { CGROUPS.get(&cgroup).or_else(|| NESTED.get(&cgroup)) }.copied()
}

/// Whether it is known that nobody has a role of his own in this very cgroup.
pub fn is_hosts(cgroup: u64) -> bool {
    // SAFETY: only looked whether it is there.
    unsafe { HOSTS.get(&cgroup) }.is_some()
}

/// Port of the listener in this namespace, host order.
pub fn listener(netns: u64) -> Option<u32> {
    // SAFETY: an aligned u32, which a concurrent update replaces as a whole.
    unsafe { LISTENERS.get(&netns) }.copied()
}

/// Asks the daemon for a listener in the namespace of this flow.
pub fn want_listener(flow: &Flow) {
    match WANTED.reserve::<Wanted>(0) {
        Some(mut entry) => {
            entry.write(Wanted { netns: flow.netns, pid: flow.pid, pad: 0 });
            entry.submit(0);
        }
        None => count(Counter::WantedLost),
    }
}

/// Whether this socket, got by a lookup, is a listener of the daemon.
///
/// # Safety
/// `sk` is not null and held.
#[inline(always)]
pub unsafe fn is_ours(sk: *mut bpf_sock) -> bool {
    // SAFETY: by the caller's promise.
    !unsafe { bpf_sk_storage_get(map_ptr(&OURS), sk.cast(), core::ptr::null_mut(), 0) }.is_null()
}

pub fn count(counter: Counter) {
    if let Some(slot) = COUNTERS.get_ptr_mut(counter as u32) {
        // SAFETY: a slot of this CPU, which this program does not leave while it runs.
        unsafe { *slot += 1 }
    }
}

/// The state of a socket, given where a hook finds a `bpf_sock`.
///
/// # Safety
/// `sk` is the `sk` field of the running program's context.
#[inline(always)]
pub unsafe fn client_of(sk: *mut bpf_sock) -> Option<&'static Client> {
    if sk.is_null() {
        return None;
    }
    // SAFETY: not null; the verifier holds us to the rest.
    unsafe { bpf_sk_storage_get(map_ptr(&CLIENTS), sk.cast(), core::ptr::null_mut(), 0).cast::<Client>().as_ref() }
}

/// Gives an accepted socket its flow. Fails only for want of memory; then the daemon refuses it.
///
/// # Safety
/// `sk` is the `sk` field of the running program's context.
#[inline(always)]
pub unsafe fn set_flow(sk: *mut bpf_sock, mut flow: Flow) {
    // SAFETY: the value lives on our stack; the verifier refuses a null `sk`.
    unsafe {
        bpf_sk_storage_get(
            map_ptr(&ACCEPTED),
            sk.cast(),
            core::ptr::from_mut(&mut flow).cast(),
            u64::from(BPF_SK_STORAGE_GET_F_CREATE),
        );
    }
}

/// `SkStorage` keeps this to itself, and takes only the context of a connect hook.
fn map_ptr<T>(map: &'static SkStorage<T>) -> *mut c_void {
    core::ptr::from_ref(map).cast_mut().cast()
}

/// The same as `client_of` for a packet, whose socket may be a request or time-wait socket without storage.
///
/// # Safety
/// `sk` is the `sk` field of the running program's `__sk_buff`.
#[inline(always)]
pub unsafe fn client_of_packet(sk: *mut bpf_sock) -> Option<&'static Client> {
    if sk.is_null() {
        return None;
    }
    // SAFETY: not null.
    unsafe { client_of(bpf_sk_fullsock(sk)) }
}

/// Whether connect(2) has approved the packet's socket for the real service.
///
/// # Safety
/// As for `client_of_packet`.
#[inline(always)]
pub unsafe fn is_approved(sk: *mut bpf_sock) -> bool {
    // SAFETY: by the caller's promise.
    unsafe { client_of_packet(sk) }.is_some_and(|client| client.verdict == VERDICT_APPROVED)
}

/// One value at this offset of the packet, where the packet's linear part reaches that far.
#[inline(always)]
pub fn load<T: Copy>(skb: &__sk_buff, offset: usize) -> Option<T> {
    let start = skb.data as usize + offset;
    if start + size_of::<T>() > skb.data_end as usize {
        return None;
    }
    // SAFETY: within the packet, as just checked; the verifier knows packet pointers to be readable.
    Some(unsafe { (start as *const T).read_unaligned() })
}
