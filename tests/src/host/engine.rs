//! A private Docker engine: dockerd and containerd as host processes, all of their state in the host's own mount namespace.

use std::{
    fs,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use anyhow::{Context as _, Result, ensure};
use bollard::{API_DEFAULT_VERSION, Docker};
use rustix::process::Signal;
use tokio::sync::Mutex;

use super::{
    HostOptions,
    machine::{Machine, find_program},
    process::Process,
};

const START_LIMIT: Duration = Duration::from_secs(60);
const STOP_LIMIT: Duration = Duration::from_secs(60);
const REQUEST_LIMIT_SECONDS: u64 = 300;

/// containerd runs by itself, as distributions run it, and stays when dockerd stops. (One that dockerd starts dies with a killed
/// dockerd, and the next dockerd waits for it in vain while it is a zombie.)
const CONTAINERD_SOCKET: &str = "/run/engine/containerd.sock";
// Without the Kubernetes plugin, which nobody asks and which starts slowly.
const CONTAINERD_CONFIG: &str = r#"
version = 2
root = "/run/engine/containerd/root"
state = "/run/engine/containerd/state"
disabled_plugins = ["io.containerd.grpc.v1.cri"]
[grpc]
address = "/run/engine/containerd.sock"
"#;

/// A runtime whose containers run for two seconds before the engine hears of it.
pub const SLOW_RUNTIME: &str = "slow";
const SLOW_RUNC: &str = "#!/bin/sh\nrunc \"$@\" || exit\nfor word; do [ \"$word\" = start ] && sleep 2; done\nexit 0\n";

pub struct Engine {
    docker: Docker,
    socket: PathBuf,
    options: HostOptions,
    process: Mutex<Process>,
    containerd: Mutex<Process>,
    machine: Arc<Machine>,
}

impl Engine {
    pub(super) async fn start(machine: Arc<Machine>, options: HostOptions) -> Result<Self> {
        for program in ["dockerd", "containerd", "runc"] {
            find_program(program, "docker.io")?;
        }
        // Our own, so that the machine's settings have no say.
        let directory = machine.directory();
        fs::write(directory.join("containerd.toml"), CONTAINERD_CONFIG).context("writing containerd.toml")?;
        let slow = directory.join("slow-runc");
        fs::write(&slow, SLOW_RUNC).context("writing slow-runc")?;
        fs::set_permissions(&slow, fs::Permissions::from_mode(0o755))?;
        let settings = format!(r#"{{"runtimes": {{"{SLOW_RUNTIME}": {{"path": "{}"}}}}}}"#, slow.display());
        fs::write(directory.join("dockerd.json"), settings).context("writing dockerd.json")?;

        let mut command = machine.command("containerd");
        command.arg("--config").arg(directory.join("containerd.toml"));
        // dockerd waits for its socket.
        let containerd = Process::spawn("containerd", command, directory.join("containerd.log"))?;
        let socket = directory.join("docker.sock");
        let mut process = spawn(&machine, &socket, options)?;
        let docker = answering(&mut process, &socket).await?;
        let docker = docker.negotiate_version().await.context("negotiating the Docker API version")?;
        Ok(Self { docker, socket, options, process: Mutex::new(process), containerd: Mutex::new(containerd), machine })
    }

    pub fn docker(&self) -> &Docker {
        &self.docker
    }

    /// The API's socket, at the same path inside and outside.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Everything that dockerd has logged.
    pub async fn log(&self) -> Result<String> {
        self.process.lock().await.log()
    }

    /// From now on dockerd hears of no container's end.
    pub async fn deafen(&self) -> Result<()> {
        self.containerd.lock().await.signal(Signal::STOP)
    }

    /// What the engine has written down of a container ends in the middle; it still tells by its API.
    pub fn spoil(&self, id: &str) -> Result<()> {
        let file = format!("/run/engine/data/containers/{id}/config.v2.json");
        let spoilt = self.machine.command("truncate").args(["--size=100", &file]).status()?;
        ensure!(spoilt.success(), "cannot spoil {file}");
        Ok(())
    }

    /// Until [`go_on`](Self::go_on) dockerd answers nothing; its socket takes connections.
    pub async fn hang(&self) -> Result<()> {
        self.process.lock().await.signal(Signal::STOP)
    }

    pub async fn go_on(&self) -> Result<()> {
        self.process.lock().await.signal(Signal::CONT)
    }

    /// Stops dockerd in order, and the containers with it unless it has live-restore.
    pub async fn stop(&self) -> Result<()> {
        self.end(Signal::TERM).await
    }

    /// Kills dockerd at once. Containers keep running; without live-restore the next start stops them.
    pub async fn kill(&self) -> Result<()> {
        self.end(Signal::KILL).await
    }

    /// Starts the engine again after [`stop`](Self::stop) or [`kill`](Self::kill).
    pub async fn resume(&self) -> Result<()> {
        let mut process = self.process.lock().await;
        *process = spawn(&self.machine, &self.socket, self.options)?;
        answering(&mut process, &self.socket).await?;
        Ok(())
    }

    pub async fn restart(&self) -> Result<()> {
        self.stop().await?;
        self.resume().await
    }

    async fn end(&self, signal: Signal) -> Result<()> {
        let mut process = self.process.lock().await;
        process.signal(signal)?;
        process.wait(STOP_LIMIT).await?;
        Ok(())
    }
}

fn spawn(machine: &Machine, socket: &Path, options: HostOptions) -> Result<Process> {
    let directory = machine.directory();
    let mut command = machine.command("dockerd");
    command
        .arg("--config-file")
        .arg(directory.join("dockerd.json"))
        .arg(format!("--host=unix://{}", socket.display()))
        .arg(format!("--containerd={CONTAINERD_SOCKET}"))
        .arg(format!("--cgroup-parent={}", machine.containers()))
        .args([
            // In the tmpfs of the mount namespace: fast, and gone with it.
            "--data-root=/run/engine/data",
            "--exec-root=/run/engine/exec",
            "--pidfile=/run/engine/pid",
            "--storage-driver=overlay2",
            "--exec-opt=native.cgroupdriver=cgroupfs",
            // There is no way out to masquerade for, and the daemon has to work without any rule of the firewall.
            "--iptables=false",
            "--ip6tables=false",
        ]);
    if options.live_restore {
        command.arg("--live-restore");
    }
    if options.userns_remap {
        // Whose the range is matters to nobody; that it is there, and not root's, does.
        let range = "echo daemon:200000:65536 > /etc/subuid; cp /etc/subuid /etc/subgid; \
                     mkdir -p /run/engine/data; chmod o+x /run/engine /run/engine/data";
        let written = machine.command("sh").args(["-c", range]).status()?;
        ensure!(written.success(), "cannot write /etc/subuid of the test host");
        command.arg("--userns-remap=daemon");
    }
    Process::spawn("dockerd", command, directory.join("dockerd.log"))
}

async fn answering(process: &mut Process, socket: &Path) -> Result<Docker> {
    let path = socket.to_str().context("the engine's socket has an unusual path")?;
    process
        .until("answering", START_LIMIT, async |_| {
            // The client refuses to be made before the socket exists.
            let Ok(docker) = Docker::connect_with_unix(path, REQUEST_LIMIT_SECONDS, API_DEFAULT_VERSION) else {
                return Ok(None);
            };
            Ok(docker.ping().await.is_ok().then_some(docker))
        })
        .await
}
