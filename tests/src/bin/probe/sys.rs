//! The system calls that std does not offer, each behind a safe function. The only `unsafe` code here.

mod rings;

use std::{
    ffi::CString,
    io,
    os::fd::{AsRawFd, FromRawFd as _, OwnedFd, RawFd},
    time::Duration,
};

pub(crate) use rings::{Shared, pages, uring_enter, uring_setup};

/// A `sockaddr` of any family.
#[derive(Clone)]
pub(crate) struct Address(Vec<u8>);

impl Address {
    pub(crate) fn v4(address: [u8; 4], port: u16) -> Self {
        let mut bytes = family(libc::AF_INET);
        bytes.extend(port.to_be_bytes());
        bytes.extend(address);
        bytes.extend([0; 8]);
        Self(bytes)
    }

    pub(crate) fn v6(address: [u8; 16], port: u16) -> Self {
        let mut bytes = family(libc::AF_INET6);
        bytes.extend(port.to_be_bytes());
        bytes.extend([0; 4]);
        bytes.extend(address);
        bytes.extend([0; 4]);
        Self(bytes)
    }

    /// What connect(2) takes for "nobody".
    pub(crate) fn nobody() -> Self {
        let mut bytes = family(libc::AF_UNSPEC);
        bytes.extend([0; 14]);
        Self(bytes)
    }

    /// An IP packet's way out of this interface, by AF_PACKET.
    pub(crate) fn link(protocol: u16, interface: u32, hardware: [u8; 6]) -> Self {
        let mut bytes = family(libc::AF_PACKET);
        bytes.extend(protocol.to_be_bytes());
        bytes.extend(interface.to_ne_bytes());
        bytes.extend([0, 0, 0, 6]); // no type, no kind, six bytes of address
        bytes.extend(hardware);
        bytes.extend([0; 2]);
        Self(bytes)
    }

    /// A queue of an interface, by AF_XDP.
    pub(crate) fn xdp(flags: u16, interface: u32) -> Self {
        let mut bytes = family(libc::AF_XDP);
        bytes.extend(flags.to_ne_bytes());
        bytes.extend(interface.to_ne_bytes());
        bytes.extend([0; 8]); // queue 0, nothing shared
        Self(bytes)
    }

    fn length(&self) -> libc::socklen_t {
        self.0.len() as libc::socklen_t
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

fn family(family: libc::c_int) -> Vec<u8> {
    (family as u16).to_ne_bytes().to_vec()
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn owned(result: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: a new descriptor that nobody else has.
    check(result).map(|fd| unsafe { OwnedFd::from_raw_fd(fd) })
}

pub(crate) fn socket(domain: libc::c_int, kind: libc::c_int, protocol: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: takes numbers only.
    owned(unsafe { libc::socket(domain, kind | libc::SOCK_CLOEXEC, protocol) })
}

pub(crate) fn connect(socket: &OwnedFd, to: &Address) -> io::Result<()> {
    // SAFETY: the address is of the length told.
    check(unsafe { libc::connect(socket.as_raw_fd(), to.0.as_ptr().cast(), to.length()) }).map(drop)
}

pub(crate) fn bind(socket: &OwnedFd, to: &Address) -> io::Result<()> {
    // SAFETY: the address is of the length told.
    check(unsafe { libc::bind(socket.as_raw_fd(), to.0.as_ptr().cast(), to.length()) }).map(drop)
}

pub(crate) fn listen(socket: &OwnedFd) -> io::Result<()> {
    // SAFETY: takes numbers only.
    check(unsafe { libc::listen(socket.as_raw_fd(), 16) }).map(drop)
}

pub(crate) fn send(socket: &OwnedFd, data: &[u8], flags: libc::c_int, to: Option<&Address>) -> io::Result<()> {
    let (address, length) = to.map_or((std::ptr::null(), 0), |to| (to.0.as_ptr(), to.length()));
    let flags = flags | libc::MSG_NOSIGNAL;
    // SAFETY: data and address are of the lengths told.
    let sent =
        unsafe { libc::sendto(socket.as_raw_fd(), data.as_ptr().cast(), data.len(), flags, address.cast(), length) };
    if sent < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

pub(crate) fn recv(socket: &OwnedFd, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: the buffer is of the length told.
    let got = unsafe { libc::recv(socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), 0) };
    usize::try_from(got).map_err(|_| io::Error::last_os_error())
}

/// Whether the socket becomes ready for this in time.
pub(crate) fn poll(socket: &OwnedFd, events: libc::c_short, limit: Duration) -> io::Result<bool> {
    let mut entry = libc::pollfd { fd: socket.as_raw_fd(), events, revents: 0 };
    // SAFETY: one entry, as told.
    Ok(check(unsafe { libc::poll(&raw mut entry, 1, limit.as_millis() as libc::c_int) })? > 0)
}

pub(crate) fn set(socket: &OwnedFd, level: libc::c_int, name: libc::c_int, value: &[u8]) -> io::Result<()> {
    let length = value.len() as libc::socklen_t;
    // SAFETY: the value is of the length told.
    check(unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, value.as_ptr().cast(), length) }).map(drop)
}

pub(crate) fn set_number(socket: &OwnedFd, level: libc::c_int, name: libc::c_int, value: i32) -> io::Result<()> {
    set(socket, level, name, &value.to_ne_bytes())
}

/// The same by the system call of a 32-bit program, which any program may make.
#[cfg(target_arch = "x86_64")]
pub(crate) fn set_number_32(socket: &OwnedFd, level: libc::c_int, name: libc::c_int, value: i32) -> io::Result<()> {
    const SETSOCKOPT: i32 = 366;
    const BYTES: usize = 4096;
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    let mut result = SETSOCKOPT;
    // SAFETY: the mapping is new and large enough for the number; the system call reads it, and keeps all registers but
    // the one of its result; rbx is LLVM's own and given back.
    unsafe {
        let low = libc::mmap(std::ptr::null_mut(), BYTES, protection, flags | libc::MAP_32BIT, -1, 0);
        if low == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        low.cast::<i32>().write(value);
        std::arch::asm!(
            "xchg rbx, {socket}",
            "int 0x80",
            "xchg rbx, {socket}",
            socket = inout(reg) i64::from(socket.as_raw_fd()) => _,
            inout("eax") result,
            in("ecx") level,
            in("edx") name,
            in("esi") low as usize as u32,
            in("edi") size_of::<i32>() as u32,
        );
        libc::munmap(low, BYTES);
    }
    if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(()) }
}

