//! The key that session tokens are made with: one for each boot of the host, so that a restarted daemon
//! still takes the tokens of the one before. It is kept in memory only, in a tmpfs.

use std::{io, path::Path};

use anyhow::Context as _;
use aws_lc_rs::rand;
use tracing::warn;

use crate::{imds::TokenKey, volatile};

const LENGTH: usize = 32;

/// A key that only this process has is good enough where none can be kept: clients whose token is
/// refused take another.
pub(crate) fn of_this_boot() -> anyhow::Result<TokenKey> {
    let path = volatile::path("token-key");
    let key = match read(&path) {
        Ok(key) => key,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            let key = random()?;
            match volatile::create(&path, &key) {
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
    volatile::read(path)?.try_into().map_err(|_| io::Error::other("it is no key; remove it"))
}
