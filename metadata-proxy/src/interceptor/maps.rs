//! Typed access to the maps.

use std::{
    io,
    os::fd::AsRawFd,
    sync::{Mutex, MutexGuard, PoisonError},
};

use aya::{
    Ebpf, Pod,
    maps::{HashMap, Map, MapData, MapError},
};
use metadata_proxy_common::Wanted;
use tokio::io::{Interest, unix::AsyncFd};
use tracing::warn;

use super::Error;

pub(super) fn take<M>(object: &mut Ebpf, name: &'static str) -> Result<M, Error>
where
    M: TryFrom<Map, Error = MapError>,
{
    let map = object.take_map(name).ok_or(Error::Missing(name))?;
    M::try_from(map).map_err(error(name))
}

pub(super) fn error(map: &'static str) -> impl Fn(MapError) -> Error {
    move |source| Error::Map { map, source }
}

/// A map has no state of ours that a panic elsewhere could have left half done.
pub(super) fn lock<T>(map: &Mutex<T>) -> MutexGuard<'_, T> {
    map.lock().unwrap_or_else(PoisonError::into_inner)
}

pub(super) fn remove<V: Pod>(map: &mut HashMap<MapData, u64, V>, name: &'static str, key: u64) {
    match map.remove(&key) {
        Ok(()) | Err(MapError::KeyNotFound) => {}
        Err(error) => warn!("BPF map {name}: cannot remove {key}: {error}"),
    }
}

/// A value that may be read from any bytes of its size.
///
/// # Safety
/// As for [`Pod`], which the kernel's events need not be.
pub(super) unsafe trait Event: Copy {}

// SAFETY: `repr(C)`, integers only, no padding.
unsafe impl Event for Wanted {}

pub(super) fn read<T: Event>(bytes: &[u8]) -> Option<T> {
    if bytes.len() != size_of::<T>() {
        return None;
    }
    // SAFETY: as many bytes as the type has, any of which are a value of it.
    Some(unsafe { bytes.as_ptr().cast::<T>().read_unaligned() })
}

/// To wait until a ring buffer has something to read. `owner` owns its descriptor.
pub(super) fn readable<T: AsRawFd>(owner: T) -> io::Result<AsyncFd<T>> {
    // SAFETY: both types we call this with, `OwnedFd` and aya's ring buffer, keep one descriptor open
    // for as long as they live.
    unsafe { AsyncFd::register_with_interest(owner, Interest::READABLE) }.map_err(|error| error.into_parts().1)
}
