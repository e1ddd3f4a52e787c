//! Containers that come and go, all of them asking: each gets its own role, at once, and never another's.
#![expect(clippy::print_stdout, reason = "the figures of a run are worth reading")]

use std::{
    collections::{HashMap, HashSet},
    fs,
    os::unix::fs::DirEntryExt as _,
    path::Path,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use bollard::{
    models::{Ipam, IpamConfig, NetworkCreateRequest},
    query_parameters::InspectContainerOptions,
};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use metadata_proxy_tests::{
    host::{Container, ContainerSpec, Network},
    stage::{Stage, role_arn},
};
use tokio::time::sleep;

const ROLE_LABEL: &str = "metadata-proxy.role";
const ROLE_LIST: &str = "http://169.254.169.254/latest/meta-data/iam/security-credentials/";

/// Asks for the role list and the credentials until it is killed, with a session token in every other round, each request on a connection of its own.
/// Prints `<kind> <status> <milliseconds> <what it got>` for each. Without any module that is slow to import.
const ASKER: &str = r#"
import _socket, sys, time
PATH = "/latest/meta-data/iam/security-credentials/"
def ask(kind, method, path, header=""):
    begin = time.monotonic()
    try:
        s = _socket.socket()
        s.settimeout(5)
        s.connect(("169.254.169.254", 80))
        s.send(("%s %s HTTP/1.1\r\nHost: 169.254.169.254\r\nConnection: close\r\n%s\r\n" % (method, path, header)).encode())
        data = b""
        while part := s.recv(65536):
            data += part
        s.close()
        head, _, body = data.decode().partition("\r\n\r\n")
        status = head.split()[1]
    except Exception as e:
        status, body = "0", repr(e)
    ms = (time.monotonic() - begin) * 1000
    shown = body
    if kind == "key" and '"AccessKeyId" : "' in body:
        shown = body.split('"AccessKeyId" : "')[1].split('"')[0]
    if kind == "token":
        shown = "-"
    print(kind, status, "%.2f" % ms, shown.replace("\n", " "), flush=True)
    return body
turn = int(sys.argv[1])
while True:
    header = ""
    if turn % 2:
        header = "X-aws-ec2-metadata-token: %s\r\n" % ask("token", "PUT", "/latest/api/token", "X-aws-ec2-metadata-token-ttl-seconds: 60\r\n")
    role = ask("list", "GET", PATH, header)
    ask("key", "GET", PATH + role, header)
    turn += 1
    time.sleep(0.05)
"#;

/// Prints the keys of each of these pinned maps on a line; `bpftool` need not be there.
const LIST_KEYS: &str = r#"
import ctypes, glob, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
BPF, OBJ_GET, GET_NEXT_KEY = 321, 7, 4
def bpf(command, attributes):
    buffer = ctypes.create_string_buffer(attributes, 128)
    return libc.syscall(BPF, command, buffer, 128)
for name in sys.argv[1:]:
    [path] = glob.glob("/sys/fs/bpf/metadata-proxy/v*/maps/" + name)
    path = ctypes.create_string_buffer(path.encode())
    fd = bpf(OBJ_GET, struct.pack("QII", ctypes.addressof(path), 0, 0))
    assert fd >= 0, ctypes.get_errno()
    keys, key, following = [], None, ctypes.create_string_buffer(8)
    while bpf(GET_NEXT_KEY, struct.pack("IIQQ", fd, 0, ctypes.addressof(key) if key else 0, ctypes.addressof(following))) == 0:
        keys.append(struct.unpack("Q", following.raw[:8])[0])
        key = ctypes.create_string_buffer(following.raw[:8], 8)
    print(*keys)
"#;

/// What one container did.
struct Life {
    name: String,
    id: String,
    role: usize,
    address: Option<String>,
    starts: usize,
    /// The shortest of its lives.
    lived: Duration,
    output: String,
}

/// Asking times of all containers, in milliseconds.
#[derive(Default)]
struct Figures {
    first: Vec<f64>,
    later: Vec<f64>,
    keys: usize,
    /// Lived long enough for one, and got none.
    unserved: usize,
}

/// A random plan for one container.
struct Plan {
    number: usize,
    role: usize,
    network: Network,
    life: Duration,
    restarted: bool,
}

/// splitmix64: the same run for the same seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mixed = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

const CONTAINERS: usize = 200;
const ROLES: u64 = 20;
const AT_A_TIME: usize = 10;
/// Addresses of the small network, without those of the network, its broadcast and its gateway.
const SMALL_NETWORK: (&str, usize) = ("172.31.7.0/28", 13);
/// Whoever lives that long has been served, starting Python included, unless the machine is very busy.
const LONG_ENOUGH: Duration = Duration::from_millis(1500);

fn role(number: usize) -> String {
    role_arn(&format!("churn-{number}"))
}

fn asker(name: &str, number: usize, own_role: usize, network: Network) -> ContainerSpec {
    let turn = number.to_string();
    ContainerSpec::on_host(name, ["/usr/bin/python3", "-I", "-S", "-c", ASKER, turn.as_str()])
        .label(ROLE_LABEL, &role(own_role))
        .network(network)
}

async fn small_network(stage: &Stage) -> Result<Network> {
    let config = IpamConfig { subnet: Some(SMALL_NETWORK.0.into()), ..Default::default() };
    let ipam = Ipam { config: Some(vec![config]), ..Default::default() };
    let request = NetworkCreateRequest { name: "small".into(), ipam: Some(ipam), ..Default::default() };
    stage.docker().create_network(request).await.context("creating the small network")?;
    Ok(Network::Named("small".into()))
}

async fn address(stage: &Stage, container: &Container) -> Result<Option<String>> {
    let found = stage.docker().inspect_container(container.id(), None::<InspectContainerOptions>).await?;
    let networks = found.network_settings.and_then(|settings| settings.networks).unwrap_or_default();
    let small = networks.into_iter().find(|(name, _)| name == "small").and_then(|(_, endpoint)| endpoint.ip_address);
    Ok(small.filter(|address| !address.is_empty()))
}

async fn live(stage: &Stage, plan: Plan) -> Result<Life> {
    let name = format!("churn-{}", plan.number);
    let container = stage.run(asker(&name, plan.number, plan.role, plan.network)).await?;
    let begin = Instant::now();
    let address = address(stage, &container).await?;
    sleep(plan.life).await;
    let mut lived = begin.elapsed();
    container.stop().await?;
    let mut starts = 1;
    if plan.restarted {
        container.start().await?;
        let begin = Instant::now();
        sleep(plan.life).await;
        lived = lived.min(begin.elapsed());
        container.stop().await?;
        starts += 1;
    }
    let (output, errors) = container.output().await?;
    ensure!(errors.is_empty(), "{name}: {errors}");
    container.remove().await?;
    Ok(Life { name, id: container.id().into(), role: plan.role, address, starts, lived, output })
}

impl Figures {
    /// Whether all that this container got was its own.
    fn check(&mut self, stage: &Stage, life: &Life) -> Result<()> {
        let own_role = role(life.role);
        let session = format!("{}-{}", life.name, &life.id[..12]);
        let mut served = 0;
        for (number, line) in life.output.lines().enumerate() {
            let wrong = || format!("{} ({own_role}), line {number}: {line}", life.name);
            let mut fields = line.splitn(4, ' ');
            let (kind, status) = (fields.next().with_context(wrong)?, fields.next().with_context(wrong)?);
            let (ms, got) = (fields.next().with_context(wrong)?, fields.next().with_context(wrong)?);
            ensure!(status == "200", wrong());
            match kind {
                "token" => {}
                "list" => ensure!(got == own_role.rsplit('/').next().unwrap_or_default(), wrong()),
                "key" => {
                    let issued = stage.sts.issued(got).with_context(wrong)?;
                    ensure!(
                        issued.role_arn == own_role && issued.session_name == session,
                        "{}: this key is {}'s",
                        wrong(),
                        issued.assumed_role_arn
                    );
                    served += 1;
                }
                _ => bail!(wrong()),
            }
            let times = if number == 0 { &mut self.first } else { &mut self.later };
            times.push(ms.parse().with_context(wrong)?);
        }
        self.unserved += usize::from(life.lived >= LONG_ENOUGH && served == 0);
        self.keys += served;
        Ok(())
    }
}

fn percentile(times: &mut [f64], percent: usize) -> f64 {
    times.sort_by(f64::total_cmp);
    times.get((times.len() * percent / 100).min(times.len().saturating_sub(1))).copied().unwrap_or(f64::NAN)
}

fn descriptors(stage: &Stage) -> Result<usize> {
    Ok(fs::read_dir(format!("/proc/{}/fd", stage.daemon.pid()))?.count())
}

/// What the kernel side knows: container cgroups, and namespaces with a listener.
struct Known {
    cgroups: HashSet<u64>,
    listeners: HashSet<u64>,
}

impl Known {
    fn read(stage: &Stage) -> Result<Self> {
        let arguments = ["-I", "-S", "-c", LIST_KEYS, "CGROUPS", "LISTENERS"];
        let output = stage.command("/usr/bin/python3").args(arguments).output()?;
        ensure!(output.status.success(), "listing keys: {}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8(output.stdout)?;
        let mut lines = text.lines();
        let mut keys = || -> Result<HashSet<u64>> {
            let line = lines.next().context("a map is missing")?;
            line.split_whitespace().map(|key| Ok(key.parse()?)).collect()
        };
        Ok(Self { cgroups: keys()?, listeners: keys()? })
    }
}

/// The ids of the cgroups of all containers on the machine: the kernel side does not care which engine's they are, and other tests have theirs.
fn container_cgroups(directory: &Path) -> HashSet<u64> {
    let mut found = HashSet::new();
    for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            let name = entry.file_name();
            let is_id = |name: &str| name.len() == 64 && name.bytes().all(|byte| byte.is_ascii_hexdigit());
            if name.to_str().is_some_and(is_id) {
                found.insert(entry.ino());
            }
            found.extend(container_cgroups(&entry.path()));
        }
    }
    found
}

