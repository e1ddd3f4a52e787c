//! Every kind of network, every AWS client, each in a container of its own, against moto's STS:
//! exactly its own role's credentials and nothing else.

use std::{
    net::SocketAddr,
    process::Stdio,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use futures_util::future::try_join_all;
use metadata_proxy_tests::{
    clients::{Client, ClientReport, Programs},
    host::{ContainerSpec, Daemon, Network, TestHost},
    imds::Imds,
    stage::{self, STS_ADDRESS, STS_ENDPOINT, aws_config_client, client_spec, daemon_options, role_arn},
};

/// A host whose STS is moto's.
struct MotoStage {
    _daemon: Daemon,
    _moto: std::process::Child,
    imds: Imds,
    host: TestHost,
    programs: Programs,
}

impl MotoStage {
    async fn start() -> Result<Self> {
        let programs = Programs::from_env(aws_config_client()?)?;
        let host = TestHost::start().await?;
        let imds = stage::start_imds(&host)?;
        let address: SocketAddr = STS_ADDRESS.parse()?;
        stage::add_address(&host, &address.ip().to_string())?;
        let command = programs.moto(address);
        let (program, arguments) = command.split_first().context("moto's command is empty")?;
        let moto = host
            .command(program)
            .args(arguments)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("start moto")?;
        wait_for(&host, address).await?;
        let mut daemon = host.daemon(daemon_options())?;
        daemon.wait_ready(Duration::from_secs(20)).await?;
        Ok(Self { _daemon: daemon, _moto: moto, imds, host, programs })
    }

    /// Whose credentials moto says these are. It checks no signatures, so the key is enough.
    fn identity_of(&self, access_key: &str) -> Result<String> {
        let credentials = aws_sdk_sts::config::Credentials::new(access_key, "unchecked", None, None, "test");
        let ask = || -> Result<String> {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let config = aws_sdk_sts::Config::builder()
                .behavior_version(aws_sdk_sts::config::BehaviorVersion::latest())
                .region(aws_sdk_sts::config::Region::new("eu-west-1"))
                .endpoint_url(STS_ENDPOINT)
                .credentials_provider(credentials)
                .build();
            let client = aws_sdk_sts::Client::from_conf(config);
            let answer = runtime.block_on(client.get_caller_identity().send())?;
            answer.arn.context("an identity without an ARN")
        };
        self.host.in_netns(ask)?
    }
}

async fn wait_for(host: &TestHost, address: SocketAddr) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(30);
    while host.in_netns(|| std::net::TcpStream::connect(address))?.is_err() {
        ensure!(Instant::now() < deadline, "moto does not answer at {address}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

/// Runs one client in one place, and checks what it got.
async fn gets_its_own_role(stage: &MotoStage, place: &str, network: &Network, client: Client) -> Result<ClientReport> {
    let name = format!("{place}-{}", client.name());
    let role = format!("role-{name}");
    let spec = client_spec(&name, client, &stage.programs, 2, None)
        .network(network.clone())
        .label("metadata-proxy.role", &role_arn(&role));
    let container = stage.host.run(spec).await?;
    let finished = container.wait().await?;
    let report = ClientReport::parse(&finished.stdout).with_context(|| format!("{name}: {}", finished.stderr))?;
    let errors: Vec<&str> = report.errors().collect();
    ensure!(errors.is_empty(), "{name}: {errors:?}");
    ensure!(report.access_keys().count() == 2, "{name}: {report:?}");
    for key in report.access_keys() {
        let id = container.id().get(..12).unwrap_or_default();
        let expected = format!("arn:aws:sts::123456789012:assumed-role/{role}/{name}-{id}");
        let identity = stage.identity_of(key)?;
        ensure!(identity == expected, "{name} got credentials of {identity}, not {expected}");
    }
    container.remove().await?;
    Ok(report)
}

#[tokio::test(flavor = "multi_thread")]
async fn every_client_gets_its_own_role_on_every_network() -> Result<()> {
    let stage = MotoStage::start().await?;
    let custom = stage.host.create_network("custom", false).await?;
    let internal = stage.host.create_network("internal", true).await?;
    let pod = stage.host.run(ContainerSpec::busybox("pod", ["sleep", "600"])).await?;
    let places = [
        ("bridge", Network::Default),
        ("custom", custom),
        ("internal", internal),
        ("none", Network::None),
        ("host", Network::Host),
        // All four clients, each with a role of its own, in one namespace at the same time.
        ("shared", Network::Container(pod.name().to_owned())),
    ];
    for (place, network) in &places {
        let clients = Client::ALL.map(|client| gets_its_own_role(&stage, place, network, client));
        for (client, report) in Client::ALL.into_iter().zip(try_join_all(clients).await?) {
            let times: Vec<String> = report.attempts.iter().map(|a| format!("{:.0} ms", a.ms)).collect();
            eprintln!("{place:<9} {:<11} {:<10} {}", client.name(), report.version, times.join(", "));
        }
    }
    let leaked = stage.imds.credential_requests();
    ensure!(leaked.is_empty(), "the real metadata service was asked for credentials: {leaked:#?}");
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn no_client_finds_credentials_without_a_role() -> Result<()> {
    let stage = MotoStage::start().await?;
    let ask = async |client: Client| -> Result<()> {
        let name = format!("plain-{}", client.name());
        let report = stage::report(&stage.host, client_spec(&name, client, &stage.programs, 1, None)).await?;
        ensure!(report.access_keys().count() == 0 && report.errors().count() == 1, "{name}: {report:?}");
        Ok(())
    };
    try_join_all(Client::ALL.map(ask)).await?;
    ensure!(stage.imds.credential_requests().is_empty(), "the host's role was asked for");
    Ok(())
}
