//! connect(2) by io_uring, with raw system calls.

use std::time::{Duration, Instant};

use libc::AF_INET;

use crate::{
    Outcome, Tried, at,
    sys::{self, Shared},
    tcp,
};
use std::os::fd::AsRawFd as _;

/// A kernel thread submits, and not the caller.
pub(crate) const SQPOLL: u32 = 2;

const ENTRIES: u32 = 4;
const OP_CONNECT: u8 = 16;
const ENTER_GETEVENTS: u32 = 1;
const ENTER_SQ_WAKEUP: u32 = 2;
const OFFSET_RINGS: i64 = 0;
const OFFSET_ENTRIES: i64 = 0x1000_0000;
const LIMIT: Duration = Duration::from_secs(5);

pub(crate) fn connect(flags: u32) -> Tried {
    let (ring, parameters) = sys::uring_setup(ENTRIES, flags).map_err(at("io_uring_setup"))?;
    // `struct io_uring_params`: from word 10 the offsets of the submission ring, from word 20 of the completion ring.
    let word = |index: usize| parameters[index] as usize;
    let (submitted, array) = (word(11), word(16));
    let (seen, completed, entries) = (word(20), word(21), word(25));
    let rings = Shared::map(&ring, OFFSET_RINGS, 4096).map_err(at("mmap"))?;
    let requests = Shared::map(&ring, OFFSET_ENTRIES, 4096).map_err(at("mmap"))?;

    let socket = tcp::tcp(AF_INET)?;
    let address = tcp::imds();
    // `struct io_uring_sqe`: the address, and its length where others have an offset.
    let mut request = [0_u8; 64];
    request[0] = OP_CONNECT;
    request[4..8].copy_from_slice(&socket.as_raw_fd().to_ne_bytes());
    request[8..16].copy_from_slice(&(address.bytes().len() as u64).to_ne_bytes());
    request[16..24].copy_from_slice(&(address.bytes().as_ptr() as u64).to_ne_bytes());
    requests.write_bytes(0, &request);
    rings.write(array, 0);
    rings.write(submitted, 1);

    let wait = if flags == SQPOLL { ENTER_SQ_WAKEUP } else { 0 };
    sys::uring_enter(&ring, 1, 0, wait | if flags == SQPOLL { 0 } else { ENTER_GETEVENTS })
        .map_err(at("io_uring_enter"))?;
    let deadline = Instant::now() + LIMIT;
    while rings.read(completed) == rings.read(seen) {
        if Instant::now() > deadline {
            return Err(Outcome::Timeout("io_uring".into()));
        }
        // The completion of a connect that has to wait is run by its task, when it next enters the kernel.
        sys::uring_enter(&ring, 0, 0, ENTER_GETEVENTS).map_err(at("io_uring_enter"))?;
        std::thread::sleep(Duration::from_millis(1));
    }
    match rings.read(entries + 8).cast_signed() {
        0 => tcp::ask(&socket),
        error => Err(at("io_uring connect")(std::io::Error::from_raw_os_error(-error))),
    }
}
