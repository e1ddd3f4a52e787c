//! What shows that it works: demonstrations, tests, lints.

use std::{ffi::OsString, process::Command};

use crate::{build, cargo, install, run};

/// Hosts with an engine each are up at the same time; on two cores more of them only wait for each other.
const THREADS: &str = "--test-threads=2";
const TESTS: &str = "metadata-proxy-tests";

/// A program of the tests that shows something, on a hermetic test host.
pub(crate) fn show(program: &str) -> anyhow::Result<()> {
    install::docker_engine()?;
    let daemon = build::daemon(false)?;
    run(cargo().args(["build", "--quiet", "--package", TESTS, "--bins"]))?;
    run(Command::new(build::binary("debug", program)?).env("METADATA_PROXY_BIN", daemon))
}

/// Every real client, see the program of that name.
pub(crate) fn clients(names: Vec<OsString>, record: bool) -> anyhow::Result<()> {
    install::docker_engine()?;
    let (python, js, further) = (install::python_clients()?, install::js_clients()?, install::further_clients()?);
    let daemon = build::daemon(false)?;
    run(cargo().args(["build", "--quiet", "--package", TESTS, "--bins"]))?;
    let mut clients = Command::new(build::binary("debug", "clients")?);
    clients.args(names).args(record.then_some("--record")).env("METADATA_PROXY_BIN", daemon);
    clients.env("METADATA_PROXY_PYTHON_CLIENTS", python).env("METADATA_PROXY_JS_CLIENTS", js);
    run(clients.env("METADATA_PROXY_FURTHER_CLIENTS", further))
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

pub(crate) fn all(filter: Option<&str>) -> anyhow::Result<()> {
    install::docker_engine()?;
    let (python, js, cloud_init) = (install::python_clients()?, install::js_clients()?, install::cloud_init()?);
    let further = install::further_clients()?;
    let daemon = build::daemon(false)?;
    // The whole workspace: unit tests stand beside their code, end-to-end tests in `tests`. The build
    // of the package's programs comes along, which the containers run.
    let mut tests = cargo();
    tests.args(["test", "--workspace", "--bins", "--lib", "--tests"]).args(filter).args(["--", THREADS]);
    tests.env("METADATA_PROXY_BIN", daemon);
    tests.env("METADATA_PROXY_PYTHON_CLIENTS", python).env("METADATA_PROXY_JS_CLIENTS", js);
    tests.env("METADATA_PROXY_CLOUD_INIT", cloud_init).env("METADATA_PROXY_FURTHER_CLIENTS", further);
    run(&mut tests)
}

pub(crate) fn lint() -> anyhow::Result<()> {
    build::ebpf()?;
    run(cargo().args(["fmt", "--all", "--check"]))?;
    run(cargo().args(["fmt", "--check", "--manifest-path", "metadata-proxy-ebpf/Cargo.toml"]))?;
    run(cargo().args(["clippy", "--quiet", "--workspace", "--all-targets", "--", "--deny", "warnings"]))
}
