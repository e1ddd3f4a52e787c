//! The real AWS clients: how each is started inside a container, and what it reports.
//!
//! They run over a read-only view of the host's `/usr`, or over a root file system that xtask has made of Debian's packages. None is told where
//! the metadata service is: that they find our answers is the point. **So none may ever run where `169.254.169.254` could be somebody's real
//! metadata service.**

mod list;
mod living;
pub mod recording;
mod report;
pub mod scenarios;
pub mod sniffer;
pub mod table;

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Context as _;

pub use self::report::{Attempt, ClientReport};

/// A program that finds credentials by itself.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Client {
    pub name: &'static str,
    /// What it is called by those who use it.
    pub title: &'static str,
    /// In braces: a folder of [`Programs`], or where the scripts are.
    words: &'static [&'static str],
    over: Over,
    pub life: Life,
    /// Of its role sessions while it lives on, where those of a few seconds are too short for it.
    pub(crate) session: Option<Duration>,
}

/// What its container is started over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Over {
    Machine,
    /// The root file system among the further clients.
    Root,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Life {
    /// Run anew for each request.
    Short,
    /// Keeps credentials until their end comes near, and then asks again.
    Long,
    /// The same, but it goes on for minutes with what is near its end or past it, so its clock is made to run fast.
    LongByClock,
    /// The same, but it trusts its own clock about session tokens: when one is refused it asks for no other.
    LongTrusting,
    /// Asks again after minutes by its own clock, whatever the credentials say, and takes none that are past by it: its
    /// clock runs as fast, but is days behind.
    LongByPeriod,
}

/// Where the clients were installed; xtask knows.
#[derive(Clone, Debug, Default)]
pub struct Programs {
    /// The virtual environment with boto3, the AWS CLI and moto.
    pub python: PathBuf,
    /// The folder whose `node_modules` has the JavaScript SDK.
    pub js: PathBuf,
    /// The `aws-config-client` program of this package.
    pub aws_config: PathBuf,
    /// What the clients need that are not in [`Client::ALL`]; empty where those are not to run.
    pub further: PathBuf,
}

/// How to start one client in a container.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Invocation {
    pub argv: Vec<String>,
    /// To be bound read-only, each at its own path.
    pub read_only: Vec<PathBuf>,
    /// `KEY=VALUE`.
    pub env: Vec<String>,
    /// Instead of the host's file system.
    pub root: Option<PathBuf>,
}

/// How long a client is to go on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loads {
    /// So many loads of credentials, each by a provider that remembers nothing.
    Fresh(u32),
    /// One provider is asked again and again until the container ends, and what changes is told.
    Watch,
}

impl From<u32> for Loads {
    fn from(loads: u32) -> Self {
        Self::Fresh(loads)
    }
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
            further: std::env::var_os("METADATA_PROXY_FURTHER_CLIENTS").map(PathBuf::from).unwrap_or_default(),
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

    /// The library that shortens the clock of a host process.
    pub(crate) fn faketime(&self) -> String {
        format!("{}/clock/usr/$LIB/faketime/libfaketimeMT.so.1", self.further.display())
    }
}

impl Client {
    /// Those that need nothing but the folders of Python and JavaScript; they run over the machine's `/usr`.
    pub const ALL: [Self; 4] = [Self::BOTO3, Self::AWS_CLI, Self::JS, Self::AWS_CONFIG];

    pub fn find(name: &str) -> anyhow::Result<Self> {
        let every: Vec<Self> = Self::every().collect();
        let names = || every.iter().map(|client| client.name).collect::<Vec<_>>().join(", ");
        let found = every.iter().find(|client| client.name == name).copied();
        found.with_context(|| format!("there is no client {name}, but: {}", names()))
    }

    /// As it is called in tables and in the names of containers.
    pub fn name(self) -> &'static str {
        self.name
    }

    /// Loads credentials and, with an STS endpoint, asks whose they are.
    pub fn invocation(self, programs: &Programs, loads: impl Into<Loads>, sts_endpoint: Option<&str>) -> Invocation {
        let scripts = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients");
        let text = |path: &Path| path.display().to_string();
        let nodes = ["/usr/bin/node", "/usr/local/bin/node"];
        let node = nodes.into_iter().find(|node| Path::new(node).exists()).unwrap_or(nodes[0]);
        let folders = [
            ("{scripts}", &scripts),
            ("{python}", &programs.python),
            ("{js}", &programs.js),
            ("{aws-config}", &programs.aws_config),
            ("{further}", &programs.further),
        ];
        let used = folders.iter().filter(|(place, _)| self.words.iter().any(|word| word.contains(place)));
        let read_only = used.map(|(_, folder)| (*folder).clone()).collect();
        let filled = |word: &&str| {
            let word = word.replace("{node}", node);
            folders.iter().fold(word, |word, (place, folder)| word.replace(place, &text(folder)))
        };
        let mut argv: Vec<String> = self.words.iter().map(filled).collect();
        argv.push(match loads.into() {
            Loads::Fresh(loads) => loads.to_string(),
            Loads::Watch => "watch".to_owned(),
        });
        let mut env: Vec<String> = [
            "HOME=/tmp",
            "PATH=/usr/bin:/bin",
            "AWS_REGION=eu-west-1",
            // The name that botocore and the AWS CLI read.
            "AWS_DEFAULT_REGION=eu-west-1",
            "PYTHONDONTWRITEBYTECODE=1",
        ]
        .map(str::to_owned)
        .into();
        env.extend(sts_endpoint.map(|endpoint| format!("STS_ENDPOINT={endpoint}")));
        let root = (self.over == Over::Root).then(|| programs.further.join("root"));
        Invocation { argv, read_only, env, root }
    }

    /// The environment in which its clock is ahead, or behind, by what the file says.
    pub(crate) fn clock(self, programs: &Programs, file: &Path) -> Vec<(String, String)> {
        let library = match self.over {
            Over::Machine => programs.faketime(),
            Over::Root => "/usr/$LIB/faketime/libfaketimeMT.so.1".to_owned(),
        };
        faketime(&library, [("FAKETIME_TIMESTAMP_FILE", &*file.to_string_lossy()), ("FAKETIME_NO_CACHE", "1")])
    }

    /// Whether the library that changes its clock is the machine's.
    pub(crate) fn is_over_machine(self) -> bool {
        self.over == Over::Machine
    }
}

/// The environment in which dates are others; what measures time is left alone, so that limits and pauses keep their length.
pub(crate) fn faketime<const N: usize>(library: &str, what: [(&str, &str); N]) -> Vec<(String, String)> {
    let pairs = [("LD_PRELOAD", library), ("FAKETIME_DONT_FAKE_MONOTONIC", "1")].into_iter().chain(what);
    pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
}
