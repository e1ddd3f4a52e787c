use clap::Parser as _;

use metadata_proxy_common::{HOST_ASKED, HOST_DENIED, HOST_SERVED};

use super::*;
use crate::cli::{Cli, Command};

fn resolve(args: &[&str]) -> Result<Config, BadConfig> {
    let cli = Cli::parse_from(["metadata-proxy", "run"].iter().chain(args));
    let Command::Run(run) = cli.command else { panic!("not run") };
    Config::resolve(run)
}

fn with_file(text: &str, args: &[&str]) -> Result<Config, BadConfig> {
    let path = std::env::temp_dir().join(format!("metadata-proxy-config-{}-{:p}.toml", std::process::id(), text));
    fs::write(&path, text).unwrap();
    let config = resolve(&[&["--config", path.to_str().unwrap()], args].concat());
    fs::remove_file(&path).unwrap();
    config
}

#[test]
fn flags_win_over_the_file() {
    let file = "docker-host = 'unix:///file.sock'\nbpffs = '/file'\nlog-format = 'json'\n";
    let config = with_file(file, &["--docker-host", "unix:///flag.sock"]).unwrap();
    assert_eq!(config.engines.first().map(|engine| engine.host.as_str()), Some("unix:///flag.sock"));
    assert_eq!(config.place.bpffs, PathBuf::from("/file"));
    assert_eq!(config.log_format, LogFormat::Json);
}

#[test]
fn a_flag_for_upstream_replaces_what_the_file_says_of_it() {
    let config = with_file("imds-endpoint = 'http://10.0.0.1'\n", &["--disable-upstream"]).unwrap();
    assert!(config.upstream.is_none());
}

#[test]
fn the_real_service_its_absence_and_a_simulated_one_exclude_each_other() {
    for (file, args, expected) in [
        ("", &["--simulate", "--disable-upstream"][..], "--disable-upstream and --simulate exclude each other"),
        ("", &["--simulate", "--imds-endpoint=http://x"], "--imds-endpoint and --simulate exclude each other"),
        ("disable-upstream = true\n[simulate]\n", &[], ".toml: disable-upstream and "),
    ] {
        let error = with_file(file, args).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    let real = with_file("[simulate]\n", &["--imds-endpoint=http://x"]).unwrap();
    assert!(matches!(real.upstream, Some(Upstream::Real { .. })));
    for (file, args) in [("[simulate]\nregion = 'eu-west-1'\n", &[][..]), ("disable-upstream = true", &["--simulate"])]
    {
        assert!(matches!(with_file(file, args).unwrap().upstream, Some(Upstream::Simulated(..))), "{file}");
    }
}

#[test]
fn a_wrong_instance_is_an_error_that_names_the_setting() {
    let error = with_file("[simulate]\naccount = '12'\n", &[]).unwrap_err().to_string();
    assert!(error.contains(".toml: [simulate]: account = \"12\": expected 12 digits"), "{error}");
}

#[test]
fn an_error_in_the_file_names_file_and_line() {
    let error = with_file("docker-host = 'unix:///x'\nrole = 'x'\n", &[]).unwrap_err().to_string();
    assert!(error.contains(".toml:2: unknown field `role`"), "{error}");
    assert_eq!(error.lines().count(), 1, "{error}");
}

const EXAMPLE: &str = include_str!("../../../examples/config.toml");

#[test]
fn the_example_says_the_defaults() {
    let example = Config { file: None, ..with_file(EXAMPLE, &[]).unwrap() };
    let defaults = resolve(&[]).unwrap();
    assert_eq!(format!("{example:?}"), format!("{defaults:?}"));
}

#[test]
fn the_example_has_every_option_and_no_other() {
    let uncomment = |line: &'static str| match line.strip_prefix('#') {
        Some(option) if option.starts_with(|c: char| c.is_ascii_lowercase() || c == '[') => option,
        _ => line,
    };
    let all: String = EXAMPLE.lines().map(|line| uncomment(line).to_owned() + "\n").collect();
    // Unknown keys are errors.
    toml::from_str::<File>(&all).unwrap();
    let all: toml::Table = toml::from_str(&all).unwrap();
    let tables = || {
        let nested = ["upstream", "exempt", "limits", "sts", "host"];
        all.iter().chain(nested.into_iter().flat_map(|name| all[name].as_table().unwrap()))
    };
    let run = <Cli as clap::CommandFactory>::command().find_subcommand("run").unwrap().clone();
    for flag in run.get_arguments().filter_map(clap::Arg::get_long) {
        // Two are flags only; one may be repeated, and is a list in the file.
        let name = if flag == "exempt-cgroup" { "cgroups" } else { flag };
        assert!(["config", "admin-socket"].contains(&flag) || tables().any(|(key, _)| key == name), "no {name}");
    }
    let simulate = all["simulate"].as_table().unwrap();
    assert_eq!(simulate.len(), 9, "{simulate:?}");
}

