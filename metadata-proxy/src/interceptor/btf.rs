//! The running kernel's own description of its structures, as far as the programs need it: offsets of members, and ids
//! of functions (`Documentation/bpf/btf.rst`).
//!
//! btfparse, the library for this, keeps every type as an object: 57 MB that stay with the process, for five numbers.

use std::{collections::HashMap, fs};

use anyhow::{Context as _, bail};
use metadata_proxy_common::TaskLayout;

const FILE: &str = "/sys/kernel/btf/vmlinux";
const MAGIC: u16 = 0xeb9f;
const POINTER: u32 = 2;
const INTEGER: u32 = 1;
const STRUCT: u32 = 4;
const UNION: u32 = 5;
const FUNCTION: u32 = 12;

pub(super) struct Btf {
    data: Vec<u8>,
    /// Where each type begins; the first has id 1.
    types: Vec<usize>,
    strings: usize,
}

/// A member, or the next of what stands behind a type.
#[derive(Clone, Copy)]
struct Member {
    kind: u32,
    /// In bytes.
    offset: u32,
}

impl Btf {
    pub(super) fn of_kernel() -> anyhow::Result<Self> {
        let data = fs::read(FILE).with_context(|| format!("cannot read {FILE} (CONFIG_DEBUG_INFO_BTF)"))?;
        Self::parse(data).with_context(|| format!("{FILE} is not as expected"))
    }

    fn parse(data: Vec<u8>) -> anyhow::Result<Self> {
        let mut btf = Self { data, types: Vec::new(), strings: 0 };
        if btf.half(0) != Some(MAGIC) {
            bail!("it does not begin like BTF of this processor");
        }
        let [header, types, length, strings] =
            [4, 8, 12, 16].map(|at| btf.word(at).map(|word| word as usize)).map(Option::unwrap_or_default);
        btf.strings = header + strings;
        let (mut at, end) = (header + types, header + types + length);
        while at < end {
            btf.types.push(at);
            at += 12 + btf.tail(at).context("it has a type of an unknown kind")?;
        }
        Ok(btf)
    }

    /// How many bytes follow the three words that each type begins with.
    fn tail(&self, at: usize) -> Option<usize> {
        let count = self.count(at)?;
        Some(match self.kind(at)? {
            2 | 7..=12 | 16 | 18 => 0, // pointer, forward, typedef, volatile, const, restrict, function, float, type tag
            1 | 14 | 17 => 4,          // integer, variable, declaration tag
            3 => 12,                   // array
            4 | 5 | 15 | 19 => count * 12, // structure, union, data section, 64-bit enumeration
            6 | 13 => count * 8,       // enumeration, prototype
            _ => return None,
        })
    }

    /// The id of a function.
    pub(super) fn function(&self, name: &str) -> Option<u32> {
        let index = self.types.iter().position(|&at| self.kind(at) == Some(FUNCTION) && self.is_named(at, name))?;
        u32::try_from(index + 1).ok()
    }

    /// What a sandbox is told by. An error, where the kernel keeps it otherwise than is known here.
    pub(super) fn task_layout(&self) -> anyhow::Result<TaskLayout> {
        let names = ["task_struct", "pid", "cred", "user_namespace"];
        let structures: HashMap<_, _> = names.iter().filter_map(|name| Some((*name, self.structure(name)?))).collect();
        let offset = |structure: &str, member: &str, kind: u32| {
            let found = structures.get(structure).and_then(|&at| self.member(at, member, 0));
            match found.with_context(|| format!("the kernel's {structure} has no {member}"))? {
                found if found.kind == kind => Ok(found.offset),
                _ => bail!("the kernel's {structure}.{member} is of another kind than is known"),
            }
        };
        Ok(TaskLayout {
            thread_pid: offset("task_struct", "thread_pid", POINTER)?,
            pid_level: offset("pid", "level", INTEGER)?,
            cred: offset("task_struct", "cred", POINTER)?,
            user_ns: offset("cred", "user_ns", POINTER)?,
            user_level: offset("user_namespace", "level", INTEGER)?,
        })
    }

    fn structure(&self, name: &str) -> Option<usize> {
        self.types.iter().copied().find(|&at| self.kind(at) == Some(STRUCT) && self.is_named(at, name))
    }

    /// A member of a structure, or of what is in it without a name; `depth` ends what no compiler has made.
    fn member(&self, structure: usize, name: &str, depth: usize) -> Option<Member> {
        const BITFIELDS: u32 = 1 << 31;
        if depth > 8 {
            return None;
        }
        let bitfields = self.word(structure + 4)? & BITFIELDS != 0;
        for index in 0..self.count(structure)? {
            let member = structure + 12 + index * 12;
            let at = *self.types.get(self.word(member + 4)?.checked_sub(1)? as usize)?;
            let bits = self.word(member + 8)?;
            let offset = if bitfields { bits & 0xff_ffff } else { bits } / 8;
            if self.is_named(member, name) {
                return Some(Member { kind: self.resolved(at)?, offset });
            }
            if self.word(member)? == 0
                && matches!(self.kind(at)?, STRUCT | UNION)
                && let Some(inner) = self.member(at, name, depth + 1)
            {
                return Some(Member { offset: offset + inner.offset, ..inner });
            }
        }
        None
    }

