//! Raw bytes from a container through the kernel's redirection to the daemon, and what came back.

use anyhow::{Context as _, Result, ensure};
use serde::{Deserialize, Serialize};

use crate::{
    host::{Container, ContainerSpec, METADATA_V4},
    imds::{HOST_ACCESS_KEY_PREFIX, HOST_INSTANCE, HOST_ROLE},
    stage::{Stage, role_arn},
};

/// Speaks on sockets of its own, byte by byte as it is told, and tells what came back.
const TALK: &str = r#"
import json, socket, sys, threading, time

def parse(data, head):
    answers = []
    while b"\r\n\r\n" in data:
        top, rest = data.split(b"\r\n\r\n", 1)
        line, *lines = top.decode("latin-1").split("\r\n")
        headers = [tuple(line.split(": ", 1)) for line in lines]
        status = int(line.split(" ")[1])
        known = {name.lower(): value for name, value in headers}
        length = 0 if head or status < 200 else int(known["content-length"])
        if len(rest) < length:
            break
        answers.append({"status": status, "headers": headers, "body": rest[:length].decode("latin-1")})
        data = rest[length:]
    return answers

def talk(plan, results, at):
    begin = time.monotonic()
    address = plan["to"]
    sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM)
    sock.settimeout(5)
    got, answers, peer, end = b"", [], "", "open"
    try:
        sock.connect((address, 80))
        peer = "[%s]:%d" % sock.getpeername()[:2]
        try:
            for part in plan["send"]:
                if isinstance(part, str):
                    sock.sendall(part.encode("latin-1"))
                else:
                    time.sleep(part)
        except OSError:
            pass # what was answered before is still to be read
        while True:
            answers = parse(got, plan["head"])
            enough = len(answers) >= plan["answers"]
            sock.settimeout(plan["linger"] if enough else max(begin + 8 - time.monotonic(), 0.01))
            data = sock.recv(65536)
            if not data:
                end = "closed"
                break
            got += data
    except ConnectionResetError:
        end = "closed"
    except socket.timeout:
        pass
    except OSError as error:
        end = repr(error)
    ms = (time.monotonic() - begin) * 1000
    results[at] = {"got": got.decode("latin-1"), "answers": answers, "end": end, "peer": peer, "ms": ms}

plans = json.loads(sys.argv[1])
results = [None] * len(plans)
threads = [threading.Thread(target=talk, args=(plan, results, at)) for at, plan in enumerate(plans)]
for thread in threads:
    thread.start()
    if sys.argv[2] == "in turn":
        thread.join()
for thread in threads:
    thread.join()
print(json.dumps(results))
"#;

/// One connection: what is sent on it, and how long it is watched.
#[derive(Clone, Debug, Serialize)]
pub struct Plan {
    pub to: String,
    pub send: Vec<Part>,
    /// So many answers are waited for.
    pub answers: usize,
    /// The answers have no bodies.
    pub head: bool,
    /// After the last answer, in seconds: for more, or for the end.
    pub linger: f64,
}

#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
pub enum Part {
    /// Each character is one byte.
    Bytes(String),
    Pause(f64),
}

#[derive(Debug, Deserialize)]
pub struct Outcome {
    pub got: String,
    pub answers: Vec<Answer>,
    /// `open`, `closed` by the other end, or the error.
    pub end: String,
    pub peer: String,
    pub ms: f64,
}

#[derive(Debug, Deserialize, PartialEq)]
pub struct Answer {
    pub status: u16,
    pub headers: Vec<(String, String)>,
    pub body: String,
}

/// Below the 2 s after which any idle connection ends.
pub const CLOSES: f64 = 1.2;

impl Plan {
    pub fn bytes(bytes: impl Into<String>) -> Self {
        let send = vec![Part::Bytes(bytes.into())];
        Self { to: METADATA_V4.to_owned(), send, answers: 1, head: false, linger: 0.0001 }
    }

    pub fn request(method: &str, path: &str, headers: &[&str]) -> Self {
        Self { head: method == "HEAD", ..Self::bytes(head(method, path, headers)) }
    }

    pub fn get(path: &str) -> Self {
        Self::request("GET", path, &[])
    }

    pub fn to(self, address: &str) -> Self {
        Self { to: address.to_owned(), ..self }
    }

    pub fn answers(self, answers: usize) -> Self {
        Self { answers, ..self }
    }

    /// Watches for the end of the connection that follows the last answer.
    pub fn then_closes(self) -> Self {
        Self { linger: CLOSES, ..self }
    }
}

impl Answer {
    pub fn header(&self, name: &str) -> Option<&str> {
        let found = self.headers.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
        found.map(|(_, value)| value.as_str())
    }
}

pub fn head(method: &str, path: &str, headers: &[&str]) -> String {
    let headers: String = headers.iter().map(|header| format!("{header}\r\n")).collect();
    format!("{method} {path} HTTP/1.1\r\nHost: 169.254.169.254\r\n{headers}\r\n")
}

pub async fn talk(container: &Container, plans: &[Plan]) -> Result<Vec<Outcome>> {
    converse(container, plans, "in turn").await
}

pub async fn converse(container: &Container, plans: &[Plan], order: &str) -> Result<Vec<Outcome>> {
    let plan = serde_json::to_string(plans)?;
    let output = container.exec(["/usr/bin/python3", "-c", TALK, &plan, order]).await?.success()?;
    serde_json::from_str(&output).with_context(|| format!("read {output:?}"))
}

/// The answer to each, one connection each.
pub async fn ask(container: &Container, plans: &[Plan]) -> Result<Vec<Answer>> {
    let outcomes = talk(container, plans).await?;
    let first = |(plan, mut outcome): (&Plan, Outcome)| {
        ensure!(outcome.answers.len() == 1, "{plan:?} got {outcome:?}");
        Ok(outcome.answers.remove(0))
    };
    plans.iter().zip(outcomes).map(first).collect()
}

pub async fn token(container: &Container, ttl: &str) -> Result<String> {
    let ttl = format!("X-aws-ec2-metadata-token-ttl-seconds: {ttl}");
    let mut answers = ask(container, &[Plan::request("PUT", "/latest/api/token", &[&ttl])]).await?;
    Ok(answers.remove(0).body)
}

pub fn with_token(path: &str, token: &str) -> Plan {
    Plan::request("GET", path, &[&format!("X-aws-ec2-metadata-token: {token}")])
}

/// A container that waits for commands.
pub async fn resident(stage: &Stage, name: &str, role: Option<String>) -> Result<Container> {
    let mut spec = ContainerSpec::resident(name);
    if let Some(role) = role {
        spec = spec.label("metadata-proxy.role", &role);
    }
    stage.run(spec).await
}

pub async fn web(stage: &Stage) -> Result<Container> {
    resident(stage, "web", Some(role_arn("web"))).await
}

/// The whole of what a container may see of a refused request.
pub fn assert_reveals_nothing(got: &str) {
    let hostname = std::fs::read_to_string("/proc/sys/kernel/hostname").expect("the name of the machine");
    let words =
        [HOST_ACCESS_KEY_PREFIX, "SIMULATED", HOST_INSTANCE, HOST_ROLE, "metadata-proxy", "hyper", hostname.trim()];
    for word in words {
        assert!(!got.to_lowercase().contains(&word.to_lowercase()), "{word:?} in {got:?}");
    }
}

pub fn assert_nothing_upstream(stage: &Stage) {
    let requests = stage.imds.requests();
    assert!(requests.is_empty(), "{requests:#?}");
}
