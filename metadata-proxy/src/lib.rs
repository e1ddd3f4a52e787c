//! metadata-proxy: gives every Docker container on a host its own IAM role.
//!
//! A library only so that the fuzz targets reach the parsers, and the manual the command line; there is no interface but the
//! program's.

mod admin;
mod app;
mod audit;
mod check;
mod cli;
mod config;
mod containers;
mod credentials;
mod exemptions;
#[doc(hidden)]
pub mod fuzz;
mod identity;
mod imds;
mod interceptor;
mod listeners;
mod log_limit;
mod metrics;
mod netns;
mod server;
mod token_key;
mod upstream;
mod wildcard;
mod workload;

use std::process::ExitCode;

use clap::Parser as _;
use cli::{Cli, Command, LogFormat};
use config::Config;
use tracing::{Level, Metadata};
use tracing_subscriber::{EnvFilter, filter::filter_fn, layer::SubscriberExt as _, util::SubscriberInitExt as _};

/// `EX_USAGE` of sysexits(3).
const BAD_CONFIGURATION: u8 = 64;

/// The command line, for its manual (`examples/manual.rs`).
#[doc(hidden)]
pub fn command() -> clap::Command {
    <Cli as clap::CommandFactory>::command()
}

/// The program.
pub fn main() -> ExitCode {
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) if error.use_stderr() => return refuse(&one_line(&error.render().to_string())),
        // Not an error: --help or --version.
        Err(help) => return if help.print().is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE },
    };
    let result = match cli.command {
        Command::Run(run) => match Config::resolve(run.clone()) {
            Ok(config) => {
                start_log(&config);
                app::run(config, move || Config::resolve(run.clone()))
            }
            Err(error) => return refuse(&error.to_string()),
        },
        Command::Check { run, config_only } => match Config::resolve(run) {
            Ok(config) => app::check(&config, config_only),
            Err(error) => return refuse(&error.to_string()),
        },
        Command::Ps { socket, json } => app::ps(&socket.path(), json),
        Command::Explain { socket, container } => app::explain(&socket.path(), &container),
        Command::Detach { bpffs, socket } => {
            app::detach(&bpffs.path.unwrap_or_else(|| config::BPFFS.into()), &socket.path())
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("metadata-proxy: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn refuse(reason: &str) -> ExitCode {
    eprintln!("metadata-proxy: {reason}");
    ExitCode::from(BAD_CONFIGURATION)
}

/// clap's message without its usage section, which `--help` shows.
fn one_line(message: &str) -> String {
    let lines = message.lines().map(str::trim).take_while(|line| !line.starts_with("Usage:"));
    let text = lines.filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ");
    text.strip_prefix("error: ").unwrap_or(&text).to_owned()
}

fn start_log(config: &Config) {
    let log = tracing_subscriber::fmt().with_env_filter(EnvFilter::new(&config.log)).with_writer(std::io::stderr);
    match config.log_format {
        LogFormat::Text => {
            log.with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
                .finish()
                .with(filter_fn(has_no_secrets))
                .init();
        }
        LogFormat::Json => log.json().finish().with(filter_fn(has_no_secrets)).init(),
    }
}

/// The AWS SDK's finest level shows requests with all their headers, in which there are session tokens.
fn has_no_secrets(line: &Metadata<'_>) -> bool {
    *line.level() != Level::TRACE || !line.target().starts_with("aws_")
}
