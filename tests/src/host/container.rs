//! Containers, from what a test wants of them to what they answered.

use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use bollard::{
    Docker,
    container::LogOutput,
    errors::Error,
    exec::{CreateExecOptions, StartExecResults},
    models::{ContainerCreateBody, HostConfig},
    query_parameters::{
        CreateContainerOptionsBuilder, InspectContainerOptions, LogsOptionsBuilder, RemoveContainerOptionsBuilder,
        StopContainerOptions, WaitContainerOptions,
    },
};
use futures_util::{Stream, TryStreamExt as _};
use tokio::time::sleep;

use super::image;

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Network {
    /// The engine's default bridge.
    #[default]
    Default,
    Named(String),
    Host,
    None,
    /// The network namespace of another container, by its name or id.
    Container(String),
}

impl Network {
    fn mode(&self) -> String {
        match self {
            Self::Default => "default".into(),
            Self::Named(name) => name.clone(),
            Self::Host => "host".into(),
            Self::None => "none".into(),
            Self::Container(name) => format!("container:{name}"),
        }
    }
}

#[derive(Debug, Clone, Default)]
pub struct ContainerSpec {
    pub name: String,
    pub image: String,
    pub network: Network,
    pub labels: Vec<(String, String)>,
    pub env: Vec<(String, String)>,
    pub cmd: Vec<String>,
    /// `source:target[:ro]`; those that the image needs are added.
    pub binds: Vec<String>,
    /// Instead of the machine's file system, for [`Self::on_host`].
    pub root: Option<PathBuf>,
    pub privileged: bool,
    /// Whatever else a test needs; the fields above go over it.
    pub host_config: HostConfig,
}

impl ContainerSpec {
    pub fn new<S: Into<String>>(image: &str, name: &str, cmd: impl IntoIterator<Item = S>) -> Self {
        Self {
            name: name.into(),
            image: image.into(),
            cmd: cmd.into_iter().map(Into::into).collect(),
            ..Self::default()
        }
    }

    /// A container of the static busybox.
    pub fn busybox<S: Into<String>>(name: &str, cmd: impl IntoIterator<Item = S>) -> Self {
        Self::new(image::BUSYBOX, name, cmd)
    }

    /// A container over the machine's `/usr`, read-only.
    pub fn on_host<S: Into<String>>(name: &str, cmd: impl IntoIterator<Item = S>) -> Self {
        Self::new(image::HOST, name, cmd)
    }

    /// The same, and it waits for commands.
    pub fn resident(name: &str) -> Self {
        Self::on_host(name, ["/usr/bin/sleep", "600"])
    }

    pub fn network(self, network: Network) -> Self {
        Self { network, ..self }
    }

    pub fn label(mut self, name: &str, value: &str) -> Self {
        self.labels.push((name.into(), value.into()));
        self
    }

    pub fn env(mut self, name: &str, value: &str) -> Self {
        self.env.push((name.into(), value.into()));
        self
    }

    pub fn bind(mut self, bind: impl Into<String>) -> Self {
        self.binds.push(bind.into());
        self
    }

    pub fn privileged(self) -> Self {
        Self { privileged: true, ..self }
    }

    fn into_body(self) -> ContainerCreateBody {
        let mut binds = self.binds;
        if self.image == image::HOST {
            binds.extend(image::host_binds(self.root.as_deref().unwrap_or(Path::new("/"))));
        }
        ContainerCreateBody {
            image: Some(self.image),
            cmd: Some(self.cmd),
            env: Some(self.env.iter().map(|(name, value)| format!("{name}={value}")).collect()),
            // A first process without a handler for SIGTERM ignores it; no test gains by the ten seconds that the engine would wait.
            stop_timeout: Some(0),
            labels: Some(self.labels.into_iter().collect()),
            host_config: Some(HostConfig {
                network_mode: Some(self.network.mode()),
                binds: Some(binds),
                privileged: Some(self.privileged),
                ..self.host_config
            }),
            ..Default::default()
        }
    }
}

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finished {
    pub exit_code: i64,
    pub stdout: String,
    pub stderr: String,
}

impl Finished {
    /// What it printed, if it succeeded.
    pub fn success(self) -> Result<String> {
        if self.exit_code != 0 {
            bail!("exit code {}\nstdout: {}\nstderr: {}", self.exit_code, self.stdout, self.stderr);
        }
        Ok(self.stdout)
    }
}

/// A started container. Dropping it does nothing: the host removes it.
#[derive(Debug, Clone)]
pub struct Container {
    docker: Docker,
    name: String,
    id: String,
}

impl Container {
    pub(super) async fn run(docker: &Docker, spec: ContainerSpec) -> Result<Self> {
        let name = spec.name.clone();
        let options = CreateContainerOptionsBuilder::new().name(&name).build();
        let created = docker
            .create_container(Some(options), spec.into_body())
            .await
            .with_context(|| format!("creating container {name}"))?;
        let container = Self { docker: docker.clone(), name, id: created.id };
        container.start().await?;
        Ok(container)
    }

