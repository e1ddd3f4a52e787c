//! A guest that runs: its emulator, its console, and the port over which it is told what to do.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};

use super::arch::Arch;
use super::port::{Answer, Port};
use crate::install::{System, describe, find, quietly};

/// Emulated, and on a machine that has other work, the slowest boot takes a third of this.
const BOOT: Duration = Duration::from_secs(300);
const START: Duration = Duration::from_secs(20);

/// How much of the console an error shows.
const TAIL: usize = 15;

pub(super) struct Machine {
    name: String,
    scratch: PathBuf,
    port: Port,
    _emulator: Killed,
}

impl Machine {
    /// Turns it on; what it writes to its disk lies in the overlay `NAME.qcow2` of the scratch folder.
    pub(super) fn start(
        name: &str,
        system: &System,
        payload: &Path,
        arch: Arch,
        scratch: &Path,
    ) -> anyhow::Result<Self> {
        let file = |ending: &str| scratch.join(format!("{name}.{ending}"));
        let (disk, console, socket) = (file("qcow2"), file("console"), file("port"));
        let qemu_img = find("qemu-img").context("qemu-img is not installed")?;
        let mut overlay = Command::new(qemu_img);
        overlay.args(["create", "-q", "-f", "qcow2", "-F", "raw", "-b"]).arg(&system.disk).arg(&disk);
        quietly(&mut overlay)?;

        // Of a run that was killed.
        let _ = fs::remove_file(&socket);
        let mut qemu = emulator(system, &disk, payload, arch);
        qemu.arg("-serial").arg(format!("file:{}", console.display()));
        qemu.arg("-chardev").arg(format!("socket,id=port,server=on,wait=off,path={}", socket.display()));
        qemu.args(["-device", "virtio-serial", "-device", "virtserialport,chardev=port,name=host"]);
        // Ends with us, even if we are killed. (This thread is the main one, with which the process ends.)
        let mut tied = Command::new("setpriv");
        tied.args(["--pdeathsig", "KILL", "--"]).arg(qemu.get_program()).args(qemu.get_args());
        let child = tied.stdin(Stdio::null()).spawn();
        let mut emulator = Killed(child.with_context(|| format!("cannot start {}", arch.emulator()))?);
        let port = Port::new(connect(&socket, &mut emulator.0)?)?;
        Ok(Self { name: name.to_owned(), scratch: scratch.to_owned(), port, _emulator: emulator })
    }

    /// The command that boots its disk with a console on the terminal.
    pub(super) fn by_hand(name: &str, system: &System, payload: &Path, arch: Arch, scratch: &Path) -> String {
        let mut qemu = emulator(system, &scratch.join(format!("{name}.qcow2")), payload, arch);
        describe(qemu.args(["-serial", "mon:stdio"]))
    }

    /// Waits until it has booted, whichever boot it is.
    pub(super) fn boot(&mut self) -> anyhow::Result<f64> {
        self.port.boot(BOOT).with_context(|| self.console())
    }

    /// Runs a script in it as root.
    pub(super) fn run(&mut self, script: &str, limit: Duration) -> anyhow::Result<Answer> {
        self.port.run(script, limit).with_context(|| self.console())
    }

    pub(super) fn reboot(&mut self) -> anyhow::Result<f64> {
        // Later, so that the answer is not overtaken.
        self.run("(sleep 1; systemctl --no-block reboot) > /dev/null 2>&1 &", START)?;
        self.boot()
    }

    /// Whether it still does what it is told.
    pub(super) fn alive(&mut self) -> anyhow::Result<()> {
        self.run("true", START).map(drop)
    }

    /// What to look at when it does not answer.
    fn console(&self) -> String {
        let path = self.scratch.join(format!("{}.console", self.name));
        let text = fs::read(&path).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        let tail = lines[lines.len().saturating_sub(TAIL)..].join("\n  ");
        format!(
            "the guest {} does not answer: see {}, or boot it by hand (--keep says how); its console ends:\n  {tail}\n",
            self.name,
            path.display()
        )
    }
}

fn emulator(system: &System, disk: &Path, payload: &Path, arch: Arch) -> Command {
    let mut qemu = Command::new(arch.emulator());
    qemu.args([
        "-machine",
        arch.machine(),
        "-accel",
        "tcg,thread=multi",
        "-cpu",
        arch.processor(),
        "-smp",
        "2",
        "-m",
        "2048",
    ]);
    // No network device: nothing gets out.
    qemu.args(["-nodefaults", "-no-user-config", "-nic", "none", "-display", "none"]);
    qemu.arg("-drive").arg(format!("if=virtio,format=qcow2,cache=unsafe,file={}", disk.display()));
    qemu.arg("-drive").arg(format!("if=virtio,format=raw,readonly=on,file={}", payload.display()));
    qemu.arg("-kernel").arg(&system.kernel).arg("-initrd").arg(&system.initrd).arg("-append");
    // Names of network devices as the kernel gives them; and there is nobody in an emulator to mitigate against.
    qemu.arg(format!("root=/dev/vda rw console={} net.ifnames=0 mitigations=off", arch.console()));
    qemu
}

/// Where the emulator listens for us.
fn connect(socket: &Path, emulator: &mut Child) -> anyhow::Result<UnixStream> {
    let deadline = Instant::now() + START;
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream),
            Err(_) if Instant::now() < deadline => thread::sleep(Duration::from_millis(20)),
            Err(error) => return Err(error).with_context(|| format!("connect to {}", socket.display())),
        }
        if let Some(status) = emulator.try_wait()? {
            bail!("the emulator ended at once: {status}");
        }
    }
}

/// An emulator that is not left running, whatever happens here.
struct Killed(Child);

impl Drop for Killed {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
