//! What containers get to see of the real metadata service, and what it gets to see of them.

use std::{
    collections::BTreeMap,
    io::{BufRead as _, BufReader, Write as _},
    sync::mpsc,
    thread,
    time::Duration,
};

use anyhow::{Context as _, Result};
use metadata_proxy_tests::{
    host::{Container, ContainerSpec},
    imds::{Fault, HOST_ACCESS_KEY_PREFIX, HOST_INSTANCE},
    stage::{Stage, daemon_options, with_config},
    talk::web,
};
use serde::Deserialize;

/// Asks for each path, exactly as it is spelled, on a connection of its own.
const GET: &str = r#"
import http.client, json, sys, time
answers = []
for path in json.loads(sys.argv[1]):
    begin = time.monotonic()
    connection = http.client.HTTPConnection("169.254.169.254", timeout=10)
    connection.putrequest("GET", path, skip_accept_encoding=True)
    for name, value in json.loads(sys.argv[2]).items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    body = answer.read().decode("latin-1")
    ms = (time.monotonic() - begin) * 1000
    answers.append({"status": answer.status, "headers": answer.getheaders(), "body": body, "ms": ms})
print(json.dumps(answers))
"#;

/// Follows every entry of every listing, as cloud-init does; prints each path and its status.
const CRAWL: &str = r#"
import http.client
def get(path):
    connection = http.client.HTTPConnection("169.254.169.254", timeout=10)
    connection.request("GET", path)
    answer = connection.getresponse()
    return answer.status, answer.read().decode()
def crawl(path):
    status, body = get(path)
    print(status, path)
    if status == 200 and path.endswith("/"):
        for entry in body.splitlines():
            crawl(path + entry)
crawl("/latest/meta-data/")
crawl("/latest/dynamic/")
"#;

#[derive(Debug, Deserialize)]
struct Answer {
    status: u16,
    headers: Vec<(String, String)>,
    body: String,
    ms: f64,
}

impl Answer {
    fn headers(&self, name: &str) -> Vec<&str> {
        let found = self.headers.iter().filter(|(known, _)| known.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_str()).collect()
    }

    fn lines(&self) -> Vec<&str> {
        self.body.lines().collect()
    }
}

async fn ask(container: &Container, headers: &[(&str, &str)], paths: &[&str]) -> Result<Vec<Answer>> {
    let headers: BTreeMap<_, _> = headers.iter().copied().collect();
    let (headers, paths) = (serde_json::to_string(&headers)?, serde_json::to_string(paths)?);
    let output = container.exec(["/usr/bin/python3", "-c", GET, &paths, &headers]).await?.success()?;
    serde_json::from_str(&output).with_context(|| format!("read {output:?}"))
}

async fn get(container: &Container, path: &str) -> Result<Answer> {
    Ok(ask(container, &[], &[path]).await?.remove(0))
}

fn statuses(answers: &[Answer]) -> Vec<u16> {
    answers.iter().map(|answer| answer.status).collect()
}

const INSTANCE: &str = "/latest/meta-data/instance-id";
/// It may change, so it is asked for each time.
const ADDRESS: &str = "/latest/meta-data/local-ipv4";
const HOST_ADDRESS: &str = "10.0.0.10";
const ROLES: &str = "/latest/meta-data/iam/security-credentials/";
const TTL: &str = "x-aws-ec2-metadata-token-ttl-seconds";
const TOKEN: &str = "x-aws-ec2-metadata-token";

