//! `cargo xtask handover`: what containers notice of a restart, a crash and an upgrade of the daemon.
#![expect(clippy::print_stdout, reason = "what it shows is its standard output")]

use std::process::ExitCode;

use anyhow::Result;
use metadata_proxy_tests::{
    handover::{Event, is_good, perform},
    stage::Stage,
};

#[tokio::main]
async fn main() -> Result<ExitCode> {
    let mut stage = Stage::start().await?;
    let mut good = true;
    println!("{:<9} {:>9} {:>7} {:>14} {:>10}", "event", "requests", "failed", "misidentified", "worst");
    for event in Event::ALL {
        let outcome = perform(&mut stage, event).await?;
        let as_expected = is_good(event, &outcome);
        println!(
            "{:<9} {:>9} {:>7} {:>14} {:>7} ms{}",
            format!("{event:?}").to_lowercase(),
            outcome.requests,
            outcome.errors.len(),
            outcome.misidentified,
            outcome.worst.as_millis(),
            if as_expected { "" } else { "   WRONG" }
        );
        for error in outcome.errors.iter().take(20) {
            println!("    {error}");
        }
        good &= as_expected;
    }
    let leaked = stage.imds.credential_requests().len();
    println!("the simulated real service was asked for credentials {leaked} times (expected 0)");
    Ok(if good && leaked == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
