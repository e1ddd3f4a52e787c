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
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use super::{
    about::Facts,
    other::{self, Other},
    status::{Credentials, Outcome, Status},
};
use crate::{
    containers::{UserNamespace, short},
    identity::printable,
    strangers::Stranger,
    workload::Client,
};

pub(crate) async fn ps(socket: &Path, json: bool, all: bool) -> anyhow::Result<()> {
    let body = get(socket, if json && all { "/strangers" } else { "/containers" }).await?;
    if json {
        println!("{}", String::from_utf8_lossy(&body));
        return Ok(());
    }
    let now = Timestamp::now();
    println!(
        "{:<14}{:<24}{:<12}{:<16}{:<40}{:<36}{:<22}{:>9}  LAST CLIENT",
        "CONTAINER", "NAME", "ENGINE", "NETWORK", "ROLE", "SOURCE", "CREDENTIALS", "REQUESTS"
    );
    for status in parse::<Status>(&body)? {
        let role = status.role.as_deref().unwrap_or("-");
        let role = role.split_once(":role/").map_or(role, |(_, name)| name);
        let source = status.role_source.as_deref().unwrap_or("-");
        // What they are is told by their names.
        let source =
            ["label ", "environment variable "].iter().find_map(|kind| source.strip_prefix(kind)).unwrap_or(source);
        let client = status.last_client.and_then(|client| client.user_agent).unwrap_or_else(|| "-".to_owned());
        let credentials = in_short(status.verdict, &status.credentials, now);
        let line = format!(
            "{:<14}{:<24}{:<12}{:<16}{role:<40}{source:<36}{credentials:<22}{:>9}  {client}",
            short(&status.id),
            status.name,
            status.engine,
            // Of `container:ID` and networks with long names, the beginning.
            status.network.chars().take(15).collect::<String>(),
            status.requests
        );
        println!("{}", printable(&line));
    }
    if all {
        let strangers = parse::<Stranger>(&get(socket, "/strangers").await?)?;
        println!("\n{}", other::HEADER);
        for stranger in strangers {
            println!("{}", printable(&other::row(&stranger)));
        }
    }
    Ok(())
}

pub(crate) async fn explain(socket: &Path, given: &str) -> anyhow::Result<()> {
    let (all, now) = (parse::<Status>(&get(socket, "/containers").await?)?, Timestamp::now());
    let lines = match Other::parse(given)? {
        None => lines(find(&all, given)?, now),
        Some(other) => match all.iter().find(|status| other.is_in(status.cgroup)) {
            Some(status) => lines(status, now),
            None => {
                let denied = matches!(about(socket).await, Some(Ok(Facts { host_denied: true, .. })));
                other.lines(&parse(&get(socket, "/strangers").await?)?, denied, now)?
            }
        },
    };
    for (what, line) in lines {
        println!("{what:<13}{}", printable(&line));
    }
    Ok(())
}

/// What the daemon says of itself; None if there is none at this socket.
pub(crate) async fn about(socket: &Path) -> Option<anyhow::Result<Facts>> {
    UnixStream::connect(socket).await.ok()?;
    let body = get(socket, "/about").await;
    Some(body.and_then(|body| serde_json::from_slice(&body).context("the daemon is of another version")))
}

/// By its name, its id, or the beginning of its id if no other's begins so.
fn find<'a>(all: &'a [Status], given: &str) -> anyhow::Result<&'a Status> {
    let exactly = |status: &&Status| status.name == given || status.id == given;
    let begin_so: Vec<_> = all.iter().filter(|status| status.id.starts_with(given)).collect();
    match (all.iter().find(exactly), begin_so.as_slice()) {
        (Some(exact), _) => Ok(exact),
        _ if given.is_empty() => bail!("which container? `metadata-proxy ps` lists those that the daemon knows"),
        (None, [one]) => Ok(one),
        (None, []) => {
            bail!("the daemon knows no running container {given:?}; `metadata-proxy ps` lists those it knows")
        }
        (None, several) => {
            let several: Vec<_> = several.iter().map(|one| format!("{} ({})", one.name, short(&one.id))).collect();
            bail!("{given:?} is the beginning of several ids; which is meant: {}?", several.join(", "))
        }
    }
}

