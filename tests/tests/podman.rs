//! A real podman beside the engine: its service on a socket, started for each while and ended when nobody asks, as its
//! users have it.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command},
    time::Duration,
};

use anyhow::{Context as _, Result, bail, ensure};
use metadata_proxy_tests::{
    host::{Daemon, TestHost},
    stage::{Stage, daemon_options, role_arn, with_config},
};
use tokio::time::{Instant, sleep};

const SOON: Duration = Duration::from_secs(20);
const ROLES: &str = "http://169.254.169.254/latest/meta-data/iam/security-credentials/";

/// podman with a store of its own on a test host. It ends with the host.
struct Podman<'a> {
    host: &'a TestHost,
    socket: PathBuf,
}

impl<'a> Podman<'a> {
    fn new(host: &'a TestHost) -> Result<Self> {
        let podman = Self { host, socket: host.directory().join("podman.sock") };
        // An image as small as they come: one program, which asks.
        let root = host.directory().join("image");
        std::fs::create_dir_all(root.join("bin"))?;
        std::fs::copy("/bin/busybox", root.join("bin/busybox")).context("busybox")?;
        for applet in ["sh", "wget", "sleep"] {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(applet))?;
        }
        let import = format!("tar -C {} -c . | podman {} import - mp/busybox", root.display(), Self::STORE.join(" "));
        success(host.command("sh").args(["-c", &import]))?;
        Ok(podman)
    }

    const STORE: [&'static str; 6] = [
        "--root=/run/podman-store",
        "--runroot=/run/podman-run",
        "--tmpdir=/run/podman-tmp",
        "--cgroup-manager=cgroupfs",
        "--events-backend=file",
        "--storage-driver=overlay",
    ];

    fn command(&self) -> Command {
        let mut command = self.host.command("podman");
        command.args(Self::STORE).arg("--runtime=runc");
        command
    }

    /// As its socket unit starts it; it ends when nobody has asked for so long.
    fn serve(&self, seconds: u32) -> Result<Child> {
        let _ = std::fs::remove_file(&self.socket);
        let mut command = self.command();
        command.args(["system", "service", &format!("--time={seconds}"), &self.host_of()]);
        command.spawn().context("starting podman's service")
    }

    fn host_of(&self) -> String {
        format!("unix://{}", self.socket.display())
    }

    /// The container's id.
    fn run(&self, name: &str, arguments: &[&str], script: &str) -> Result<String> {
        let parent = format!("--cgroup-parent=/{}/podman", self.host.machine().name());
        let mut command = self.command();
        command.args([
            "run",
            "--detach",
            &parent,
            "--name",
            name,
            "--pids-limit=-1",
            "--ulimit=nofile=1024:1024",
            "--ulimit=nproc=1024:1024",
            "--label",
            &format!("metadata-proxy.role={}", role_arn(name)),
        ]);
        Ok(success(command.args(arguments).args(["mp/busybox", "/bin/sh", "-c", script]))?.trim().to_owned())
    }

    /// What a container says to the list of roles, from within.
    fn ask(&self, name: &str) -> Result<String> {
        let output = self.command().args(["exec", name, "/bin/wget", "-q", "-O-", ROLES]).output()?;
        Ok(String::from_utf8_lossy(if output.status.success() { &output.stdout } else { &output.stderr })
            .trim()
            .to_owned())
    }
}

