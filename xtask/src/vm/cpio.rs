//! An archive in the form that the kernel unpacks its first file system from ("newc": see
//! `Documentation/driver-api/early-userspace/buffer-format.rst` of Linux).

use std::collections::BTreeSet;

const DIRECTORY: u32 = 0o040_000;
const FILE: u32 = 0o100_000;
const LINK: u32 = 0o120_000;
const TRAILER: &str = "TRAILER!!!";

/// Everything belongs to root.
#[derive(Default)]
pub(super) struct Archive {
    bytes: Vec<u8>,
    entries: u32,
    directories: BTreeSet<String>,
}

impl Archive {
    /// `/a/b` and the directories above it, once each: what comes later has to find them there.
    pub(super) fn directory(&mut self, path: &str) {
        let mut end = 0;
        let path = path.trim_matches('/');
        while end < path.len() {
            end = path[end + 1..].find('/').map_or(path.len(), |next| end + 1 + next);
            if self.directories.insert(path[..end].to_owned()) {
                self.entry(&path[..end], DIRECTORY | 0o755, &[]);
            }
        }
    }

    pub(super) fn file(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.above(path);
        self.entry(path.trim_matches('/'), FILE | mode, content);
    }

    pub(super) fn link(&mut self, path: &str, target: &str) {
        self.above(path);
        self.entry(path.trim_matches('/'), LINK | 0o777, target.as_bytes());
    }

    pub(super) fn finish(mut self) -> Vec<u8> {
        self.entry(TRAILER, 0, &[]);
        self.bytes
    }

    fn above(&mut self, path: &str) {
        if let Some((directory, _)) = path.trim_matches('/').rsplit_once('/') {
            self.directory(directory);
        }
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) {
        // A number of its own, or the kernel would take two files for one.
        self.entries += 1;
        let links = if mode & DIRECTORY == DIRECTORY { 2 } else { 1 };
        let (size, name) = (content.len() as u32, path.len() as u32 + 1);
        // Number, mode, owner, group, links, time, size, two pairs of devices, name's length, checksum.
        let fields = [self.entries, mode, 0, 0, links, 0, size, 0, 0, 0, 0, name, 0];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(path.bytes().chain([0]));
        self.pad();
        self.bytes.extend(content);
        self.pad();
    }

    /// Name and content each end on a multiple of four.
    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_brings_the_directories_above_it() {
        let mut archive = Archive::default();
        archive.file("/usr/bin/x", 0o755, b"12345");
        archive.link("/usr/y", "bin/x");
        let text = String::from_utf8_lossy(&archive.bytes).into_owned();
        let at = |name: &str| text.find(&format!("{name}\0")).unwrap();
        assert!(at("usr") < at("usr/bin") && at("usr/bin") < at("usr/bin/x") && at("usr/bin/x") < at("usr/y"));
        assert_eq!(archive.entries, 4);
        assert_eq!(archive.bytes.len() % 4, 0);
    }
}
