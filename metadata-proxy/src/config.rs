//! Flags, environment and file, resolved into one validated configuration.

mod fixed;
mod limits;
mod rules;
mod sts;

use std::{
    collections::{BTreeMap, HashSet},
    fmt::Display,
    fs,
    net::SocketAddr,
    path::PathBuf,
    str::FromStr,
};

pub(crate) use fixed::Fixed;
use hyper::Uri;
use serde::Deserialize;

use crate::{
    audit,
    cli::{LogFormat, Run},
    credentials,
    identity::{self, Kind, Template, check_tags, operators_tags, rules::Effect, session_tag},
    imds::{Instance, InstanceSettings, Policy, View},
    server::Limits,
};

/// Said in one line: what is wrong, and where it stands.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct BadConfig(String);

#[derive(Debug)]
pub(crate) struct Config {
    pub(crate) docker_host: String,
    pub(crate) cgroup: Option<PathBuf>,
    pub(crate) bpffs: PathBuf,
    pub(crate) identity: identity::Settings,
    pub(crate) trust_image_metadata: bool,
    pub(crate) credentials: credentials::Settings,
    /// None: serve credentials only.
    pub(crate) upstream: Option<Upstream>,
    /// The real service's address if it was given, for the daemon's own credentials too.
    pub(crate) imds_endpoint: Option<String>,
    pub(crate) exempt_cgroups: Vec<PathBuf>,
    pub(crate) admin_socket: PathBuf,
    pub(crate) metrics_address: Option<SocketAddr>,
    pub(crate) limits: Limits,
    pub(crate) audit_log: Option<audit::Target>,
    pub(crate) log_format: LogFormat,
    pub(crate) log: String,
}

/// Where everything but credentials comes from.
#[derive(Debug)]
pub(crate) enum Upstream {
    Real { endpoint: Uri, policy: Policy },
    Simulated(Instance, View),
}