    /// The kind behind typedefs and qualifiers.
    fn resolved(&self, mut at: usize) -> Option<u32> {
        for _ in 0..16 {
            let kind = self.kind(at)?;
            if !matches!(kind, 8..=11 | 18) {
                return Some(kind);
            }
            at = *self.types.get(self.word(at + 8)?.checked_sub(1)? as usize)?;
        }
        None
    }

    fn kind(&self, at: usize) -> Option<u32> {
        Some(self.word(at + 4)? >> 24 & 0x1f)
    }

    fn count(&self, at: usize) -> Option<usize> {
        Some((self.word(at + 4)? & 0xffff) as usize)
    }

    /// Whether the name that the type or member at this place begins with is this one.
    fn is_named(&self, at: usize, name: &str) -> bool {
        let string = self.word(at).and_then(|offset| self.data.get(self.strings + offset as usize..));
        string.and_then(|string| string.strip_prefix(name.as_bytes())).is_some_and(|rest| rest.first() == Some(&0))
    }

    fn word(&self, at: usize) -> Option<u32> {
        Some(u32::from_ne_bytes(*self.data.get(at..)?.first_chunk()?))
    }

    fn half(&self, at: usize) -> Option<u16> {
        Some(u16::from_ne_bytes(*self.data.get(at..)?.first_chunk()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Words after the header: types and strings as the kernel has them.
    fn btf(types: &[u32], strings: &str) -> anyhow::Result<Btf> {
        let length = types.len() as u32 * 4;
        let header = [u32::from(MAGIC) | 1 << 16, 24, 0, length, length, strings.len() as u32];
        let words = header.iter().chain(types).flat_map(|word| word.to_ne_bytes());
        Btf::parse(words.chain(strings.bytes()).collect())
    }

    const fn info(kind: u32, count: u32) -> u32 {
        kind << 24 | count
    }

    const STRINGS: &str = "\0task_struct\0thread_pid\0cred\0pid\0level\0user_namespace\0user_ns\0f\0";

    fn at(name: &str) -> u32 {
        STRINGS.find(&format!("\0{name}\0")).unwrap() as u32 + 1
    }

    fn kernel(pid_level: u32) -> Vec<u32> {
        let int = [at("f"), info(INTEGER, 0), 4, 0]; // 1
        let pointer = [0, info(POINTER, 0), 0]; // 2
        let anonymous = [0, info(STRUCT, 1), 8, at("cred"), 2, 8 * 8]; // 3: a member at its byte 8
        let task = [at("task_struct"), info(STRUCT, 2), 64, at("thread_pid"), 2, 16 * 8, 0, 3, 32 * 8]; // 4
        let constant = [0, info(10, 0), pid_level]; // 5: const
        let pid = [at("pid"), info(STRUCT, 1), 8, at("level"), 5, 4 * 8]; // 6
        let cred = [at("cred"), info(STRUCT, 1), 8, at("user_ns"), 2, 0]; // 7
        let user = [at("user_namespace"), 1 << 31 | info(STRUCT, 1), 8, at("level"), 1, (24 << 24) | (12 * 8)]; // 8
        let function = [at("f"), info(FUNCTION, 0), 9]; // 9
        [&int[..], &pointer, &anonymous, &task, &constant, &pid, &cred, &user, &function].concat()
    }

    #[test]
    fn finds_members_behind_qualifiers_and_in_what_has_no_name() {
        let btf = btf(&kernel(1), STRINGS).unwrap();
        let expected = TaskLayout { thread_pid: 16, pid_level: 4, cred: 40, user_ns: 0, user_level: 12 };
        assert_eq!(btf.task_layout().unwrap(), expected);
        assert_eq!((btf.function("f"), btf.function("g")), (Some(9), None));
    }

    #[test]
    fn another_layout_is_an_error_and_not_a_wrong_offset() {
        let error = btf(&kernel(2), STRINGS).unwrap().task_layout().unwrap_err().to_string();
        assert_eq!(error, "the kernel's pid.level is of another kind than is known");
        let error = btf(&kernel(1)[..10], STRINGS).unwrap().task_layout().unwrap_err().to_string();
        assert_eq!(error, "the kernel's task_struct has no thread_pid");
    }

    #[test]
    fn what_is_no_btf_is_an_error() {
        let cut = kernel(1);
        for length in 0..cut.len() {
            // Wherever it ends, it is read to that end and no further.
            let _ = btf(&cut[..length], "\0").map(|btf| btf.task_layout());
        }
        assert!(Btf::parse(vec![0; 64]).is_err());
        assert!(Btf::parse(Vec::new()).is_err());
        assert!(btf(&[0, info(31, 0), 0], "\0").is_err());
    }

    #[test]
    fn knows_the_running_kernel() {
        let btf = Btf::of_kernel().unwrap();
        let layout = btf.task_layout().unwrap();
        assert!(layout.thread_pid > 0 && layout.cred > 0 && layout.user_level > 0, "{layout:?}");
        assert!(btf.function("security_socket_setsockopt").is_some());
    }
}
