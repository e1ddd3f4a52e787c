//! Files that end with the boot: in a tmpfs, and for root alone.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use rustix::fs::fstatfs;

const DIRECTORY: &str = "/run/metadata-proxy";
const TMPFS_MAGIC: u64 = 0x0102_1994;

pub(crate) fn path(name: &str) -> PathBuf {
    Path::new(DIRECTORY).join(name)
}

/// An error where somebody else may have written or read it.
pub(crate) fn read(path: &Path) -> io::Result<Vec<u8>> {
    let mut file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(path)?;
    let metadata = file.metadata()?;
    if metadata.uid() != rustix::process::geteuid().as_raw() || metadata.mode() & 0o077 != 0 {
        return Err(io::Error::other("somebody else may have written or read it; remove it"));
    }
    let mut content = Vec::new();
    file.read_to_end(&mut content)?;
    Ok(content)
}

/// Whole or not at all: another daemon may be reading.
pub(crate) fn replace(path: &Path, content: &[u8]) -> io::Result<()> {
    write(path, content, |temporary| fs::rename(temporary, path))
}

/// The same, unless it is there.
pub(crate) fn create(path: &Path, content: &[u8]) -> io::Result<()> {
    write(path, content, |temporary| fs::hard_link(temporary, path).and_then(|()| fs::remove_file(temporary)))
}

fn write(path: &Path, content: &[u8], place: impl FnOnce(&Path) -> io::Result<()>) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(DIRECTORY)?;
    if fstatfs(File::open(DIRECTORY)?)?.f_type.cast_unsigned() != TMPFS_MAGIC {
        return Err(io::Error::other(format!("{DIRECTORY} is not in a tmpfs, and no secret goes to a disk")));
    }
    let temporary = path.with_extension(std::process::id().to_string());
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
    let placed = file.write_all(content).and_then(|()| place(&temporary));
    if placed.is_err() {
        // Gone already, where it was only the last step that failed.
        let _ = fs::remove_file(&temporary);
    }
    placed
}