#[cfg(not(target_arch = "x86_64"))]
pub(crate) fn set_number_32(_: &OwnedFd, _: libc::c_int, _: libc::c_int, _: i32) -> io::Result<()> {
    Err(io::Error::from_raw_os_error(libc::EPERM))
}

/// The error that a non-blocking connect has ended with.
pub(crate) fn take_error(socket: &OwnedFd) -> io::Result<()> {
    let error = get(socket, libc::SOL_SOCKET, libc::SO_ERROR, 4)?;
    match error.try_into().map(i32::from_ne_bytes) {
        Ok(0) => Ok(()),
        Ok(error) => Err(io::Error::from_raw_os_error(error)),
        Err(_) => Err(io::ErrorKind::InvalidData.into()),
    }
}

pub(crate) fn get(socket: &OwnedFd, level: libc::c_int, name: libc::c_int, size: usize) -> io::Result<Vec<u8>> {
    let mut value = vec![0; size];
    let mut length = size as libc::socklen_t;
    // SAFETY: the value is of the length told.
    check(unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, value.as_mut_ptr().cast(), &raw mut length) })?;
    value.truncate(length as usize);
    Ok(value)
}

type GetName = unsafe extern "C" fn(libc::c_int, *mut libc::sockaddr, *mut libc::socklen_t) -> libc::c_int;

fn name(socket: &OwnedFd, get: GetName) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0_u8; 128];
    let mut length = bytes.len() as libc::socklen_t;
    // SAFETY: getsockname or getpeername, with a buffer of the length told.
    check(unsafe { get(socket.as_raw_fd(), bytes.as_mut_ptr().cast(), &raw mut length) })?;
    bytes.truncate(length as usize);
    Ok(bytes)
}

pub(crate) fn own_name(socket: &OwnedFd) -> io::Result<Vec<u8>> {
    name(socket, libc::getsockname)
}

pub(crate) fn peer_name(socket: &OwnedFd) -> io::Result<Vec<u8>> {
    name(socket, libc::getpeername)
}

pub(crate) fn interface_index(name: &str) -> io::Result<u32> {
    let name = CString::new(name)?;
    // SAFETY: a C string.
    match unsafe { libc::if_nametoindex(name.as_ptr()) } {
        0 => Err(io::Error::last_os_error()),
        index => Ok(index),
    }
}