#[test]
fn what_takes_a_restart_is_named() {
    let in_force = with_file("bpffs = '/a'\ndefault-role = 'x'\n", &[]).unwrap().fixed();
    let changed = |file: &str| with_file(file, &[]).unwrap().needs_restart(&in_force);
    assert_eq!(changed("bpffs = '/a'\ndefault-role = 'y'\n[[rule]]\nallow = ['*']\n"), [""; 0]);
    let file = "bpffs = '/b'\nlog = 'debug'\n[sts]\ncalls-per-second = 1\n[upstream]\ndeny = ['meta-data/tags/**']\n";
    assert_eq!(changed(file), ["bpffs", "[sts]", "upstream or simulation", "log"]);
}

#[test]
fn numbers_for_sts_are_taken_and_wrong_ones_named() {
    let file = "[sts]\ncalls-per-second = 0.5\nconcurrent-calls = 4\nrefusal-memory = '2m'\n";
    let settings = with_file(file, &[]).unwrap().credentials;
    assert_eq!(settings.limits, credentials::Limits { per_second: 0.5, concurrent: 4 });
    assert_eq!(settings.refusal_memory.as_secs(), 120);
    for (line, expected) in [
        ("calls-per-second = 0.0", "[sts]: calls-per-second 0: expected 0.1 to 1000"),
        ("calls-per-second = nan", "[sts]: calls-per-second NaN"),
        ("concurrent-calls = 0", "[sts]: concurrent-calls 0: expected 1 to 1000"),
        ("refusal-memory = '2h'", "[sts]: refusal-memory \"2h\": expected 1s to 1h"),
        ("calls = 1", ":2: unknown field `calls`"),
    ] {
        let error = with_file(&format!("[sts]\n{line}\n"), &[]).unwrap_err().to_string();
        assert!(error.contains(expected), "{line}: {error}");
    }
}

#[test]
fn a_bad_rule_is_named_by_its_line() {
    for (rule, expected) in [
        ("name = 'web'", "toml:2: a rule says allow"),
        ("deny = true\nallow = ['web']", "toml:2: a rule with deny"),
        ("allow = ['we b']", "toml:2: allow: \"we b\""),
        ("allow = ['arn:aws:iam::12345678901:role/*']", "the account is not 12 digits"),
        ("default-role = 'we b'", "toml:2: default-role: \"we b\""),
        ("allow = ['x']\nmax-duration = '1s'", "toml:2: max-duration \"1s\""),
        ("allow = ['@instance']\nmax-duration = '1h'", "toml:2: nothing can be forced"),
        ("allow = ['x']\npolicy = '{'", "toml:2: policy: "),
        ("allow = ['x']\npolicy-arns = ['x']", "toml:2: policy-arns: \"x\""),
        ("allow = ['x']\n[rule.tags]\n'aws:x' = 'y'", "toml:2: tags: key"),
        ("allow = ['x']\nnames = 'y'", "toml:4: unknown field `names`"),
    ] {
        let error = with_file(&format!("\n[[rule]]\n{rule}\n"), &[]).unwrap_err().to_string();
        assert!(error.contains(expected), "{rule}: {error}");
    }
}

