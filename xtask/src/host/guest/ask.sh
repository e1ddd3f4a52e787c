#!/bin/sh
# In a container: asks for its role and its access key, TRIES times at most with half a second between; prints both, or
# what it got instead. With a second argument, notes each answer there.
url=http://169.254.169.254/latest/meta-data/iam/security-credentials/
tries=$1
while [ "$tries" -gt 0 ]; do
    role=$(timeout 10 wget -qO- "$url" 2>&1) && document=$(timeout 10 wget -qO- "$url$role" 2>&1) || document=
    key=$(echo "$document" | sed -n 's/.*"AccessKeyId" *: *"\([A-Z0-9]*\)".*/\1/p')
    if [ -n "$key" ]; then said="$role $key"; else said="nothing: ${role:-no answer within 10 s} $document"; fi
    [ -z "$2" ] || echo "$said" >> "$2"
    [ -z "$key" ] || { echo "$said"; exit; }
    tries=$((tries - 1))
    [ "$tries" = 0 ] || sleep 0.5
done
echo "$said"
exit 1
