//! What systemd is told: that the programs are attached, and that the daemon is alive.

use std::{convert::Infallible, future::pending, time::Duration};

use anyhow::Context as _;
use sd_notify::NotifyState;
use tokio::time::{interval, timeout};
use tracing::{debug, warn};

use crate::netns;

/// Of the time that the unit gives (`WatchdogSec`), for a sign of life may come late.
const SHARE: u32 = 3;

/// Containers may be started.
pub(super) fn ready() {
    if let Err(error) = sd_notify::notify(&[NotifyState::Ready]) {
        warn!("cannot tell systemd that the programs are attached: {error}");
    }
}

/// Gives signs of life for as long as the runtime and the thread that works in namespaces both do their work; without
/// one systemd replaces the daemon.
pub(super) async fn watch(worker: netns::Worker) -> anyhow::Result<Infallible> {
    let Some(patience) = sd_notify::watchdog_enabled() else {
        return pending().await;
    };
    let mut signs = interval((patience / SHARE).max(Duration::from_millis(1)));
    loop {
        signs.tick().await;
        match timeout(patience, worker.run_in(None, || ())).await {
            Ok(worked) => worked?,
            Err(_) => return Err(anyhow::anyhow!("the netns thread hangs")).context("not alive"),
        }
        if let Err(error) = sd_notify::notify(&[NotifyState::Watchdog]) {
            debug!("cannot tell systemd that the daemon is alive: {error}");
        }
    }
}
