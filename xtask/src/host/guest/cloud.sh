#!/bin/sh
# Makes the network beyond the host, where IMDS and STS are; the host's end is eth0, and all routes lead through it.
# With LATE=1 the host has neither addresses nor routes before `cloud.sh lease` brings them, 25 s after a container has
# asked.
set -e
configure() {
    ip address add 198.51.100.1/24 dev eth0
    ip address add 2001:db8:9::1/64 dev eth0 nodad
    ip route add default via 198.51.100.2
    ip route add default via 2001:db8:9::2
}
if [ "$1" = lease ]; then
    until [ -s /var/lib/asked/plain ]; do sleep 0.5; done
    sleep 25
    configure
    exit
fi
ip netns add cloud
ip link add eth0 type veth peer name cloud0 netns cloud
ip link set eth0 up
beyond() { ip -n cloud "$@"; }
beyond link set lo up
beyond address add 198.51.100.2/24 dev cloud0
beyond address add 2001:db8:9::2/64 dev cloud0 nodad
beyond link set cloud0 up
for address in 169.254.169.254/32 192.0.2.1/32 fd00:ec2::254/128; do
    beyond address add "$address" dev lo
done
beyond route add default via 198.51.100.1
beyond route add default via 2001:db8:9::1
[ -n "$LATE" ] || configure
