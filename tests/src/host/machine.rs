//! The bare test host: namespaces, addresses, a cgroup and a directory, all of which end with the test process.

use std::{
    ffi::OsStr,
    fs::{self, File},
    io::{BufRead as _, BufReader},
    net::TcpListener,
    os::{fd::AsFd as _, unix::process::CommandExt as _},
    path::{Path, PathBuf},
    process::{self, Child, Command, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    thread,
};

use anyhow::{Context as _, Result, bail, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use super::cgroup;

/// Where the stand-in for the real metadata service listens, on the host's loopback.
pub const METADATA_V4: &str = "169.254.169.254";
pub const METADATA_V6: &str = "fd00:ec2::254";

/// What host processes find their programs by, whatever the tester's own is.
pub(super) const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

const PREFIX: &str = "metadata-proxy-test-";
// Short, because the engine's socket lies there and a socket's path has at most 107 bytes.
const DIRECTORIES: &str = "/tmp";

/// In the command line of the kernel of a guest; xtask's `vm` says it, too.
const GUEST: &str = "metadata-proxy-guest";

/// Prepares the namespaces that it was started in, holds them, and kills the test's cgroup when the test process ends in whatever way.
///
/// A plain parent-death signal would not do: it fires when the *thread* that started the child ends, as tokio's threads do at any time.
const HOLDER: &str = r#"
set -eu
name=$1 cgroup2=$2
ip link set lo up
ip address add 169.254.169.254/32 dev lo
ip address add fd00:ec2::254/128 dev lo nodad

# The machine's sockets (Docker's too) are out of sight, and what is pinned or written below dies with the namespace.
mount -t tmpfs -o mode=755 tmpfs /run
mount -t bpf bpf /sys/fs/bpf

# Pure cgroup v2, as on today's hosts, even where the machine has v1 beside it: the engine then leaves v1 alone.
# Bound, not mounted anew: a new mount would reset options of the machine's tree (nsdelegate).
mkdir /run/cgroup
mount --bind "$cgroup2" /run/cgroup
umount --recursive /sys/fs/cgroup
mount --move /run/cgroup /sys/fs/cgroup
rmdir /run/cgroup

# dockerd writes /etc/docker/key.json and containerd makes /opt/containerd, whatever they are told.
for directory in /etc /opt; do
    mkdir -p "/run/changes$directory/upper" "/run/changes$directory/work"
    mount -t overlay -o "lowerdir=$directory,upperdir=/run/changes$directory/upper,workdir=/run/changes$directory/work" overlay "$directory"
done

echo ready
read -r _ || true
echo 1 > "/sys/fs/cgroup/$name/cgroup.kill"
"#;

pub struct Machine {
    name: String,
    cgroup: PathBuf,
    directory: PathBuf,
    // It is the whole of a virtual machine: there is nothing beside it to keep apart.
    whole: bool,
    // Its standard input is the life line: the only other end of that pipe is here.
    holder: Option<Child>,
}

impl Machine {
    pub fn start() -> Result<Self> {
        ensure!(
            rustix::process::geteuid().is_root(),
            "the test host makes namespaces and cgroups: run the tests as root (sudo)"
        );
        for (program, package) in [("unshare", "util-linux"), ("nsenter", "util-linux"), ("ip", "iproute2")] {
            find_program(program, package)?;
        }
        let cgroup2 = cgroup::mount_point()?;
        sweep(&cgroup2);

        static COUNT: AtomicU32 = AtomicU32::new(0);
        let name = format!("{PREFIX}{}-{}", process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        // From here on dropping it cleans up, however far it has come.
        let (cgroup, directory) = (cgroup2.join(&name), Path::new(DIRECTORIES).join(&name));
        let mut machine = Self { name, cgroup, directory, whole: false, holder: None };
        cgroup::create(&machine.cgroup)?;
        fs::create_dir(&machine.directory)
            .with_context(|| format!("creating the directory {}", machine.directory.display()))?;
        machine.hold_namespaces(&cgroup2)?;
        Ok(machine)
    }

    /// The whole of the virtual machine that runs us: its own namespaces, and the root of its cgroup2 tree.
    ///
    /// `cargo xtask vm` prepares it as [`Self::start`] prepares the namespaces, and tells so in the kernel's command line: anywhere else this
    /// would attach to a root cgroup that is somebody's.
    pub fn guest() -> Result<Self> {
        let command_line = fs::read_to_string("/proc/cmdline").context("reading /proc/cmdline")?;
        ensure!(command_line.split_whitespace().any(|word| word == GUEST), "this is no guest of `cargo xtask vm`");
        let name = format!("{PREFIX}guest");
        let directory = Path::new(DIRECTORIES).join(&name);
        fs::create_dir_all(&directory).with_context(|| format!("creating the directory {}", directory.display()))?;
        Ok(Self { cgroup: cgroup::mount_point()?, directory, name, whole: true, holder: None })
    }

    fn hold_namespaces(&mut self, cgroup2: &Path) -> Result<()> {
        let log = self.directory.join("holder.log");
        let mut holder = Command::new("unshare")
            .args(["--net", "--mount", "--propagation", "private", "sh", "-c", HOLDER, "sh"])
            .arg(&self.name)
            .arg(cgroup2)
            .env_clear()
            .env("PATH", PATH)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(&log).with_context(|| format!("creating {}", log.display()))?)
            // An interrupt at the terminal reaches the tests; their end is what the holder waits for.
            .process_group(0)
            .spawn()
            .context("starting unshare")?;
        let output = holder.stdout.take();
        self.holder = Some(holder);
        let mut line = String::new();
        BufReader::new(output.context("the holder has no output")?).read_line(&mut line)?;
        if line.trim_end() != "ready" {
            bail!("the test host's namespaces could not be made: {}", fs::read_to_string(log)?.trim_end());
        }
        Ok(())
    }

    /// The name of the cgroup (directly below the root) and of the directory.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The cgroup as the test process sees it. It has the leaf `host`, and a leaf below `containers` for each container.
    pub fn cgroup(&self) -> &Path {
        &self.cgroup
    }

    /// The same cgroup as processes of the test host see it.
    pub fn inner_cgroup(&self) -> PathBuf {
        Path::new("/sys/fs/cgroup").join(&self.name)
    }

    /// A directory for the test's own files, at the same path inside and outside, removed with the host.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The cgroup below which the engine makes those of its containers: in a guest the engine's own default.
    pub(super) fn containers(&self) -> String {
        if self.whole { "/docker".to_owned() } else { format!("/{}/containers", self.name) }
    }

    /// See [`Self::guest`].
    pub(super) fn is_guest(&self) -> bool {
        self.whole
    }

    /// The process that the namespaces belong to, for `nsenter --target`.
    pub fn holder(&self) -> u32 {
        self.holder.as_ref().map_or(0, Child::id)
    }

    /// A host process: in the host's namespaces and its `host` cgroup, with nothing but `PATH` in its environment, started in `/`.
    /// It is a child of the caller and keeps the process id that `spawn` tells; it ends with the host at the latest.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = if self.whole { Command::new(program) } else { self.entering(program.as_ref()) };
        command.env_clear().env("PATH", PATH).stdin(Stdio::null());
        command
    }

    fn entering(&self, program: &OsStr) -> Command {
        let mut command = Command::new("/bin/sh");
        command
            .arg("-c")
            .arg(r#"echo $$ > "$0" && exec nsenter "$@""#)
            .arg(self.cgroup.join("host/cgroup.procs"))
            .arg(format!("--net=/proc/{}/ns/net", self.holder()))
            .arg(format!("--mount=/proc/{}/ns/mnt", self.holder()))
            .arg("--")
            .arg(program);
        command
    }

    /// Runs a closure in the host's network namespace, on a thread of its own: a runtime's worker would stay there.
    /// A socket made in it belongs to the namespace for good. The calling process's cgroup lies outside, so it is never intercepted.
    pub fn in_netns<T: Send>(&self, run: impl FnOnce() -> T + Send) -> Result<T> {
        if self.whole {
            return Ok(run());
        }
        let path = format!("/proc/{}/ns/net", self.holder());
        let namespace = File::open(&path).with_context(|| format!("opening {path}"))?;
        let entered = thread::scope(|scope| {
            let thread = scope.spawn(|| {
                move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
                anyhow::Ok(run())
            });
            thread.join()
        });
        match entered {
            Ok(result) => result.context("entering the test host's network namespace"),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }

    /// A listener in the host's network namespace, non-blocking, ready for `tokio::net::TcpListener::from_std`.
    pub fn bind_tcp(&self, address: &str) -> Result<TcpListener> {
        let listener = self
            .in_netns(|| TcpListener::bind(address))?
            .with_context(|| format!("listening on {address} in the test host"))?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        if self.whole {
            return; // ends with the virtual machine
        }
        let removed = cgroup::remove(&self.cgroup);
        if let Some(mut holder) = self.holder.take() {
            // By its handle, so it can hit no other; already ended is as good.
            let _ = holder.kill();
            let _ = holder.wait();
        }
        let _ = fs::remove_dir_all(&self.directory);
        if let Err(error) = removed {
            eprintln!("{error:#}");
        }
    }
}

pub(super) fn find_program(name: &str, package: &str) -> Result<PathBuf> {
    PATH.split(':')
        .map(|directory| Path::new(directory).join(name))
        .find(|path| path.is_file())
        .with_context(|| format!("{name} not found in {PATH}: apt-get install {package}"))
}

/// Removes what is left of runs that were killed together with their holder.
fn sweep(cgroup2: &Path) {
    for parent in [cgroup2, Path::new(DIRECTORIES)] {
        let names = fs::read_dir(parent).into_iter().flatten().flatten().map(|entry| entry.file_name());
        for name in names.filter(|name| owner_is_dead(name)) {
            // What cannot be removed must not stop this test, which shares nothing with it.
            if let Err(error) = cgroup::remove(&cgroup2.join(&name)) {
                eprintln!("left over from an earlier run: {error:#}");
            } else {
                let _ = fs::remove_dir_all(Path::new(DIRECTORIES).join(&name));
            }
        }
    }
}

fn owner_is_dead(name: &OsStr) -> bool {
    let owner = name.to_str().and_then(|name| name.strip_prefix(PREFIX)?.split_once('-')?.0.parse::<u32>().ok());
    owner.is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists())
}
