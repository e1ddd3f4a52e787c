//! A test host with the stand-ins and the daemon on it: what most tests begin with.

use std::{fs, ops::Deref, path::PathBuf, time::Duration};

use anyhow::{Context as _, Result, ensure};
use bollard::{models::ContainerConfig, query_parameters::CommitContainerOptionsBuilder};

use crate::{
    clients::{Client, ClientReport, Loads, Programs},
    host::{Container, ContainerSpec, Daemon, DaemonOptions, METADATA_V4, METADATA_V6, TestHost},
    imds::Imds,
    sts::{BASE_ACCESS_KEY, BASE_SECRET_KEY, Sts},
};

/// Where the stand-in for STS listens: an address of TEST-NET-1 (RFC 5737) on the host's loopback,
/// which containers reach by their default route.
pub const STS_ADDRESS: &str = "192.0.2.1:4566";
pub const STS_ENDPOINT: &str = "http://192.0.2.1:4566";

const READY: Duration = Duration::from_secs(20);

/// The ARN of a role in the account of the tests.
pub fn role_arn(name: &str) -> String {
    format!("arn:aws:iam::123456789012:role/{name}")
}

/// The daemon on a host with stand-ins.
pub struct Stage {
    // In the order of their end.
    pub daemon: Daemon,
    pub sts: Sts,
    pub imds: Imds,
    pub host: TestHost,
}

impl Deref for Stage {
    type Target = TestHost;

    fn deref(&self) -> &TestHost {
        &self.host
    }
}

impl Stage {
    /// With the defaults, and ready.
    pub async fn start() -> Result<Self> {
        Self::on(TestHost::start().await?, daemon_options()).await
    }

    pub async fn start_with(options: DaemonOptions) -> Result<Self> {
        Self::on(TestHost::start().await?, options).await
    }

    pub async fn on(host: TestHost, options: DaemonOptions) -> Result<Self> {
        let imds = start_imds(&host)?;
        let sts = start_sts(&host)?;
        let mut daemon = host.daemon(options)?;
        daemon.wait_ready(READY).await?;
        Ok(Self { daemon, sts, imds, host })
    }

    /// With a configuration file.
    pub async fn configured(options: DaemonOptions, config: &str) -> Result<Self> {
        let host = TestHost::start().await?;
        let options = with_config(&host, options, config)?;
        Self::on(host, options).await
    }

    /// Ends the daemon and starts another, as an operator's restart.
    pub async fn replace_daemon(&mut self, options: DaemonOptions) -> Result<()> {
        self.daemon.terminate(Duration::from_secs(15)).await?;
        self.daemon = self.host.daemon(options)?;
        self.daemon.wait_ready(READY).await
    }

    /// The role that an access key belongs to, by its bare name.
    pub fn role_of(&self, access_key: &str) -> Option<String> {
        let issued = self.sts.issued(access_key)?;
        issued.role_arn.rsplit('/').next().map(str::to_owned)
    }