#[test]
fn tags_that_would_refuse_every_container_are_named() {
    let many =
        |count: usize, prefix: &str| -> String { (0..count).map(|at| format!("{prefix}{at} = 'x'\n")).collect() };
    let rule = "[[rule]]\nallow = ['*']\n[rule.tags]\n";
    for (file, expected) in [
        ("[session-tags]\nteam = 'a'\nTeam = 'b'\n".to_owned(), "[session-tags]: key \"team\" is there twice"),
        (format!("{rule}team = 'a'\nTEAM = 'b'\n"), "toml:1: tags: key \"team\" is there twice"),
        (format!("[session-tags]\n{}", many(51, "a")), "[session-tags]: 51 session tags: AWS takes 50 at most"),
        (format!("{rule}{}", many(51, "a")), "toml:1: tags: 51 session tags"),
        (format!("{rule}{}[session-tags]\n{}", many(30, "a"), many(30, "b")), "toml:1: tags and [session-tags]: 60"),
    ] {
        let error = with_file(&file, &[]).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    // The rule's replace the others.
    with_file(&format!("{rule}{}[session-tags]\n{}", many(30, "a"), many(30, "A")), &[]).unwrap();
}

#[test]
fn services_are_taken_at_the_operators_word_and_their_mistakes_named() {
    let services = |text: &str| with_file(text, &[]).map(|config| config.services);
    assert_eq!(services("").unwrap().host(), HOST_SERVED);
    assert_eq!(services("[host]\ndefault = 'deny'").unwrap().host(), HOST_DENIED);
    let file = "[[service]]\nunit = 'app@*.service'\nrole = 'app'\npolicy = '{}'\n";
    assert_eq!(services(file).unwrap().host(), HOST_ASKED);
    for (service, expected) in [
        ("", "toml:2: expected either unit"),
        ("unit = 'a'\ncgroup = '/b'", "toml:2: expected either unit"),
        ("unit = 'a/b'", "toml:2: expected either unit"),
        ("cgroup = 'relative'", "toml:2: expected either unit"),
        ("cgroup = '/'", "toml:2: expected either unit"),
        ("unit = 'a'\nrole = 'we b'", "toml:2: role: \"we b\""),
        ("unit = 'a'\nrol = 'web'", "toml:2: \"rol\": there is no such setting of a service, only role, external-id"),
        ("unit = 'a'\nduration = '1s'", "toml:2: [[service]] duration"),
        ("unit = 'a'\nrole = 3", "invalid type"),
    ] {
        let error = services(&format!("\n[[service]]\n{service}\n")).unwrap_err().to_string();
        assert!(error.contains(expected), "{service}: {error}");
    }
    let error = services("[host]\ndefault = 'no'").unwrap_err().to_string();
    assert!(error.contains("toml:2: unknown variant `no`"), "{error}");
    let error = with_file("[[engine]]\nhost = 'unix:///x'\nname = 'systemd'", &[]).unwrap_err().to_string();
    assert!(error.contains("give it another name"), "{error}");
}

#[test]
fn rules_stand_in_the_files_order() {
    let file = "unmatched = 'allow'\n[[rule]]\nname = 'a'\ndeny = true\n[[rule]]\nlabel = { team = 'x*' }\nallow = ['*', '@instance']\n";
    let rules = with_file(file, &[]).unwrap().identity.rules;
    assert!(rules.unmatched_allowed);
    let places: Vec<_> = rules.rules.iter().filter_map(|rule| rule.place.rsplit(':').next()).collect();
    assert_eq!(places, ["2", "5"]);
}

#[test]
fn bad_values_name_their_flag() {
    for (args, expected) in [
        (["--default-role", "we b"], "--default-role: \"we b\" is not an IAM role"),
        (["--role-base", "arn:aws:iam::123456789012:role/x"], "--role-base: \"arn:aws:iam"),
        (["--session-name", "{x}"], "--session-name: there is no {x}"),
        (["--imds-endpoint", "https://x"], "--imds-endpoint \"https://x\": not an http URL"),
        (["--imds-endpoint", "http://x/latest"], "it has a path"),
        (["--docker-host", "/var/run/docker.sock"], "expected unix:///path"),
        (["--config", "/nowhere.toml"], "--config /nowhere.toml: No such file"),
    ] {
        let error = resolve(&args).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}
