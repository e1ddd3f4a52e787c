//! `cargo xtask vm`: Debian's kernels in virtual machines, each with the daemon at its true root cgroup.
//!
//! Every kernel is booted once for each way of having cgroups: `unified` is version 2 alone, `hybrid` is
//! version 1 with 2 beside it, `legacy` is version 1 alone.
#![expect(clippy::print_stdout, reason = "the table is its standard output")]

mod boot;
mod cpio;
mod image;

use std::fs;
use std::time::Instant;

use anyhow::{Context as _, bail};

use self::boot::Report;
use crate::{build, cargo, install, run, workspace};

/// A line of kernels, and the release of Debian that has it.
struct Line {
    name: &'static str,
    debian: &'static str,
    /// Too old for the daemon, which then has to say this.
    refusal: Option<&'static str>,
}

const LINES: [Line; 4] = [
    Line { name: "5.10", debian: "bullseye", refusal: Some("(Linux 5.15)") },
    Line { name: "6.1", debian: "bookworm", refusal: None },
    Line { name: "6.12", debian: "trixie", refusal: None },
    Line { name: "7", debian: "testing", refusal: None },
];

const CGROUPS: [&str; 3] = ["unified", "hybrid", "legacy"];
const NO_CGROUP2: &str = "cgroup v1 only";

/// What may be chosen.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Kernels to boot: 5.10, 6.1, 6.12, 7 [default: all]
    #[arg(value_name = "KERNEL")]
    kernels: Vec<String>,
    /// Only this way of having cgroups: unified, hybrid, legacy
    #[arg(long, value_parser = CGROUPS)]
    cgroups: Option<String>,
    /// Have the processor run the guests instead of emulating them, where /dev/kvm works
    #[arg(long)]
    kvm: bool,
    /// Look for newer kernels than those in the cache
    #[arg(long)]
    renew: bool,
    /// Print the guests' consoles, too
    #[arg(long)]
    verbose: bool,
}

pub(crate) fn run_all(options: &Options) -> anyhow::Result<()> {
    if std::env::consts::ARCH != "x86_64" {
        bail!("the virtual machines are x86_64 only, because they run this machine's container engine");
    }
    let lines = chosen(&options.kernels)?;
    install::docker_engine()?;
    install::c_toolchain()?;
    install::qemu()?;
    build::daemon(false)?;
    run(cargo().args(["build", "--quiet", "--package", "metadata-proxy-tests", "--bins"]))?;
    let scratch = workspace()?.join("target/vm");
    fs::create_dir_all(&scratch).with_context(|| format!("create {}", scratch.display()))?;
    let programs = image::programs(&scratch)?;
    let initramfs = scratch.join("initramfs");

    println!("{:<26} {:<8} {:<40} {:<7} seen", "kernel", "cgroups", "test", "result");
    let mut good = true;
    for line in lines {
        let kernel = install::kernel(line.debian, line.name, options.renew)?;
        for cgroups in CGROUPS.into_iter().filter(|name| options.cgroups.as_ref().is_none_or(|only| only == name)) {
            let refusal = line.refusal.or((cgroups == "legacy").then_some(NO_CGROUP2));
            let arguments = refusal.map_or(vec!["serves", cgroups], |text| vec!["refuses", text]);
            boot::join(&[&programs, &image::kernel(&kernel, &arguments)?], &initramfs)?;
            let begin = Instant::now();
            let report = boot::boot(&kernel, cgroups, &initramfs, options.kvm)?;
            good &= report.good && !report.tests.is_empty();
            print(&kernel.release, cgroups, &report, options.verbose);
            println!("{:<26} {cgroups:<8} ran for {:.0} s", kernel.release, begin.elapsed().as_secs_f64());
        }
    }
    fs::remove_file(&initramfs).with_context(|| format!("remove {}", initramfs.display()))?;
    if !good {
        bail!("not as it should be: see above");
    }
    println!("All as it should be.");
    Ok(())
}

fn chosen(names: &[String]) -> anyhow::Result<Vec<&'static Line>> {
    if names.is_empty() {
        return Ok(LINES.iter().collect());
    }
    let find = |name: &String| LINES.iter().find(|line| line.name == name);
    let lines = names.iter().map(|name| find(name).with_context(|| format!("no kernel {name}: there are {}", known())));
    lines.collect()
}

fn known() -> String {
    LINES.map(|line| line.name).join(", ")
}

fn print(release: &str, cgroups: &str, report: &Report, verbose: bool) {
    for test in &report.tests {
        let result = if test.good { "ok" } else { "FAILED" };
        println!("{release:<26} {cgroups:<8} {:<40} {result:<7} {}", test.name, test.seen);
    }
    if verbose || !report.good || report.tests.is_empty() {
        println!("The console of {release}, cgroups {cgroups}:\n  {}", report.console.join("\n  "));
    }
}