/// Takes an interface up or down.
pub(crate) fn set_up(interface: &str, up: bool) -> io::Result<()> {
    let socket = socket(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
    // `struct ifreq`: 16 bytes of name, then the flags.
    let mut request = [0_u8; 40];
    request[..interface.len()].copy_from_slice(interface.as_bytes());
    let flags: u16 = if up { libc::IFF_UP as u16 } else { 0 };
    request[16..18].copy_from_slice(&flags.to_ne_bytes());
    // SAFETY: a request as large as the kernel's.
    check(unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFFLAGS, request.as_mut_ptr()) }).map(drop)
}

pub(crate) fn unshare(namespaces: libc::c_int) -> io::Result<()> {
    // SAFETY: takes a number; there is one thread.
    check(unsafe { libc::unshare(namespaces) }).map(drop)
}

pub(crate) fn enter_network(namespace: &impl AsRawFd) -> io::Result<()> {
    // SAFETY: takes numbers; there is one thread.
    check(unsafe { libc::setns(namespace.as_raw_fd(), libc::CLONE_NEWNET) }).map(drop)
}

pub(crate) fn mount_cgroup2(at: &str) -> io::Result<()> {
    let at = CString::new(at)?;
    // SAFETY: C strings, and no data.
    check(unsafe { libc::mount(c"none".as_ptr(), at.as_ptr(), c"cgroup2".as_ptr(), 0, std::ptr::null()) }).map(drop)
}

/// Room for one descriptor in a control message.
const CONTROL: usize = 24;

/// The one control message `SCM_RIGHTS` with this descriptor; of `struct cmsghdr` on 64 bits.
pub(crate) fn send_fd(over: &impl AsRawFd, fd: &OwnedFd) -> io::Result<()> {
    let mut control = [0_u64; CONTROL / 8];
    control[0] = 20; // length: a header of 16 bytes, and 4
    control[1] = pair(libc::SOL_SOCKET, libc::SCM_RIGHTS);
    control[2] = pair(fd.as_raw_fd(), 0);
    message(over, &mut control, |socket, message| {
        // SAFETY: `message` points to valid buffers.
        unsafe { libc::sendmsg(socket, message, libc::MSG_NOSIGNAL) }
    })
}

pub(crate) fn recv_fd(over: &impl AsRawFd) -> io::Result<OwnedFd> {
    let mut control = [0_u64; CONTROL / 8];
    message(over, &mut control, |socket, message| {
        // SAFETY: `message` points to valid buffers.
        unsafe { libc::recvmsg(socket, message, 0) }
    })?;
    if control[1] != pair(libc::SOL_SOCKET, libc::SCM_RIGHTS) {
        return Err(io::Error::other("no descriptor came"));
    }
    let [a, b, c, d, ..] = control[2].to_ne_bytes();
    owned(RawFd::from_ne_bytes([a, b, c, d]))
}

/// Two integers as they stand in memory.
fn pair(first: i32, second: i32) -> u64 {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&first.to_ne_bytes());
    bytes[4..].copy_from_slice(&second.to_ne_bytes());
    u64::from_ne_bytes(bytes)
}

fn message(
    over: &impl AsRawFd,
    control: &mut [u64; CONTROL / 8],
    call: impl Fn(RawFd, *mut libc::msghdr) -> isize,
) -> io::Result<()> {
    let mut byte = [0_u8];
    let mut vector = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
    // SAFETY: integers and pointers; all zero is a valid value.
    let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
    message.msg_iov = &raw mut vector;
    message.msg_iovlen = 1;
    message.msg_control = control.as_mut_ptr().cast();
    message.msg_controllen = CONTROL;
    match call(over.as_raw_fd(), &raw mut message) {
        1 => Ok(()),
        0 => Err(io::ErrorKind::UnexpectedEof.into()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// bpf(2) with the start of a `union bpf_attr`.
pub(crate) fn bpf(command: libc::c_int, attributes: &mut [u32]) -> io::Result<libc::c_int> {
    // SAFETY: the attributes are of the size told. Any pointer in them is the caller's, see `bpf_link_info`.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_mut_ptr(), size_of_val(attributes)) };
    check(result as libc::c_int)
}

/// The first words of `struct bpf_link_info`: type, id, program, and of a cgroup's link its id.
pub(crate) fn bpf_link_info(link: RawFd) -> io::Result<[u64; 4]> {
    const OBJ_GET_INFO_BY_FD: libc::c_int = 15;
    let mut info = [0_u64; 4];
    let place = info.as_mut_ptr() as u64;
    bpf(OBJ_GET_INFO_BY_FD, &mut [link as u32, size_of_val(&info) as u32, place as u32, (place >> 32) as u32])?;
    Ok(info)
}

/// A descriptor that a raw system call has returned.
pub(crate) fn own(fd: libc::c_int) -> io::Result<OwnedFd> {
    owned(fd)
}
