//! Coverage-guided fuzzing: every target of `metadata-proxy/fuzz` for a time.

#![expect(clippy::print_stdout, reason = "the table is its standard output")]

use std::{
    fs,
    path::Path,
    process::{Command, Stdio},
};

use anyhow::{Context as _, bail};

use crate::{build, forget_ourselves, install, run};

const CRATE: &str = "metadata-proxy/fuzz";
/// Apart from the other builds: all of it carries the counters of the fuzzer.
const TARGET_DIR: &str = "target/fuzz";
const COMMON: [&str; 7] = [
    "--fuzz-dir",
    CRATE,
    // The address sanitizer is nightly's, and unsafe code is none here.
    "--sanitizer=none",
    "--codegen-units=16",
    "--features=libfuzzer",
    "--target-dir",
    TARGET_DIR,
];

#[derive(clap::Args)]
pub(crate) struct Options {
    /// For each target
    #[arg(long, default_value_t = 60)]
    seconds: u32,
    /// These targets only
    targets: Vec<String>,
}

pub(crate) fn all(options: &Options) -> anyhow::Result<()> {
    install::cpp_toolchain()?;
    let fuzzer = install::cargo_fuzz()?;
    build::ebpf()?;
    let mut names = targets()?;
    if let Some(unknown) = options.targets.iter().find(|target| !names.contains(target)) {
        bail!("there is no target {unknown:?}, only {}", names.join(", "));
    }
    names.retain(|name| options.targets.is_empty() || options.targets.contains(name));
    eprintln!("compiling the daemon with the fuzzer's counters, which takes some minutes once");
    run(&mut cargo_fuzz(&fuzzer, "build"))?;
    println!("{:<10} {:>8} {:>14} {:>10} {:>10}", "target", "seconds", "inputs tried", "coverage", "kept");
    for name in &names {
        let tried = one(&fuzzer, name, options.seconds)?;
        println!("{name:<10} {:>8} {:>14} {:>10} {:>10}", options.seconds, tried.inputs, tried.coverage, tried.kept);
    }
    Ok(())
}

/// As the crate's folder has them.
fn targets() -> anyhow::Result<Vec<String>> {
    let folder = Path::new(CRATE).join("fuzz_targets");
    let files = fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))?;
    let mut names: Vec<String> =
        files.flatten().filter_map(|file| file.path().file_stem()?.to_str().map(str::to_owned)).collect();
    names.sort_unstable();
    Ok(names)
}

fn cargo_fuzz(fuzzer: &Path, subcommand: &str) -> Command {
    let mut command = Command::new(fuzzer);
    command.args(["fuzz", subcommand]).args(COMMON);
    // The program is started often and optimised by others: what counts is to have it soon.
    command.envs([("CARGO_PROFILE_RELEASE_LTO", "off"), ("CARGO_PROFILE_RELEASE_OPT_LEVEL", "1")]);
    command.env_remove("CARGO_TARGET_DIR");
    forget_ourselves(&mut command);
    command
}

struct Tried {
    inputs: u64,
    coverage: String,
    kept: String,
}

/// New inputs that reach more code are kept below `target`; those in the repository are a beginning.
fn one(fuzzer: &Path, name: &str, seconds: u32) -> anyhow::Result<Tried> {
    let found = format!("{TARGET_DIR}/corpus/{name}");
    fs::create_dir_all(&found).with_context(|| format!("create {found}"))?;
    let mut fuzz = cargo_fuzz(fuzzer, "run");
    fuzz.args([name, &found, &format!("{CRATE}/corpus/{name}"), "--"]);
    fuzz.args([&format!("-max_total_time={seconds}"), "-print_final_stats=1", "-max_len=16384", "-timeout=10"]);
    let output = fuzz.stdout(Stdio::null()).output().with_context(|| format!("cannot run {}", fuzzer.display()))?;
    let log = String::from_utf8_lossy(&output.stderr);
    if !output.status.success() {
        let from = log.find("panicked at").or_else(|| log.find("ERROR: libFuzzer")).unwrap_or_default();
        bail!("{name}: {}\n{}", output.status, &log[from..]);
    }
    let last = log.lines().rfind(|line| line.contains(" cov: ")).unwrap_or_default();
    let after =
        |word: &str| last.split_once(word).and_then(|(_, rest)| rest.split(' ').next()).unwrap_or("?").to_owned();
    let inputs = log.lines().find_map(|line| line.strip_prefix("stat::number_of_executed_units:"));
    let inputs = inputs.and_then(|count| count.trim().parse().ok());
    let inputs = inputs.with_context(|| format!("{name}: the fuzzer does not say how many inputs it tried:\n{log}"))?;
    Ok(Tried { inputs, coverage: after(" cov: "), kept: after(" corp: ") })
}