/// Waits until it holds; the last reason why not after too long.
async fn eventually(limit: Duration, mut check: impl FnMut() -> Result<()>) -> Result<()> {
    let deadline = Instant::now() + limit;
    loop {
        match check() {
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => sleep(Duration::from_millis(100)).await,
            Ok(()) => return Ok(()),
        }
    }
}

/// No more than when it began, and a few for the SDK's and the engine's pooled connections.
async fn descriptors_return(stage: &Stage, before: usize, limit: Duration) -> Result<()> {
    const POOLED: usize = 8;
    eventually(limit, || {
        let now = descriptors(stage)?;
        ensure!(now <= before + POOLED, "the daemon had {before} descriptors and has {now} with all containers gone");
        Ok(())
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn containers_that_come_and_go_get_their_own_role_and_never_anothers() -> Result<()> {
    let stage = Stage::start().await?;
    let before = descriptors(&stage)?;
    let small = small_network(&stage).await?;
    let internal = stage.create_network("churn-internal", true).await?;
    // Namespaces to share, whose first containers ask as well, for a third role.
    let mut pods = Vec::new();
    for number in [1000, 1001] {
        let name = format!("churn-{number}");
        pods.push((stage.run(asker(&name, number, number % 3, Network::Default)).await?, number % 3));
    }

    let mut random = Random(0x5eed);
    let plans: Vec<Plan> = (0..CONTAINERS)
        .map(|number| Plan {
            number,
            role: random.below(ROLES) as usize,
            network: match random.below(10) {
                0..4 => small.clone(),
                4 => internal.clone(),
                5 => Network::Default,
                6 => Network::None,
                7 => Network::Host,
                _ => Network::Container(pods[random.below(2) as usize].0.name().into()),
            },
            life: Duration::from_millis(100 + random.below(1900)),
            restarted: random.below(8) == 0,
        })
        .collect();
    let begin = Instant::now();
    let lives = stream::iter(plans).map(|plan| live(&stage, plan)).buffer_unordered(AT_A_TIME);
    let mut lives: Vec<Life> = lives.try_collect().await?;
    let took = begin.elapsed();
    for (pod, role) in pods {
        pod.stop().await?;
        let (name, id, output) = (pod.name().into(), pod.id().into(), pod.output().await?.0);
        lives.push(Life { name, id, role, address: None, starts: 1, lived: took, output });
    }

    stage.assert_no_leak()?;
    let mut figures = Figures::default();
    let checked: Result<()> = lives.iter().try_for_each(|life| figures.check(&stage, life));
    checked.with_context(|| format!("the daemon's log:\n{}", stage.daemon.log().unwrap_or_default()))?;

    let mut tenants = HashMap::<&str, HashSet<usize>>::new();
    for life in &lives {
        tenants.entry(life.address.as_deref().unwrap_or_default()).or_default().insert(life.role);
    }
    tenants.remove("");
    let crowded = tenants.values().filter(|roles| roles.len() > 1).count();
    ensure!(tenants.len() <= SMALL_NETWORK.1 && crowded > 5, "addresses were not reused: {tenants:?}");

    let starts: usize = lives.iter().map(|life| life.starts).sum();
    let calls: usize = (0..ROLES as usize).map(|number| stage.sts.assume_role_calls(&role(number))).sum();
    let served = lives.iter().filter(|life| life.output.contains("\nkey ")).count();
    println!(
        "{} containers, {starts} starts in {took:.1?}, {served} served; {} requests, {} keys, {calls} calls of STS; \
         first request p50 {:.1} ms, p99 {:.1} ms, worst {:.1} ms; later p50 {:.1} ms, p99 {:.1} ms, worst {:.1} ms",
        lives.len(),
        figures.first.len() + figures.later.len(),
        figures.keys,
        percentile(&mut figures.first, 50),
        percentile(&mut figures.first, 99),
        percentile(&mut figures.first, 100),
        percentile(&mut figures.later, 50),
        percentile(&mut figures.later, 99),
        percentile(&mut figures.later, 100),
    );
    ensure!(calls <= starts + starts / 20, "{starts} starts of containers made {calls} calls of STS");
    ensure!(figures.keys > 2 * starts, "too few answers ({}) to say anything", figures.keys);
    ensure!(figures.unserved * 20 <= lives.len(), "{} of {} got no key", figures.unserved, lives.len());
    descriptors_return(&stage, before, Duration::from_secs(40)).await
}

#[tokio::test(flavor = "multi_thread")]
async fn what_containers_needed_is_given_back_when_they_are_gone() -> Result<()> {
    let stage = Stage::start().await?;
    let root = stage.machine().cgroup().parent().context("the test's cgroup is the root")?;
    let own = stage.machine().cgroup();
    let before = descriptors(&stage)?;
    ensure!(Known::read(&stage)?.listeners.is_empty(), "a listener before any container");

    let mut containers = Vec::new();
    for number in 0..24 {
        let network = [Network::Default, Network::None, Network::Host][number % 3].clone();
        containers.push(stage.run(asker(&format!("held-{number}"), number, number, network)).await?);
    }
    // Sixteen namespaces of their own and the host's: more than the connections that may be pooled.
    eventually(Duration::from_secs(10), || {
        let (known, own) = (Known::read(&stage)?, container_cgroups(own));
        ensure!(own.len() == 24 && own.is_subset(&known.cgroups), "of {own:?} these are known: {:?}", known.cgroups);
        ensure!(known.listeners.len() == 17, "17 namespaces, but these listeners: {:?}", known.listeners);
        Ok(())
    })
    .await?;
    let held = container_cgroups(own);

    for container in containers {
        container.remove().await?;
    }
    descriptors_return(&stage, before, Duration::from_secs(10)).await?;
    eventually(Duration::from_secs(10), || {
        let known = Known::read(&stage)?;
        let stale: Vec<_> = known.cgroups.intersection(&held).collect();
        ensure!(stale.is_empty(), "cgroups of containers that are gone: {stale:?}");
        ensure!(known.cgroups.is_subset(&container_cgroups(root)), "cgroups that are not there: {:?}", known.cgroups);
        ensure!(known.listeners.is_empty(), "listeners without a container: {:?}", known.listeners);
        Ok(())
    })
    .await
}

/// Twenty in a row whose first process is a static program that does nothing but ask, once: for the role list and for the credentials in turn.
async fn serves_at_once(network: Network) -> Result<()> {
    let stage = Stage::start().await?;
    let mut times = Vec::new();
    for number in 0..20 {
        let (name, arn) = (format!("early-{number}"), role(number));
        let bare = format!("churn-{number}");
        let url = if number % 2 == 0 { ROLE_LIST.to_owned() } else { format!("{ROLE_LIST}{bare}") };
        let spec = ContainerSpec::busybox(&name, ["wget", "-qO-", &url]).label(ROLE_LABEL, &arn);
        let begin = Instant::now();
        let container = stage.run(spec.network(network.clone())).await?;
        let answer = stage.finish(&container).await.with_context(|| format!("{name}, {url}"));
        stage.assert_no_leak().with_context(|| name.clone())?;
        times.push(begin.elapsed().as_secs_f64() * 1000.0);
        let answer = answer?;
        if number % 2 == 0 {
            ensure!(answer == bare, "{name}: {answer}");
        } else {
            let key = answer.split("\"AccessKeyId\" : \"").nth(1).and_then(|rest| rest.split('"').next());
            let issued = key.and_then(|key| stage.sts.issued(key)).with_context(|| format!("{name}: {answer}"))?;
            ensure!(issued.role_arn == arn, "{name}: {answer}");
        }
        container.remove().await?;
    }
    println!("start to end of a container that asks once on {network:?}: p50 {:.0} ms", percentile(&mut times, 50));
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_first_process_that_asks_at_once_is_served_on_a_bridge() -> Result<()> {
    serves_at_once(Network::Default).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_first_process_that_asks_at_once_is_served_without_any_network() -> Result<()> {
    serves_at_once(Network::None).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_first_process_that_asks_at_once_is_served_on_the_hosts_network() -> Result<()> {
    serves_at_once(Network::Host).await
}
