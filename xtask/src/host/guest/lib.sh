# What the scenarios' scripts have at hand.
roles=http://169.254.169.254/latest/meta-data/iam/security-credentials/
unit=metadata-proxy.service
# Where its AWS is; its credentials are the host's, from the stand-in for IMDS.
aws='AWS_REGION=eu-west-1 AWS_ENDPOINT_URL_STS=http://192.0.2.1:4566'
config=/etc/metadata-proxy/config.toml

# Requests that were answered with the host's credentials, but for the daemon's and those of host processes that say so.
leaks() { cat /run/cloud.log /run/near.log 2> /dev/null | grep ' SECRET$' | grep -v -e ' aws-sdk-rust/' -e ' host-process ' || true; }

# A host process, as `leaks` knows it.
on_host() { busybox timeout 10 wget -qO- -U host-process "$@"; }

# in_unit NAME OPTION...: the role that this unit sees as soon as it runs. It is not kept, also where that has failed.
in_unit() {
    name=$1; shift
    seen=$(systemd-run --quiet --wait --pipe --collect --unit "$name" "$@" \
        sh -c "exec busybox timeout 20 wget -qO- -U host-process $roles 2> /dev/null") || true
    echo "$name: ${seen:-nothing}"
}

# wait_for SECONDS COMMAND...: until it succeeds.
wait_for() {
    left=$(($1 * 5)); shift
    until "$@" > /dev/null 2>&1; do
        left=$((left - 1))
        [ "$left" -gt 0 ] || { echo "not within the time: $*"; return 1; }
        sleep 0.2
    done
}

# The role that an access key was issued for.
role_of() {
    for _ in 1 2 3 4 5 6 7 8 9 10; do
        arn=$(awk -v key="$1" '$1 == "sts" && $3 == key { print $4 }' /run/cloud.log)
        [ -z "$arn" ] || { echo "${arn##*/}"; return; }
        sleep 0.1
    done
    echo "nobody"
}

# own NAME OPTION...: the role that a container sees that is started with it and these options, and that of its access key.
own() {
    name=$1; shift
    said=$(docker run --rm --name "$name" --label "metadata-proxy.role=$name" "$@" box ask 60) || return
    echo "$said" | { read -r role key; echo "$role, key of $(role_of "$key")"; }
}

# make_image NAME CHANGE...: busybox and our clients, without a registry.
make_image() {
    name=$1; shift
    mkdir -p box/bin box/tmp
    cp /usr/bin/busybox /opt/host/ask /opt/host/load box/bin/
    for applet in $(busybox --list); do
        [ -e "box/bin/$applet" ] || ln -s busybox "box/bin/$applet"
    done
    tar -C box -c . | docker import --change 'ENV PATH=/bin' "$@" - "$name" > /dev/null
}

# load NAME OPTION...: a container that asks all the time, and notes what it is answered; begun where it is not yet.
load() {
    name=$1; shift
    [ -z "$(docker ps --quiet --filter "name=^$name$")" ] || return 0
    mkdir -p /var/lib/seen
    rm -f "/var/lib/seen/$name"
    docker run --detach --name "$name" --label "metadata-proxy.role=$name" --stop-signal KILL \
        --volume /var/lib/seen:/seen --env "NAME=$name" "$@" box load > /dev/null
    wait_for 60 test -s "/var/lib/seen/$name"
}

clients() { load web; load agent --network host; }

# next NAME...: what each of them is answered that asks from now on.
next() {
    for name in "$@"; do
        # One may be on its way.
        echo $(($(cat "/var/lib/seen/$name" | wc -l) + 2)) > "/run/next-$name"
    done
    for name in "$@"; do
        line=$(cat "/run/next-$name")
        wait_for 60 has_lines "$line" "/var/lib/seen/$name" || continue
        sed -n "${line}p" "/var/lib/seen/$name" | {
            read -r _ _ role rest
            [ "$role" = nothing: ] && echo "$name: $role $rest" || echo "$name: $role, key of $(role_of "$rest")"
        }
    done
}
has_lines() { [ "$(cat "$2" | wc -l)" -ge "$1" ]; }

# loaded NAME...: ends them, and tells what failed.
loaded() {
    docker rm --force "$@" > /dev/null
    for name in "$@"; do
        awk -v name="$name" '
            $3 == "nothing:" { failed++; print name ": " $0 }
            END { printf "%s: %d answers, %d failed\n", name, NR, failed }' "/var/lib/seen/$name"
    done
}

serves() { metadata-proxy ps; }

