//! The contents of the pinned BPF maps, as bytes: the four bpf(2) commands that this takes, for all kinds of maps alike.

use std::{
    ffi::CString,
    fs, io,
    os::{
        fd::{AsFd as _, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd},
        unix::ffi::OsStrExt as _,
    },
    path::Path,
};

use anyhow::{Context as _, Result, ensure};
use rustix::{
    mm::{MapFlags, ProtFlags, mmap, munmap},
    process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open},
};

use crate::host::TestHost;

const MAP_LOOKUP_ELEM: libc::c_int = 1;
const MAP_GET_NEXT_KEY: libc::c_int = 4;
const OBJ_GET: libc::c_int = 7;
const OBJ_GET_INFO_BY_FD: libc::c_int = 15;

/// `BPF_MAP_TYPE_*`
const SK_STORAGE: u32 = 24;
const RINGBUF: u32 = 27;

/// Above the value of any of our maps, over all processors.
const VALUE_LIMIT: usize = 1 << 20;
const PAGE: usize = 4096;

/// The start of `struct bpf_map_info`.
#[repr(C)]
#[derive(Default)]
struct Info {
    kind: u32,
    id: u32,
    key_size: u32,
    value_size: u32,
    max_entries: u32,
    flags: u32,
}

/// All maps of the daemon, by name, each with its keys and values one after another. Socket storage is there for the
/// sockets of these processes.
pub fn dump_maps(host: &TestHost, processes: &[u32]) -> Result<Vec<(String, Vec<u8>)>> {
    let root = format!("/proc/{}/root/sys/fs/bpf/metadata-proxy", host.machine().holder());
    let mut sockets = Vec::new();
    for process in processes {
        sockets.append(&mut sockets_of(*process)?);
    }
    let mut maps = Vec::new();
    for layout in fs::read_dir(&root).with_context(|| format!("reading {root}"))? {
        for pin in fs::read_dir(layout?.path().join("maps"))? {
            let pin = pin?;
            let name = pin.file_name().to_string_lossy().into_owned();
            let content = dump(&pin.path(), &sockets).with_context(|| format!("reading the map {name}"))?;
            maps.push((name, content));
        }
    }
    Ok(maps)
}

fn dump(pin: &Path, sockets: &[OwnedFd]) -> Result<Vec<u8>> {
    let map = open(pin)?;
    let map = map.as_fd();
    let info = info(map)?;
    let mut content = Vec::new();
    match info.kind {
        RINGBUF => return ring(map, info.max_entries as usize).context("mapping the ring"),
        SK_STORAGE => {
            for socket in sockets {
                content.extend(lookup(map, &socket.as_raw_fd().to_ne_bytes(), &info)?.unwrap_or_default());
            }
        }
        _ => {
            let mut key = None;
            while let Some(next) = next_key(map, key.as_deref(), info.key_size as usize)? {
                content.extend(&next);
                content.extend(lookup(map, &next, &info)?.unwrap_or_default());
                key = Some(next);
            }
        }
    }
    Ok(content)
}

fn sockets_of(process: u32) -> Result<Vec<OwnedFd>> {
    let pid = Pid::from_raw(process.try_into()?).context("no process id")?;
    let pidfd = pidfd_open(pid, PidfdFlags::empty()).context("pidfd_open")?;
    let mut sockets = Vec::new();
    for entry in fs::read_dir(format!("/proc/{process}/fd"))? {
        let entry = entry?;
        let is_socket =
            fs::read_link(entry.path()).is_ok_and(|link| link.as_os_str().as_bytes().starts_with(b"socket:"));
        let number = entry.file_name().to_string_lossy().parse::<i32>()?;
        // It may have been closed meanwhile.
        if let Some(Ok(socket)) = is_socket.then(|| pidfd_getfd(&pidfd, number, PidfdGetfdFlags::empty())) {
            sockets.push(socket);
        }
    }
    Ok(sockets)
}

fn open(pin: &Path) -> Result<OwnedFd> {
    let path = CString::new(pin.as_os_str().as_bytes())?;
    let fd = bpf(OBJ_GET, &[path.as_ptr() as u64, 0]).context("BPF_OBJ_GET")?;
    // SAFETY: a new descriptor that nobody else has.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn info(map: BorrowedFd<'_>) -> Result<Info> {
    let mut info = Info::default();
    let length = (size_of::<Info>() as u64) << 32;
    bpf(OBJ_GET_INFO_BY_FD, &[descriptor(map) | length, (&raw mut info) as u64])?;
    Ok(info)
}

fn next_key(map: BorrowedFd<'_>, key: Option<&[u8]>, size: usize) -> Result<Option<Vec<u8>>> {
    let mut next = vec![0; size];
    let key = key.map_or(0, |key| key.as_ptr() as u64);
    found(bpf(MAP_GET_NEXT_KEY, &[descriptor(map), key, next.as_mut_ptr() as u64]), next)
}

fn lookup(map: BorrowedFd<'_>, key: &[u8], info: &Info) -> Result<Option<Vec<u8>>> {
    ensure!(key.len() == info.key_size as usize, "a key of {} bytes", info.key_size);
    let mut value = vec![0; VALUE_LIMIT];
    let result = bpf(MAP_LOOKUP_ELEM, &[descriptor(map), key.as_ptr() as u64, value.as_mut_ptr() as u64, 0]);
    // Of maps with one for each processor, those follow each other.
    value.truncate(value.iter().rposition(|byte| *byte != 0).map_or(0, |at| at + 1).max(info.value_size as usize));
    found(result, value)
}

fn found<T>(result: io::Result<libc::c_int>, value: T) -> Result<Option<T>> {
    match result {
        Ok(_) => Ok(Some(value)),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// The data of a ring buffer lie behind the pages of consumer and producer.
fn ring(map: BorrowedFd<'_>, size: usize) -> Result<Vec<u8>> {
    // SAFETY: a new mapping somewhere, which is read while it is there; the kernel writes to it, so it is copied by volatile reads.
    unsafe {
        let start = mmap(std::ptr::null_mut(), PAGE + size, ProtFlags::READ, MapFlags::SHARED, map, PAGE as u64)?;
        let data = start.cast::<u8>().add(PAGE);
        let content = (0..size).map(|at| data.add(at).read_volatile()).collect();
        munmap(start, PAGE + size)?;
        Ok(content)
    }
}

fn descriptor(map: BorrowedFd<'_>) -> u64 {
    u64::from(map.as_raw_fd().cast_unsigned())
}

/// `attributes` as the 64-bit words of `union bpf_attr`.
fn bpf(command: libc::c_int, attributes: &[u64]) -> io::Result<libc::c_int> {
    // SAFETY: words that each caller has filled as its command expects, with pointers into buffers of at least the size
    // that the map tells.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attributes.as_ptr(), size_of_val(attributes)) };
    match libc::c_int::try_from(result) {
        Ok(value) if value >= 0 => Ok(value),
        _ => Err(io::Error::last_os_error()),
    }
}
