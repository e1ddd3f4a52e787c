//! A tar archive that is the same each time: everything belongs to root and is of one time.

use std::{collections::BTreeSet, io::Write as _};

use anyhow::Context as _;
use flate2::{Compression, write::GzEncoder};
use tar::{Builder, EntryType, Header};

pub(super) struct Archive {
    builder: Builder<Vec<u8>>,
    time: u64,
    directories: BTreeSet<String>,
}

impl Archive {
    pub(super) fn new(time: u64) -> Self {
        Self { builder: Builder::new(Vec::new()), time, directories: BTreeSet::new() }
    }

    /// `a/b` and the directories above it, once each; those above can be entered by all.
    pub(super) fn directory(&mut self, path: &str, mode: u32) -> anyhow::Result<()> {
        let path = path.trim_matches('/');
        if path.is_empty() || !self.directories.insert(path.to_owned()) {
            return Ok(());
        }
        self.above(path)?;
        self.append(EntryType::Directory, &format!("{path}/"), mode, &[])
    }

    pub(super) fn file(&mut self, path: &str, mode: u32, content: &[u8]) -> anyhow::Result<()> {
        let path = path.trim_matches('/');
        self.above(path)?;
        self.append(EntryType::Regular, path, mode, content)
    }

    pub(super) fn link(&mut self, path: &str, target: &str) -> anyhow::Result<()> {
        let path = path.trim_matches('/');
        self.above(path)?;
        let mut header = self.header(EntryType::Symlink, 0o777, 0);
        self.builder.append_link(&mut header, path, target).with_context(|| format!("pack {path}"))
    }

    pub(super) fn finish(self) -> anyhow::Result<Vec<u8>> {
        self.builder.into_inner().context("finish an archive")
    }

    fn above(&mut self, path: &str) -> anyhow::Result<()> {
        path.rsplit_once('/').map_or(Ok(()), |(directory, _)| self.directory(directory, 0o755))
    }

    fn append(&mut self, kind: EntryType, path: &str, mode: u32, content: &[u8]) -> anyhow::Result<()> {
        let mut header = self.header(kind, mode, content.len() as u64);
        self.builder.append_data(&mut header, path, content).with_context(|| format!("pack {path}"))
    }

    fn header(&self, kind: EntryType, mode: u32, size: u64) -> Header {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_mode(mode);
        header.set_size(size);
        header.set_mtime(self.time);
        header.set_uid(0);
        header.set_gid(0);
        header
    }
}

/// Without a time or name of its own, so that it is the same each time.
pub(super) fn gzip(content: &[u8]) -> anyhow::Result<Vec<u8>> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(content).and_then(|()| encoder.finish()).context("compress")
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;

    use super::*;

    #[test]
    fn directories_come_once_and_before_what_is_in_them() {
        let pack = || {
            let mut archive = Archive::new(7);
            archive.directory("root", 0o700).unwrap();
            archive.file("usr/bin/x", 0o755, b"12345").unwrap();
            archive.link("/usr/bin/y", "x").unwrap();
            archive.finish().unwrap()
        };
        let bytes = pack();
        assert_eq!(bytes, pack());
        let mut archive = tar::Archive::new(bytes.as_slice());
        let entries = archive.entries().unwrap().map(|entry| {
            let entry = entry.unwrap();
            let header = entry.header();
            assert_eq!((header.mtime().unwrap(), header.uid().unwrap()), (7, 0));
            (entry.path().unwrap().display().to_string(), header.mode().unwrap())
        });
        let expected =
            [("root/", 0o700), ("usr/", 0o755), ("usr/bin/", 0o755), ("usr/bin/x", 0o755), ("usr/bin/y", 0o777)];
        assert_eq!(entries.collect::<Vec<_>>(), expected.map(|(path, mode)| (path.to_owned(), mode)));
    }

    #[test]
    fn what_is_compressed_says_nothing_of_when() {
        let packed = gzip(b"text").unwrap();
        assert_eq!(packed[3..8], [0; 5], "neither a name nor a time");
        let mut text = String::new();
        flate2::read::GzDecoder::new(packed.as_slice()).read_to_string(&mut text).unwrap();
        assert_eq!(text, "text");
    }
}