#[tokio::test(flavor = "multi_thread")]
async fn allowed_documents_come_from_the_real_service() -> Result<()> {
    let stage = Stage::start().await?;
    let web = web(&stage).await?;
    let documents = [
        (INSTANCE, HOST_INSTANCE),
        ("/1.0/meta-data/instance-id", HOST_INSTANCE),
        ("/2021-07-15/meta-data/ami-id", "ami-0simulated0000000"),
        ("/latest/meta-data/placement/availability-zone", "eu-west-1a"),
        ("/latest/meta-data/placement/region/", "eu-west-1"),
        ("/latest/meta-data/network/interfaces/macs/02:00:5e:00:53:01/subnet-id", "subnet-0123456789abcdef0"),
        ("/latest/meta-data/services/partition", "aws"),
        ("//latest//meta-data/%68ostname?x=/iam", "ip-10-0-0-10.eu-west-1.compute.internal"),
        ("/latest/dynamic/fws/instance-monitoring", "disabled"),
    ];
    let answers = ask(&web, &[], &documents.map(|(path, _)| path)).await?;
    for ((path, body), answer) in documents.iter().zip(&answers) {
        assert_eq!((answer.status, answer.body.as_str()), (200, *body), "{path}");
        assert_eq!(answer.headers("content-type"), ["text/plain"], "{path}");
        assert_eq!(answer.headers("server"), ["EC2ws"], "{path}");
        assert_eq!(answer.headers("accept-ranges"), ["none"], "{path}");
        assert_eq!(answer.headers("content-length"), [body.len().to_string()], "{path}");
        assert_eq!(answer.headers("last-modified"), ["Thu, 01 Jan 2026 00:00:00 GMT"], "{path}");
        // It is about the daemon's session with the service, not the container's with the daemon.
        assert!(answer.headers(TTL).is_empty(), "{path}");
    }
    let identity = get(&web, "/latest/dynamic/instance-identity/document").await?;
    let identity: serde_json::Value = serde_json::from_str(&identity.body)?;
    assert_eq!(identity["instanceId"], HOST_INSTANCE);
    // Allowed, but not there.
    assert_eq!(get(&web, "/latest/meta-data/spot/instance-action").await?.status, 404);

    let seen: Vec<String> =
        stage.imds.requests().iter().map(|seen| format!("{} {}", seen.method, seen.target)).collect();
    assert_eq!(seen[0], "PUT /latest/api/token");
    assert_eq!(seen[1], format!("GET {INSTANCE}"));
    assert!(seen.contains(&"GET /latest/meta-data/hostname".to_owned()), "{seen:?}");
    assert_eq!(seen.len(), documents.len() + 3, "{seen:#?}");
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn listings_show_what_can_be_asked_for_and_nothing_else() -> Result<()> {
    let stage = Stage::start().await?;
    let web = web(&stage).await?;
    let plain = stage.run(ContainerSpec::resident("plain")).await?;
    let paths = [
        "/latest/meta-data/",
        "/latest/meta-data",
        "/1.0/meta-data/",
        "/latest",
        "/latest/",
        "/latest/dynamic/instance-identity/",
        "/latest/meta-data/placement/",
    ];
    let answers = ask(&web, &[], &paths).await?;
    assert_eq!(statuses(&answers), [200; 7]);
    let expected = [
        "ami-id",
        "ami-launch-index",
        "events/",
        "hostname",
        "iam/",
        "instance-action",
        "instance-id",
        "instance-life-cycle",
        "instance-type",
        "local-hostname",
        "local-ipv4",
        "mac",
        "metrics/",
        "network/",
        "placement/",
        "profile",
        "public-hostname",
        "public-ipv4",
        "reservation-id",
        "security-groups",
        "services/",
        "system",
    ];
    for answer in &answers[..3] {
        assert_eq!(answer.lines(), expected);
        assert_eq!(answer.headers("content-length"), [answer.body.len().to_string()]);
        assert!(!answer.body.ends_with('\n'));
    }
    assert_eq!(answers[3].body, "dynamic\nmeta-data");
    assert_eq!(answers[4].body, "dynamic\nmeta-data");
    assert_eq!(answers[5].body, "document");
    assert_eq!(answers[6].body, "availability-zone\navailability-zone-id\nregion");
    let versions = get(&web, "/").await?;
    assert!(versions.lines().contains(&"2021-07-15") && versions.lines().ends_with(&["latest"]), "{versions:?}");

    let without: Vec<_> = expected.into_iter().filter(|entry| *entry != "iam/").collect();
    assert_eq!(get(&plain, "/latest/meta-data/").await?.lines(), without);

    let crawled = web.exec(["/usr/bin/python3", "-c", CRAWL]).await?.success()?;
    assert!(crawled.lines().count() > 40, "{crawled}");
    for found in ["iam/security-credentials/web", "network/interfaces/macs/02:00:5e:00:53:01/vpc-id", "metrics/vhostmd"]
    {
        assert!(crawled.lines().any(|line| line == format!("200 /latest/meta-data/{found}")), "{crawled}");
    }
    let broken: Vec<&str> = crawled.lines().filter(|line| !line.starts_with("200 ")).collect();
    assert!(broken.is_empty(), "{broken:#?}");
    stage.assert_no_leak()
}

/// What is denied unless the operator opts in; all of it is there in the stand-in.
const OPTIONAL: [&str; 11] = [
    "user-data",
    "user-data/",
    "dynamic/instance-identity/pkcs7",
    "dynamic/instance-identity/signature",
    "dynamic/instance-identity/rsa2048",
    "meta-data/public-keys/0/openssh-key",
    "meta-data/tags/instance/Name",
    "meta-data/tags/instance/",
    "meta-data/block-device-mapping/root",
    "meta-data/ami-manifest-path",
    "meta-data/product-codes",
];

#[tokio::test(flavor = "multi_thread")]
async fn what_reveals_the_host_is_denied_unless_opted_in() -> Result<()> {
    let mut stage = Stage::start().await?;
    let web = web(&stage).await?;
    let paths: Vec<String> =
        OPTIONAL.iter().flat_map(|path| [format!("/latest/{path}"), format!("/2009-04-04//{path}")]).collect();
    let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
    let answers = ask(&web, &[], &paths).await?;
    for (path, answer) in paths.iter().zip(&answers) {
        assert_eq!((answer.status, answer.body.len()), (404, 339), "{path}");
    }
    assert!(stage.imds.requests().is_empty(), "{:#?}", stage.imds.requests());

    stage.replace_daemon(daemon_options().arg("--allow-user-data")).await?;
    let answers = ask(&web, &[], &["/latest/user-data", "/latest", "/latest/meta-data/tags/instance/Name"]).await?;
    assert_eq!(statuses(&answers), [200, 200, 404]);
    assert!(answers[0].body.ends_with("user data of the host\n"), "{answers:?}");
    assert_eq!(answers[1].body, "dynamic\nmeta-data\nuser-data");

    let config =
        "[upstream]\nallow = ['meta-data/tags/instance/Name']\ndeny = ['meta-data/mac', 'meta-data/network/**']\n";
    stage.replace_daemon(with_config(&stage, daemon_options(), config)?).await?;
    let paths = [
        "/latest/meta-data/tags/instance/Name",
        "/latest/meta-data/tags/instance/",
        "/latest/meta-data/tags/instance/secret-tag",
        "/latest/meta-data/mac",
        "/latest/meta-data/MAC",
        "/latest/meta-data/network/interfaces/",
        "/latest/user-data",
        "/latest/meta-data/",
    ];
    let answers = ask(&web, &[], &paths).await?;
    assert_eq!(statuses(&answers), [200, 200, 404, 404, 404, 404, 404, 200]);
    assert_eq!(answers[0].body, "simulated-host");
    assert_eq!(answers[1].body, "Name");
    let listed = answers[7].lines();
    assert!(listed.contains(&"tags/") && !listed.contains(&"mac") && !listed.contains(&"network/"), "{listed:?}");
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn no_spelling_leads_to_the_credentials_of_the_host() -> Result<()> {
    // With everything opted in that can be.
    let allow = "allow = ['meta-data/tags/**', 'meta-data/public-keys/**', 'meta-data/elastic-*/**', 'user-data']";
    let stage = Stage::configured(daemon_options(), &format!("[upstream]\n{allow}\n")).await?;
    let web = web(&stage).await?;

    let trees = [
        "iam/security-credentials/simulated-host-role",
        "iam/security-credentials-extended/",
        "iam-ecs-0123456789abcdef/info",
        "iam-ecs-0123456789abcdef/security-credentials/simulated-task-role",
        "iam-ecs-0123456789abcdef/",
        "identity-credentials/ec2/security-credentials/ec2-instance",
        "identity-credentials/ec2/info",
        "identity-credentials/",
        "managed-ssh-keys/signer-cert",
        "managed-ssh-keys/active-keys/ec2-user",
    ];
    let mut paths = Vec::new();
    for tree in trees {
        for version in ["latest", "1.0", "2009-04-04", "2024-04-11", "2031-12-31", "LATEST", "x"] {
            paths.push(format!("/{version}/meta-data/{tree}"));
        }
        let spellings = [
            format!("//latest//meta-data//{tree}"),
            format!("/latest/meta-data/{tree}/"),
            format!("/latest/meta-data/{tree}?x=y"),
            format!("/latest/meta-data/{tree}#x"),
            format!("/latest/meta-data/{tree};x"),
            format!("/latest;x/meta-data/{tree}"),
            format!("/latest/meta-data;x/{tree}"),
            format!("/latest/META-DATA/{tree}"),
            format!("/latest/meta-data/{}", tree.to_uppercase()),
            format!("/latest/meta-data/{}", tree.replacen('i', "I", 1)),
            format!("/latest/meta-data/{}", tree.replacen('i', "%69", 1)),
            format!("/latest/meta-data/{}", tree.replacen('i', "%2569", 1)),
            format!("/latest/meta-data/{}", tree.replace('-', "%2D")),
            format!("/latest/meta-data/{}", tree.replace('/', "%2f")),
            format!("/latest/meta-data/{}", tree.replace('/', "%5c")),
            format!("/latest/meta-data/{}", tree.replace('/', "\\")),
            format!("/latest/meta-data%2f{tree}"),
            format!("/latest%2fmeta-data%2f{tree}"),
            format!("/%6c%61%74%65%73%74/meta-data/{tree}"),
            format!("/latest/meta-data/placement/../{tree}"),
            format!("/latest/meta-data/placement/%2e%2e/{tree}"),
            format!("/latest/meta-data/placement/..%2f{tree}"),
            format!("/latest/meta-data/./{tree}"),
            format!("/latest/meta-data/network/%252e%252e/{tree}"),
            format!("/latest/user-data/../meta-data/{tree}"),
            format!("/latest/meta-data/tags/../{tree}"),
            format!("/latest/meta-data/instance-id%00/../{tree}"),
            format!("/latest/meta-data/%20{tree}"),
            format!("/latest/meta-data/{tree}%20"),
            format!("/latest/meta-data/{tree}%00"),
            format!("/latest/meta-data/{tree}."),
            format!("/meta-data/{tree}"),
            format!("/latest/{tree}"),
            format!("/{tree}"),
            format!("http://169.254.169.254/latest/meta-data/{tree}"),
            format!("@169.254.169.254/latest/meta-data/{tree}"),
        ];
        paths.extend(spellings);
    }
    // Not their own role in some spelling, but nobody's.
    paths.push("/latest/meta-data/IAM/security-credentials/".to_owned());
    paths.push("/latest/Meta-Data/iam/security-credentials/".to_owned());
    paths.push("/latest/meta-data/iam%20/security-credentials/".to_owned());
    let paths: Vec<&str> = paths.iter().map(String::as_str).collect();
    for (path, answer) in paths.iter().zip(ask(&web, &[], &paths).await?) {
        assert!(matches!(answer.status, 400 | 404), "{path}: {answer:?}");
        assert!(!answer.body.contains("SIMULATED") && !answer.body.contains(HOST_ACCESS_KEY_PREFIX), "{path}");
    }
    assert!(stage.imds.requests().is_empty(), "{:#?}", stage.imds.requests());
    stage.assert_no_leak()
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_of_the_clients_request_but_the_path_is_passed_on() -> Result<()> {
    let stage = Stage::start().await?;
    let web = web(&stage).await?;
    let headers = [
        ("X-Forwarded-For", "192.0.2.66"),
        ("Forwarded", "for=192.0.2.66"),
        ("Authorization", "Bearer secret-of-the-client"),
        ("Cookie", "secret=of-the-client"),
        ("User-Agent", "agent-of-the-client"),
        ("X-Anything", "of-the-client"),
        ("Connection", "X-Anything, close"),
    ];
    assert_eq!(ask(&web, &headers, &[ADDRESS]).await?[0].body, HOST_ADDRESS);
    let requests = stage.imds.requests();
    assert_eq!(requests.len(), 2, "{requests:#?}");
    for request in &requests {
        let mut names: Vec<&str> = request.headers.keys().map(http::HeaderName::as_str).collect();
        names.sort_unstable();
        let own = if request.method == "PUT" { TTL } else { TOKEN };
        assert_eq!(names.iter().filter(|name| **name != "content-length").count(), 3, "{names:?}");
        for name in ["host", "user-agent", own] {
            assert!(names.contains(&name), "{names:?}");
        }
        assert!(request.user_agent().starts_with("metadata-proxy/"), "{request:?}");
        assert_eq!(request.headers["host"], "169.254.169.254");
    }

    // A token of the container's own session stays here, and its answer speaks of it.
    let put = "import http.client as c; h = c.HTTPConnection('169.254.169.254'); \
        h.request('PUT', '/latest/api/token', headers={'X-aws-ec2-metadata-token-ttl-seconds': '77'}); \
        print(h.getresponse().read().decode(), end='')";
    let token = web.exec(["/usr/bin/python3", "-c", put]).await?.success()?;
    let answer = ask(&web, &[(TOKEN, &token)], &[ADDRESS]).await?.remove(0);
    assert_eq!(answer.body, HOST_ADDRESS);
    let left: u32 = answer.headers(TTL).first().context("no remaining lifetime")?.parse()?;
    assert!((60..=77).contains(&left), "{left}");
    assert_eq!(answer.headers(TTL).len(), 1);
    let leaked = stage.imds.requests().into_iter().any(|seen| seen.headers.values().any(|value| *value == token));
    assert!(!leaked, "{:#?}", stage.imds.requests());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn the_real_service_is_asked_with_a_session_token_of_the_daemons_own() -> Result<()> {
    let stage = Stage::start().await?;
    let web = web(&stage).await?;
    assert_eq!(ask(&web, &[], &[ADDRESS; 3]).await?[2].body, HOST_ADDRESS);
    let seen = |stage: &Stage| stage.imds.requests().iter().map(|seen| seen.method.clone()).collect::<Vec<_>>();
    // One for all.
    assert_eq!(seen(&stage), ["PUT", "GET", "GET", "GET"]);
    let requests = stage.imds.requests();
    assert_eq!(requests[0].headers[TTL], "21600");
    assert!(
        requests[1..].iter().all(|get| get.headers.contains_key(TOKEN) && get.status == Some(200)),
        "{requests:#?}"
    );

    stage.imds.require_token(true);
    assert_eq!(get(&web, ADDRESS).await?.body, HOST_ADDRESS);

    // An answer of 401 would tell the container that *its* token is bad.
    stage.imds.set_fault(Some(Fault::Status(401)));
    let answer = get(&web, ADDRESS).await?;
    assert_eq!((answer.status, answer.body.as_str()), (502, ""));
    stage.imds.set_fault(None);
    stage.imds.clear();
    assert_eq!(get(&web, ADDRESS).await?.body, HOST_ADDRESS);
    assert!(stage.imds.requests().last().is_some_and(|last| last.headers.contains_key(TOKEN)));
    Ok(())
}

/// A service at this address that knows no session tokens; it tells of each request's first line.
fn tokenless(stage: &Stage, address: &str) -> Result<mpsc::Receiver<String>> {
    let listener = stage.bind_tcp(address)?;
    listener.set_nonblocking(false)?;
    let (sender, requests) = mpsc::channel();
    thread::spawn(move || {
        for connection in listener.incoming().flatten() {
            let mut lines = BufReader::new(&connection).lines();
            let Some(Ok(first)) = lines.next() else { continue };
            let token = lines.map_while(Result::ok).take_while(|line| !line.is_empty());
            let token = token.filter(|line| line.to_lowercase().starts_with(&format!("{TOKEN}:"))).count();
            let answer = match (first.starts_with("PUT"), token) {
                (true, _) => "HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n",
                (_, 0) => "HTTP/1.1 200 OK\r\nContent-Length: 9\r\nX-Secret: y\r\nConnection: close\r\n\r\ni-another",
                _ => "HTTP/1.1 401 Unauthorized\r\nContent-Length: 0\r\n\r\n",
            };
            let answered = (&connection).write_all(answer.as_bytes());
            if answered.is_err() || sender.send(first).is_err() {
                break;
            }
        }
    });
    Ok(requests)
}

#[tokio::test(flavor = "multi_thread")]
async fn another_endpoint_is_asked_also_without_session_tokens() -> Result<()> {
    let endpoint = daemon_options().arg("--imds-endpoint").arg("http://192.0.2.1:8169");
    let stage = Stage::start_with(endpoint).await?;
    let requests = tokenless(&stage, "192.0.2.1:8169")?;
    let web = web(&stage).await?;
    let answers = ask(&web, &[], &[ADDRESS, ADDRESS, ROLES]).await?;
    assert_eq!(statuses(&answers), [200, 200, 200]);
    assert_eq!((answers[0].body.as_str(), answers[1].body.as_str()), ("i-another", "i-another"));
    assert!(answers[0].headers("x-secret").is_empty());
    assert_eq!(answers[2].body, "web");
    let seen: Vec<String> = requests.try_iter().collect();
    let get = format!("GET {ADDRESS} HTTP/1.1");
    assert_eq!(seen, ["PUT /latest/api/token HTTP/1.1", &get, &get]);
    assert!(stage.imds.requests().is_empty(), "{:#?}", stage.imds.requests());
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_real_service_is_down_credentials_are_served() -> Result<()> {
    let stage = Stage::start().await?;
    let web = web(&stage).await?;
    assert_eq!(get(&web, ADDRESS).await?.body, HOST_ADDRESS);
    for fault in [None, Some(Fault::Close)] {
        match &fault {
            None => stage.imds.stop_listening()?,
            fault => stage.imds.set_fault(fault.clone()),
        }
        let answers = ask(&web, &[], &[ADDRESS, "/latest/meta-data/", ROLES, "/latest/user-data"]).await?;
        assert_eq!(statuses(&answers), [502, 502, 200, 404], "{fault:?}: {answers:?}");
        assert_eq!((answers[0].body.as_str(), answers[2].body.as_str()), ("", "web"));
        assert!(answers.iter().all(|answer| answer.ms < 1900.0), "{answers:?}");
        assert!(!format!("{answers:?}").contains("refused"), "{answers:?}");
        stage.imds.set_fault(None);
        stage.imds.listen_again()?;
        assert_eq!(get(&web, ADDRESS).await?.body, HOST_ADDRESS);
    }
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_slow_real_service_is_given_up_and_holds_nobody_else_up() -> Result<()> {
    let stage = Stage::start().await?;
    let web = web(&stage).await?;
    stage.imds.set_fault(Some(Fault::Delay(Duration::from_secs(30))));
    let slow = ask(&web, &[], &[ADDRESS]);
    let meanwhile = async {
        tokio::time::sleep(Duration::from_millis(300)).await;
        ask(&web, &[], &[ROLES]).await
    };
    let (slow, meanwhile) = tokio::try_join!(slow, meanwhile)?;
    assert_eq!((slow[0].status, slow[0].body.as_str()), (504, ""));
    assert!(slow[0].ms < 4000.0, "{slow:?}");
    assert_eq!(meanwhile[0].body, "web");
    assert!(meanwhile[0].ms < 1500.0, "{meanwhile:?}");

    // Slower than usual is not too slow.
    stage.imds.set_fault(Some(Fault::Delay(Duration::from_millis(400))));
    assert_eq!(get(&web, ADDRESS).await?.body, HOST_ADDRESS);
    Ok(())
}

#[tokio::test(flavor = "multi_thread")]
async fn with_upstream_disabled_there_is_nothing_but_iam() -> Result<()> {
    let stage = Stage::start_with(daemon_options().arg("--disable-upstream")).await?;
    let web = web(&stage).await?;
    let plain = stage.run(ContainerSpec::resident("plain")).await?;
    let listed =
        ["/", "/latest", "/latest/", "/latest/meta-data", "/latest/meta-data/", "/latest/meta-data/iam/", ROLES];
    let answers = ask(&web, &[], &listed).await?;
    assert_eq!(statuses(&answers), [200; 7]);
    assert!(answers[0].lines().ends_with(&["latest"]));
    let bodies: Vec<&str> = answers[1..].iter().map(|answer| answer.body.as_str()).collect();
    assert_eq!(bodies, ["meta-data", "meta-data", "iam/", "iam/", "info\nsecurity-credentials/", "web"]);
    let absent = [
        INSTANCE,
        "/latest/dynamic/instance-identity/document",
        "/latest/user-data",
        "/latest/dynamic",
        "/latest/meta-data/placement/",
        "/latest/meta-data/iam/security-credentials/simulated-host-role",
    ];
    assert_eq!(statuses(&ask(&web, &[], &absent).await?), [404; 6]);
    assert_eq!(statuses(&ask(&plain, &[], &[ROLES, INSTANCE, "/latest/meta-data/"]).await?), [404, 404, 200]);
    assert!(stage.imds.requests().is_empty(), "{:#?}", stage.imds.requests());
    Ok(())
}
