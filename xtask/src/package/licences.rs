//! The licences of the crates that have gone into the daemon and its BPF programs, as one text. Most of them ask that their
//! notices go with the program.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs,
    path::Path,
};

use anyhow::{Context as _, ensure};
use serde_json::Value;

use crate::{build, cargo, workspace};

const BEGINNINGS: [&str; 6] = ["licence", "license", "copying", "copyright", "notice", "unlicense"];

/// A crate's name with its version, what it says of its licence, and the texts that it brings.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Crate {
    name: String,
    licence: String,
    texts: Vec<String>,
}

pub(super) fn text(triple: &str) -> anyhow::Result<String> {
    let mut crates = BTreeSet::new();
    for (folder, triple) in [("metadata-proxy", triple), ("metadata-proxy-ebpf", build::BPF_TARGET)] {
        let mut ask = cargo();
        ask.args(["metadata", "--locked", "--format-version", "1", "--filter-platform", triple]);
        let output = ask.current_dir(workspace()?.join(folder)).output().context("cannot run cargo metadata")?;
        ensure!(output.status.success(), "cargo metadata: {}", String::from_utf8_lossy(&output.stderr).trim());
        let metadata = serde_json::from_slice(&output.stdout).context("read what cargo metadata says")?;
        for package in linked(&metadata).context("cargo metadata is not as it was")? {
            crates.extend(look_at(package)?);
        }
    }
    Ok(print(crates))
}

/// The packages that are linked into the one that was asked for.
fn linked(metadata: &Value) -> Option<Vec<&Value>> {
    let by_id = |list: &'static str| {
        let entries = metadata.pointer(list)?.as_array()?.iter();
        entries.map(|entry| Some((entry["id"].as_str()?, entry))).collect::<Option<HashMap<_, _>>>()
    };
    let (packages, nodes) = (by_id("/packages")?, by_id("/resolve/nodes")?);
    let runs_while_compiling = |package: &Value| {
        let kinds = package["targets"].as_array().into_iter().flatten().filter_map(|target| target["kind"].as_array());
        kinds.flatten().any(|kind| kind == "proc-macro")
    };
    // Those for builds and tests have a kind.
    let is_linked = |needed: &&Value| {
        needed["dep_kinds"].as_array().is_some_and(|kinds| kinds.iter().any(|kind| kind["kind"].is_null()))
    };
    let mut found = BTreeMap::new();
    let mut wanted = vec![metadata.pointer("/resolve/root")?.as_str()?];
    while let Some(id) = wanted.pop() {
        let package = *packages.get(id)?;
        if !runs_while_compiling(package) && found.insert(id, package).is_none() {
            let needed = nodes.get(id)?["deps"].as_array()?.iter().filter(is_linked);
            wanted.extend(needed.filter_map(|needed| needed["pkg"].as_str()));
        }
    }
    Some(found.into_values().collect())
}

/// Ours have no source: their licences lie beside this text.
fn look_at(package: &Value) -> anyhow::Result<Option<Crate>> {
    if package["source"].is_null() {
        return Ok(None);
    }
    let word = |name: &str| package[name].as_str().unwrap_or("-").to_owned();
    let manifest = word("manifest_path");
    let folder = Path::new(&manifest).parent().context("a crate without a folder")?;
    let mut texts = Vec::new();
    for entry in fs::read_dir(folder).with_context(|| format!("read {}", folder.display()))? {
        let file = entry?.path();
        let name = file.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
        if BEGINNINGS.iter().any(|begin| name.starts_with(begin)) && !name.ends_with(".rs") && file.is_file() {
            let text = fs::read(&file).with_context(|| format!("read {}", file.display()))?;
            texts.push(String::from_utf8_lossy(&text).trim().replace("\r\n", "\n"));
        }
    }
    texts.sort_unstable();
    Ok(Some(Crate { name: format!("{} {}", word("name"), word("version")), licence: word("license"), texts }))
}

/// Each text once, after all that bring it.
fn print(crates: BTreeSet<Crate>) -> String {
    let mut all = "What others have written of metadata-proxy, beside the standard library of Rust (MIT OR Apache-2.0), and the texts of \
                   their licences.\n\n".to_owned();
    let mut texts: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for found in crates {
        let note = if found.texts.is_empty() { " (brings no text)" } else { "" };
        all += &format!("{}: {}{note}\n", found.name, found.licence);
        for text in found.texts {
            texts.entry(text).or_default().push(found.name.clone());
        }
    }
    for (text, names) in texts {
        all += &format!("\n{}\n{}:\n\n{text}\n", "-".repeat(80), names.join(", "));
    }
    all
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_only_builds_and_tests_need_is_not_linked() {
        let package = |id: &str, kind: &str| json!({ "id": id, "targets": [{ "kind": [kind] }] });
        let needs = |id: &str, kind: Value| json!({ "pkg": id, "dep_kinds": [{ "kind": kind }] });
        let metadata = json!({
            "packages": [
                package("own", "lib"), package("lib", "lib"), package("deep", "lib"), package("build", "lib"),
                package("macro", "proc-macro"),
            ],
            "resolve": { "root": "own", "nodes": [
                { "id": "own", "deps": [needs("lib", Value::Null), needs("build", "build".into()), needs("macro", Value::Null)] },
                { "id": "lib", "deps": [needs("deep", Value::Null)] },
                { "id": "deep", "deps": [needs("lib", Value::Null)] },
            ] },
        });
        let ids: Vec<&Value> = linked(&metadata).unwrap().into_iter().map(|package| &package["id"]).collect();
        assert_eq!(ids, ["deep", "lib", "own"]);
    }

    #[test]
    fn a_text_that_several_bring_is_there_once() {
        let made = |name: &str, texts: &[&str]| Crate {
            name: name.into(),
            licence: "MIT".into(),
            texts: texts.iter().map(|text| (*text).to_owned()).collect(),
        };
        let text = print([made("a 1", &["one text"]), made("b 2", &["one text"]), made("c 3", &[])].into());
        assert_eq!(text.matches("one text").count(), 1);
        assert!(text.contains("\na 1, b 2:\n") && text.contains("\nc 3: MIT (brings no text)\n"), "{text}");
    }
}
