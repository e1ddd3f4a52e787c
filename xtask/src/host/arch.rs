//! Processors that a guest may have.

use crate::install::{QEMU, QEMU_ARM};

#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Arch {
    Amd64,
    Arm64,
}

impl Arch {
    /// As Debian names it, and so do packages.
    pub(super) fn debian(self) -> &'static str {
        match self {
            Self::Amd64 => "amd64",
            Self::Arm64 => "arm64",
        }
    }

    /// As Rust names it, for programs that run in the guest.
    pub(super) fn target(self) -> &'static str {
        match self {
            Self::Amd64 => "x86_64-unknown-linux-gnu",
            Self::Arm64 => "aarch64-unknown-linux-gnu",
        }
    }

    pub(super) fn is_native(self) -> bool {
        self.target().starts_with(std::env::consts::ARCH)
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

    /// All that the emulator has. The architected way to authenticate pointers takes half of an emulated Arm's time.
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
