//! The command line: flags and their environment variables. What they mean together is `config`'s.

use std::path::PathBuf;

use clap::{
    Args, Parser, Subcommand, ValueEnum,
    builder::{OsStringValueParser, TypedValueParser},
};

/// Gives every Docker container on this host its own IAM role.
///
/// Connections of containers to the EC2 instance metadata service (169.254.169.254:80 and
/// [fd00:ec2::254]:80) are redirected by eBPF to this daemon, which assumes the container's role at
/// STS and answers as the real service would. Host processes keep the real service.
#[derive(Debug, Parser)]
#[command(version, disable_help_subcommand = true)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Intercept and serve until SIGTERM or SIGINT.
    ///
    /// When it ends, the interception stays: containers get connection errors, never the real
    /// service, until the daemon runs again or `detach` is called. So it is where the configuration
    /// is wrong.
    #[command(after_help = RUN_HELP)]
    Run(Run),
    /// Intercept, and leave the rest to `run`: containers get connection errors until then.
    ///
    /// For the first moments of a boot. Needs no configuration, no engine, no network and no AWS;
    /// where the programs are attached already, it puts its own in their place. Of a configuration
    /// file it reads `cgroup` and `bpffs` only, whatever else is wrong with it.
    ///
    /// Exit status: 0 if it is done, 1 if this host lacks something that is needed.
    Attach {
        #[command(flatten)]
        config: ConfigFile,
        #[command(flatten)]
        place: Place,
    },
    /// Say whether this host has what `run` with the same flags needs, and what to do where not.
    ///
    /// Exit status: 0 if it has, 64 for bad configuration, 1 if something is missing.
    Check {
        #[command(flatten)]
        run: Run,
        /// Only whether flags, environment and file are right: asks neither kernel, Docker nor AWS, and needs no root
        #[arg(long)]
        config_only: bool,
    },
    /// List the containers that the running daemon knows: role, credentials, requests.
    Ps {
        #[command(flatten)]
        socket: AdminSocket,
        /// Everything that is known, as JSON
        #[arg(long)]
        json: bool,
        /// Also who has asked and is no container that an engine has told of; with --json, only these
        #[arg(long)]
        all: bool,
    },
    /// Say how a container came to its role, and how its credentials stand; of anything else, why it has none.
    Explain {
        #[command(flatten)]
        socket: AdminSocket,
        /// Name, or the beginning of the id; also `pid:N` for whatever a process is in, and `cgroup:ID`
        container: String,
    },
    /// Remove all BPF programs, links and maps that `run` has left.
    ///
    /// From then on containers reach the real service. Does nothing where nothing is left. Of a
    /// configuration file it reads `bpffs` only.
    Detach {
        #[command(flatten)]
        config: ConfigFile,
        #[command(flatten)]
        bpffs: Bpffs,
        #[command(flatten)]
        socket: AdminSocket,
    },
}

const RUN_HELP: &str = "\
Role of a container, first found: label metadata-proxy.role, label com.swipely.iam-docker.iam-profile,
environment IAM_ROLE, IAM_PROFILE, --default-role. None: the container sees no role.

Credentials for STS come from the standard AWS chain: AWS_PROFILE, the shared files, keys in the
environment, or the host's own instance role; AWS_REGION and AWS_ENDPOINT_URL_STS are honoured.

Exit status: 0 after SIGTERM or SIGINT, 64 for bad configuration, 1 for anything else.";

#[derive(Debug, Clone, Args)]
pub(crate) struct Run {
    /// Docker engine, or podman's service: unix:///path or tcp://host:port; may be given again
    /// [default: unix:///var/run/docker.sock and unix:///run/podman/podman.sock, where they are]
    #[arg(long, env = "DOCKER_HOST", value_name = "URL", value_delimiter = ',')]
    pub(crate) docker_host: Vec<String>,

    /// Role of containers that name none: NAME, PATH/NAME, NAME@ACCOUNT or an ARN [default: no role]
    #[arg(long, env = "DEFAULT_IAM_ROLE", value_name = "ROLE")]
    pub(crate) default_role: Option<String>,

    /// What roles named without an ARN are appended to, such as
    /// arn:aws:iam::123456789012:role/containers/ [default: the daemon's own account]
    #[arg(long, env = "METADATA_PROXY_ROLE_BASE", value_name = "ARN")]
    pub(crate) role_base: Option<String>,

    /// Template of session names [default: {container.name}-{container.id:12}]
    #[arg(long, env = "METADATA_PROXY_SESSION_NAME", value_name = "TEMPLATE")]
    pub(crate) session_name: Option<String>,

    /// Let images name roles and options of containers by their own labels and environment
    #[arg(long, env = "METADATA_PROXY_TRUST_IMAGE_METADATA", value_parser = switch)]
    pub(crate) trust_image_metadata: bool,

