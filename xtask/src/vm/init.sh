#!/usr/bin/busybox sh
# The first process of a guest of `cargo xtask vm`: makes a host out of the machine, runs the tests, turns it off.
# Kernel command line: cgroups=unified|hybrid|legacy.

if [ "$1" != again ]; then
    # runc changes the root, which cannot be done to the kernel's first file system: another view of it can be left.
    export PATH=/usr/sbin:/usr/bin
    busybox mount -t proc proc /proc
    busybox mount --bind / /root
    cd /root
    busybox mount -t proc proc proc
    busybox mount --move . /
    exec busybox chroot . /init again
fi

busybox --install -s /usr/local/bin
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t devpts devpts /dev/pts
ln -s /proc/self/fd /dev/fd
mount -t tmpfs -o mode=755 tmpfs /run
mount -t tmpfs tmpfs /tmp
for module in /modules/*.ko; do
    insmod "$module" || echo "cannot insert $module"
done

cgroups=$(sed -n 's/.*cgroups=\([a-z]*\).*/\1/p' /proc/cmdline)
if [ "$cgroups" = unified ]; then
    mount -t cgroup2 cgroup2 /sys/fs/cgroup
else
    # As systemd does it: each controller of version 1 by itself, and in the hybrid case version 2 beside them.
    mount -t tmpfs -o mode=755 tmpfs /sys/fs/cgroup
    for controller in $(awk '$4 == 1 { print $1 }' /proc/cgroups); do
        mkdir "/sys/fs/cgroup/$controller"
        # Newer kernels list controllers that they have for version 2 only.
        mount -t cgroup -o "$controller" cgroup "/sys/fs/cgroup/$controller" 2> /dev/null || rmdir "/sys/fs/cgroup/$controller"
    done
    mkdir /sys/fs/cgroup/systemd
    mount -t cgroup -o none,name=systemd cgroup /sys/fs/cgroup/systemd
    if [ "$cgroups" = hybrid ]; then
        mkdir /sys/fs/cgroup/unified
        mount -t cgroup2 cgroup2 /sys/fs/cgroup/unified
    fi
fi
mount -t bpf bpf /sys/fs/bpf
mount -t tracefs tracefs /sys/kernel/tracing

# There is no other network, so what goes to these addresses cannot leave.
ip link set lo up
ip address add 169.254.169.254/32 dev lo
ip address add fd00:ec2::254/128 dev lo
# A device that the daemon takes for an uplink; nothing is at its other end.
ip link add up0 type veth peer name beyond0
ip link set up0 up

read -r uptime _ < /proc/uptime
echo "booted in $uptime s: $(uname -r), cgroups $cgroups"
export METADATA_PROXY_BIN=/metadata-proxy/metadata-proxy
. /metadata-proxy/arguments
/metadata-proxy/guest "$@"
status=$?
read -r uptime _ < /proc/uptime
printf 'GUEST\tend\t%s\t%s\n' "$status" "$uptime"
poweroff -f
