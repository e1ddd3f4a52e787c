//! `cargo xtask host`: whole distributions in virtual machines, as their users have them: systemd, their own kernel and
//! engine. The package is installed there, and put through what happens to a host.
#![expect(clippy::print_stdout, reason = "the table is its standard output")]

mod arch;
mod guest;
mod machine;
mod payload;
mod port;
mod scenarios;

use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Context as _, bail};

use self::arch::Arch;
use self::guest::Guest;
use self::machine::Machine;
use crate::install::{self, Recipe};
use crate::{package, workspace};

struct Distribution {
    name: &'static str,
    /// Debian's name of it.
    release: &'static str,
    /// What older ones have in the daemon's package: `docker`, and its client of BuildKit.
    clients: &'static [&'static str],
}

const DISTRIBUTIONS: [Distribution; 3] = [
    Distribution { name: "debian-12", release: "bookworm", clients: &[] },
    Distribution { name: "debian-13", release: "trixie", clients: &["docker-cli", "docker-buildx"] },
    Distribution { name: "debian-testing", release: "testing", clients: &["docker-cli", "docker-buildx"] },
];

/// Where the scenarios take the least time.
const QUICKEST: &str = "debian-13";

/// What a host of containers has, and what the scenarios look with.
const PACKAGES: [&str; 13] = [
    "systemd-sysv",
    "dbus",
    "udev",
    "initramfs-tools",
    "docker.io",
    "apparmor",
    "iproute2",
    "iptables",
    "nftables",
    "ca-certificates",
    "kmod",
    "procps",
    "busybox-static",
];

const FILES: [(&str, &str); 5] = [
    ("/etc/hostname", "host\n"),
    ("/etc/hosts", "127.0.0.1 localhost host\n::1 localhost\n"),
    ("/etc/fstab", "/dev/vda / ext4 defaults 0 0\n/dev/vdb /opt/host ext4 ro 0 0\n"),
    ("/etc/systemd/system/agent.service", include_str!("host/guest/agent.service")),
    ("/etc/systemd/system/cloud.service", include_str!("host/guest/cloud.service")),
];
const WANTED: [(&str, &str); 2] = [("agent.service", "multi-user.target"), ("cloud.service", "multi-user.target")];

/// What may be chosen.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Distributions to boot: debian-12, debian-13, debian-testing [default: all]
    #[arg(value_name = "NAME")]
    names: Vec<String>,
    /// The guests' processor
    #[arg(long, value_enum, default_value = "amd64")]
    arch: Arch,
    /// The package to install [default: the newest in target/package, made first where there is none]
    #[arg(long, value_name = "FILE.deb")]
    package: Option<PathBuf>,
    /// Only these groups of scenarios
    #[arg(long = "only", value_name = "GROUP", value_delimiter = ',')]
    groups: Vec<String>,
    /// Only the scenarios that tell most for their time; and the package, if none is named, is made of a daemon that is not
    /// optimised
    #[arg(long)]
    quick: bool,
    /// Make the guests' disks anew, of newer packages than those in the cache
    #[arg(long)]
    renew: bool,
    /// Print the daemon's log of each scenario that is not as it should be
    #[arg(long)]
    verbose: bool,
    /// Keep the guests' disks, and say how to boot them by hand
    #[arg(long)]
    keep: bool,
}

/// What `cargo xtask test` has of it.
pub(crate) fn quickest() -> anyhow::Result<()> {
    run_all(&Options {
        names: vec![QUICKEST.into()],
        arch: Arch::native()?,
        package: None,
        groups: Vec::new(),
        quick: true,
        renew: false,
        verbose: true,
        keep: false,
    })
}

pub(crate) fn run_all(options: &Options) -> anyhow::Result<()> {
    let chosen = chosen(&options.names)?;
    let groups = scenarios::chosen(&options.groups, options.quick)?;
    let scratch = workspace()?.join("target/host");
    fs::create_dir_all(&scratch).with_context(|| format!("create {}", scratch.display()))?;
    let target = options.arch.target()?;
    let (package, made) = match &options.package {
        Some(package) => (package.clone(), ""),
        None if options.quick => (package::unoptimised(target)?, ", made of a daemon that is not optimised"),
        None => (payload::newest(target)?, ""),
    };
    payload::check(&package, target)?;
    let image = groups.iter().any(|(name, _)| *name == scenarios::IMAGE);
    let payload = payload::make(&package, image, target, &scratch)?;
    install::emulator(options.arch.emulator())?;

    let begin = Instant::now();
    println!("The package is {}{made}.", package.display());
    println!("{:<16} {:<10} {:<52} {:<7} {:>4}  seen", "distribution", "group", "scenario", "result", "s");
    let mut good = true;
    for distribution in chosen {
        let kernel = format!("linux-image-cloud-{}", target.debian);
        let clients = distribution.clients.iter().copied();
        let packages: Vec<&str> = PACKAGES.into_iter().chain([kernel.as_str()]).chain(clients).collect();
        let name = format!("{}-{}", distribution.name, target.debian);
        let recipe = Recipe {
            name: &name,
            release: distribution.release,
            architecture: target.debian,
            packages: &packages,
            files: &FILES,
            wanted: &WANTED,
        };
        let system = install::debian(&recipe, options.renew)?;
        let machine = Machine::start(&name, &system, &payload, options.arch, &scratch)?;
        let mut guest = Guest::new(distribution.name, machine, options.verbose);
        let result = guest.go_through(&groups);
        drop(guest);
        if options.keep {
            let command = Machine::by_hand(&name, &system, &payload, options.arch, &scratch);
            println!("The disk of {name} is kept; to log in as root:\n  {command}");
        } else {
            let disk = scratch.join(format!("{name}.qcow2"));
            fs::remove_file(&disk).with_context(|| format!("remove {}", disk.display()))?;
        }
        good &= result?;
    }
    println!("ran for {:.0} s", begin.elapsed().as_secs_f64());
    if !good {
        bail!("not as it should be: see above");
    }
    println!("All as it should be.");
    Ok(())
}

fn chosen(names: &[String]) -> anyhow::Result<Vec<&'static Distribution>> {
    if names.is_empty() {
        return Ok(DISTRIBUTIONS.iter().collect());
    }
    let known = DISTRIBUTIONS.map(|distribution| distribution.name).join(", ");
    let find = |name: &String| DISTRIBUTIONS.iter().find(|distribution| distribution.name == name);
    names.iter().map(|name| find(name).with_context(|| format!("no distribution {name}: there are {known}"))).collect()
}
