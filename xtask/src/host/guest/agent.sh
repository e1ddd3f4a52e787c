#!/bin/sh
# Does in a guest of `cargo xtask host` what its owner says. It tells of each boot; then comes the length of a script and
# the seconds that it may take, and the script; then go its exit status, the length of all that it printed, and that.
port=/dev/virtio-ports/host
# Opened before udev has made it, it would be made an ordinary file.
until [ -c $port ]; do sleep 0.1; done
exec 3<> $port
cd /root || exit
read -r uptime _ < /proc/uptime
printf 'boot %s\n' "$uptime" >&3
while read -r length seconds <&3; do
    head -c "$length" <&3 > /run/step
    timeout -k 5 "$seconds" sh /run/step > /run/step.out 2>&1 < /dev/null
    status=$?
    printf 'done %s %s\n' "$status" "$(stat -c %s /run/step.out)" >&3
    cat /run/step.out >&3
done