fn success(command: &mut Command) -> Result<String> {
    let output = command.output()?;
    ensure!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// What `ps --json` says.
fn known(daemon: &Stage) -> Result<Vec<serde_json::Value>> {
    let mut command = daemon.command(metadata_proxy_tests::host::program()?);
    Ok(serde_json::from_str(&success(command.args(["ps", "--json"]))?)?)
}

async fn until(what: &str, mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + SOON;
    while !holds()? {
        ensure!(Instant::now() < deadline, "{what}: not within {SOON:?}");
        sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

fn log_tail(daemon: &Daemon) -> String {
    daemon.log().unwrap_or_default()
}

#[tokio::test(flavor = "multi_thread")]
async fn podmans_containers_have_their_roles_beside_those_of_docker() -> Result<()> {
    let host = TestHost::start().await?;
    let (docker, socket) = (host.engine().socket().to_owned(), host.directory().join("podman.sock"));
    let config = format!(
        "docker-host = ['unix://{}', 'unix://{}']\n[[engine]]\nhost = 'unix://{}'\nname = 'podman'\ndeny = ['arn:*secret']\n",
        docker.display(),
        socket.display(),
        socket.display(),
    );
    // Not the flag that tests have by default.
    let options = with_config(&host, daemon_options().arg("--docker-host="), &config)?;
    // Its socket is not there yet.
    let mut stage = Stage::on(host, options).await?;
    let podman = Podman::new(&stage.host)?;
    let mut service = podman.serve(3)?;
    let following = format!("ready: following the containers of {}", podman.host_of());
    stage.daemon.wait_for("podman", SOON, |log| log.contains(&following)).await?;

    // By the service that is there, and by none: podman's own command line does not need it.
    for (name, network) in [("host-1", "--network=host"), ("none-1", "--network=none"), ("secret", "--network=host")] {
        podman.run(name, &[network], "sleep 600")?;
    }
    for name in ["host-1", "none-1"] {
        until(name, || Ok(podman.ask(name)? == name)).await.with_context(|| log_tail(&stage.daemon))?;
    }
    ensure!(podman.ask("secret")?.contains("404"), "{}", podman.ask("secret")?);
    let engines: Vec<_> = known(&stage)?.iter().map(|status| status["engine"].to_string()).collect();
    ensure!(engines == [r#""podman""#; 3], "{engines:?}");

    // What has ended is gone, whatever podman says of it, and however soon it is asked.
    for number in 0..5 {
        podman.run(&format!("brief-{number}"), &["--rm", "--network=none"], "exit 0")?;
    }
    success(podman.command().args(["rm", "--force", "--time=0", "none-1"]))?;
    until("they are gone", || Ok(known(&stage)?.len() == 2)).await.with_context(|| log_tail(&stage.daemon))?;

    // The service ends when it idles, and podman goes on without.
    service.kill()?;
    service.wait()?;
    ensure!(podman.ask("host-1")? == "host-1", "a known container of an engine that is away");
    let mut service = podman.serve(3)?;
    podman.run("host-2", &["--network=host"], "sleep 600")?;
    until("host-2", || Ok(podman.ask("host-2")? == "host-2")).await.with_context(|| log_tail(&stage.daemon))?;
    let log = log_tail(&stage.daemon);
    let mut warned =
        log.lines().filter(|line| line.contains(" WARN ") && !line.contains("cannot follow the engine podman"));
    let about_ends =
        warned.find(|line| line.contains("inspect") || line.contains("variant") || line.contains("no listener"));
    ensure!(about_ends.is_none(), "{about_ends:?}");

    service.kill()?;
    service.wait()?;
    success(podman.command().args(["rm", "--force", "--time=0", "--all"]))?;
    stage.assert_no_leak()
}

/// A socket that is a user's: its containers get nothing by their own word, and it cannot speak for those of others.
#[tokio::test(flavor = "multi_thread")]
async fn a_users_engine_gives_no_roles_and_takes_none() -> Result<()> {
    let host = TestHost::start().await?;
    let directory = host.directory().join("users");
    std::fs::create_dir(&directory)?;
    let theirs = directory.join("docker.sock");
    // As the user sees it, a relay to the engine that is root's.
    let mut relay = relay(&host, &theirs)?;
    std::os::unix::fs::chown(&directory, Some(65534), None)?;
    let config = format!(
        "[[engine]]\nhost = 'unix://{}'\nname = 'theirs'\nallow = ['*']\n[[engine]]\nhost = 'unix://{}'\n",
        theirs.display(),
        host.engine().socket().display()
    );
    let options = with_config(&host, daemon_options().arg("--docker-host="), &config)?;
    let mut stage = Stage::on(host, options).await?;
    stage.daemon.wait_for("the user's engine", SOON, |log| log.contains("engine theirs is user 65534's")).await?;
    let container = stage
        .run(
            metadata_proxy_tests::host::ContainerSpec::on_host("web", ["sleep", "600"])
                .label("metadata-proxy.role", &role_arn("web")),
        )
        .await?;
    let ask = || async { container.exec(["/usr/bin/curl", "-sS", ROLES]).await?.success() };
    let refusal = "tells of a container of user 0's: it does not count";
    stage.daemon.wait_for("the refusal", SOON, |log| log.contains(refusal)).await?;
    ensure!(ask().await? == "web", "{}", ask().await?);
    let engines: Vec<_> = known(&stage)?.iter().map(|status| status["engine"].to_string()).collect();
    ensure!(engines == [r#""docker""#], "{engines:?}");
    relay.kill()?;
    relay.wait()?;
    if ask().await? != "web" {
        bail!("the user's engine is away, and others' containers suffer");
    }
    stage.assert_no_leak()
}

/// As user nobody, whose socket it is.
fn relay(host: &TestHost, socket: &Path) -> Result<Child> {
    std::os::unix::fs::chown(socket.parent().context("no directory")?, Some(65534), None)?;
    // Whoever has this group may use the engine, as members of `docker` do.
    let group = std::os::unix::fs::chown(host.engine().socket(), None, Some(65534));
    group.context("giving the engine's socket to a group")?;
    let script = format!(
        "import socket,threading\nl=socket.socket(socket.AF_UNIX); l.bind('{0}'); l.listen(64)\ndef pump(a,b):\n while True:\n  d=a.recv(65536)\n  if not d: break\n  b.sendall(d)\n b.shutdown(1)\ndef serve(c):\n s=socket.socket(socket.AF_UNIX); s.connect('{1}'); threading.Thread(target=pump,args=(c,s),daemon=True).start(); pump(s,c)\nwhile True:\n c,_=l.accept(); threading.Thread(target=serve,args=(c,),daemon=True).start()",
        socket.display(),
        host.engine().socket().display(),
    );
    let mut command = host.command("setpriv");
    command.args(["--reuid=65534", "--regid=65534", "--clear-groups", "python3", "-c", &script]);
    let child = command.spawn().context("starting the relay")?;
    let deadline = std::time::Instant::now() + SOON;
    while !socket.exists() {
        ensure!(std::time::Instant::now() < deadline, "the relay does not listen");
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(child)
}