/// The file: the flags' names, and what is too long for a flag.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct File {
    docker_host: Option<String>,
    cgroup: Option<PathBuf>,
    bpffs: Option<PathBuf>,
    default_role: Option<String>,
    role_base: Option<String>,
    session_name: Option<String>,
    trust_image_metadata: bool,
    imds_endpoint: Option<String>,
    disable_upstream: bool,
    require_imdsv2: bool,
    log_format: Option<LogFormat>,
    log: Option<String>,
    metrics_address: Option<String>,
    audit_log: Option<String>,
    unmatched: rules::Unmatched,
    rule: Vec<toml::Spanned<rules::Table>>,
    /// Values are templates.
    session_tags: BTreeMap<String, String>,
    upstream: UpstreamTable,
    sts: sts::Table,
    /// Turns the simulation on where it stands.
    simulate: Option<InstanceSettings>,
    exempt: ExemptTable,
    limits: limits::Table,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct ExemptTable {
    /// Paths below the cgroup2 mount.
    cgroups: Vec<PathBuf>,
    /// Names.
    containers: HashSet<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
struct UpstreamTable {
    allow: Vec<String>,
    deny: Vec<String>,
    allow_user_data: bool,
    container_labels: bool,
}

pub(crate) const BPFFS: &str = "/sys/fs/bpf";
const DOCKER_HOST: &str = "unix:///var/run/docker.sock";
const IMDS_ENDPOINT: &str = "http://169.254.169.254";

impl Config {
    /// Else for a part of it, such as a test has, whose namespaces may be other than the host's.
    pub(crate) fn is_whole_host(&self) -> bool {
        self.cgroup.is_none()
    }

    pub(crate) fn resolve(run: Run) -> Result<Self, BadConfig> {
        let Some(path) = given_path(run.config.clone()) else { return Self::with_file(run, "", "") };
        let file_name = path.display().to_string();
        let text = fs::read_to_string(&path).map_err(|error| BadConfig(format!("--config {file_name}: {error}")))?;
        Self::with_file(run, &file_name, &text)
    }

    pub(crate) fn with_file(run: Run, file_name: &str, text: &str) -> Result<Self, BadConfig> {
        // An empty variable is as good as unset: compose files pass them on so.
        let given = |value: Option<String>| value.filter(|value| !value.is_empty());
        let (file, rules) = parse(file_name, text)?;
        let either = |flag: &'static str, value: Option<String>, in_file: Option<String>| match given(value) {
            Some(value) => (Some(value), format!("--{flag}")),
            None => (given(in_file), format!("{file_name}: {flag}")),
        };
        // Flags win as a whole over the file, so that the ways to say where upstream is cannot
        // contradict each other across them.
        let endpoint = given(run.imds_endpoint);
        let by_flag = endpoint.is_some() || run.disable_upstream || run.simulate;
        let (endpoint, disable, simulate, origins) = if by_flag {
            let flags = ["--imds-endpoint", "--disable-upstream", "--simulate"].map(str::to_owned);
            (endpoint, run.disable_upstream, run.simulate, flags)
        } else {
            let names = ["imds-endpoint", "disable-upstream", "[simulate]"].map(|name| format!("{file_name}: {name}"));
            (given(file.imds_endpoint), file.disable_upstream, file.simulate.is_some(), names)
        };
        let chosen = origins.iter().zip([endpoint.is_some(), disable, simulate]).filter(|(_, chosen)| *chosen);
        if let [(one, _), (other, _), ..] = chosen.collect::<Vec<_>>().as_slice() {
            return Err(BadConfig(format!("{one} and {other} exclude each other")));
        }
        let [endpoint_origin, ..] = &origins;
        let session_tags =
            tags(&file.session_tags).map_err(|rule| BadConfig(format!("{file_name}: [session-tags]: {rule}")))?;
        check_all_tags(&rules, &session_tags)?;
        let (session_name, name_origin) = either("session-name", run.session_name, file.session_name);
        let session_name =
            Template::parse(Kind::SessionName, session_name.as_deref().unwrap_or(identity::SESSION_NAME));
        let identity = identity::Settings {
            default_role: parsed(either("default-role", run.default_role, file.default_role))?,
            role_base: parsed(either("role-base", run.role_base, file.role_base))?,
            session_name: session_name.map_err(|rule| BadConfig(format!("{name_origin}: {rule}")))?,
            session_tags,
            require_imdsv2: run.require_imdsv2 || file.require_imdsv2,
            container_labels: file.upstream.container_labels,
            exempt: file.exempt.containers,
            rules,
            host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        };

        let (docker_host, docker_origin) = either("docker-host", run.docker_host, file.docker_host);
        let docker_host = docker_host.unwrap_or_else(|| DOCKER_HOST.to_owned());
        if !["unix://", "tcp://", "http://"].iter().any(|scheme| docker_host.starts_with(scheme)) {
            return Err(BadConfig(format!(
                "{docker_origin} {docker_host:?}: expected unix:///path or tcp://host:port"
            )));
        }
        let user_data = run.allow_user_data || file.upstream.allow_user_data;
        let view = View::new(&file.upstream.allow, &file.upstream.deny, user_data)
            .map_err(|error| BadConfig(format!("{file_name}: [upstream]: {error}")))?;
        let upstream = if disable {
            None
        } else if simulate {
            let instance = Instance::new(file.simulate.unwrap_or_default())
                .map_err(|error| BadConfig(format!("{file_name}: [simulate]: {error}")))?;
            Some(Upstream::Simulated(instance, view))
        } else {
            let uri = imds_uri(endpoint.as_deref().unwrap_or(IMDS_ENDPOINT));
            let endpoint = uri.map_err(|reason| BadConfig(format!("{endpoint_origin} {reason}")))?;
            Some(Upstream::Real { endpoint, policy: Policy::new(view) })
        };
        let (log, log_origin) = either("log", run.log, file.log);
        let log = log.unwrap_or_else(|| "info".to_owned());
        tracing_subscriber::EnvFilter::try_new(&log)
            .map_err(|error| BadConfig(format!("{log_origin} {log:?}: {error}")))?;
        let (metrics_address, origin) = either("metrics-address", run.metrics_address, file.metrics_address);
        let metrics_address = metrics_address
            .map(|address| address.parse::<SocketAddr>().map_err(|error| (address, error)))
            .transpose()
            .map_err(|(address, error)| BadConfig(format!("{origin} {address:?}: {error}; expected IP:PORT")))?;
        Ok(Self {
            docker_host,
            cgroup: given_path(run.cgroup).or(file.cgroup),
            bpffs: given_path(run.bpffs.path).or(file.bpffs).unwrap_or_else(|| BPFFS.into()),
            identity,
            trust_image_metadata: run.trust_image_metadata || file.trust_image_metadata,
            credentials: file.sts.settings().map_err(|error| BadConfig(format!("{file_name}: [sts]: {error}")))?,
            upstream,
            imds_endpoint: endpoint,
            exempt_cgroups: if run.exempt_cgroup.is_empty() { file.exempt.cgroups } else { run.exempt_cgroup },
            admin_socket: run.admin_socket.path(),
            metrics_address,
            limits: file.limits.limits().map_err(|error| BadConfig(format!("{file_name}: [limits]: {error}")))?,
            audit_log: either("audit-log", run.audit_log, file.audit_log).0.as_deref().map(audit::Target::from),
            log_format: run.log_format.or(file.log_format).unwrap_or(LogFormat::Text),
            log,
        })
    }
}

