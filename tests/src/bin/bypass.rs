//! The bypass matrix, to be seen: each way to the metadata service, what must come of it, what came,
//! and what arrived at the (simulated) real service.
#![expect(clippy::print_stdout, reason = "what it shows is its standard output")]

use std::process::ExitCode;

use metadata_proxy_tests::bypass;

#[tokio::main]
async fn main() -> anyhow::Result<ExitCode> {
    let (text, good) = bypass::print(&bypass::run().await?);
    print!("{text}");
    Ok(if good { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
