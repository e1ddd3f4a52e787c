//! The main job, to be seen: containers on every kind of network, each asking with a real AWS client
//! and getting its own role. AWS itself is simulated.
#![expect(clippy::print_stdout, reason = "what it shows is its standard output")]

use std::{process::ExitCode, time::Instant};

use anyhow::Result;
use metadata_proxy_tests::{
    clients::{Client, ClientReport, Programs},
    host::{ContainerSpec, Network},
    stage::{self, STS_ENDPOINT, Stage, client_spec, role_arn},
};

/// One container of the demonstration.
struct Act {
    name: &'static str,
    network: Network,
    /// What the table calls it.
    place: &'static str,
    role: Option<&'static str>,
}

#[tokio::main]
async fn main() -> Result<ExitCode> {
    let begin = Instant::now();
    println!("Setting up a hermetic host: no uplink, its own container engine, SIMULATED STS and metadata service.");
    let stage = Stage::start().await?;
    println!("The daemon is ready after {:.1} s.\n", begin.elapsed().as_secs_f64());

    let custom = stage.create_network("demo-net", false).await?;
    let internal = stage.create_network("demo-internal", true).await?;
    // Two containers with different roles in one network namespace: the addresses are the same.
    let pod = stage.run(ContainerSpec::busybox("pod", ["sleep", "600"])).await?;
    let shared = Network::Container(pod.name().to_owned());
    let acts = [
        Act { name: "web", network: Network::Default, place: "bridge", role: Some("web") },
        Act { name: "api", network: custom, place: "user-defined", role: Some("api") },
        Act { name: "batch", network: internal, place: "internal", role: Some("batch") },
        Act { name: "agent", network: Network::Host, place: "host", role: Some("agent") },
        Act { name: "sealed", network: Network::None, place: "none", role: Some("sealed") },
        Act { name: "main", network: shared.clone(), place: "container:pod", role: Some("main") },
        Act { name: "sidecar", network: shared, place: "container:pod", role: Some("sidecar") },
        Act { name: "plain", network: Network::Default, place: "bridge", role: None },
    ];

    // Only this client is shown, so nothing but it has to be installed.
    let programs = Programs { aws_config: stage::aws_config_client()?, ..Programs::default() };
    println!(
        "{:<9} {:<14} {:<10} {:<22} {:<38} {:>8} {:>8}",
        "container", "network", "role asked", "access key", "GetCallerIdentity", "1st", "2nd"
    );
    let mut good = true;
    for act in acts {
        good &= perform(&stage, &programs, act).await?;
    }

    let leaked = stage.imds.credential_requests();
    println!("\nThe simulated real metadata service was asked for credentials {} times (expected 0).", leaked.len());
    for request in &leaked {
        println!("  LEAK: {} {}", request.method, request.target);
    }
    good &= leaked.is_empty() & host_keeps_the_service(&stage)?;
    println!("{}", if good { "All as it should be." } else { "NOT as it should be: see above." });
    if !good {
        println!("The daemon's log:\n{}", stage.daemon.log()?);
    }
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs one container and prints its line; whether it got what it should.
async fn perform(stage: &Stage, programs: &Programs, act: Act) -> Result<bool> {
    let reaches_sts = act.network != Network::None;
    let sts = reaches_sts.then_some(STS_ENDPOINT);
    let mut spec = client_spec(act.name, Client::AWS_CONFIG, programs, 2, sts).network(act.network);
    if let Some(role) = act.role {
        spec = spec.label("metadata-proxy.role", &role_arn(role));
    }
    let report = stage::report(stage, spec).await?;
    let key = report.access_keys().next().unwrap_or("none").to_owned();
    let identity = match &report.identity {
        Some(arn) => arn.clone(),
        // From a container without any route nobody reaches STS; who issued the key knows.
        None => stage.sts.identity_of(&key).unwrap_or_default(),
    };
    let short = identity.split_once("assumed-role/").map_or("-", |(_, name)| name);
    let good = as_it_should_be(&report, act.role, short);
    let ms = |attempt: usize| report.attempts.get(attempt).map_or_else(String::new, |a| format!("{:.0} ms", a.ms));
    println!(
        "{:<9} {:<14} {:<10} {:<22} {:<38} {:>8} {:>8}{}",
        act.name,
        act.place,
        act.role.unwrap_or("-"),
        key,
        if reaches_sts || act.role.is_none() { short.to_owned() } else { format!("{short} (*)") },
        ms(0),
        ms(1),
        if good { "" } else { "   WRONG" }
    );
    Ok(good)
}

fn as_it_should_be(report: &ClientReport, role: Option<&str>, identity: &str) -> bool {
    match role {
        Some(role) => {
            report.errors().next().is_none()
                && report.access_keys().count() == 2
                && identity.split('/').next() == Some(role)
        }
        None => report.access_keys().next().is_none(),
    }
}

/// The host's own processes are not our business.
fn host_keeps_the_service(stage: &Stage) -> Result<bool> {
    let url = "http://169.254.169.254/latest/meta-data/iam/security-credentials/";
    let output = stage.command("timeout").args(["5", "busybox", "wget", "-qO-", url]).output()?;
    let role = String::from_utf8_lossy(&output.stdout).trim().to_owned();
    println!("A host process still reaches the real one: its role list says {role:?}.");
    println!("(*) has no route to STS; the identity is what STS recorded for the key.");
    Ok(role == metadata_proxy_tests::imds::HOST_ROLE)
}
