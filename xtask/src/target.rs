//! What the daemon is built for: Linux with glibc, on the processors that EC2 has.

use std::env::consts::ARCH;

/// A processor, by all the names that it has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    /// Rust's name.
    pub(crate) triple: &'static str,
    /// Linux's name, and that of RPM packages.
    pub(crate) machine: &'static str,
    /// Debian's name, and that of container images.
    pub(crate) debian: &'static str,
    /// GNU's name, which its compilers and folders of libraries bear.
    pub(crate) gnu: &'static str,
}

const TARGETS: [Target; 2] = [
    Target { triple: "x86_64-unknown-linux-gnu", machine: "x86_64", debian: "amd64", gnu: "x86_64-linux-gnu" },
    Target { triple: "aarch64-unknown-linux-gnu", machine: "aarch64", debian: "arm64", gnu: "aarch64-linux-gnu" },
];

impl Target {
    /// By Rust's name.
    pub(crate) fn named(triple: &str) -> Result<Self, String> {
        let names = TARGETS.map(|target| target.triple).join(" and ");
        let target = TARGETS.into_iter().find(|target| target.triple == triple);
        target.ok_or_else(|| format!("there are only {names}"))
    }

    /// This machine.
    pub(crate) fn native() -> anyhow::Result<Self> {
        let target = TARGETS.into_iter().find(|target| target.machine == ARCH);
        target.ok_or_else(|| anyhow::anyhow!("no packages are made for {ARCH}; choose another by --target"))
    }

    pub(crate) fn is_native(self) -> bool {
        self.machine == ARCH
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_target_is_told_which_there_are() {
        assert_eq!(Target::named("aarch64-unknown-linux-gnu").unwrap().debian, "arm64");
        let error = Target::named("riscv64gc-unknown-linux-gnu").unwrap_err();
        assert!(TARGETS.iter().all(|target| error.contains(target.triple)), "{error}");
    }

    #[test]
    fn one_of_them_at_most_is_this_machine() {
        assert_eq!(TARGETS.iter().filter(|target| target.is_native()).count(), usize::from(Target::native().is_ok()));
    }
}
