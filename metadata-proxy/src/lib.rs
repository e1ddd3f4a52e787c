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
mod log;
mod log_limit;
mod metrics;
mod netns;
mod server;
mod services;
mod strangers;
mod token_key;
mod upstream;
mod volatile;
mod wildcard;
mod workload;

use std::process::ExitCode;

use clap::Parser as _;
use cli::{Cli, Command, LogFormat};
use config::{Config, Place};

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
                log::start(config.log_format, &config.log);
                app::run(config, move || Config::resolve(run.clone()))
            }
            Err(error) => return refuse(&format!("{error}; {}", attached_all_the_same(run))),
        },
        Command::Attach { config, place } => {
            log::start(LogFormat::Text, "info");
            let (place, bad) = Place::read(config, place);
            if let Some(bad) = bad {
                tracing::warn!("{bad}; attached where flags, environment and defaults say");
            }
            app::attach(&place)
        }
        Command::Check { run, config_only } => match Config::resolve(run) {
            Ok(config) => app::check(&config, config_only),
            Err(error) => return refuse(&error.to_string()),
        },
        Command::Ps { socket, json, all } => app::ps(&socket.path(), json, all),
        Command::Explain { socket, container } => app::explain(&socket.path(), &container),
        Command::Detach { config, bpffs, socket } => {
            let (place, bad) = Place::read(config, cli::Place { cgroup: None, bpffs });
            if let Some(bad) = bad {
                eprintln!("{bad}; looking in {}", place.bpffs.display());
            }
            app::detach(&place.bpffs, &socket.path())
        }
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            log::last_words(&format!("{error:#}"));
            ExitCode::FAILURE
        }
    }
}

/// Whoever has no configuration serves nobody; that is no reason to let containers have the host's role.
fn attached_all_the_same(run: cli::Run) -> String {
    // What is wrong with the file has been said.
    let (place, _) = Place::read(run.config, run.place);
    match app::attach(&place) {
        Ok(()) => "until it is right, containers get errors".to_owned(),
        Err(error) => format!("and containers are not intercepted: {error:#}"),
    }
}

fn refuse(reason: &str) -> ExitCode {
    log::last_words(reason);
    ExitCode::from(BAD_CONFIGURATION)
}

/// clap's message without its usage section, which `--help` shows.
fn one_line(message: &str) -> String {
    let lines = message.lines().map(str::trim).take_while(|line| !line.starts_with("Usage:"));
    let text = lines.filter(|line| !line.is_empty()).collect::<Vec<_>>().join(" ");
    text.strip_prefix("error: ").unwrap_or(&text).to_owned()
}
