#!/bin/sh
# Programs that are run anew for each request, as people call them from scripts; nothing is configured but the region.
# When to ask and what to print is in README.md.
#
# Usage: tool.sh NAME PROGRAM N|watch
name=$1
program=$2
times=$3
address=${STS_ENDPOINT#http://}
imds=http://169.254.169.254/latest

line() { tr -s '\n\t ' ' ' | sed 's/^ //; s/ $//'; }
field() { printf '%s' "$document" | sed -n "s/.*\"$1\" : \"\([^\"]*\)\".*/\1/p"; }

version() {
    case $name in
    aws-cli*) "$program" --version 2>&1 | sed 's|^aws-cli/\([^ ]*\).*|\1|' ;;
    curl*) "$program" --version | sed -n '1s/^curl \([^ ]*\).*/\1/p' ;;
    s3cmd) "$program" --version | sed 's/.* //' ;;
    rclone) "$program" version | sed -n '1s/.* v//p' ;;
    s5cmd) "$program" version | sed 's/^v//; s/-.*//' ;;
    esac
}

# Prints the access key, and more on the lines that follow where that is to be had with it.
load() {
    case $name in
    # Version 1 cannot show its credentials. This loads them as every command does, needs no network beyond that, and
    # has the access key in the address that it signs.
    aws-cli*) "$program" s3 presign s3://bucket/key | sed -n 's/.*\(AWSAccessKeyId=\|X-Amz-Credential=\)\([A-Z0-9]*\).*/\2/p' ;;
    curl)
        token=$(get -X PUT -H 'X-aws-ec2-metadata-token-ttl-seconds: 21600' $imds/api/token) || return
        credentials -H "X-aws-ec2-metadata-token: $token"
        ;;
    curl-v1) credentials ;;
    s3cmd) whoami "$program" -q --config=/dev/null --no-ssl --host="$address" --host-bucket="$address/%(bucket)s" \
        get s3://bucket/whoami - ;;
    rclone) whoami "$program" --config=/dev/null --retries 1 \
        cat ":s3,provider=Other,env_auth=true,region=$AWS_REGION,endpoint='$STS_ENDPOINT':bucket/whoami" ;;
    s5cmd) whoami "$program" --endpoint-url "$STS_ENDPOINT" cat s3://bucket/whoami ;;
    esac
}

get() { "$program" -sS --fail --max-time 10 "$@"; }

credentials() {
    roles=$imds/meta-data/iam/security-credentials/
    role=$(get "$@" $roles) || return
    document=$(get "$@" "$roles$role") || return
    field AccessKeyId && field SecretAccessKey && field Token
}

# The stand-in says who has signed: the ARN and the key.
whoami() {
    text=$("$@") || return
    set -- $text
    echo "$2" "$1"
}

# By what `load` has printed.
identify() {
    case $name in
    aws-cli*) "$program" sts get-caller-identity --endpoint-url "$STS_ENDPOINT" --query Arn --output text ;;
    curl*)
        get --aws-sigv4 "aws:amz:$AWS_REGION:sts" --user "$1:$2" -H "X-Amz-Security-Token: $3" \
            "$STS_ENDPOINT/?Action=GetCallerIdentity&Version=2011-06-15" | sed -n 's|.*<Arn>\(.*\)</Arn>.*|\1|p'
        ;;
    *) echo "$2" ;;
    esac
}

echo "version $(version)"
last=
while [ "$times" != 0 ]; do
    begin=$(date +%s%N)
    if found=$(load 2>/tmp/error) && [ -n "$found" ]; then
        took=$((($(date +%s%N) - begin) / 1000000))
        set -- $found
        if [ "$times" != watch ] || [ "$1" != "$last" ]; then
            echo "key $1 $took"
            if [ -n "$STS_ENDPOINT" ]; then
                arn=$(identify "$@" 2>/tmp/error) && echo "identity $arn" || echo "identity-error $(line </tmp/error)"
            fi
        fi
        last=$1
    else
        echo "error $(line </tmp/error)"
    fi
    if [ "$times" = watch ]; then sleep 0.3; else times=$((times - 1)); fi
done
