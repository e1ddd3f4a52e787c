//! Sockets that are made here and used there: later, or by somebody else.

use std::{
    fs,
    os::{
        fd::OwnedFd,
        unix::net::{UnixListener, UnixStream},
    },
    path::Path,
    time::{Duration, Instant},
};

use libc::AF_INET;

use crate::{Outcome, Tried, at, sys, tcp};

const LIMIT: Duration = Duration::from_secs(40);

/// Gives a socket to the first who asks at this path, and lives until the other is done with it.
pub(crate) fn give(path: &str, connected: bool) -> Tried {
    let socket = tcp::tcp(AF_INET)?;
    if connected {
        sys::connect(&socket, &tcp::imds()).map_err(at("connect"))?;
    }
    let listener = UnixListener::bind(path).map_err(at("bind"))?;
    let (mut other, _) = listener.accept().map_err(at("accept"))?;
    sys::send_fd(&other, &socket).map_err(at("SCM_RIGHTS"))?;
    // The end of the stream is the end of the other.
    std::io::copy(&mut other, &mut std::io::sink()).map_err(at("read"))?;
    Ok(Outcome::Refused("given away".into()))
}

/// Takes the socket that somebody gives at this path, and asks over it.
pub(crate) fn take(path: &str, connect: bool) -> Tried {
    wait_for(path)?;
    let giver = UnixStream::connect(path).map_err(at("connect to the giver"))?;
    let socket = sys::recv_fd(&giver).map_err(at("SCM_RIGHTS"))?;
    use_now(&socket, connect)
}

/// Makes a socket now (says so with a file `.ready`), and uses it when there is a file `.go`.
pub(crate) fn wait(path: &str, connect: bool) -> Tried {
    let socket = tcp::tcp(AF_INET)?;
    if !connect {
        sys::connect(&socket, &tcp::imds()).map_err(at("connect"))?;
    }
    fs::write(format!("{path}.ready"), "").map_err(at("ready"))?;
    wait_for(&format!("{path}.go"))?;
    use_now(&socket, connect)
}

fn use_now(socket: &OwnedFd, connect: bool) -> Tried {
    if connect {
        sys::connect(socket, &tcp::imds()).map_err(at("connect"))?;
    }
    tcp::ask(socket)
}

fn wait_for(path: &str) -> Result<(), Outcome> {
    let deadline = Instant::now() + LIMIT;
    while !Path::new(path).exists() {
        if Instant::now() > deadline {
            return Err(Outcome::Error(format!("{path} does not appear")));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    Ok(())
}
