//! The HTTP server below both stand-ins: hyper on a thread and a runtime of its own.
//!
//! On its own thread because a test may block, and because a `#[tokio::test]` takes its runtime down with it while the daemon is still asking. The
//! listeners come bound: only the test host knows the network namespace they belong to.

use std::future::{Future, poll_fn};
use std::net::{SocketAddr, TcpListener};
use std::sync::mpsc as blocking;
use std::task::Poll;
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context as _;
use bytes::Bytes;
use http::{Request, Response};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;

/// What a handler answers; `Err` closes the connection without an answer.
pub(crate) type Answer = Result<Response<Full<Bytes>>, Closed>;

/// The connection is closed on purpose.
#[derive(Debug)]
pub(crate) struct Closed;

impl std::fmt::Display for Closed {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("closed on purpose")
    }
}

impl std::error::Error for Closed {}

/// Whether the server closes a connection after each answer, as the real metadata service does, or keeps it, as STS does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Connections {
    Close,
    Keep,
}

enum Command {
    Pause,
    Resume,
}

/// A running server; dropping it ends its connections and its thread.
#[derive(Debug)]
pub(crate) struct Server {
    /// `None` only while dropping: its end is what ends the thread.
    commands: Option<mpsc::UnboundedSender<(Command, blocking::Sender<anyhow::Result<()>>)>>,
    thread: Option<JoinHandle<()>>,
    addresses: Vec<SocketAddr>,
}

impl Server {
    pub(crate) fn start<H, F>(
        name: &str,
        listeners: Vec<TcpListener>,
        connections: Connections,
        handler: H,
    ) -> anyhow::Result<Self>
    where
        H: Fn(Request<Incoming>, SocketAddr) -> F + Clone + Send + Sync + 'static,
        F: Future<Output = Answer> + Send + 'static,
    {
        let mut addresses = Vec::new();
        for listener in &listeners {
            listener.set_nonblocking(true).context("set the listener non-blocking")?;
            addresses.push(listener.local_addr().context("read the listener's address")?);
        }
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .with_context(|| format!("start the runtime of the {name}"))?;
        let listening = {
            let _runtime = runtime.enter();
            adopt(&listeners)?
        };
        let bound = addresses.clone();
        let (commands, receiver) = mpsc::unbounded_channel();
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(move || {
                runtime.block_on(run((listeners, bound), listening, receiver, connections, handler));
            })
            .with_context(|| format!("start the thread of the {name}"))?;
        Ok(Self { commands: Some(commands), thread: Some(thread), addresses })
    }

    pub(crate) fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Stops listening and breaks every connection: from here on a connection is refused, as by a service that is down.
    pub(crate) fn pause(&self) -> anyhow::Result<()> {
        self.command(Command::Pause).context("stop listening")
    }

    /// Listens again, on the same addresses in the same network namespace.
    pub(crate) fn resume(&self) -> anyhow::Result<()> {
        self.command(Command::Resume).context("listen again")
    }

    fn command(&self, command: Command) -> anyhow::Result<()> {
        let (done, result) = blocking::channel();
        let commands = self.commands.as_ref().context("the server has ended")?;
        commands.send((command, done)).ok().context("the server has ended")?;
        result.recv().context("the server has ended")?
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.commands = None;
        if let Some(thread) = self.thread.take() {
            // A panic of that thread has been printed already, and a destructor has nobody to tell.
            let _ended = thread.join();
        }
    }
}

/// Registers duplicates with the runtime; the originals stay, so that `pause` and `resume` never have to bind.
fn adopt(listeners: &[TcpListener]) -> anyhow::Result<Vec<tokio::net::TcpListener>> {
    let mut adopted = Vec::new();
    for listener in listeners {
        let duplicate = listener.try_clone().context("duplicate the listener")?;
        adopted.push(tokio::net::TcpListener::from_std(duplicate).context("register the listener")?);
    }
    Ok(adopted)
}

/// One task accepts, obeys and owns the connections, so that no connection slips in between a pause and the breaking of the old ones.
async fn run<H, F>(
    (listeners, addresses): (Vec<TcpListener>, Vec<SocketAddr>),
    mut listening: Vec<tokio::net::TcpListener>,
    mut commands: mpsc::UnboundedReceiver<(Command, blocking::Sender<anyhow::Result<()>>)>,
    connections: Connections,
    handler: H,
) where
    H: Fn(Request<Incoming>, SocketAddr) -> F + Clone + Send + Sync + 'static,
    F: Future<Output = Answer> + Send + 'static,
{
    let mut open = JoinSet::new();
    loop {
        tokio::select! {
            command = commands.recv() => {
                let Some((command, done)) = command else { break };
                let result = match command {
                    Command::Pause if listening.is_empty() => Ok(()),
                    Command::Pause => {
                        // Dropped and made anew: a registered listener that was shut down would be reported as readable for ever.
                        listening.clear();
                        open.abort_all();
                        close(&listeners, &addresses)
                    }
                    Command::Resume if !listening.is_empty() => Ok(()),
                    Command::Resume => reopen(&listeners).map(|reopened| listening = reopened),
                };
                // Whoever asked may have gone.
                let _told = done.send(result);
            }
            accepted = accept(&listening) => match accepted {
                Ok((stream, peer)) => drop(open.spawn(serve(stream, peer, connections, handler.clone()))),
                // Out of descriptors, most likely: it passes, and spinning would not help.
                Err(_) => tokio::time::sleep(Duration::from_millis(5)).await,
            },
            Some(_) = open.join_next() => {}
        }
    }
}

/// Shuts the listeners down without closing them, so that coming back needs neither the right network
/// namespace nor luck with the port.
fn close(listeners: &[TcpListener], addresses: &[SocketAddr]) -> anyhow::Result<()> {
    for (listener, address) in listeners.iter().zip(addresses) {
        rustix::net::shutdown(listener, rustix::net::Shutdown::Read)?;
        // The kernel has taken back a port that it had chosen itself (one bound as 0). It keeps the
        // others, and says EINVAL.
        match rustix::net::bind(listener, address) {
            Ok(()) | Err(rustix::io::Errno::INVAL) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn reopen(listeners: &[TcpListener]) -> anyhow::Result<Vec<tokio::net::TcpListener>> {
    for listener in listeners {
        rustix::net::listen(listener, 1024)?;
    }
    adopt(listeners)
}

async fn accept(listening: &[tokio::net::TcpListener]) -> std::io::Result<(TcpStream, SocketAddr)> {
    poll_fn(|context| {
        for listener in listening {
            if let Poll::Ready(accepted) = listener.poll_accept(context) {
                return Poll::Ready(accepted);
            }
        }
        Poll::Pending
    })
    .await
}

async fn serve<H, F>(stream: TcpStream, peer: SocketAddr, connections: Connections, handler: H)
where
    H: Fn(Request<Incoming>, SocketAddr) -> F + Send + Sync + 'static,
    F: Future<Output = Answer> + Send + 'static,
{
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .keep_alive(connections == Connections::Keep)
        .serve_connection(TokioIo::new(stream), service_fn(move |request| handler(request, peer)))
        .await;
    // Broken connections are the client's affair; what was asked has been recorded.
    drop(served);
}
