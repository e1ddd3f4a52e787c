//! What the daemon says of itself: `ps`, `explain`, metrics.

use std::process::Output;

use anyhow::{Context as _, Result, ensure};
use metadata_proxy_tests::{
    host::{ContainerSpec, TestHost, program},
    stage::{Stage, daemon_options, image_with_a_role, of_image, role_arn, start_imds, start_sts, with_config},
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
        ("refused", &["label metadata-proxy.role", "AccessDenied", "trust policy", "next try when a client asks"]),
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

const POLICY: &str = r#"
unmatched = "allow"

[exempt]
containers = ["exempt"]

[[rule]]
name = "banned"
deny = true

[[rule]]
name = "agent"
allow = ["@instance"]

[[rule]]
name = "given"
default-role = "arn:aws:iam::123456789012:role/given"
"#;

/// As `ps --json` has it, as soon as it is so.
async fn state(stage: &Stage, name: &str, expected: [&str; 2]) -> Result<Value> {
    for _ in 0..200 {
        let all: Vec<Value> = serde_json::from_slice(&ask(stage, &["ps", "--json"])?.stdout)?;
        let found = all.into_iter().find(|status| status["name"] == name);
        if let Some(status) = found
            && [&status["verdict"], &status["credentials"]["state"]] == expected
        {
            return Ok(status);
        }
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    anyhow::bail!("{name} is not {expected:?}:\n{}", text(&ask(stage, &["explain", name])?))
}

#[tokio::test(flavor = "multi_thread")]
async fn every_kind_of_refusal_is_told_apart() -> Result<()> {
    const ROLE: &str = "metadata-proxy.role";
    let host = TestHost::start().await?;
    let image = image_with_a_role(&host, "mp/greedy", "admin").await?;
    let (imds, sts) = (start_imds(&host)?, start_sts(&host)?);
    // Nobody tells the daemon its account yet.
    sts.stop_listening()?;
    sts.set_role_fault(&role_arn("forbidden"), Some(sts::Fault::Refuse));
    let mut daemon = host.daemon(with_config(&host, daemon_options(), POLICY)?)?;
    daemon.wait_ready(std::time::Duration::from_secs(20)).await?;
    let stage = Stage { daemon, sts, imds, host };

    let evil = "{x}\nrole         admin\u{1b}[1A";
    for (name, labels) in [
        ("banned", &[(ROLE, "web")][..]),
        ("option", &[(ROLE, "web"), ("metadata-proxy.duration", "1s")]),
        ("empty", &[(ROLE, "web"), ("metadata-proxy.policy", "")]),
        ("agent", &[(ROLE, "@instance")]),
        ("exempt", &[(ROLE, "web")]),
        ("pending", &[(ROLE, "team/later")]),
        ("given", &[]),
        ("forbidden", &[(ROLE, &role_arn("forbidden"))]),
        ("plain", &[]),
        ("evil", &[(ROLE, "web"), ("metadata-proxy.session-name", evil)]),
    ] {
        let spec = ContainerSpec::resident(name);
        stage.run(labels.iter().fold(spec, |spec, (label, value)| spec.label(label, value))).await?;
    }
    stage.run(of_image(&image, "image")).await?;

    state(&stage, "pending", ["pending", "none"]).await?;
    let told = |name: &str, words: &[&str]| -> Result<()> {
        let explained = text(&ask(&stage, &["explain", name])?);
        for part in words {
            ensure!(explained.contains(part), "{name}: no {part:?} in:\n{explained}");
        }
        let lines: Vec<_> = explained.lines().filter(|line| line.starts_with("role  ")).collect();
        ensure!(lines.len() == 1 && !explained.contains('\u{1b}'), "{name}: {lines:?}");
        ensure!(!explained.contains("AKIAOFITSOWN"), "a value of the environment");
        Ok(())
    };
    told(
        "pending",
        &["role         later, in an account that is not known yet", "none yet: AWS has not told", "remedy       see"],
    )?;
    let table = text(&ask(&stage, &["ps"])?);
    let row = |table: &str, name: &str| -> Vec<String> {
        let rows = table.lines().map(|line| line.split_whitespace().map(str::to_owned).collect::<Vec<_>>());
        rows.into_iter().find(|row| row.get(1).is_some_and(|found| found == name)).unwrap_or_default()
    };
    ensure!(row(&table, "pending")[4..7] == ["later", ROLE, "PENDING"], "{table}");

    stage.sts.listen_again()?;
    for (name, expected, role, source, shown, words) in [
        (
            "banned",
            ["refused", "none"],
            "-",
            "-",
            "REFUSED",
            &["the rule denies it any role", "role         none: refused", "its role is refused"][..],
        ),
        (
            "option",
            ["refused", "none"],
            "-",
            "-",
            "REFUSED",
            &["label metadata-proxy.duration \"1s\"", "role         none: refused", "remedy       correct"],
        ),
        (
            "empty",
            ["refused", "none"],
            "-",
            "-",
            "REFUSED",
            &["label metadata-proxy.policy \"\": expected a value", "label metadata-proxy.policy: empty"],
        ),
        (
            "agent",
            ["instance", "none"],
            "@instance",
            ROLE,
            "the",
            &["role         @instance: it has the real service", "credentials  the host's own"],
        ),
        (
            "exempt",
            ["instance", "none"],
            "@instance",
            "[exempt]",
            "the",
            &["exempt by its name", "role         @instance: it has the real service"],
        ),
        (
            "pending",
            ["role", "valid"],
            "team/later",
            ROLE,
            "59",
            &["role         arn:aws:iam::111122223333:role/team/later", "named by     label metadata-proxy.role"],
        ),
        ("given", ["role", "valid"], "given", "default-role", "of", &["named by     default-role of the rule"]),
        (
            "forbidden",
            ["role", "refused"],
            "forbidden",
            ROLE,
            "REFUSED",
            &["AccessDenied", "must allow sts:AssumeRole to arn:aws:iam::111122223333:user/metadata-proxy"],
        ),
        ("plain", ["no-role", "none"], "-", "-", "-", &["role         none\n", "none: the container has no role"]),
        (
            "image",
            ["no-role", "none"],
            "-",
            "-",
            "-",
            &["label metadata-proxy.role: from the image, does not count", "role         none\n"],
        ),
        ("evil", ["refused", "none"], "-", "-", "REFUSED", &["there is no {x}", "\\nrole         admin\\u{1b}[1A"]),
    ] {
        state(&stage, name, expected).await?;
        told(name, words)?;
        let table = text(&ask(&stage, &["ps"])?);
        ensure!(row(&table, name).get(4..7) == Some(&[role, source, shown].map(str::to_owned)), "{name} in:\n{table}");
    }
    let table = text(&ask(&stage, &["ps"])?);
    ensure!(table.lines().count() == 12 && !table.contains('\u{1b}'), "{table}");
    let log = stage.daemon.log()?;
    ensure!(log.contains("there is no {x}") && !log.lines().any(|line| line.starts_with("role  ")), "{log}");

    // Every id begins so.
    let unclear = ask(&stage, &["explain", ""])?;
    ensure!(unclear.status.code() == Some(1) && text(&unclear).contains("which container?"), "{unclear:?}");
    let first = state(&stage, "plain", ["no-role", "none"]).await?;
    let (id, prefix) = (first["id"].as_str().context("id")?, &first["id"].as_str().context("id")?[..12]);
    for given in [id, prefix, "plain"] {
        ensure!(text(&ask(&stage, &["explain", given])?).starts_with("container    plain ("), "{given}");
    }
    let own = ContainerSpec::resident("own").label(ROLE, "web").env("AWS_ACCESS_KEY_ID", "AKIAOFITSOWN");
    stage.run(own.env("AWS_EC2_METADATA_DISABLED", "true")).await?;
    told(
        "own",
        &["conflict     environment variable AWS_ACCESS_KEY_ID: ", "AWS_EC2_METADATA_DISABLED: SDKs do not ask"],
    )?;
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
        "metadata_proxy_bpf_nested 0",
        "metadata_proxy_listeners_evicted_total 0",
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

#[tokio::test(flavor = "multi_thread")]
async fn what_no_engine_has_told_of_is_shown_and_explained() -> Result<()> {
    const ASK: &str = "curl -s -m 5 http://169.254.169.254/latest/meta-data/iam/security-credentials/";
    let stage = Stage::start().await?;
    let web = stage.run(ContainerSpec::resident("web").label("metadata-proxy.role", &role_arn("web"))).await?;
    let mut sandbox = stage.command("unshare");
    sandbox.args(["--pid", "--fork", "--kill-child", "--mount-proc", "sh", "-c", &format!("{ASK}; exec sleep 600")]);
    let mut sandbox = sandbox.spawn()?;
    let mut host = stage.command("sleep").arg("600").spawn()?;
    let explain = |what: &str| -> Result<String> { Ok(text(&ask(&stage, &["explain", what])?)) };
    let begin = std::time::Instant::now();
    let (table, row) = loop {
        let table = text(&ask(&stage, &["ps", "--all"])?);
        let row = table.lines().find(|line| line.contains("pid ")).map(str::to_owned);
        if let Some(row) = row {
            break (table, row);
        }
        ensure!(begin.elapsed() < std::time::Duration::from_secs(10), "{table}");
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    };
    let words: Vec<_> = row.split_whitespace().collect();
    ensure!(words[2..5] == ["curl", "pid", "1"] && row.ends_with("/host"), "{table}");
    let told: Vec<Value> = serde_json::from_slice(&ask(&stage, &["ps", "--all", "--json"])?.stdout)?;
    ensure!(told.len() == 1 && told[0]["cgroup"].as_u64() == words[0].parse().ok(), "{told:?}");

    let of_cgroup = explain(&format!("cgroup:{}", words[0]))?;
    for part in ["pid of its own", "asked        1 times", "role         none", "--exempt-cgroup /"] {
        ensure!(of_cgroup.contains(part), "no {part:?} in:\n{of_cgroup}");
    }
    // The same cgroup, and none of its namespaces.
    let of_web = explain(&format!("pid:{}", web.pid().await?))?;
    ensure!(of_web.contains("container    web") && of_web.contains("role/web"), "{of_web}");
    let failed = ask(&stage, &["explain", "pid:4194304"])?;
    ensure!(!failed.status.success() && String::from_utf8_lossy(&failed.stderr).contains("no process"), "{failed:?}");
    let failed = ask(&stage, &["explain", "cgroup:1"])?;
    ensure!(String::from_utf8_lossy(&failed.stderr).contains("ps --all"), "{failed:?}");
    let failed = ask(&stage, &["explain", "cgroup:x"])?;
    ensure!(String::from_utf8_lossy(&failed.stderr).contains("a number"), "{failed:?}");
    for child in [&mut sandbox, &mut host] {
        child.kill()?;
        child.wait()?;
    }
    stage.assert_no_leak()
}