main_pid() {
    pid=$(systemctl show --property MainPID --value "$unit")
    [ "$pid" != 0 ] && echo "$pid" || echo "no-daemon"
}
replaced() { [ "$(main_pid)" != "$1" ] && [ "$(main_pid)" != no-daemon ]; }

# For how long containers' connections had to wait at the last replacement of the daemon, in seconds.
away() {
    journalctl --no-pager --boot --unit "$unit" --output short-unix | awk '
        /: closing [0-9]+ listeners/ { from = $1 }
        /: attached: / { if (from) away = $1 - from; from = 0 }
        END { printf "%.1f\n", away }'
}

# configure TEXT: the daemon's file, which it has not read yet.
configure() { echo "$1" > "$config"; }

# engine JSON: dockerd with this configuration.
engine() {
    mkdir -p /etc/docker
    echo "$1" > /etc/docker/daemon.json
    systemctl reset-failed docker.service
    systemctl restart docker.service
}

no_containers() { docker ps --all --quiet | xargs --no-run-if-empty docker rm --force > /dev/null; }

# askers: containers, begun once, that the engine starts by itself at each boot, and that ask as their first instruction,
# on both kinds of network; each notes what it is answered in a file of its own.
askers() {
    mkdir -p /var/lib/asked
    for name in bridge-1 bridge-2 host-1 host-2; do
        docker inspect "$name" > /dev/null 2>&1 ||
            docker run --detach --restart always --name "$name" --network "${name%-*}" --stop-signal KILL \
                --label "metadata-proxy.role=$name" --volume /var/lib/asked:/asked \
                box sh -c "read -r begin _ < /proc/uptime; ask 100 /asked/$name
                    read -r end _ < /proc/uptime; echo \$begin \$end > /asked/.$name; exec sleep 3600" > /dev/null
    done
    wait_for 60 all_answered
    rm -f /var/lib/asked/*
    sync
}
all_asked() { [ "$(ls /var/lib/asked | wc -l)" = 4 ]; }
# all_answered [COUNT]
all_answered() { [ "$(grep -l ASIA /var/lib/asked/* | wc -l)" = "${1:-4}" ]; }
# The longest that one of them has waited for its role, in seconds.
longest_wait() { cat /var/lib/asked/.*-? | awk '{ if ($2 - $1 > longest) longest = $2 - $1 } END { print longest }'; }

# answers: one line for each of them, with all that it was answered and how often.
answers() {
    for file in /var/lib/asked/*; do
        echo "${file##*/}: $(sed 's/ASIASTANDIN[A-Z]*/KEY/' "$file" | sort | uniq -c | sed 's/^ *//' | tr '\n' ',')"
    done
}

# A stand-in on the host's own loopback, as on a developer's machine; it is asked before the one beyond.
near() {
    ip address add 169.254.169.254/32 dev lo
    systemd-run --quiet --unit near --property StandardOutput=append:/run/near.log \
        /opt/host/cloud 127.0.0.1:4566 169.254.169.254:80
    wait_for 20 on_host "$roles"
}
not_near() {
    systemctl stop near.service
    ip address delete 169.254.169.254/32 dev lo
    rm -f /run/near.log
}

# late: the next boot has a container that a plain unit starts, and no network before that has asked for 25 s.
late() {
    mkdir -p /etc/systemd/system/cloud.service.d
    printf '[Service]\nEnvironment=LATE=1\n' > /etc/systemd/system/cloud.service.d/late.conf
    cp /opt/host/lease.service /opt/host/plain.service /etc/systemd/system/
    systemctl daemon-reload
    systemctl --quiet enable lease.service plain.service
}
not_late() {
    systemctl --quiet disable lease.service plain.service
    rm -r /etc/systemd/system/cloud.service.d /etc/systemd/system/lease.service /etc/systemd/system/plain.service
    systemctl daemon-reload
}

# After a scenario that has not come to its end: as it was after the start.
tidy() {
    [ ! -e /usr/bin/metadata-proxy.away ] || mv /usr/bin/metadata-proxy.away /usr/bin/metadata-proxy
    umount /var/log/metadata-proxy 2> /dev/null
    [ ! -e /run/near.log ] || not_near
    [ ! -e /etc/systemd/system/lease.service ] || not_late
    [ ! -d "${config%/*}" ] || configure ''
    [ ! -e /etc/docker/daemon.json ] || engine '{}'
    systemctl reset-failed
    systemctl start docker.service
    no_containers
    rm -rf /var/lib/asked /var/lib/seen
    docker swarm leave --force > /dev/null 2>&1
    systemctl restart "$unit"
    sleep 0.2
    : > /run/cloud.log
}
