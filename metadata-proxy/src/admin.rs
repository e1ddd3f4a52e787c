//! What the daemon says of itself, to root on this host, over a unix socket; and its metrics, to whoever
//! may reach the address that the operator names. Reads only.

pub(crate) mod about;
pub(crate) mod client;
mod conflicts;
mod other;
pub(crate) mod status;

use std::{
    convert::Infallible, fs, io, net::SocketAddr, os::unix::fs::PermissionsExt as _, path::Path, sync::Arc,
    time::Duration,
};

use anyhow::Context as _;
use bytes::Bytes;
use http::{Request, Response, StatusCode, header::CONTENT_TYPE};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::registry::Registry;
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, UnixListener},
};
use tracing::{debug, warn};

use about::About;

use crate::{
    containers,
    credentials::Store,
    metrics,
    strangers::{Stranger, Strangers},
    workload::Workload,
};

const HEADER_TIMEOUT: Duration = Duration::from_secs(2);

pub(crate) struct Admin {
    pub(crate) containers: Arc<containers::Registry<Workload>>,
    pub(crate) credentials: Arc<Store>,
    pub(crate) strangers: Arc<Strangers>,
    pub(crate) metrics: Registry,
    pub(crate) about: Arc<About>,
}

/// Who asks, and so what may be asked.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Asker {
    Root,
    Network,
}

impl Admin {
    /// Takes the socket's path over from a daemon before us.
    pub(crate) fn bind(path: &Path) -> anyhow::Result<UnixListener> {
        let bind = || -> io::Result<UnixListener> {
            if let Some(directory) = path.parent() {
                fs::create_dir_all(directory)?;
            }
            match fs::remove_file(path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
            let listener = UnixListener::bind(path)?;
            fs::set_permissions(path, fs::Permissions::from_mode(0o600))?;
            Ok(listener)
        };
        bind().with_context(|| format!("cannot listen on --admin-socket {}", path.display()))
    }

    pub(crate) async fn serve_unix(self: Arc<Self>, listener: UnixListener) {
        loop {
            match listener.accept().await {
                // The mode of the socket says the same; but modes get changed.
                Ok((stream, _)) if stream.peer_cred().is_ok_and(|peer| peer.uid() == 0) => {
                    tokio::spawn(Arc::clone(&self).connection(stream, Asker::Root));
                }
                Ok(_) => warn!("refused somebody who is not root at the admin socket"),
                Err(error) => retry_later(&error).await,
            }
        }
    }

    pub(crate) async fn serve_metrics(self: Arc<Self>, address: SocketAddr) {
        let listener = match TcpListener::bind(address).await {
            Ok(listener) => listener,
            Err(error) => return warn!("no metrics: cannot listen on --metrics-address {address}: {error}"),
        };
        loop {
            match listener.accept().await {
                Ok((stream, _)) => drop(tokio::spawn(Arc::clone(&self).connection(stream, Asker::Network))),
                Err(error) => retry_later(&error).await,
            }
        }
    }

    async fn connection(self: Arc<Self>, stream: impl AsyncRead + AsyncWrite + Unpin, asker: Asker) {
        let service = service_fn(|request| {
            let answer = self.answer(&request, asker);
            async move { Ok::<_, Infallible>(answer) }
        });
        let served = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(HEADER_TIMEOUT)
            .keep_alive(false)
            .serve_connection(TokioIo::new(stream), service)
            .await;
        if let Err(error) = served {
            debug!("admin connection ended: {error}");
        }
    }

    fn answer(&self, request: &Request<Incoming>, asker: Asker) -> Response<Full<Bytes>> {
        let path = request.uri().path();
        match (asker, path) {
            (_, "/healthz") => text("ok\n".to_owned()),
            (_, "/metrics") => text(metrics::encode(&self.metrics)),
            (Asker::Root, "/containers") => json(&self.statuses()),
            (Asker::Root, "/strangers") => json(&self.strangers()),
            (Asker::Root, "/about") => json(&self.about.facts()),
            _ => {
                let mut answer = text("not found\n".to_owned());
                *answer.status_mut() = StatusCode::NOT_FOUND;
                answer
            }
        }
    }

    /// Those that are no container's by now.
    fn strangers(&self) -> Vec<Stranger> {
        for workload in self.containers.all() {
            self.strangers.forget(workload.container.cgroup);
        }
        self.strangers.all()
    }

    fn statuses(&self) -> Vec<status::Status> {
        let mut all: Vec<_> =
            self.containers.all().iter().map(|workload| status::of(workload, &self.credentials)).collect();
        all.sort_by(|one, other| one.name.cmp(&other.name));
        all
    }
}

fn text(body: String) -> Response<Full<Bytes>> {
    with_type(body, "text/plain; version=0.0.4; charset=utf-8")
}

fn json(value: &impl serde::Serialize) -> Response<Full<Bytes>> {
    // Names and numbers: nothing that could fail.
    with_type(serde_json::to_string(value).unwrap_or_default(), "application/json")
}

fn with_type(body: String, content_type: &'static str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    response.headers_mut().insert(CONTENT_TYPE, http::HeaderValue::from_static(content_type));
    response
}

async fn retry_later(error: &io::Error) {
    warn!("admin: accept: {error}");
    tokio::time::sleep(Duration::from_millis(100)).await;
}
