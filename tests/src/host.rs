//! A hermetic host for one test: nothing it does reaches the machine, and nothing of the machine reaches it.
//!
//! A [`Machine`] is the bare host: private network and mount namespaces with the metadata addresses on the loopback, and a cgroup of its own.
//! A [`TestHost`] adds a private Docker [`Engine`] with two images. Dropping it, also in a panic, ends and removes everything.

mod cgroup;
mod container;
mod daemon;
mod engine;
mod image;
mod machine;
mod process;

use std::{ffi::OsStr, net::TcpListener, path::Path, process::Command, sync::Arc};

use anyhow::{Context as _, Result};
use bollard::{Docker, models::NetworkCreateRequest};

pub use self::{
    container::{Container, ContainerSpec, Finished, Network},
    daemon::{Daemon, DaemonOptions, program},
    engine::{Engine, SLOW_RUNTIME},
    image::{BUSYBOX, HOST},
    machine::{METADATA_V4, METADATA_V6, Machine},
};

/// What a test may choose about its host.
#[derive(Debug, Clone, Copy, Default)]
pub struct HostOptions {
    /// Containers outlive the engine's stop and restart, as with `dockerd --live-restore`.
    pub live_restore: bool,
    /// Containers have user namespaces of their own unless they say otherwise, as with `dockerd --userns-remap`.
    pub userns_remap: bool,
}

pub struct TestHost {
    // First, so that the engine is ended before what it stands on.
    engine: Engine,
    machine: Arc<Machine>,
}

impl TestHost {
    pub async fn start() -> Result<Self> {
        Self::start_with(HostOptions::default()).await
    }

    pub async fn start_with(options: HostOptions) -> Result<Self> {
        Self::on(Machine::start()?, options).await
    }

    /// The virtual machine that runs us, see [`Machine::guest`].
    pub async fn guest() -> Result<Self> {
        Self::on(Machine::guest()?, HostOptions::default()).await
    }

    async fn on(machine: Machine, options: HostOptions) -> Result<Self> {
        let machine = Arc::new(machine);
        let engine = Engine::start(Arc::clone(&machine), options).await?;
        image::import_all(engine.docker()).await?;
        Ok(Self { engine, machine })
    }

    pub fn machine(&self) -> &Machine {
        &self.machine
    }

    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    /// The engine's API, for what this interface does not offer.
    pub fn docker(&self) -> &Docker {
        self.engine.docker()
    }

    /// A directory for the test's own files, at the same path inside and outside, removed with the host.
    pub fn directory(&self) -> &Path {
        self.machine.directory()
    }

    /// See [`Machine::command`].
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        self.machine.command(program)
    }

    /// See [`Machine::in_netns`].
    pub fn in_netns<T: Send>(&self, run: impl FnOnce() -> T + Send) -> Result<T> {
        self.machine.in_netns(run)
    }

    /// See [`Machine::bind_tcp`].
    pub fn bind_tcp(&self, address: &str) -> Result<TcpListener> {
        self.machine.bind_tcp(address)
    }

    /// Creates and starts a container.
    pub async fn run(&self, spec: ContainerSpec) -> Result<Container> {
        Container::run(self.docker(), spec).await
    }

    /// A user-defined bridge network. The engine runs without iptables, so an internal one may well reach the host: what leaks there is seen.
    pub async fn create_network(&self, name: &str, internal: bool) -> Result<Network> {
        let request = NetworkCreateRequest { name: name.into(), internal: Some(internal), ..Default::default() };
        self.docker().create_network(request).await.with_context(|| format!("creating network {name}"))?;
        Ok(Network::Named(name.into()))
    }

    /// Starts the daemon under test on this host; it is not ready yet.
    pub fn daemon(&self, options: DaemonOptions) -> Result<Daemon> {
        let docker_host = format!("unix://{}", self.engine.socket().display());
        Daemon::start(&self.machine, &docker_host, options)
    }
}
