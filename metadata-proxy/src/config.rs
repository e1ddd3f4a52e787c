//! Flags, environment and file, resolved into one validated configuration.

mod engines;
mod fixed;
mod limits;
mod place;
mod rules;
mod services;
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
pub(crate) use place::Place;
use serde::Deserialize;

use crate::{
    audit,
    cli::{LogFormat, Run},
    containers::docker::EngineAt,
    credentials,
    identity::{self, Kind, Template, check_tags, operators_tags, rules::Effect, session_tag},
    imds::{Instance, InstanceSettings, Policy, View},
    server::Limits,
    services::Settings as Services,
};

/// Said in one line: what is wrong, and where it stands.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(crate) struct BadConfig(String);

#[derive(Debug)]
pub(crate) struct Config {
    pub(crate) engines: Vec<EngineAt>,
    /// Where all this was read, apart from flags and environment.
    pub(crate) file: Option<PathBuf>,
    pub(crate) place: Place,
    pub(crate) identity: identity::Settings,
    pub(crate) trust_image_metadata: bool,
    pub(crate) credentials: credentials::Settings,
    /// None: serve credentials only.
    pub(crate) upstream: Option<Upstream>,
    /// The real service's address if it was given, for the daemon's own credentials too.
    pub(crate) imds_endpoint: Option<String>,
    pub(crate) exempt_cgroups: Vec<PathBuf>,
    pub(crate) services: Services,
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
    docker_host: Option<engines::Hosts>,
    engine: Vec<toml::Spanned<engines::Table>>,
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
    host: services::Host,
    service: Vec<toml::Spanned<services::Table>>,
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

const IMDS_ENDPOINT: &str = "http://169.254.169.254";

impl Config {
    /// Who may have which role.
    pub(crate) fn in_short(&self) -> String {
        match self.identity.rules.rules.len() {
            0 => "no rules: every container may have the role that it names".to_owned(),
            1 => "1 rule".to_owned(),
            count => format!("{count} rules"),
        }
    }

    pub(crate) fn resolve(run: Run) -> Result<Self, BadConfig> {
        let Some(path) = given_path(run.config.file.clone()) else { return Self::with_file(run, "", "") };
        let file_name = path.display().to_string();
        let text = fs::read_to_string(&path).map_err(|error| BadConfig(format!("--config {file_name}: {error}")))?;
        Self::with_file(run, &file_name, &text)
    }

    pub(crate) fn with_file(run: Run, file_name: &str, text: &str) -> Result<Self, BadConfig> {
        // An empty variable is as good as unset: compose files pass them on so.
        let given = |value: Option<String>| value.filter(|value| !value.is_empty());
        let (mut file, rules) = parse(file_name, text)?;
        let engines = engines(run.docker_host, &mut file, file_name, text)?;
        let services = services(&mut file, file_name, text)?;
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
            engines: engines.policies,
            host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        };

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
            engines: engines.at,
            file: given_path(run.config.file),
            place: run.place.resolve(file.cgroup, file.bpffs),
            identity,
            trust_image_metadata: run.trust_image_metadata || file.trust_image_metadata,
            credentials: file.sts.settings().map_err(|error| BadConfig(format!("{file_name}: [sts]: {error}")))?,
            upstream,
            imds_endpoint: endpoint,
            exempt_cgroups: if run.exempt_cgroup.is_empty() { file.exempt.cgroups } else { run.exempt_cgroup },
            services,
            admin_socket: run.admin_socket.path(),
            metrics_address,
            limits: file.limits.limits().map_err(|error| BadConfig(format!("{file_name}: [limits]: {error}")))?,
            audit_log: either("audit-log", run.audit_log, file.audit_log).0.as_deref().map(audit::Target::from),
            log_format: run.log_format.or(file.log_format).unwrap_or(LogFormat::Text),
            log,
        })
    }
}

/// An empty one is as good as none.
fn given_path(value: Option<PathBuf>) -> Option<PathBuf> {
    value.filter(|value| !value.as_os_str().is_empty())
}

/// A value that has been given, with the place where it was.
fn parsed<T: FromStr<Err: Display>>((value, origin): (Option<String>, String)) -> Result<Option<T>, BadConfig> {
    let value = value.map(|value| value.parse()).transpose();
    value.map_err(|error| BadConfig(format!("{origin}: {error}")))
}

/// An empty one of those given is as good as none.
fn engines(flags: Vec<String>, file: &mut File, place: &str, text: &str) -> Result<engines::Engines, BadConfig> {
    let given = |hosts: Vec<String>| hosts.into_iter().filter(|host| !host.is_empty()).collect::<Vec<_>>();
    let flags = given(flags);
    let by_flag = !flags.is_empty();
    let (hosts, origin) = match file.docker_host.take() {
        Some(hosts) if !by_flag => (given(hosts.all()), format!("{place}: docker-host")),
        _ => (flags, "--docker-host".to_owned()),
    };
    let tables = std::mem::take(&mut file.engine);
    let placed = |table: toml::Spanned<engines::Table>| {
        (format!("{place}:{}", line_at(text, table.span().start)), table.into_inner())
    };
    engines::Engines::resolve(hosts, &origin, tables.into_iter().map(placed).collect(), by_flag).map_err(BadConfig)
}

fn services(file: &mut File, place: &str, text: &str) -> Result<Services, BadConfig> {
    let mut services = Vec::new();
    for table in std::mem::take(&mut file.service) {
        let place = format!("{place}:{}", line_at(text, table.span().start));
        let service = table.into_inner().service(&place).map_err(|reason| BadConfig(format!("{place}: {reason}")))?;
        services.push(service);
    }
    Ok(Services { services, deny: file.host.default == services::Default::Deny })
}

fn line_at(text: &str, at: usize) -> usize {
    text.get(..at).unwrap_or_default().matches('\n').count() + 1
}

fn parse(place: &str, text: &str) -> Result<(File, rules::Rules), BadConfig> {
    let mut file: File = toml::from_str(text).map_err(|error| {
        let line = error.span().map_or(1, |span| line_at(text, span.start));
        let reason = error.message().lines().collect::<Vec<_>>().join(" ");
        BadConfig(format!("{place}:{line}: {reason}"))
    })?;
    let mut rules = Vec::new();
    for table in std::mem::take(&mut file.rule) {
        let place = format!("{place}:{}", line_at(text, table.span().start));
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
mod tests;
