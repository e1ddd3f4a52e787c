//! The real AWS clients: how each is started inside a container, and what it reports.
//!
//! They run over a read-only view of the host's `/usr`, so an image needs nothing but somewhere to
//! bind it. None is told where the metadata service is: that they find our answers is the point.
//! **So none may ever run where `169.254.169.254` could be somebody's real metadata service.**

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde::Deserialize;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Client {
    Boto3,
    AwsCli,
    /// The AWS SDK for JavaScript v3.
    Js,
    /// The AWS SDK for Rust.
    AwsConfig,
}

/// Where the clients were installed; xtask knows.
#[derive(Clone, Debug)]
pub struct Programs {
    /// The virtual environment with boto3, the AWS CLI and moto.
    pub python: PathBuf,
    /// The folder whose `node_modules` has the JavaScript SDK.
    pub js: PathBuf,
    /// The `aws-config-client` program of this package.
    pub aws_config: PathBuf,
}

/// How to start one client in a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invocation {
    pub argv: Vec<String>,
    /// To be bound read-only, each at its own path, beside the host's `/usr`.
    pub read_only: Vec<PathBuf>,
    /// `KEY=VALUE`.
    pub env: Vec<String>,
}

/// The one line that each client prints.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct ClientReport {
    pub client: String,
    pub version: String,
    pub attempts: Vec<Attempt>,
    /// What STS says about the credentials, if the client was to ask and got any.
    pub identity: Option<String>,
    pub identity_error: Option<String>,
}

/// One load of credentials by a provider that remembers nothing.
#[derive(Clone, Debug, Deserialize, PartialEq)]
pub struct Attempt {
    pub access_key: Option<String>,
    /// How long the load took; for the AWS CLI with the start of the program.
    pub ms: f64,
    /// Only boto3 tells.
    pub role_name: Option<String>,
    pub error: Option<String>,
}

impl Programs {
    /// The installed clients that xtask names in the environment.
    pub fn from_env(aws_config_client: impl Into<PathBuf>) -> anyhow::Result<Self> {
        let folder = |variable: &str| {
            let path = std::env::var_os(variable).map(PathBuf::from);
            path.with_context(|| format!("{variable} is not set; start this with `cargo xtask test`"))
        };
        Ok(Self {
            python: folder("METADATA_PROXY_PYTHON_CLIENTS")?,
            js: folder("METADATA_PROXY_JS_CLIENTS")?,
            aws_config: aws_config_client.into(),
        })
    }

    /// moto's server, whose STS is the other real-wire-protocol STS beside ours: to be run by the test
    /// host in the daemon's namespace.
    ///
    /// The daemon needs `AWS_ENDPOINT_URL_STS=http://ADDRESS`, a region and **any** static key pair:
    /// moto checks no signatures, and takes callers it does not know for one user of its own. It
    /// answers once its port accepts connections, after about half a second. Unlike the real one it
    /// writes expirations with a fraction of a second and every partition as `aws`.
    pub fn moto(&self, address: SocketAddr) -> Vec<String> {
        let server = self.python.join("bin/moto_server").display().to_string();
        let (host, port) = (address.ip().to_string(), address.port().to_string());
        [server, "-H".to_owned(), host, "-p".to_owned(), port].into()
    }
}

impl Client {
    pub const ALL: [Self; 4] = [Self::Boto3, Self::AwsCli, Self::Js, Self::AwsConfig];

    /// As it is called in its own report.
    pub fn name(self) -> &'static str {
        match self {
            Self::Boto3 => "boto3",
            Self::AwsCli => "aws-cli",
            Self::Js => "js",
            Self::AwsConfig => "aws-config",
        }
    }

    /// Loads credentials `attempts` times and, with an STS endpoint, asks whose they are.
    pub fn invocation(self, programs: &Programs, attempts: u32, sts_endpoint: Option<&str>) -> Invocation {
        let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients");
        let text = |path: &Path| path.display().to_string();
        let python = |program: &str| text(&programs.python.join("bin").join(program));
        let script = |name: &str| text(&scripts.join(name));
        let node = ["/usr/bin/node", "/usr/local/bin/node"].into_iter().find(|node| Path::new(node).exists());
        let (mut argv, installed) = match self {
            Self::Boto3 => (vec![python("python3"), script("boto3-client.py")], Some(&programs.python)),
            Self::AwsCli => {
                let shell = "/usr/bin/sh".to_owned();
                (vec![shell, script("aws-cli-client.sh"), python("aws")], Some(&programs.python))
            }
            Self::Js => {
                let node = node.unwrap_or("/usr/bin/node").to_owned();
                (vec![node, script("js-client.mjs")], Some(&programs.js))
            }
            Self::AwsConfig => (vec![text(&programs.aws_config)], None),
        };
        argv.push(attempts.to_string());

        let read_only = match installed {
            Some(installed) => vec![installed.clone(), scripts],
            None => vec![programs.aws_config.clone()],
        };
        let mut env = vec![
            "HOME=/tmp".to_owned(),
            "PATH=/usr/bin:/bin".to_owned(),
            "AWS_REGION=eu-west-1".to_owned(),
            // The name that botocore and the AWS CLI read.
            "AWS_DEFAULT_REGION=eu-west-1".to_owned(),
            "PYTHONDONTWRITEBYTECODE=1".to_owned(),
            format!("NODE_PATH={}", text(&programs.js.join("node_modules"))),
        ];
        env.extend(sts_endpoint.map(|endpoint| format!("STS_ENDPOINT={endpoint}")));
        Invocation { argv, read_only, env }
    }
}

impl ClientReport {
    /// Finds the report in what a client wrote to its standard output.
    pub fn parse(stdout: &str) -> anyhow::Result<Self> {
        let line = stdout.lines().rev().find(|line| line.starts_with('{'));
        let line = line.with_context(|| format!("no report in the client's output: {stdout:?}"))?;
        serde_json::from_str(line).with_context(|| format!("read the client's report: {line}"))
    }

    /// The access keys it got, one for each attempt that succeeded.
    pub fn access_keys(&self) -> impl Iterator<Item = &str> {
        self.attempts.iter().filter_map(|attempt| attempt.access_key.as_deref())
    }

    /// What went wrong, in any attempt or afterwards.
    pub fn errors(&self) -> impl Iterator<Item = &str> {
        let attempts = self.attempts.iter().filter_map(|attempt| attempt.error.as_deref());
        attempts.chain(self.identity_error.as_deref())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_is_found_among_other_output() {
        let output = "warning: something\n{\"client\":\"aws-cli\",\"version\":\"1\",\"attempts\":[\
                      {\"access_key\":\"ASIAX\",\"ms\":12},{\"error\":\"none\",\"ms\":1.5}]}\n";
        let report = ClientReport::parse(output).unwrap();
        assert_eq!(report.access_keys().collect::<Vec<_>>(), ["ASIAX"]);
        assert_eq!(report.errors().collect::<Vec<_>>(), ["none"]);
        assert_eq!(report.identity, None);
        assert!(ClientReport::parse("Traceback").is_err());
    }
}
