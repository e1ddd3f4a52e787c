//! What a program or library asks of the system that loads it, read from the file itself: so it works for any processor.

use std::{fmt, path::Path};

use anyhow::{Context as _, ensure};
use object::{
    Endianness, elf,
    read::elf::{Dyn as _, FileHeader as _, ProgramHeader as _},
};

/// A version of glibc.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Glibc(u32, u32);

/// That of Amazon Linux 2023 and RHEL 9, the oldest that the daemon is to run on.
pub(super) const OLDEST: Glibc = Glibc(2, 34);

#[derive(Debug, Default)]
pub(super) struct Needs {
    pub(super) machine: &'static str,
    /// The loader, by its path; libraries name none.
    pub(super) loader: Option<String>,
    pub(super) libraries: Vec<String>,
    /// Of which library which version of its symbols: `libc.so.6`, `GLIBC_2.34`.
    pub(super) versions: Vec<(String, String)>,
}

impl Needs {
    pub(super) fn of(file: &Path) -> anyhow::Result<Self> {
        let data = std::fs::read(file).with_context(|| format!("read {}", file.display()))?;
        Self::read(&data).with_context(|| format!("read what {} needs", file.display()))
    }

    fn read(data: &[u8]) -> anyhow::Result<Self> {
        let header = elf::FileHeader64::<Endianness>::parse(data)?;
        let endian = header.endian()?;
        let machine = match header.e_machine(endian) {
            elf::EM_X86_64 => "x86_64",
            elf::EM_AARCH64 => "aarch64",
            _ => "another processor",
        };
        let mut needs = Self { machine, ..Self::default() };
        for segment in header.program_headers(endian, data)? {
            if let Some(loader) = segment.interpreter(endian, data)? {
                needs.loader = Some(text(loader)?);
            }
        }
        let sections = header.sections(endian, data)?;
        if let Some((entries, strings)) = sections.dynamic(endian, data)? {
            let strings = sections.strings(endian, data, strings)?;
            for entry in entries.iter().filter(|entry| entry.tag(endian) == elf::DT_NEEDED) {
                needs.libraries.push(text(entry.string(endian, strings)?)?);
            }
        }
        if let Some((mut files, strings)) = sections.gnu_verneed(endian, data)? {
            let strings = sections.strings(endian, data, strings)?;
            while let Some((file, mut versions)) = files.next()? {
                let file = text(file.file(endian, strings)?)?;
                while let Some(version) = versions.next()? {
                    needs.versions.push((file.clone(), text(version.name(endian, strings)?)?));
                }
            }
        }
        Ok(needs)
    }

    /// The newest version of glibc that anything is needed from.
    pub(super) fn glibc(&self) -> anyhow::Result<Glibc> {
        let names = self.versions.iter().filter_map(|(_, name)| name.strip_prefix("GLIBC_"));
        let versions = names.map(|name| Glibc::read(name).with_context(|| format!("GLIBC_{name} is no known version")));
        let newest = versions.collect::<anyhow::Result<Vec<_>>>()?.into_iter().max();
        newest.context("it needs no glibc, which is not what was to be built")
    }

    /// Which symbols are newer than the oldest glibc that there is to be.
    pub(super) fn check(&self) -> anyhow::Result<Glibc> {
        let needed = self.glibc()?;
        let newer = |name: &&(String, String)| {
            name.1.strip_prefix("GLIBC_").and_then(Glibc::read).is_some_and(|version| version > OLDEST)
        };
        let newer: Vec<String> =
            self.versions.iter().filter(newer).map(|(file, name)| format!("{name} of {file}")).collect();
        ensure!(
            newer.is_empty(),
            "the daemon would not run on Amazon Linux 2023 and RHEL 9, which have glibc {OLDEST}: it needs {}. \
             Build it on an older system, such as Debian 12",
            newer.join(", ")
        );
        Ok(needed)
    }
}

impl Glibc {
    /// `2.34`, `2.2.5`: the third number never tells more than what is older still.
    fn read(name: &str) -> Option<Self> {
        // The loader of that version understands relocations that older ones do not.
        if name == "ABI_DT_RELR" {
            return Some(Self(2, 36));
        }
        let mut numbers = name.split('.').map(str::parse);
        match (numbers.next(), numbers.next()) {
            (Some(Ok(major)), Some(Ok(minor))) => Some(Self(major, minor)),
            _ => None,
        }
    }
}

impl fmt::Display for Glibc {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(formatter, "{}.{}", self.0, self.1)
    }
}

fn text(bytes: &[u8]) -> anyhow::Result<String> {
    Ok(std::str::from_utf8(bytes).context("a name is not UTF-8")?.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn needing(names: &[&str]) -> Needs {
        let versions = names.iter().map(|name| ("libc.so.6".into(), (*name).into())).collect();
        Needs { versions, ..Needs::default() }
    }

    #[test]
    fn versions_are_numbers_and_not_text() {
        assert_eq!(needing(&["GLIBC_2.9", "GLIBC_2.34", "GCC_4.2.0", "GLIBC_2.2.5"]).glibc().unwrap(), Glibc(2, 34));
        assert_eq!(needing(&["GLIBC_2.9", "GLIBC_2.34"]).check().unwrap().to_string(), "2.34");
        assert_eq!(needing(&["GLIBC_ABI_DT_RELR"]).glibc().unwrap(), Glibc(2, 36));
    }

    #[test]
    fn what_is_too_new_is_named() {
        let error = needing(&["GLIBC_2.34", "GLIBC_2.38", "GLIBC_2.100"]).check().unwrap_err().to_string();
        assert!(error.contains("needs GLIBC_2.38 of libc.so.6, GLIBC_2.100 of libc.so.6."), "{error}");
    }

    #[test]
    fn the_package_asks_for_no_older_one() {
        let manifest = include_str!("../../../metadata-proxy/Cargo.toml");
        assert!(manifest.contains(&format!("depends = \"libc6 (>= {OLDEST})\"")));
    }

    #[test]
    fn what_cannot_be_told_is_no_small_version() {
        assert!(needing(&["GLIBC_PRIVATE"]).check().is_err());
        assert!(needing(&["GCC_3.0"]).check().is_err());
    }

    #[test]
    fn a_program_tells_its_processor_and_libraries() {
        let needs = Needs::of(&std::env::current_exe().unwrap()).unwrap();
        assert_eq!(needs.machine, std::env::consts::ARCH);
        assert!(needs.loader.unwrap().contains("/ld-linux"));
        assert!(needs.libraries.iter().any(|library| library == "libc.so.6"));
        assert!(Needs::read(b"#!/bin/sh").is_err());
    }
}
