//! The bpf(2) commands that aya 0.14 does not offer: it can neither give out the descriptor of a pinned
//! link, nor exchange the program of a cgroup link, nor tell which device a link is on, nor load what changes the
//! return value of a kernel function.

use std::{
    ffi::{CStr, CString},
    io,
    os::{
        fd::{AsRawFd, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use aya_obj::generated::bpf_insn;

const BPF_PROG_LOAD: libc::c_int = 5;
const BPF_OBJ_PIN: libc::c_int = 6;
const BPF_OBJ_GET: libc::c_int = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_int = 15;
const BPF_RAW_TRACEPOINT_OPEN: libc::c_int = 17;
const BPF_LINK_CREATE: libc::c_int = 28;
const BPF_LINK_UPDATE: libc::c_int = 29;

const BPF_PROG_TYPE_TRACING: u32 = 26;
const BPF_CGROUP_SETSOCKOPT: u32 = 22;
const BPF_MODIFY_RETURN: u32 = 26;

const BPF_LINK_TYPE_TCX: u32 = 11;

/// The start of `union bpf_attr` for `BPF_PROG_LOAD`.
#[repr(C)]
#[derive(Default)]
struct ProgLoad {
    prog_type: u32,
    insn_cnt: u32,
    insns: u64,
    license: u64,
    log_level: u32,
    log_size: u32,
    log_buf: u64,
    kern_version: u32,
    prog_flags: u32,
    prog_name: [u8; 16],
    prog_ifindex: u32,
    expected_attach_type: u32,
    prog_btf_fd: u32,
    func_info_rec_size: u32,
    func_info: u64,
    func_info_cnt: u32,
    line_info_rec_size: u32,
    line_info: u64,
    line_info_cnt: u32,
    attach_btf_id: u32,
}

/// The start of `union bpf_attr` for `BPF_RAW_TRACEPOINT_OPEN`, padding included.
#[repr(C)]
struct RawTracepointOpen {
    name: u64,
    prog_fd: u32,
    pad: u32,
}

/// The start of `union bpf_attr` for `BPF_OBJ_GET` and `BPF_OBJ_PIN`.
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

/// The start of `union bpf_attr` for `BPF_LINK_CREATE`.
#[repr(C)]
struct LinkCreate {
    prog_fd: u32,
    target_fd: u32,
    attach_type: u32,
    flags: u32,
}

/// The start of `union bpf_attr` for `BPF_LINK_UPDATE`.
#[repr(C)]
struct LinkUpdate {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

/// A program that runs before the kernel function of this BTF id, and instead of it where it returns anything but 0.
pub(super) fn load_modify_return(instructions: &[bpf_insn], license: &CStr, function: u32) -> io::Result<OwnedFd> {
    let mut log = vec![0_u8; 1 << 16];
    let attributes = ProgLoad {
        prog_type: BPF_PROG_TYPE_TRACING,
        insn_cnt: u32::try_from(instructions.len()).map_err(io::Error::other)?,
        insns: instructions.as_ptr() as u64,
        license: license.as_ptr() as u64,
        log_level: 1,
        log_size: log.len() as u32,
        log_buf: log.as_mut_ptr() as u64,
        prog_name: *b"imds_setsockopt\0",
        expected_attach_type: BPF_MODIFY_RETURN,
        attach_btf_id: function,
        ..ProgLoad::default()
    };
    // SAFETY: a prefix of `bpf_attr` of the size told; all that it points to outlives the call.
    let fd = unsafe { bpf(BPF_PROG_LOAD, &attributes) }.map_err(|error| {
        let said = CStr::from_bytes_until_nul(&log).unwrap_or_default().to_string_lossy();
        match said.trim_end().lines().last() {
            Some(line) => io::Error::new(error.kind(), format!("{error}: {line}")),
            None => error,
        }
    })?;
    // SAFETY: a new descriptor that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// From now on the program runs, until the link is gone.
pub(super) fn attach_modify_return(program: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let attributes = RawTracepointOpen { name: 0, prog_fd: program.as_raw_fd().cast_unsigned(), pad: 0 };
    // SAFETY: a prefix of `bpf_attr` of the size told; it holds no pointers.
    let fd = unsafe { bpf(BPF_RAW_TRACEPOINT_OPEN, &attributes) }?;
    // SAFETY: a new descriptor that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Since Linux 5.7. Of a program that is asked for each socket option.
pub(super) fn link_setsockopt(program: BorrowedFd<'_>, cgroup: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let fd = |fd: BorrowedFd<'_>| fd.as_raw_fd().cast_unsigned();
    let (prog_fd, target_fd) = (fd(program), fd(cgroup));
    let attributes = LinkCreate { prog_fd, target_fd, attach_type: BPF_CGROUP_SETSOCKOPT, flags: 0 };
    // SAFETY: a prefix of `bpf_attr` of the size told; it holds no pointers.
    let fd = unsafe { bpf(BPF_LINK_CREATE, &attributes) }?;
    // SAFETY: a new descriptor that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

pub(super) fn pin(object: BorrowedFd<'_>, path: &Path) -> io::Result<()> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let bpf_fd = object.as_raw_fd().cast_unsigned();
    let attributes = ObjGet { pathname: path.as_ptr() as u64, bpf_fd, file_flags: 0 };
    // SAFETY: a prefix of `bpf_attr` of the size told; the path outlives the call.
    unsafe { bpf(BPF_OBJ_PIN, &attributes) }?;
    Ok(())
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
