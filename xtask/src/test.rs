//! What shows that it works: demonstrations, tests, lints.

use std::{ffi::OsString, process::Command};

use crate::{build, cargo, host, install, run};

/// Hosts with an engine each are up at the same time; on two cores more of them only wait for each other.
const THREADS: &str = "--test-threads=2";
/// What boots a distribution and puts the package through the quick part of what happens to a host.
const BOOTED_HOST: &str = "booted-host";
const TESTS: &str = "metadata-proxy-tests";

/// A program of the tests that shows something, on a hermetic test host.
pub(crate) fn show(program: &str) -> anyhow::Result<()> {
    run(&mut shower(program)?)
}

fn shower(program: &str) -> anyhow::Result<Command> {
    install::docker_engine()?;
    let daemon = build::daemon(false)?;
    run(cargo().args(["build", "--quiet", "--package", TESTS, "--bins"]))?;
    let mut shower = Command::new(build::binary("debug", program)?);
    shower.env("METADATA_PROXY_BIN", daemon);
    Ok(shower)
}

/// Every real client, see the program of that name.
pub(crate) fn clients(names: Vec<OsString>, record: bool) -> anyhow::Result<()> {
    run(with_clients(&mut shower("clients")?)?.args(names).args(record.then_some("--record")))
}

/// For what starts the real clients.
fn with_clients(command: &mut Command) -> anyhow::Result<&mut Command> {
    command.env("METADATA_PROXY_PYTHON_CLIENTS", install::python_clients()?);
    command.env("METADATA_PROXY_JS_CLIENTS", install::js_clients()?);
    Ok(command.env("METADATA_PROXY_FURTHER_CLIENTS", install::further_clients()?))
}

/// As `show`, but optimised: only then do the figures mean something.
pub(crate) fn bench() -> anyhow::Result<()> {
    install::docker_engine()?;
    let daemon = build::daemon(true)?;
    run(cargo().args(["build", "--quiet", "--release", "--package", TESTS, "--bin", "bench"]))?;
    run(Command::new(build::binary("release", "bench")?).env("METADATA_PROXY_BIN", daemon))
}

/// A test, for the reasons that it names itself; it needs no host.
pub(crate) fn simulate_fleet() -> anyhow::Result<()> {
    build::ebpf()?;
    install::c_toolchain()?;
    run(cargo().args(["test", "--quiet", "--package", "metadata-proxy", "--lib", "--"]).args([
        "--ignored",
        "--exact",
        "--nocapture",
        "credentials::fleet::a_virtual_day",
    ]))
}

/// Run all tests, or those whose name contains the filter. The booted host is one of them, by its whole name only, because it
/// takes minutes.
pub(crate) fn all(filter: Option<&str>) -> anyhow::Result<()> {
    if filter != Some(BOOTED_HOST) {
        with_cargo(filter)?;
    }
    if filter.is_none_or(|filter| filter == BOOTED_HOST) {
        host::quickest()?;
    }
    Ok(())
}

fn with_cargo(filter: Option<&str>) -> anyhow::Result<()> {
    install::docker_engine()?;
    let daemon = build::daemon(false)?;
    // The whole workspace: unit tests stand beside their code, end-to-end tests in `tests`. The build
    // of the package's programs comes along, which the containers run.
    let mut tests = cargo();
    tests
        .args(["test", "--workspace", "--bins", "--lib", "--tests", "--no-fail-fast"])
        .args(filter)
        .args(["--", THREADS]);
    tests.env("METADATA_PROXY_BIN", daemon).env("METADATA_PROXY_CLOUD_INIT", install::cloud_init()?);
    run(with_clients(&mut tests)?)
}

pub(crate) fn lint() -> anyhow::Result<()> {
    build::ebpf()?;
    run(cargo().args(["fmt", "--all", "--check"]))?;
    run(cargo().args(["fmt", "--check", "--manifest-path", "metadata-proxy-ebpf/Cargo.toml"]))?;
    run(cargo().args(["clippy", "--quiet", "--workspace", "--all-targets", "--", "--deny", "warnings"]))
}
