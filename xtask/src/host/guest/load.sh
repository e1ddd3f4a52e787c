#!/bin/sh
# In a container: asks for its credentials five times a second until it is told to end, then prints how many it asked for,
# and every failure.
url=http://169.254.169.254/latest/meta-data/iam/security-credentials/
trap 'echo "$count requests, $failed failed"; exit' TERM
count=0 failed=0
until role=$(timeout 10 wget -qO- "$url"); do sleep 0.5; done
: > /tmp/begun
while :; do
    count=$((count + 1))
    # Longer than a client waits, so that what is late is told from what fails by its time.
    begin=$(date +%s)
    said=$(timeout 10 wget -qO- "$url$role" 2>&1)
    case $said in
        *AccessKeyId*) ;;
        *) failed=$((failed + 1)); echo "at $(date +%T) after $(($(date +%s) - begin)) s: $said" ;;
    esac
    sleep 0.2
done
