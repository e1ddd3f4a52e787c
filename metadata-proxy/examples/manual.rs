//! Writes the manual pages and the shells' completions into a folder: `cargo run --example manual -- FOLDER`.
//!
//! They are made from the command line itself, so they cannot say anything else than it does.

use std::{env, fs, path::Path};

use anyhow::{Context as _, ensure};
use clap::Command;
use clap_complete::Shell;
use clap_mangen::Man;

const SHELLS: [Shell; 3] = [Shell::Bash, Shell::Zsh, Shell::Fish];

fn main() -> anyhow::Result<()> {
    let arguments: Vec<_> = env::args_os().skip(1).collect();
    ensure!(arguments.len() == 1, "one argument is needed: the folder to write to");
    let folder = Path::new(&arguments[0]);
    fs::create_dir_all(folder).with_context(|| format!("create {}", folder.display()))?;
    let mut command = metadata_proxy::command();
    let name = command.get_name().to_owned();
    for shell in SHELLS {
        clap_complete::generate_to(shell, &mut command, &name, folder)
            .with_context(|| format!("write the completions of {shell}"))?;
    }
    command.build();
    let version = command.render_version();
    page(&command, version.trim_end(), folder)
}

/// The page of a command, and those of its subcommands.
fn page(command: &Command, version: &str, folder: &Path) -> anyhow::Result<()> {
    let page = Man::new(command.clone()).section("8").source(version).manual("System administration");
    page.generate_to(folder).with_context(|| format!("write {}", page.get_filename()))?;
    command.get_subcommands().filter(|sub| !sub.is_hide_set()).try_for_each(|sub| self::page(sub, version, folder))
}
