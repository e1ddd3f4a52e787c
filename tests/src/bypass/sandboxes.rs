//! Sandboxes in the host's network that no engine has told of: a host process makes one, and what is in it asks.

use std::fs;

use anyhow::{Context as _, Result};
use serde_json::json;

use super::{
    Expect::{self, Elsewhere, Host, Nobody, Refused},
    Row, Seen,
    scene::Scene,
};

/// As a user who has subordinate ids and may make a tap device; what a rootless engine's network ends at is a process in
/// the host's network, which opens there whatever connection a frame asks for.
macro_rules! rootless {
    () => {
        "exec unshare --mount sh -ec '
mount -t tmpfs -o mode=1777 tmpfs /mnt; export HOME=/mnt XDG_RUNTIME_DIR=/mnt; cd /mnt
mknod -m 666 tun c 10 200; mount --bind tun /dev/net/tun
echo nobody:100000:65536 >sub; mount --bind sub /etc/subuid; mount --bind sub /etc/subgid
exec setpriv --reuid=65534 --regid=65534 --clear-groups "
    };
}

macro_rules! nspawn {
    () => {
        "exec systemd-nspawn --quiet --register=no --keep-unit --directory=$SHARE/bundle/root --bind-ro=/usr --bind-ro=/lib \
            --bind-ro=/lib64 --bind-ro=$PROBE "
    };
}

/// What it is, the host's shell command, and what must come of it. None is in a cgroup that is named like a container's.
const SANDBOXES: &[(&str, &str, Expect)] = &[
    ("connect in a PID namespace", "exec unshare --pid --fork --kill-child $PROBE connect", Nobody),
    ("connect in two PID namespaces", "exec unshare --pid --fork unshare --pid --fork $PROBE connect", Nobody),
    ("v6 in a PID namespace", "exec unshare --pid --fork --kill-child $PROBE v6", Nobody),
    ("io-uring in a PID namespace", "exec unshare --pid --fork --kill-child $PROBE io-uring-polled", Nobody),
    ("connect in a user namespace", "exec unshare --user $PROBE connect", Nobody),
    ("connect as root of a user namespace", "exec unshare --user --map-root-user $PROBE connect", Nobody),
    (
        "connect in a user's user namespace",
        "exec setpriv --reuid=65534 --clear-groups unshare --user $PROBE connect",
        Nobody,
    ),
    ("raw-tcp in a PID namespace", "exec unshare --pid --fork --kill-child $PROBE raw-tcp", Refused),
    ("frame up0 in a PID namespace", "exec unshare --pid --fork --kill-child $PROBE frame up0", Refused),
    ("frame-direct up0 in a PID namespace", "exec unshare --pid --fork --kill-child $PROBE frame-direct up0", Refused),
    (
        "frame-xdp up0 in a PID namespace",
        "exec unshare --pid --fork --kill-child --mount sh -c 'mount -t sysfs sysfs /sys && exec $PROBE frame-xdp up0'",
        Refused,
    ),
    ("runc run, id of ten letters", "exec runc --root $SHARE/runc run --bundle $SHARE/bundle sandboxed1", Nobody),
    (
        "ctr run --net-host",
        "exec ctr --address /run/engine/containerd.sock run --rm --net-host --cpu-shares=0 --cgroup=/$MACHINE/ctr \
            --mount type=bind,src=/usr,dst=/usr,options=rbind:ro --mount type=bind,src=/lib,dst=/lib,options=rbind:ro \
            --mount type=bind,src=/lib64,dst=/lib64,options=rbind:ro \
            --mount type=bind,src=$PROBE,dst=/probe,options=bind:ro --rootfs $SHARE/bundle/root sandboxed2 /probe connect",
        Nobody,
    ),
    ("systemd-nspawn", concat!(nspawn!(), "$PROBE connect"), Nobody),
    ("systemd-nspawn -U", concat!(nspawn!(), "--private-users=524288:65536 $PROBE connect"), Nobody),
    (
        "podman run --network host --cgroups=disabled",
        "exec podman --runtime=crun --root=/run/pods --runroot=/run/pods-run --tmpdir=/run/pods-tmp \
            --cgroup-manager=cgroupfs --events-backend=none run --rm --network=host --cgroups=disabled \
            --ulimit=nofile=1024:1024 --ulimit=nproc=1024:1024 -v /usr:/usr:ro -v /lib:/lib:ro -v /lib64:/lib64:ro \
            -v $PROBE:/probe:ro --rootfs $SHARE/bundle/root /probe connect",
        Nobody,
    ),
    (
        "frame tap0, rootlesskit with slirp4netns",
        concat!(
            rootless!(),
            "rootlesskit --net=slirp4netns --disable-host-loopback --slirp4netns-sandbox=auto --slirp4netns-seccomp=auto $PROBE frame tap0'"
        ),
        Elsewhere,
    ),
    (
        "frame tap0, pasta",
        concat!(
            rootless!(),
            "pasta --config-net --ipv4-only -i up0 -a 10.11.0.2 -n 24 -g 10.11.0.1 -I tap0 -- $PROBE frame tap0'"
        ),
        Elsewhere,
    ),
    (
        "connect, pasta",
        concat!(
            rootless!(),
            "pasta --config-net --ipv4-only -i up0 -a 10.11.0.2 -n 24 -g 10.11.0.1 -I tap0 -- $PROBE connect'"
        ),
        Nobody,
    ),
    ("connect in other namespaces", "exec unshare --mount --uts --ipc --cgroup $PROBE connect", Host),
];

