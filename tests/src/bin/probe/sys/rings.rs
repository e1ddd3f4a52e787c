//! Memory that is shared with the kernel, and io_uring's own calls.

use std::{
    io,
    os::fd::{AsRawFd as _, OwnedFd},
};

use super::{check, owned};

/// io_uring_setup(2): the ring, and the parameters as the kernel has filled them in.
pub(crate) fn uring_setup(entries: u32, flags: u32) -> io::Result<(OwnedFd, [u32; 30])> {
    let mut parameters = [0_u32; 30];
    parameters[2] = flags;
    // SAFETY: parameters of the kernel's size, 120 bytes.
    let result = unsafe { libc::syscall(libc::SYS_io_uring_setup, entries, parameters.as_mut_ptr()) };
    Ok((owned(result as libc::c_int)?, parameters))
}

pub(crate) fn uring_enter(ring: &OwnedFd, submit: u32, complete: u32, flags: u32) -> io::Result<()> {
    let none = std::ptr::null::<u8>();
    // SAFETY: takes numbers, and no signal mask.
    let result = unsafe { libc::syscall(libc::SYS_io_uring_enter, ring.as_raw_fd(), submit, complete, flags, none, 0) };
    check(result as libc::c_int).map(drop)
}

/// Memory shared with the kernel, for as long as the process runs.
pub(crate) struct Shared {
    start: *mut u8,
    length: usize,
}

impl Shared {
    pub(crate) fn map(fd: &OwnedFd, offset: i64, length: usize) -> io::Result<Self> {
        let protection = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a mapping where the kernel finds room.
        let start =
            unsafe { libc::mmap(std::ptr::null_mut(), length, protection, libc::MAP_SHARED, fd.as_raw_fd(), offset) };
        if start == libc::MAP_FAILED {
            Err(io::Error::last_os_error())
        } else {
            Ok(Self { start: start.cast(), length })
        }
    }

    pub(crate) fn read(&self, offset: usize) -> u32 {
        assert!(offset.is_multiple_of(4) && offset + 4 <= self.length);
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
        // SAFETY: aligned and within the mapping, as just checked; volatile, for the kernel writes it.
        unsafe { self.start.add(offset).cast::<u32>().read_volatile() }
    }

    pub(crate) fn write(&self, offset: usize, value: u32) {
        assert!(offset.is_multiple_of(4) && offset + 4 <= self.length);
        // SAFETY: aligned and within the mapping, as just checked.
        unsafe { self.start.add(offset).cast::<u32>().write_volatile(value) };
        std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
    }

    pub(crate) fn write_bytes(&self, offset: usize, bytes: &[u8]) {
        assert!(offset + bytes.len() <= self.length);
        // SAFETY: within the mapping, as just checked.
        unsafe { self.start.add(offset).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
    }
}

/// Page-aligned memory that lasts as long as the process, as AF_XDP wants it for its frames.
pub(crate) fn pages(length: usize) -> io::Result<(u64, Shared)> {
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a mapping where the kernel finds room.
    let start = unsafe { libc::mmap(std::ptr::null_mut(), length, protection, flags, -1, 0) };
    if start == libc::MAP_FAILED {
        return Err(io::Error::last_os_error());
    }
    Ok((start as u64, Shared { start: start.cast(), length }))
}