    /// The real metadata service, for everything but credentials [default: http://169.254.169.254]
    #[arg(long, env = "METADATA_PROXY_IMDS_ENDPOINT", value_name = "URL")]
    pub(crate) imds_endpoint: Option<String>,

    /// Serve credentials only; nothing comes from the real metadata service
    #[arg(long, env = "METADATA_PROXY_DISABLE_UPSTREAM", value_parser = switch)]
    pub(crate) disable_upstream: bool,

    /// Play an instance instead of asking the real metadata service, for machines off EC2; what it
    /// says of itself is set by [simulate] in the configuration file
    #[arg(long, env = "METADATA_PROXY_SIMULATE", value_parser = switch)]
    pub(crate) simulate: bool,

    /// Refuse requests without a session token (IMDSv1)
    #[arg(long, env = "METADATA_PROXY_REQUIRE_IMDSV2", value_parser = switch)]
    pub(crate) require_imdsv2: bool,

    /// Let containers read the host's user-data
    #[arg(long, env = "METADATA_PROXY_ALLOW_USER_DATA", value_parser = switch)]
    pub(crate) allow_user_data: bool,

    /// Let the processes of this cgroup (and below) keep the real service; may be given again
    #[arg(long, env = "METADATA_PROXY_EXEMPT_CGROUP", value_name = "PATH", value_delimiter = ',')]
    pub(crate) exempt_cgroup: Vec<PathBuf>,

    #[command(flatten)]
    pub(crate) config: ConfigFile,

    #[command(flatten)]
    pub(crate) place: Place,

    #[command(flatten)]
    pub(crate) admin_socket: AdminSocket,

    /// Serve Prometheus metrics at http://ADDRESS/metrics [default: nowhere but the admin socket]
    #[arg(long, env = "METADATA_PROXY_METRICS_ADDRESS", value_name = "ADDRESS")]
    pub(crate) metrics_address: Option<String>,

    /// Record each hand-out of credentials as a line of JSON in this file, which SIGHUP opens anew; `-` is standard output
    /// [default: only as lines of the log]
    #[arg(long, env = "METADATA_PROXY_AUDIT_LOG", value_name = "PATH")]
    pub(crate) audit_log: Option<String>,

    /// Form of the log on standard error [default: text]
    #[arg(long, env = "METADATA_PROXY_LOG_FORMAT", value_enum)]
    pub(crate) log_format: Option<LogFormat>,

    /// What to log: error, warn, info, debug, or a tracing filter; debug includes the BPF programs
    /// [default: info]
    #[arg(long, env = "METADATA_PROXY_LOG", value_name = "FILTER")]
    pub(crate) log: Option<String>,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct ConfigFile {
    /// Configuration file, TOML; flags and environment win over it
    #[arg(long = "config", env = "METADATA_PROXY_CONFIG", value_parser = path(), value_name = "FILE.toml")]
    pub(crate) file: Option<PathBuf>,
}

/// Where the programs are attached and pinned.
#[derive(Debug, Clone, Args)]
pub(crate) struct Place {
    /// Intercept below this cgroup only, in whatever namespaces the daemon is [default: the root of the cgroup2
    /// hierarchy, and the host's namespaces only]
    #[arg(long, env = "METADATA_PROXY_CGROUP", value_parser = path(), value_name = "PATH")]
    pub(crate) cgroup: Option<PathBuf>,

    #[command(flatten)]
    pub(crate) bpffs: Bpffs,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct Bpffs {
    /// Mounted bpffs to pin programs and maps in [default: /sys/fs/bpf]
    #[arg(long = "bpffs", env = "METADATA_PROXY_BPFFS", value_parser = path(), value_name = "PATH")]
    pub(crate) path: Option<PathBuf>,
}

#[derive(Debug, Clone, Args)]
pub(crate) struct AdminSocket {
    /// Unix socket by which root asks the running daemon [default: /run/metadata-proxy/admin.sock]
    #[arg(long = "admin-socket", env = "METADATA_PROXY_ADMIN_SOCKET", value_parser = path(), value_name = "PATH")]
    given: Option<PathBuf>,
}

impl AdminSocket {
    pub(crate) fn path(&self) -> PathBuf {
        let given = self.given.as_ref().filter(|path| !path.as_os_str().is_empty());
        given.cloned().unwrap_or_else(|| "/run/metadata-proxy/admin.sock".into())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum LogFormat {
    Text,
    Json,
}

/// What a switch's environment variable says. Empty is as good as unset, as compose files have it.
fn switch(value: &str) -> Result<bool, &'static str> {
    match value.to_ascii_lowercase().as_str() {
        "1" | "true" | "yes" | "on" => Ok(true),
        "" | "0" | "false" | "no" | "off" => Ok(false),
        _ => Err("expected true or false"),
    }
}

/// Unlike clap's own, takes an empty one, for `config` to treat as unset.
fn path() -> impl TypedValueParser<Value = PathBuf> {
    OsStringValueParser::new().map(PathBuf::from)
}