impl Scene {
    pub(super) async fn before_sandboxes(&self) -> Result<Vec<Seen>> {
        self.make_bundle()?;
        self.seen();
        let mut seen = Vec::new();
        for (_, script, _) in SANDBOXES {
            self.probe_on_host(script).await?;
            seen.push(self.seen());
        }
        Ok(seen)
    }

    pub(super) async fn sandboxes(&self, before: Vec<Seen>) -> Result<Vec<Row>> {
        let mut rows = Vec::new();
        for ((what, script, expect), before) in SANDBOXES.iter().zip(before) {
            let report = self.probe_on_host(script).await?;
            rows.push(Row { before: Some(before), ..self.row(what, "(sandbox)", *expect, report) });
        }
        Ok(rows)
    }

    /// For runc: the machine's own programs, on the host's network.
    fn make_bundle(&self) -> Result<()> {
        let (bundle, probe) = (self.share.join("bundle"), self.probe_file());
        let root = bundle.join("root");
        let bind =
            |path: &str| json!({"source": path, "destination": path, "type": "bind", "options": ["rbind", "ro"]});
        for directory in ["proc", "sys", "dev", "run", "tmp", "etc", "usr", "lib", "lib64"] {
            fs::create_dir_all(root.join(directory)).context("making a root for runc")?;
        }
        let everything = ["CAP_NET_RAW", "CAP_NET_ADMIN"];
        let config = json!({
            "ociVersion": "1.0.2",
            "process": {
                "user": {"uid": 0, "gid": 0},
                "args": [probe, "connect"],
                "cwd": "/",
                "capabilities": {"bounding": everything, "effective": everything, "permitted": everything},
            },
            "root": {"path": "root"},
            "mounts": [
                {"source": "proc", "destination": "/proc", "type": "proc"},
                bind("/usr"), bind("/lib"), bind("/lib64"), bind(&probe.display().to_string()),
            ],
            "linux": {
                "cgroupsPath": format!("/{}/host/sandboxed", self.host.machine().name()),
                "namespaces": [{"type": "pid"}, {"type": "mount"}, {"type": "ipc"}, {"type": "uts"}],
            },
        });
        fs::write(bundle.join("config.json"), config.to_string()).context("writing runc's configuration")
    }
}
