//! What containers notice of a restart, a crash and an upgrade of the daemon.

use anyhow::{Result, ensure};
use metadata_proxy_tests::{
    handover::{Event, is_good, perform},
    stage::Stage,
};

async fn stays_good(event: Event) -> Result<()> {
    let mut stage = Stage::start().await?;
    let outcome = perform(&mut stage, event).await?;
    eprintln!("{event:?}: {} requests, worst {:?}, {:?}", outcome.requests, outcome.worst, outcome.errors);
    ensure!(is_good(event, &outcome), "{outcome:#?}\n{}", stage.daemon.log()?);
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_under_load_fails_no_request() -> Result<()> {
    stays_good(Event::Restart).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_crash_under_load_fails_only_what_was_being_answered() -> Result<()> {
    stays_good(Event::Kill).await
}

#[tokio::test(flavor = "multi_thread")]
async fn an_upgrade_under_load_fails_no_request() -> Result<()> {
    stays_good(Event::Upgrade).await
}
