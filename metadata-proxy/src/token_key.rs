//! The key that session tokens are made with: one for each boot of the host, so that a restarted daemon
//! still takes the tokens of the one before. It is kept in memory only, in a tmpfs.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, Read as _, Write as _},
    os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _},
    path::Path,
};

use anyhow::Context as _;
use aws_lc_rs::rand;
use rustix::fs::fstatfs;
use tracing::warn;

use crate::imds::TokenKey;

const DIRECTORY: &str = "/run/metadata-proxy";
const TMPFS_MAGIC: u64 = 0x0102_1994;
const LENGTH: usize = 32;

/// A key that only this process has is good enough where none can be kept: clients whose token is
/// refused take another.
pub(crate) fn of_this_boot() -> anyhow::Result<TokenKey> {
    let path = Path::new(DIRECTORY).join("token-key");
    let key = match read(&path) {
        Ok(key) => key,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let key = random()?;
            match write(&path, &key) {
                Ok(()) => key,
                // Another daemon was faster.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => read(&path).unwrap_or(key),
                Err(error) => {
                    warn!("session tokens end with this process: cannot keep their key in {}: {error}", path.display());
                    key
                }
            }
        }
        Err(error) => {
            warn!("session tokens end with this process: {}: {error}", path.display());
            random()?
        }
    };
    Ok(TokenKey::new(&key))
}

fn random() -> anyhow::Result<[u8; LENGTH]> {
    let mut key = [0; LENGTH];
    rand::fill(&mut key).ok().context("the system has no randomness to give")?;
    Ok(key)
}

fn read(path: &Path) -> io::Result<[u8; LENGTH]> {
    let mut file = OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW).open(path)?;
    let metadata = file.metadata()?;
    if metadata.uid() != rustix::process::geteuid().as_raw() || metadata.mode() & 0o077 != 0 {
        return Err(io::Error::other("somebody else may have written or read it; remove it"));
    }
    let mut key = [0; LENGTH];
    file.read_exact(&mut key)?;
    Ok(key)
}

fn write(path: &Path, key: &[u8]) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(DIRECTORY)?;
    if fstatfs(File::open(DIRECTORY)?)?.f_type.cast_unsigned() != TMPFS_MAGIC {
        return Err(io::Error::other(format!("{DIRECTORY} is not in a tmpfs, and no secret goes to a disk")));
    }
    // Whole or not at all: another daemon may be reading.
    let temporary = path.with_extension(std::process::id().to_string());
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
    let written = file.write_all(key).and_then(|()| fs::hard_link(&temporary, path));
    fs::remove_file(&temporary)?;
    written
}