    /// One that was started before, by its name.
    pub async fn find(docker: &Docker, name: &str) -> Result<Self> {
        let found = docker.inspect_container(name, None::<InspectContainerOptions>).await;
        let id = found.with_context(|| format!("looking for container {name}"))?.id.context("it has no id")?;
        Ok(Self { docker: docker.clone(), name: name.into(), id })
    }

    pub fn id(&self) -> &str {
        &self.id
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its first process, in the machine's process ids; 0 when it does not run.
    pub async fn pid(&self) -> Result<u32> {
        let found = self.docker.inspect_container(&self.id, None::<InspectContainerOptions>).await;
        let state = found.with_context(|| format!("inspecting container {}", self.name))?.state;
        let pid = state.and_then(|state| state.pid).context("the engine tells no process id")?;
        Ok(pid.try_into()?)
    }

    /// Starts it again after it has ended.
    pub async fn start(&self) -> Result<()> {
        let started = self.docker.start_container(&self.id, None).await;
        started.with_context(|| format!("starting container {}", self.name))
    }

    /// Waits for its end; it is not removed.
    pub async fn wait(&self) -> Result<Finished> {
        let mut answers = self.docker.wait_container(&self.id, None::<WaitContainerOptions>);
        let exit_code = match answers.try_next().await {
            Ok(Some(answer)) => answer.status_code,
            // The client takes any other exit code for an error of its own.
            Err(Error::DockerContainerWaitError { code, error }) if error.is_empty() => code,
            Ok(None) => bail!("the engine did not tell how container {} ended", self.name),
            Err(error) => {
                return Err(error).with_context(|| format!("waiting for container {}", self.name));
            }
        };
        let (stdout, stderr) = self.output().await?;
        Ok(Finished { exit_code, stdout, stderr })
    }

    /// What it has printed so far, standard output and standard error.
    pub async fn output(&self) -> Result<(String, String)> {
        let options = LogsOptionsBuilder::new().stdout(true).stderr(true).build();
        let output = collect(self.docker.logs(&self.id, Some(options))).await;
        output.with_context(|| format!("reading the output of container {}", self.name))
    }

    /// Waits until it has printed this word.
    pub async fn says(&self, word: &str, limit: Duration) -> Result<()> {
        let deadline = Instant::now() + limit;
        loop {
            let output = self.output().await?;
            if output.0.contains(word) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "{} has not said {word:?} within {limit:?}: {output:?}", self.name);
            sleep(Duration::from_millis(20)).await;
        }
    }

    /// Runs one more command in it, to its end.
    pub async fn exec<S: Into<String>>(&self, cmd: impl IntoIterator<Item = S>) -> Result<Finished> {
        let options = CreateExecOptions {
            cmd: Some(cmd.into_iter().map(Into::into).collect()),
            attach_stdout: Some(true),
            attach_stderr: Some(true),
            ..CreateExecOptions::<String>::default()
        };
        let doing = || format!("running a command in container {}", self.name);
        let exec = self.docker.create_exec(&self.id, options).await.with_context(doing)?;
        let StartExecResults::Attached { output, .. } =
            self.docker.start_exec(&exec.id, None).await.with_context(doing)?
        else {
            bail!("{}: the engine gave no output", doing());
        };
        let (stdout, stderr) = collect(output).await.with_context(doing)?;
        let exit_code = self.docker.inspect_exec(&exec.id).await.with_context(doing)?.exit_code;
        Ok(Finished { exit_code: exit_code.with_context(doing)?, stdout, stderr })
    }

    /// Ends it at once: SIGTERM, then SIGKILL without waiting.
    pub async fn stop(&self) -> Result<()> {
        let stopped = self.docker.stop_container(&self.id, None::<StopContainerOptions>).await;
        stopped.with_context(|| format!("stopping container {}", self.name))
    }

    /// Removes it, running or not.
    pub async fn remove(&self) -> Result<()> {
        let options = RemoveContainerOptionsBuilder::new().force(true).build();
        let removed = self.docker.remove_container(&self.id, Some(options)).await;
        removed.with_context(|| format!("removing container {}", self.name))
    }
}

async fn collect(mut output: impl Stream<Item = Result<LogOutput, Error>> + Unpin) -> Result<(String, String)> {
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    while let Some(part) = output.try_next().await? {
        match part {
            LogOutput::StdErr { message } => stderr.extend_from_slice(&message),
            LogOutput::StdOut { message } | LogOutput::Console { message } => stdout.extend_from_slice(&message),
            LogOutput::StdIn { .. } => {}
        }
    }
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    Ok((text(stdout), text(stderr)))
}
