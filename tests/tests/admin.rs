//! What the daemon says of itself: `ps`, `explain`, metrics.

use std::process::Output;

use anyhow::{Context as _, Result, ensure};
use metadata_proxy_tests::{
    host::{ContainerSpec, program},
    stage::{Stage, daemon_options, role_arn},
    sts,
};
use serde_json::Value;

const METRICS: &str = "127.0.0.1:9464";

fn ask(stage: &Stage, arguments: &[&str]) -> Result<Output> {
    let program = program()?;
    stage.command(program).args(arguments).output().context("run the command")
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&[output.stdout.as_slice(), &output.stderr].concat()).into_owned()
}

async fn scene() -> Result<Stage> {
    let stage = Stage::start_with(daemon_options().arg("--metrics-address").arg(METRICS)).await?;
    stage.sts.set_role_fault(&role_arn("forbidden"), Some(sts::Fault::Refuse));
    let asking = "wget -qO- http://169.254.169.254/latest/meta-data/iam/security-credentials/; sleep 600";
    for (name, role) in [("served", Some("web")), ("refused", Some("forbidden")), ("plain", None)] {
        let mut spec = ContainerSpec::busybox(name, ["sh", "-c", asking]);
        if let Some(role) = role {
            spec = spec.label("metadata-proxy.role", &role_arn(role));
        }
        stage.run(spec).await?;
    }
    stage.run(ContainerSpec::busybox("broken", ["sleep", "600"]).label("metadata-proxy.role", "non sense")).await?;
    // Until each has asked and has been answered.
    for _ in 0..100 {
        let seen = |status: &Value| status["requests"].as_u64() == Some(1);
        let all: Vec<Value> = serde_json::from_slice(&ask(&stage, &["ps", "--json"])?.stdout).unwrap_or_default();
        if all.len() == 4 && all.iter().filter(|status| seen(status)).count() == 3 {
            return Ok(stage);
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    anyhow::bail!("not all containers have asked: {}", text(&ask(&stage, &["ps"])?));
}

#[tokio::test(flavor = "multi_thread")]
async fn ps_and_explain_tell_every_containers_state_and_why() -> Result<()> {
    let stage = scene().await?;
    let all: Vec<Value> = serde_json::from_slice(&ask(&stage, &["ps", "--json"])?.stdout)?;
    let state = |name: &str| {
        let status = all.iter().find(|status| status["name"] == name);
        status.map(|status| status["credentials"]["state"].as_str().unwrap_or_default().to_owned())
    };
    for (name, expected) in [("served", "valid"), ("refused", "refused"), ("plain", "none"), ("broken", "none")] {
        ensure!(state(name).as_deref() == Some(expected), "{name} is {:?}, not {expected}", state(name));
    }
    let table = text(&ask(&stage, &["ps"])?);
    ensure!(table.lines().count() == 5 && table.contains("REFUSED") && table.contains("59 min"), "{table}");

    for (name, expected) in [
        (
            "served",
            &["label metadata-proxy.role", ", valid until ", "to be renewed at ", "Wget", "duration: 3600 s"][..],
        ),
        ("served", &["network      bridge, namespace net:[", "the host's user namespace", "(/", "from 127.0.0.1:"]),
        (
            "refused",
            &["label metadata-proxy.role", "AccessDenied", "trust policy", "next try when a client asks after "],
        ),
        (
            "plain",
            &["neither a label nor the environment", "role         none", "Wget", "remedy       to give it a role"],
        ),
        ("plain", &["label metadata-proxy.role: not there", "environment variable IAM_PROFILE: not there"]),
        ("broken", &["\"non sense\" is not an IAM role", "role         none", "none yet", "remedy       correct"]),
        ("broken", &["looked at    label metadata-proxy.role: non sense"]),
    ] {
        let explained = text(&ask(&stage, &["explain", name])?);
        for part in expected {
            ensure!(explained.contains(part), "{name}: no {part:?} in:\n{explained}");
        }
    }
    let nobody = ask(&stage, &["explain", "nobody"])?;
    ensure!(nobody.status.code() == Some(1) && text(&nobody).contains("metadata-proxy ps"), "{nobody:?}");

    // What was handed out is shown nowhere.
    let shown = format!("{table}{all:?}");
    for call in stage.sts.calls() {
        if let sts::Outcome::Issued(key) = call.outcome {
            let issued = stage.sts.issued(&key).context("issued")?;
            ensure!(!shown.contains(&issued.secret_key) && !shown.contains(&issued.session_token), "a secret is shown");
        }
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_are_served_where_asked_and_nothing_else_is() -> Result<()> {
    let stage = scene().await?;
    let fetch = |path: &str| -> Result<String> {
        let url = format!("http://{METRICS}{path}");
        Ok(text(&stage.command("timeout").args(["5", "busybox", "wget", "-qO-", &url]).output()?))
    };
    let metrics = fetch("/metrics")?;
    for line in [
        "metadata_proxy_requests_total{caller=\"container\",status=\"200\"} 1",
        "metadata_proxy_requests_total{caller=\"container\",status=\"404\"} 2",
        "metadata_proxy_containers 4",
        "metadata_proxy_bpf_redirected_total 3",
        "metadata_proxy_bpf_unknown_total 0",
    ] {
        ensure!(metrics.lines().any(|found| found == line), "no {line:?} in:\n{metrics}");
    }
    ensure!(fetch("/healthz")? == "ok\n", "not healthy");
    ensure!(fetch("/containers")?.contains("404"), "containers are told to the network");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn nobody_but_root_is_answered_at_the_admin_socket() -> Result<()> {
    let stage = Stage::start().await?;
    let socket = "/run/metadata-proxy/admin.sock";
    let open = stage.command("chmod").args(["-R", "a+rwx", "/run/metadata-proxy"]).status()?;
    ensure!(open.success(), "chmod");
    let script = format!(
        "import socket; s = socket.socket(socket.AF_UNIX); s.connect('{socket}'); \
         s.send(b'GET /containers HTTP/1.1\\r\\nHost: x\\r\\n\\r\\n'); print(len(s.recv(100)))"
    );
    let ask = |uid: &str| -> Result<String> {
        let user = ["--reuid", uid, "--clear-groups", "/usr/bin/python3", "-c", &script];
        Ok(text(&stage.command("setpriv").args(user).output()?))
    };
    ensure!(ask("0")?.trim() == "100", "root is not answered: {}", ask("0")?);
    let nobody = ask("65534")?;
    ensure!(nobody.trim() == "0" || nobody.contains("ConnectionReset") || nobody.contains("BrokenPipe"), "{nobody}");
    Ok(())
}
