//! `metadata-proxy ps` and `explain`: ask the running daemon, and print.
#![expect(clippy::print_stdout, reason = "what they print is their standard output")]

use std::path::Path;

use anyhow::{Context as _, bail};
use bytes::Bytes;
use http::{Request, header::HOST};
use http_body_util::{BodyExt as _, Empty};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use jiff::Timestamp;
use tokio::net::UnixStream;

use super::status::{Credentials, Status};
use crate::containers::short;

pub(crate) async fn ps(socket: &Path, json: bool) -> anyhow::Result<()> {
    let body = get(socket, "/containers").await?;
    if json {
        println!("{}", String::from_utf8_lossy(&body));
        return Ok(());
    }
    let now = Timestamp::now();
    println!("{:<14}{:<24}{:<40}{:<22}{:>9}  LAST CLIENT", "CONTAINER", "NAME", "ROLE", "CREDENTIALS", "REQUESTS");
    for status in parse(&body)? {
        let role = status.role.as_deref().and_then(|arn| arn.split_once(":role/")).map_or("-", |(_, name)| name);
        let client = status.last_client.as_deref().unwrap_or("-");
        let credentials = in_short(&status.credentials, now);
        println!(
            "{:<14}{:<24}{role:<40}{credentials:<22}{:>9}  {client}",
            short(&status.id),
            status.name,
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
    println!("container    {} ({})", status.name, short(&status.id));
    println!("cgroup       {}, first process {}", status.cgroup, status.pid);
    for reason in &status.reasons {
        println!("because      {reason}");
    }
    println!("role         {}", status.role.as_deref().unwrap_or("none"));
    println!("session      {}", status.session.as_deref().unwrap_or("none"));
    for line in at_length(&status.credentials) {
        println!("credentials  {line}");
    }
    println!("requests     {}", status.requests);
    println!("last client  {}", status.last_client.as_deref().unwrap_or("none yet"));
    Ok(())
}

fn in_short(credentials: &Credentials, now: Timestamp) -> String {
    match credentials {
        Credentials::None => "-".to_owned(),
        Credentials::Pending => "asking STS".to_owned(),
        Credentials::Valid { expiration, trouble } => {
            let minutes = expiration.duration_since(now).as_secs() / 60;
            format!("{minutes} min{}", if trouble.is_some() { ", not renewed" } else { "" })
        }
        Credentials::Refused { .. } => "REFUSED".to_owned(),
        Credentials::Unavailable { .. } => "UNAVAILABLE".to_owned(),
    }
}

fn at_length(credentials: &Credentials) -> Vec<String> {
    match credentials {
        Credentials::None => vec!["none: the container has no role".to_owned()],
        Credentials::Pending => vec!["STS has been asked and has not answered yet".to_owned()],
        Credentials::Valid { expiration, trouble } => {
            let renewal = trouble.iter().map(|trouble| format!("but not renewed: {trouble}"));
            [format!("valid until {expiration}")].into_iter().chain(renewal).collect()
        }
        Credentials::Refused { reason } | Credentials::Unavailable { reason } => vec![reason.clone()],
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
