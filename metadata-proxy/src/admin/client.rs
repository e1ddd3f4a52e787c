//! `metadata-proxy ps` and `explain`: ask the running daemon, and print.
#![expect(clippy::print_stdout, reason = "what they print is their standard output")]

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use http::{Request, header::HOST};
use http_body_util::{BodyExt as _, Empty};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use tokio::net::UnixStream;

use super::status::{Credentials, Status};
use crate::{
    containers::{UserNamespace, short},
    workload::Client,
};

pub(crate) async fn ps(socket: &Path, json: bool) -> anyhow::Result<()> {
    let body = get(socket, "/containers").await?;
    if json {
        println!("{}", String::from_utf8_lossy(&body));
        return Ok(());
    }
    let now = Timestamp::now();
    println!(
        "{:<14}{:<24}{:<16}{:<40}{:<22}{:>9}  LAST CLIENT",
        "CONTAINER", "NAME", "NETWORK", "ROLE", "CREDENTIALS", "REQUESTS"
    );
    for status in parse(&body)? {
        let role = status.role.as_deref().and_then(|arn| arn.split_once(":role/")).map_or("-", |(_, name)| name);
        let client = status.last_client.and_then(|client| client.user_agent).unwrap_or_else(|| "-".to_owned());
        let credentials = in_short(&status.credentials, now);
        println!(
            "{:<14}{:<24}{:<16}{role:<40}{credentials:<22}{:>9}  {client}",
            short(&status.id),
            status.name,
            // Of `container:ID` and networks with long names, the beginning.
            status.network.chars().take(15).collect::<String>(),
            status.requests
        );
    }
    Ok(())
}

pub(crate) async fn explain(socket: &Path, container: &str) -> anyhow::Result<()> {
    let all = parse(&get(socket, "/containers").await?)?;
    let mut found = all.iter().filter(|status| status.name == container || status.id.starts_with(container));
    let Some(status) = found.next() else {
        bail!("the daemon knows no running container {container}; `metadata-proxy ps` lists those it knows");
    };
    for (what, line) in lines(status, Timestamp::now()) {
        println!("{what:<13}{line}");
    }
    Ok(())
}

/// The whole chain, from the kernel's view to STS's answer.
fn lines(status: &Status, now: Timestamp) -> Vec<(&'static str, String)> {
    let path = |path: &Option<PathBuf>| path.as_ref().map_or("gone".to_owned(), |path| path.display().to_string());
    let user = match status.user_namespace {
        UserNamespace::Host => "the host's user namespace",
        UserNamespace::Own => "a user namespace of its own",
    };
    let mut lines = vec![
        ("container", format!("{} ({}), image {}", status.name, short(&status.id), status.image)),
        ("cgroup", format!("{} (/{}), first process {}", status.cgroup, path(&status.cgroup_path), status.pid)),
        ("network", format!("{}, namespace {}, {user}", status.network, path(&status.network_namespace))),
    ];
    let client = status.last_client.as_ref().map_or("none yet".to_owned(), |client| {
        let address = client.address.map_or("?".to_owned(), |address| address.to_string());
        let agent = client.user_agent.as_deref().unwrap_or("of no name");
        let Client { time, pid, cgroup, .. } = client;
        format!("{agent} at {time}, from {address}, process {pid} in cgroup {cgroup}; request {}", status.requests)
    });
    lines.push(("last client", client));
    for said in &status.sources {
        let value = match (&said.value, said.from_image) {
            (_, true) => "from the image, does not count",
            (Some(value), _) if value.is_empty() => "empty",
            (Some(value), _) => value,
            (None, _) => "not there",
        };
        lines.push(("looked at", format!("{}: {value}", said.source)));
    }
    lines.extend(status.reasons.iter().map(|reason| ("because", reason.clone())));
    lines.push(("role", status.role.clone().unwrap_or_else(|| "none".to_owned())));
    lines.extend(status.session.iter().map(|session| ("session", session.clone())));
    lines.extend(status.options.iter().map(|(name, value)| ("option", format!("{name}: {value}"))));
    lines.extend(at_length(&status.credentials, now).into_iter().map(|line| ("credentials", line)));
    lines.extend(status.advice.iter().map(|advice| ("remedy", advice.clone())));
    lines
}

fn in_short(credentials: &Credentials, now: Timestamp) -> String {
    match credentials {
        Credentials::None => "-".to_owned(),
        Credentials::Pending => "asking STS".to_owned(),
        Credentials::Valid { expiration, trouble, .. } => {
            let minutes = expiration.duration_since(now).as_secs() / 60;
            format!("{minutes} min{}", if trouble.is_some() { ", not renewed" } else { "" })
        }
        Credentials::Refused { .. } => "REFUSED".to_owned(),
        Credentials::Unavailable { .. } => "UNAVAILABLE".to_owned(),
    }
}

fn at_length(credentials: &Credentials, now: Timestamp) -> Vec<String> {
    match credentials {
        Credentials::None => vec!["none: the container has no role".to_owned()],
        Credentials::Pending => vec!["STS has been asked and has not answered yet".to_owned()],
        Credentials::Valid { access_key_id, expiration, renewal, trouble } => {
            let mut lines = vec![format!("{access_key_id}, valid until {expiration}")];
            match trouble {
                None => lines.push(format!("to be renewed at {renewal}")),
                Some(trouble) => {
                    lines.push(format!("not renewed: {}", trouble.reason));
                    lines.push(format!("next try at {}", trouble.next_try));
                }
            }
            lines
        }
        Credentials::Refused(trouble) if trouble.next_try <= now => {
            vec![trouble.reason.clone(), "next try when a client asks".to_owned()]
        }
        Credentials::Refused(trouble) => {
            vec![trouble.reason.clone(), format!("next try when a client asks after {}", trouble.next_try)]
        }
        Credentials::Unavailable(trouble) => {
            vec![trouble.reason.clone(), format!("next try at {}", trouble.next_try)]
        }
    }
}

fn parse(body: &[u8]) -> anyhow::Result<Vec<Status>> {
    serde_json::from_slice(body).context("the daemon's answer is not understood; is it of another version?")
}

async fn get(socket: &Path, path: &str) -> anyhow::Result<Bytes> {
    let remedy = || format!("cannot ask the daemon at {}: is it running, and are you root?", socket.display());
    let stream = UnixStream::connect(socket).await.with_context(remedy)?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.with_context(remedy)?;
    tokio::spawn(connection);
    let request = Request::get(path).header(HOST, "metadata-proxy").body(Empty::<Bytes>::new())?;
    let response = sender.send_request(request).await.with_context(remedy)?;
    if !response.status().is_success() {
        bail!("the daemon answers {} to {path}", response.status());
    }
    Ok(response.into_body().collect().await.with_context(remedy)?.to_bytes())
}