fn given_path(value: Option<PathBuf>) -> Option<PathBuf> {
    value.filter(|value| !value.as_os_str().is_empty())
}

/// A value that has been given, with the place where it was.
fn parsed<T: FromStr<Err: Display>>((value, origin): (Option<String>, String)) -> Result<Option<T>, BadConfig> {
    let value = value.map(|value| value.parse()).transpose();
    value.map_err(|error| BadConfig(format!("{origin}: {error}")))
}

fn parse(place: &str, text: &str) -> Result<(File, rules::Rules), BadConfig> {
    let line_at = |at: usize| text.get(..at).unwrap_or_default().matches('\n').count() + 1;
    let mut file: File = toml::from_str(text).map_err(|error| {
        let line = error.span().map_or(1, |span| line_at(span.start));
        let reason = error.message().lines().collect::<Vec<_>>().join(" ");
        BadConfig(format!("{place}:{line}: {reason}"))
    })?;
    let mut rules = Vec::new();
    for table in std::mem::take(&mut file.rule) {
        let place = format!("{place}:{}", line_at(table.span().start));
        let rule = table.into_inner().rule(&place).map_err(|reason| BadConfig(format!("{place}: {reason}")))?;
        rules.push(rule);
    }
    let unmatched_allowed = file.unmatched == rules::Unmatched::Allow;
    Ok((file, rules::Rules { rules, unmatched_allowed }))
}

fn tags(given: &BTreeMap<String, String>) -> Result<Vec<(String, Template)>, String> {
    let tags = given.iter().map(|(key, value)| session_tag(key, value)).collect::<Result<Vec<_>, _>>()?;
    check_tags(&tags).map(|()| tags)
}

/// A rule's tags and those of all sessions come together: more than AWS takes would refuse every container of that rule.
fn check_all_tags(rules: &rules::Rules, of_all: &[(String, Template)]) -> Result<(), BadConfig> {
    for rule in &rules.rules {
        if let Effect::Allow(allowance) = &rule.effect {
            check_tags(&operators_tags(&allowance.tags, of_all))
                .map_err(|reason| BadConfig(format!("{}: tags and [session-tags]: {reason}", rule.place)))?;
        }
    }
    Ok(())
}

fn imds_uri(given: &str) -> Result<Uri, String> {
    let bad = |reason: &str| format!("{given:?}: {reason}; expected http://HOST[:PORT]");
    let uri: Uri = given.parse().map_err(|_| bad("not a URL"))?;
    if uri.scheme_str() != Some("http") || uri.authority().is_none() {
        return Err(bad("not an http URL"));
    }
    if !matches!(uri.path(), "" | "/") || uri.query().is_some() {
        return Err(bad("it has a path"));
    }
    Ok(uri)
}

#[cfg(test)]
mod tests {
    use clap::Parser as _;

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
        assert_eq!(config.docker_host, "unix:///flag.sock");
        assert_eq!(config.bpffs, PathBuf::from("/file"));
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
        for (file, args) in
            [("[simulate]\nregion = 'eu-west-1'\n", &[][..]), ("disable-upstream = true", &["--simulate"])]
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

    const EXAMPLE: &str = include_str!("../../examples/config.toml");

    #[test]
    fn the_example_says_the_defaults() {
        let (example, defaults) = (with_file(EXAMPLE, &[]).unwrap(), resolve(&[]).unwrap());
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
            let nested = ["upstream", "exempt", "limits", "sts"];
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
        let file =
            "bpffs = '/b'\nlog = 'debug'\n[sts]\ncalls-per-second = 1\n[upstream]\ndeny = ['meta-data/tags/**']\n";
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
            (
                format!("{rule}{}[session-tags]\n{}", many(30, "a"), many(30, "b")),
                "toml:1: tags and [session-tags]: 60",
            ),
        ] {
            let error = with_file(&file, &[]).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
        // The rule's replace the others.
        with_file(&format!("{rule}{}[session-tags]\n{}", many(30, "a"), many(30, "A")), &[]).unwrap();
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
}