/// The whole chain, from the kernel's view to STS's answer.
fn lines(status: &Status, now: Timestamp) -> Vec<(&'static str, String)> {
    let path = |path: &Option<PathBuf>| path.as_ref().map_or("gone".to_owned(), |path| path.display().to_string());
    let user = match status.user_namespace {
        UserNamespace::Host => "the host's user namespace",
        UserNamespace::Own => "a user namespace of its own",
    };
    // A service of the host has none.
    let image = if status.image.is_empty() { String::new() } else { format!(", image {}", status.image) };
    let mut lines = vec![
        ("container", format!("{} ({}), engine {}{image}", status.name, short(&status.id), status.engine)),
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
    lines.extend(status.conflicts.iter().map(|conflict| ("conflict", conflict.clone())));
    for said in &status.sources {
        let value = match (&said.value, said.from_image) {
            (None, true) => "from the image, does not count",
            (Some(value), _) if value.is_empty() => "empty",
            (Some(value), true) => &format!("{value} (from the image, counts as far as it takes away)"),
            (Some(value), false) => value,
            (None, false) => "not there",
        };
        lines.push(("looked at", format!("{}: {value}", said.source)));
    }
    lines.extend(status.reasons.iter().map(|reason| ("because", reason.clone())));
    let role = status.role.as_deref().unwrap_or("none");
    lines.push(match status.verdict {
        Outcome::Role | Outcome::NoRole => ("role", role.to_owned()),
        Outcome::Pending => ("role", format!("{role}, in an account that is not known yet")),
        Outcome::Instance => ("role", format!("{role}: it has the real service, and the host's own role")),
        Outcome::Refused => ("role", format!("{role}: refused")),
    });
    lines.extend(status.role_source.iter().map(|source| ("named by", source.clone())));
    lines.extend(status.session.iter().map(|session| ("session", session.clone())));
    lines.extend(status.options.iter().map(|(name, value)| ("option", format!("{name}: {value}"))));
    lines.extend(at_length(status.verdict, &status.credentials, now).into_iter().map(|line| ("credentials", line)));
    lines.extend(status.advice.iter().map(|advice| ("remedy", advice.clone())));
    lines
}

fn in_short(verdict: Outcome, credentials: &Credentials, now: Timestamp) -> String {
    match credentials {
        Credentials::None => match verdict {
            Outcome::Refused => "REFUSED".to_owned(),
            Outcome::Pending => "PENDING".to_owned(),
            Outcome::Instance => "the host's".to_owned(),
            Outcome::Role | Outcome::NoRole => "-".to_owned(),
        },
        Credentials::Pending => "asking STS".to_owned(),
        Credentials::Valid { expiration, trouble, .. } => {
            let minutes = expiration.duration_since(now).as_secs() / 60;
            format!("{minutes} min{}", if trouble.is_some() { ", not renewed" } else { "" })
        }
        Credentials::Refused { .. } => "REFUSED".to_owned(),
        Credentials::Unavailable { .. } => "UNAVAILABLE".to_owned(),
    }
}

fn at_length(verdict: Outcome, credentials: &Credentials, now: Timestamp) -> Vec<String> {
    match credentials {
        Credentials::None => {
            let why = match verdict {
                Outcome::Refused => "none: its role is refused",
                Outcome::Pending => "none yet: AWS has not told whose account the daemon is in, so STS cannot be asked",
                Outcome::Instance => "the host's own, which the real service gives it and the daemon does not see",
                Outcome::Role | Outcome::NoRole => "none: the container has no role",
            };
            vec![why.to_owned()]
        }
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

fn parse<T: DeserializeOwned>(body: &[u8]) -> anyhow::Result<Vec<T>> {
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

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn status(name: &str, id: &str) -> Status {
        let status = json!({
            "id": id, "name": name, "engine": "docker", "image": "", "cgroup": 1, "cgroup_path": null, "pid": 1, "network": "", "network_namespace": null,
            "user_namespace": "host", "sources": [], "reasons": [], "verdict": "no-role", "role": null, "role_source": null,
            "session": null, "options": [], "credentials": { "state": "none" }, "advice": null, "requests": 0, "last_client": null,
        });
        serde_json::from_value(status).unwrap()
    }

    #[test]
    fn a_container_is_found_by_its_name_its_id_or_a_beginning_that_is_nobody_elses() {
        let all = [status("web", "ab12"), status("ab1", "cd34"), status("job", "ab19"), status("cd34", "ef56")];
        let found =
            |given: &str| find(&all, given).map(|status| status.name.as_str()).map_err(|error| error.to_string());
        for (given, name) in [("web", "web"), ("ab12", "web"), ("ab19", "job"), ("e", "cd34"), ("ab1", "ab1")] {
            assert_eq!(found(given).as_deref(), Ok(name), "{given}");
        }
        let several = found("ab").unwrap_err();
        assert!(several.contains("web (ab12), job (ab19)") && !several.contains("ef56"), "{several}");
        assert!(found("x").unwrap_err().contains("metadata-proxy ps") && found("").is_err());
    }
}
