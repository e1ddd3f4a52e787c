//! Nothing gets around the interception, but for what SECURITY.md names.

use anyhow::{Result, ensure};
use metadata_proxy_tests::bypass;

#[tokio::test(flavor = "multi_thread")]
async fn no_way_leads_around_the_interception() -> Result<()> {
    let (text, good) = bypass::print(&bypass::run().await?);
    ensure!(good, "{text}");
    Ok(())
}
