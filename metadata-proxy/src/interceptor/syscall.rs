//! The bpf(2) commands that aya 0.14 does not offer: it can neither give out the descriptor of a pinned
//! link, nor exchange the program of a cgroup link, nor tell which device a link is on.

use std::{
    ffi::CString,
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

const BPF_OBJ_GET: libc::c_int = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_LINK_UPDATE: libc::c_int = 29;

const BPF_LINK_TYPE_TCX: u32 = 11;

/// The start of `union bpf_attr` for `BPF_OBJ_GET`.
#[repr(C)]
struct ObjGet {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

/// The start of `union bpf_attr` for `BPF_OBJ_GET_INFO_BY_FD`.
#[repr(C)]
struct GetInfo {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

/// The start of `struct bpf_link_info` of a tcx link.
#[repr(C)]
#[derive(Default)]
struct TcxLinkInfo {
    kind: u32,
    id: u32,
    program: u32,
    pad: u32,
    interface: u32,
    attach_type: u32,
}

/// The start of `union bpf_attr` for `BPF_LINK_UPDATE`.
#[repr(C)]
struct LinkUpdate {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

pub(super) fn open_pin(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let attributes = ObjGet { pathname: path.as_ptr() as u64, bpf_fd: 0, file_flags: 0 };
    // SAFETY: a prefix of `bpf_attr` of the size told; the path outlives the call.
    let fd = unsafe { bpf(BPF_OBJ_GET, &attributes) }?;
    // SAFETY: a new descriptor that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Since Linux 5.7. Connections see the old program or the new one, never none.
pub(super) fn update_link(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let fd = |fd: BorrowedFd<'_>| fd.as_raw_fd().cast_unsigned();
    let attributes = LinkUpdate { link_fd: fd(link), new_prog_fd: fd(program), flags: 0, old_prog_fd: 0 };
    // SAFETY: a prefix of `bpf_attr` of the size told; it holds no pointers.
    unsafe { bpf(BPF_LINK_UPDATE, &attributes) }?;
    Ok(())
}

/// Whether the device of a tcx link is gone, and the link of no more use. A device that moves to another
/// network namespace keeps its links.
pub(super) fn is_dead(link: BorrowedFd<'_>) -> io::Result<bool> {
    let mut info = TcxLinkInfo::default();
    let attributes = GetInfo {
        bpf_fd: link.as_raw_fd().cast_unsigned(),
        info_len: size_of::<TcxLinkInfo>() as u32,
        info: core::ptr::from_mut(&mut info) as u64,
    };
    // SAFETY: a prefix of `bpf_attr` of the size told; the kernel writes no more of the info than its size.
    unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &attributes) }?;
    Ok(info.kind == BPF_LINK_TYPE_TCX && info.interface == 0)
}

/// # Safety
/// `attributes` is what the command expects, and what it points to is valid.
unsafe fn bpf<T>(command: libc::c_int, attributes: &T) -> io::Result<libc::c_int> {
    // SAFETY: by the caller's promise.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, core::ptr::from_ref(attributes), size_of::<T>()) };
    match libc::c_int::try_from(result) {
        Ok(value) if value >= 0 => Ok(value),
        _ => Err(io::Error::last_os_error()),
    }
}