    /// Nothing that has to do with credentials has reached the real service.
    /// What a process of that container's is told, which no engine has to start: in its cgroup and its network. It waits for
    /// `limit` seconds.
    pub fn role_list_of(&self, pid: u32, limit: u32) -> Result<String> {
        const ROLES: &str = "http://169.254.169.254/latest/meta-data/iam/security-credentials/";
        let cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        let cgroup = cgroup.lines().find_map(|line| line.strip_prefix("0::")).context("no cgroup")?;
        let join = format!(
            "echo $$ > /sys/fs/cgroup{cgroup}/cgroup.procs &&
             exec nsenter --net=/proc/{pid}/ns/net curl -s -m {limit} {ROLES}"
        );
        let output = self.command("sh").args(["-c", &join]).output()?;
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    pub fn assert_no_leak(&self) -> Result<()> {
        let leaked = self.imds.credential_requests();
        ensure!(leaked.is_empty(), "the real metadata service was asked for credentials: {leaked:#?}");
        Ok(())
    }

    /// Runs to its end, and on failure tells what the daemon said.
    pub async fn finish(&self, container: &Container) -> Result<String> {
        let finished = container.wait().await?;
        finished.success().with_context(|| format!("the daemon's log:\n{}", self.daemon.log().unwrap_or_default()))
    }
}

pub fn start_imds(host: &TestHost) -> Result<Imds> {
    let listener = |address: &str| host.bind_tcp(&format!("{address}:80"));
    Imds::start(vec![listener(METADATA_V4)?, listener(&format!("[{METADATA_V6}]"))?])
}

pub fn start_sts(host: &TestHost) -> Result<Sts> {
    add_address(host, STS_ADDRESS.split(':').next().unwrap_or_default())?;
    Sts::start(host.bind_tcp(STS_ADDRESS)?)
}

/// An address that containers with a route reach the host by.
pub fn add_address(host: &TestHost, address: &str) -> Result<()> {
    let status = host.command("ip").args(["address", "add", &format!("{address}/32"), "dev", "lo"]).status()?;
    ensure!(status.success(), "cannot add {address} to the test host's loopback");
    Ok(())
}

/// The daemon with static keys, at the stand-in for STS.
pub fn daemon_options() -> DaemonOptions {
    DaemonOptions::default()
        .env("AWS_ENDPOINT_URL_STS", STS_ENDPOINT)
        .env("AWS_REGION", "eu-west-1")
        .env("AWS_ACCESS_KEY_ID", BASE_ACCESS_KEY)
        .env("AWS_SECRET_ACCESS_KEY", BASE_SECRET_KEY)
        .env("METADATA_PROXY_LOG", "info,metadata_proxy=debug")
}

/// An image that names a role for whoever starts it.
pub async fn image_with_a_role(host: &TestHost, name: &str, role: &str) -> Result<String> {
    image_with(host, name, &format!("LABEL metadata-proxy.role={0}\nENV IAM_ROLE={0}", role_arn(role))).await
}

/// An image with these lines of a Dockerfile.
pub async fn image_with(host: &TestHost, name: &str, changes: &str) -> Result<String> {
    let base = host.run(ContainerSpec::resident("base")).await?;
    let image = commit(host, &base, name, changes).await?;
    base.remove().await?;
    Ok(image)
}

/// An image of what a container has become, as `docker commit` makes it: with the container's labels and variables.
pub async fn commit(host: &TestHost, container: &Container, name: &str, changes: &str) -> Result<String> {
    let options = CommitContainerOptionsBuilder::new().container(container.id()).repo(name).changes(changes).build();
    Ok(host.docker().commit_container(options, ContainerConfig::default()).await.context("commit")?.id)
}

/// A container of it that does nothing by itself.
pub fn of_image(image: &str, name: &str) -> ContainerSpec {
    let mut spec = ContainerSpec::resident(name);
    // The test host's image needs its binds, which go by the name of the image.
    spec.binds = vec!["/usr:/usr:ro".into()];
    ContainerSpec { image: image.into(), ..spec }
}

/// The host's configuration file.
pub fn config_file(host: &TestHost) -> PathBuf {
    host.directory().join("config.toml")
}

/// Writes it for a daemon that is to be started with it.
pub fn with_config(host: &TestHost, options: DaemonOptions, config: &str) -> Result<DaemonOptions> {
    let file = config_file(host);
    fs::write(&file, config).with_context(|| format!("write {}", file.display()))?;
    Ok(options.arg("--config").arg(file.display().to_string()))
}

/// The `aws-config-client` beside the running program, or one folder up from a test.
pub fn aws_config_client() -> Result<PathBuf> {
    let own = std::env::current_exe().context("find the running program")?;
    let folders = own.ancestors().skip(1).take(2);
    let found = folders.map(|folder| folder.join("aws-config-client")).find(|client| client.exists());
    found.context("aws-config-client is not built: cargo build -p metadata-proxy-tests --bins")
}

/// A container in which this client loads credentials.
pub fn client_spec(
    name: &str,
    client: Client,
    programs: &Programs,
    loads: impl Into<Loads>,
    sts_endpoint: Option<&str>,
) -> ContainerSpec {
    let invocation = client.invocation(programs, loads, sts_endpoint);
    let mut spec = ContainerSpec::on_host(name, invocation.argv);
    spec.root = invocation.root;
    for path in invocation.read_only {
        spec = spec.bind(format!("{0}:{0}:ro", path.display()));
    }
    for variable in &invocation.env {
        if let Some((name, value)) = variable.split_once('=') {
            spec = spec.env(name, value);
        }
    }
    spec
}

/// Runs a client's container to its end.
pub async fn report(host: &TestHost, spec: ContainerSpec) -> Result<ClientReport> {
    let container = host.run(spec).await?;
    let finished = container.wait().await?;
    container.remove().await?;
    ClientReport::parse(&finished.stdout)
        .with_context(|| format!("exit status {}; standard error: {}", finished.exit_code, finished.stderr))
}
