//! The daemon is restarted, killed and replaced while containers keep asking: what fails, and who gets
//! whose credentials.

use std::time::Duration;

use anyhow::{Context as _, Result};
use serde::Deserialize;

use crate::{
    host::{Container, ContainerSpec, Network},
    stage::{Stage, daemon_options, role_arn},
};

const READY: Duration = Duration::from_secs(20);
/// Longer than the daemon's hold: a client of ours outwaits it, so a failure is the daemon's.
const CLIENT: &str = r#"
import http.client, json, sys, time
stop = time.monotonic() + float(sys.argv[1])
keys, errors, worst = {}, [], 0.0
while time.monotonic() < stop:
    begin = time.monotonic()
    try:
        path = "/latest/meta-data/iam/security-credentials/"
        for _ in range(2):
            connection = http.client.HTTPConnection("169.254.169.254", timeout=10)
            connection.request("GET", path, headers={"Connection": "close"})
            answer = connection.getresponse()
            body = answer.read().decode()
            connection.close()
            if answer.status != 200:
                raise Exception(f"status {answer.status} for {path}")
            path += body
        key = json.loads(body)["AccessKeyId"]
        keys[key] = keys.get(key, 0) + 1
    except Exception as error:
        errors.append(repr(error))
    worst = max(worst, time.monotonic() - begin)
print(json.dumps({"keys": keys, "errors": errors, "worst_ms": worst * 1000}))
"#;

/// What happens to the daemon.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    Nothing,
    /// SIGTERM, and another is started when it has ended.
    Restart,
    /// SIGKILL, and another is started.
    Kill,
    /// Another takes over while it runs, and it is ended then.
    Upgrade,
}

impl Event {
    pub const ALL: [Self; 4] = [Self::Nothing, Self::Restart, Self::Kill, Self::Upgrade];
}

/// What the containers saw of it.
#[derive(Debug, Default)]
pub struct Outcome {
    pub requests: usize,
    pub errors: Vec<String>,
    pub misidentified: usize,
    pub worst: Duration,
}

#[derive(Deserialize)]
struct Report {
    keys: std::collections::BTreeMap<String, usize>,
    errors: Vec<String>,
    worst_ms: f64,
}

/// Six clients in six cgroups of four network namespaces ask for as long as it takes.
pub async fn perform(stage: &mut Stage, event: Event) -> Result<Outcome> {
    let seconds = "6";
    let mut clients = Vec::new();
    for (number, network) in ["bridge", "bridge", "none", "host", "shared", "shared"].into_iter().enumerate() {
        let name = format!("{event:?}-{number}").to_lowercase();
        let network = match network {
            "none" => Network::None,
            "host" => Network::Host,
            "shared" => Network::Container(format!("{event:?}-0").to_lowercase()),
            _ => Network::Default,
        };
        let spec = ContainerSpec::on_host(&name, ["/usr/bin/python3", "-c", CLIENT, seconds])
            .network(network)
            .label("metadata-proxy.role", &role_arn(&name));
        clients.push(stage.run(spec).await?);
    }
    tokio::time::sleep(Duration::from_secs(1)).await;
    for _ in 0..2 {
        happen(stage, event).await?;
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    let mut outcome = Outcome::default();
    for client in &clients {
        collect(stage, client, &mut outcome).await?;
    }
    for client in &clients {
        client.remove().await?;
    }
    Ok(outcome)
}

async fn happen(stage: &mut Stage, event: Event) -> Result<()> {
    match event {
        Event::Nothing => {}
        Event::Restart => stage.replace_daemon(daemon_options()).await?,
        Event::Kill => {
            stage.daemon.kill().await?;
            tokio::time::sleep(Duration::from_millis(300)).await;
            stage.daemon = stage.host.daemon(daemon_options())?;
            stage.daemon.wait_ready(READY).await?;
        }
        Event::Upgrade => {
            let mut new = stage.host.daemon(daemon_options())?;
            new.wait_ready(READY).await?;
            let mut old = std::mem::replace(&mut stage.daemon, new);
            old.terminate(READY).await?;
        }
    }
    Ok(())
}

async fn collect(stage: &Stage, client: &Container, outcome: &mut Outcome) -> Result<()> {
    let output = client.wait().await?.success()?;
    let report: Report = serde_json::from_str(output.trim()).with_context(|| format!("report of {}", client.name()))?;
    for (key, count) in report.keys {
        outcome.requests += count;
        if stage.role_of(&key).as_deref() != Some(client.name()) {
            outcome.misidentified += count;
        }
    }
    outcome.requests += report.errors.len();
    outcome.errors.extend(report.errors.into_iter().map(|error| format!("{}: {error}", client.name())));
    outcome.worst = outcome.worst.max(Duration::from_secs_f64(report.worst_ms / 1000.0));
    Ok(())
}

/// Whether that is as it should be. A killed daemon takes with it the requests that it was just
/// answering, and, while the kernel closes its sockets one by one, perhaps a client's next: at most two
/// of each of the six clients, each of the two times. All later ones are held.
pub fn is_good(event: Event, outcome: &Outcome) -> bool {
    let allowed = if event == Event::Kill { 24 } else { 0 };
    outcome.misidentified == 0 && outcome.errors.len() <= allowed && outcome.requests > 100
}
