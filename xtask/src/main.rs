//! `cargo xtask`: builds, runs, shows and tests metadata-proxy, and installs what that needs.

mod build;
mod fuzz;
mod host;
mod install;
mod package;
mod target;
mod test;
mod vm;

use std::{
    env,
    ffi::OsString,
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::Command,
};

use anyhow::{Context as _, bail};
use clap::Parser;

use self::target::Target;

/// Builds, runs, shows and tests metadata-proxy, and installs what that needs
#[derive(Parser)]
#[command(bin_name = "cargo xtask")]
enum Task {
    /// Build the BPF programs
    BuildEbpf,
    /// Build the BPF programs and the daemon
    Build {
        /// Optimised, as it is to be installed
        #[arg(long)]
        release: bool,
        /// Which processor: x86_64-unknown-linux-gnu or aarch64-unknown-linux-gnu [default: this machine's]
        #[arg(long, value_name = "TRIPLE", value_parser = Target::named)]
        target: Option<Target>,
    },
    /// Build what is handed out, into target/package: packages, an archive, a container image
    Package(package::Options),
    /// Build the daemon and run it on this machine: `run -- run --help`
    Run {
        #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
        args: Vec<OsString>,
    },
    /// Show the main job on a hermetic test host: real containers, simulated AWS
    Demo,
    /// Restart, kill and upgrade the daemon under load, and print what failed
    Handover,
    /// Measure what the interception costs, as ratios within one run
    Bench,
    /// Live a virtual day of 5,000 containers with the real cache of credentials, and print what STS and clients saw
    SimulateFleet,
    /// Try every way around the interception, and print what came of each
    Bypass,
    /// Try inputs that nobody has thought of, guided by coverage, and print how many
    Fuzz(fuzz::Options),
    /// Run real AWS clients in containers through every scenario, and print what came of each
    Clients {
        /// Only these; all if none is named
        names: Vec<OsString>,
        /// Keep what they send, and what they are answered, in tests/recordings
        #[arg(long)]
        record: bool,
    },
    /// Run all tests: unit, privileged, end to end, and the quick scenarios of a booted host
    Test {
        /// Only the tests whose name contains this; `booted-host` is the booted host alone
        filter: Option<String>,
    },
    /// Boot Debian's kernels in virtual machines, and run the daemon there at the true root cgroup
    Vm(vm::Options),
    /// Boot whole distributions in virtual machines, install the package there, and put it through what happens to a host
    Host(host::Options),
    /// Check what CI checks before the tests: formatting and lints, warnings denied
    Lint,
}

fn main() -> anyhow::Result<()> {
    env::set_current_dir(workspace()?).context("cannot enter the workspace")?;
    match Task::parse() {
        Task::BuildEbpf => build::ebpf().map(drop),
        Task::Build { release, target: None } => build::daemon(release).map(drop),
        Task::Build { release, target: Some(target) } => build::daemon_for(target, release).map(drop),
        Task::Package(options) => package::all(&options),
        // As if it had been started by hand, its exit status included.
        Task::Run { args } => {
            let daemon = build::daemon(false)?;
            let error = Command::new(&daemon).args(args).exec();
            bail!("cannot run {}: {error}", daemon.display())
        }
        Task::Demo => test::show("demo"),
        Task::Handover => test::show("handover"),
        Task::Bench => test::bench(),
        Task::SimulateFleet => test::simulate_fleet(),
        Task::Bypass => test::show("bypass"),
        Task::Fuzz(options) => fuzz::all(&options),
        Task::Clients { names, record } => test::clients(names, record),
        Task::Test { filter } => test::all(filter.as_deref()),
        Task::Vm(options) => vm::run_all(&options),
        Task::Host(options) => host::run_all(&options),
        Task::Lint => test::lint(),
    }
}

/// The folder of the workspace, from wherever in it the xtask was called.
fn workspace() -> anyhow::Result<PathBuf> {
    let own = Path::new(env!("CARGO_MANIFEST_DIR"));
    own.parent().map(Path::to_owned).context("the xtask lies in no workspace")
}

/// The cargo that runs us.
fn cargo() -> Command {
    let mut cargo = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    forget_ourselves(&mut cargo);
    cargo
}

/// What cargo tells the xtask of its package is none of those that are built: some build scripts (ring's) would run again,
/// and all that depends on them be compiled anew, with each change between `cargo xtask` and a cargo started by hand.
fn forget_ourselves(command: &mut Command) {
    let ours = |name: &OsString| {
        let name = name.to_string_lossy();
        name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_")
    };
    for (name, _) in env::vars_os().filter(|(name, _)| ours(name)) {
        command.env_remove(name);
    }
}

/// Runs a command that speaks for itself.
fn run(command: &mut Command) -> anyhow::Result<()> {
    let status = command.status().with_context(|| format!("cannot run {}", command.get_program().display()))?;
    if !status.success() {
        bail!("{} {}: {status}", command.get_program().display(), words(command));
    }
    Ok(())
}

fn words(command: &Command) -> String {
    command.get_args().map(|word| word.to_string_lossy()).collect::<Vec<_>>().join(" ")
}
