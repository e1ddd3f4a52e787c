//! What is handed out is recorded, and its secrets are shown and kept nowhere but in the answer.

use std::{
    fs,
    os::unix::{fs::PermissionsExt as _, process::ExitStatusExt as _},
    path::{Path, PathBuf},
    process::Command,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use metadata_proxy_tests::{
    bpf,
    host::{Container, ContainerSpec, DaemonOptions, TestHost, program},
    stage::{Stage, daemon_options, role_arn},
    sts::{BASE_SECRET_KEY, Outcome},
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tokio::time::sleep;

const PATH: &str = "/latest/meta-data/iam/security-credentials/web";

async fn stage_with_audit(options: DaemonOptions) -> Result<(Stage, PathBuf)> {
    let host = TestHost::start().await?;
    let file = host.directory().join("audit.log");
    let options = options.arg("--audit-log").arg(file.display().to_string());
    Ok((Stage::on(host, options).await?, file))
}

async fn web(stage: &Stage) -> Result<Container> {
    let spec = ContainerSpec::resident("web");
    stage.run(spec.label("metadata-proxy.role", &role_arn("web"))).await
}

/// The document, once it is there.
async fn hand_out(container: &Container) -> Result<String> {
    let url = format!("http://169.254.169.254{PATH}");
    let curl = ["/usr/bin/curl", "-sS", "--fail", "--retry", "5", "--max-time", "20", &url];
    container.exec(curl).await?.success()
}

fn records(file: &Path) -> Result<Vec<Value>> {
    let text = fs::read_to_string(file).with_context(|| format!("reading {}", file.display()))?;
    text.lines().map(|line| serde_json::from_str(line).with_context(|| line.to_owned())).collect()
}

async fn records_reach(file: &Path, count: usize) -> Result<Vec<Value>> {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        let records = records(file).unwrap_or_default();
        if records.len() >= count {
            return Ok(records);
        }
        ensure!(Instant::now() < deadline, "{} records instead of {count}: {records:#?}", records.len());
        sleep(Duration::from_millis(20)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn each_hand_out_is_a_record_and_the_file_can_be_rotated() -> Result<()> {
    let (mut stage, file) = stage_with_audit(daemon_options()).await?;
    let web = web(&stage).await?;
    let document: Value = serde_json::from_str(&hand_out(&web).await?)?;
    // No hand-outs: the list, and what is not there.
    for path in ["iam/security-credentials/", "iam/info", "iam/security-credentials/other"] {
        web.exec(["/usr/bin/curl", "-s", &format!("http://169.254.169.254/latest/meta-data/{path}")]).await?;
    }
    let mode = fs::metadata(&file)?.permissions().mode() & 0o777;
    ensure!(mode == 0o600, "mode {mode:o}");

    let moved = file.with_extension("1");
    fs::rename(&file, &moved)?;
    let pid = Pid::from_raw(stage.daemon.pid().try_into()?).context("no process id")?;
    kill_process(pid, Signal::HUP)?;
    stage.daemon.wait_for("reloaded", Duration::from_secs(20), |log| log.contains("reloaded")).await?;
    hand_out(&web).await?;
    let [after] = records_reach(&file, 1).await?.try_into().map_err(|all| anyhow::anyhow!("{all:#?}"))?;
    let [before] = records(&moved)?.try_into().map_err(|all| anyhow::anyhow!("{all:#?}"))?;

    let key = document["AccessKeyId"].as_str().context("no key")?;
    let issued = stage.sts.issued(key).context("a key from nowhere")?;
    for (field, expected) in [
        ("container_id", web.id()),
        ("container_name", "web"),
        ("image", "mp/host"),
        ("role_arn", &role_arn("web")),
        ("session_name", &issued.session_name),
        ("access_key_id", key),
        ("path", PATH),
    ] {
        for record in [&before, &after] {
            ensure!(record[field] == expected, "{field}: {record:#}");
        }
    }
    // The document has whole seconds.
    ensure!(
        before["expiration"].as_str().map(|end| end.trim_end_matches('Z'))
            == document["Expiration"].as_str().map(|end| end.trim_end_matches('Z')),
        "{before:#} {document:#}"
    );
    let (first, second) = (before["time"].as_str().context("no time")?, after["time"].as_str().context("no time")?);
    ensure!(first.parse::<jiff::Timestamp>()? < second.parse()?, "{first} {second}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_disk_costs_records_and_no_answers() -> Result<()> {
    let host = TestHost::start().await?;
    let mut stage = Stage::on(host, daemon_options().arg("--audit-log").arg("/dev/full")).await?;
    let web = web(&stage).await?;
    for _ in 0..3 {
        hand_out(&web).await?;
    }
    let warned = "cannot write to the audit log";
    stage.daemon.wait_for(warned, Duration::from_secs(20), |log| log.contains(warned)).await?;
    ensure!(stage.daemon.log()?.matches(warned).count() == 1, "it repeats itself");
    let lost = "metadata_proxy_audit_records_lost_total 3";
    ensure!(metrics(&stage)?.contains(lost), "{}", metrics(&stage)?);
    Ok(())
}

fn metrics(stage: &Stage) -> Result<String> {
    let socket = "/run/metadata-proxy/admin.sock";
    let curl = ["-s", "--unix-socket", socket, "http://admin/metrics"];
    Ok(String::from_utf8(stage.command("curl").args(curl).output()?.stdout)?)
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_are_in_the_answer_and_nowhere_else() -> Result<()> {
    // Everything that the libraries say at debug level, too.
    let options = daemon_options().env("METADATA_PROXY_LOG", "trace");
    let (stage, audit) = stage_with_audit(options).await?;
    let web = web(&stage).await?;
    let answer = hand_out(&web).await?;
    stage.sts.set_role_fault(&role_arn("refused"), Some(metadata_proxy_tests::sts::Fault::Refuse));
    let spec = ContainerSpec::resident("refused");
    stage.run(spec.label("metadata-proxy.role", &role_arn("refused"))).await?;
    let key = serde_json::from_str::<Value>(&answer)?["AccessKeyId"].as_str().context("no key")?.to_owned();
    let issued = stage.sts.issued(&key).context("a key from nowhere")?;
    let keys = stage.sts.calls().into_iter().filter_map(|call| match call.outcome {
        Outcome::Issued(key) => stage.sts.issued(&key),
        _ => None,
    });
    let mut secrets = vec![BASE_SECRET_KEY.to_owned()];
    secrets.extend(keys.flat_map(|issued| [issued.secret_key, issued.session_token]));
    let found = |bytes: &[u8]| secrets.iter().any(|secret| finds(bytes, secret.as_bytes()));
    // The search does find them: where they belong, as bytes and as they would be in JSON or Debug.
    ensure!(finds(answer.as_bytes(), issued.secret_key.as_bytes()) && found(answer.as_bytes()), "{answer}");

    records_reach(&audit, 1).await?;
    let program = program()?;
    let ask = |arguments: &[&str]| -> Result<Vec<u8>> {
        let output = stage.command(&program).args(arguments).output()?;
        Ok([output.stdout, output.stderr].concat())
    };
    let outputs = [
        ("standard output and error", stage.daemon.log()?.into_bytes()),
        ("the audit log", fs::read(&audit)?),
        ("ps", ask(&["ps"])?),
        ("ps --json", ask(&["ps", "--json"])?),
        ("explain web", ask(&["explain", "web"])?),
        ("explain refused", ask(&["explain", "refused"])?),
        ("metrics", metrics(&stage)?.into_bytes()),
    ];
    for (name, output) in &outputs {
        ensure!(!output.is_empty() && !found(output), "a secret in {name}: {}", String::from_utf8_lossy(output));
    }
    // The right ones were looked at.
    for (name, output) in &outputs[..2] {
        ensure!(finds(output, key.as_bytes()), "{name} does not tell of the hand-out");
    }

    // With a connection of which the kernel knows something at both ends.
    let spec = ContainerSpec::on_host("open", ["/usr/bin/python3", "-c", ONE_CONNECTION]);
    let open = stage.run(spec.label("metadata-proxy.role", &role_arn("web"))).await?;
    let deadline = Instant::now() + Duration::from_secs(10);
    while open.output().await?.0.is_empty() {
        ensure!(Instant::now() < deadline, "no answer: {:?}", open.output().await?);
        sleep(Duration::from_millis(20)).await;
    }
    let maps = bpf::dump_maps(&stage, &[stage.daemon.pid(), open.pid().await?])?;
    let names = [
        "SETTINGS",
        "CGROUPS",
        "NESTED",
        "HOSTS",
        "LISTENERS",
        "OURS",
        "CLIENTS",
        "ACCEPTED",
        "FLOWS",
        "WANTED",
        "COUNTERS",
    ];
    for name in names {
        let (_, content) = maps.iter().find(|(map, _)| map == name).with_context(|| format!("no map {name}"))?;
        // Flows are gone once they are accepted, listeners that are opened ahead are not wanted, and no container
        // makes cgroups.
        ensure!(
            ["FLOWS", "WANTED", "NESTED"].contains(&name) || content.iter().any(|byte| *byte != 0),
            "nothing in the map {name}"
        );
        ensure!(!found(content), "a secret in the BPF map {name}");
    }
    ensure!(maps.len() == names.len(), "more maps: {:?}", maps.iter().map(|(name, _)| name).collect::<Vec<_>>());
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_leaves_no_core_dump() -> Result<()> {
    let mut stage = Stage::start().await?;
    let aborted = |pid: u32| -> Result<()> {
        let status = stage.command("prlimit").args(["--pid", &pid.to_string(), "--core=unlimited"]).status()?;
        ensure!(status.success(), "prlimit");
        Ok(kill_process(Pid::from_raw(pid.try_into()?).context("no process id")?, Signal::ABORT)?)
    };
    // This host does dump those who do not mind.
    let mut other = Command::new("sleep").arg("600").current_dir(stage.directory()).spawn()?;
    aborted(other.id())?;
    ensure!(other.wait()?.core_dumped(), "nobody's core is dumped here (/proc/sys/kernel/core_pattern)");

    aborted(stage.daemon.pid())?;
    let status = stage.daemon.wait(Duration::from_secs(10)).await?;
    ensure!(status.signal() == Some(Signal::ABORT.as_raw()) && !status.core_dumped(), "{status}");
    Ok(())
}

const ONE_CONNECTION: &str = r#"
import http.client, time
connection = http.client.HTTPConnection("169.254.169.254", timeout=10)
while True:
    connection.request("GET", "/latest/meta-data/iam/security-credentials/web")
    connection.getresponse().read()
    print("answered", flush=True)
    time.sleep(0.2)
"#;

fn finds(haystack: &[u8], needle: &[u8]) -> bool {
    haystack.windows(needle.len()).any(|window| window == needle)
}
