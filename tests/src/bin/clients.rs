//! `cargo xtask clients`: real AWS clients in containers through every scenario, each with the exact identity.
#![expect(clippy::print_stdout, reason = "what it shows is its standard output")]

use std::{path::Path, process::ExitCode, time::Instant};

use anyhow::{Context as _, Result};
use clap::Parser;
use metadata_proxy_tests::{
    clients::{Client, Programs, scenarios, table},
    stage::aws_config_client,
};

/// Runs real AWS clients in containers, and prints what came of each
#[derive(Parser)]
struct Options {
    /// Only these; all if none is named
    names: Vec<String>,
    /// Keep what they send, and what they are answered, in tests/recordings
    #[arg(long)]
    record: bool,
}

#[tokio::main]
async fn main() -> Result<ExitCode> {
    let options = Options::parse();
    let begin = Instant::now();
    let clients = match options.names.as_slice() {
        [] => Client::every().collect(),
        names => names.iter().map(|name| Client::find(name)).collect::<Result<Vec<_>>>()?,
    };
    let programs = Programs::from_env(aws_config_client()?)?;
    let rows = scenarios::run(&programs, &clients).await?;
    print!("{}", table::print(&rows));
    if options.record {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("recordings");
        for row in rows.iter().filter(|row| !row.recording.0.is_empty()) {
            let file = folder.join(format!("{}.http", row.client.name));
            std::fs::write(&file, row.recording.write()).with_context(|| format!("write {}", file.display()))?;
        }
        print!("\n{}", table::markdown(&rows));
    }
    let wrong = rows.iter().filter(|row| !row.good()).count();
    println!("{} clients in {:.0} s, {wrong} of them with something wrong", rows.len(), begin.elapsed().as_secs_f64());
    Ok(if wrong == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
