//! Processors that a guest may have, by Debian's names.

use crate::install::{QEMU, QEMU_ARM};
use crate::target::Target;

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Arch {
    Amd64,
    Arm64,
}

impl Arch {
    /// This machine's.
    pub(super) fn native() -> anyhow::Result<Self> {
        Ok(if Target::native()?.debian == "arm64" { Self::Arm64 } else { Self::Amd64 })
    }

    /// What programs for it are built for.
    pub(super) fn target(self) -> anyhow::Result<Target> {
        let triple = match self {
            Self::Amd64 => "x86_64-unknown-linux-gnu",
            Self::Arm64 => "aarch64-unknown-linux-gnu",
        };
        Target::named(triple).map_err(anyhow::Error::msg)
    }

    pub(super) fn emulator(self) -> &'static str {
        match self {
            Self::Amd64 => QEMU,
            Self::Arm64 => QEMU_ARM,
        }
    }

    pub(super) fn machine(self) -> &'static str {
        match self {
            Self::Amd64 => "q35",
            Self::Arm64 => "virt",
        }
    }

    /// All that the emulator has. To authenticate pointers as Arm's architecture says would be slow to emulate.
    pub(super) fn processor(self) -> &'static str {
        match self {
            Self::Amd64 => "max",
            Self::Arm64 => "max,pauth-impdef=on",
        }
    }

    /// The kernel's name of the first serial port.
    pub(super) fn console(self) -> &'static str {
        match self {
            Self::Amd64 => "ttyS0",
            Self::Arm64 => "ttyAMA0",
        }
    }
}
