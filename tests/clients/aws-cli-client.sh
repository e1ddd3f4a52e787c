#!/bin/sh
# The AWS CLI as people call it: gets credentials, says which, in one line of JSON.
#
# Usage: aws-cli-client.sh AWS [ATTEMPTS]. Nothing is configured but the region. With STS_ENDPOINT it also
# asks that STS whose credentials they are. Exits 3 when an attempt got none.
#
# Version 1 of the CLI has no `configure export-credentials`. `s3 presign` loads credentials as every command
# does, needs no network beyond that, and shows the access key in the address that it signs. The milliseconds
# include the start of Python. Every run of the CLI loads credentials anew, also the one that asks STS.
aws=$1
attempts=${2:-2}

json_string() { tr '\n\t' '  ' | sed 's/[\\"]/\\&/g; s/^ *//; s/ *$//; s/.*/"&"/'; }

version=$("$aws" --version 2>&1 | sed 's|^aws-cli/\([^ ]*\).*|\1|')
status=0
list=
number=0
while [ "$number" -lt "$attempts" ]; do
    number=$((number + 1))
    begin=$(date +%s%N)
    output=$("$aws" s3 presign s3://bucket/key 2>&1)
    end=$(date +%s%N)
    key=$(printf '%s' "$output" | sed -n 's/.*\(AWSAccessKeyId=\|X-Amz-Credential=\)\([A-Z0-9]*\).*/\2/p')
    if [ -n "$key" ]; then
        result="\"access_key\":\"$key\""
    else
        status=3
        result="\"error\":$(printf '%s' "$output" | json_string)"
    fi
    list="$list${list:+,}{$result,\"ms\":$(((end - begin) / 1000000))}"
done

identity=
if [ -n "$STS_ENDPOINT" ] && [ "$status" -eq 0 ]; then
    if arn=$("$aws" sts get-caller-identity --endpoint-url "$STS_ENDPOINT" --query Arn --output text 2>&1); then
        identity=",\"identity\":\"$arn\""
    else
        identity=",\"identity_error\":$(printf '%s' "$arn" | json_string)"
    fi
fi
printf '{"client":"aws-cli","version":"%s","attempts":[%s]%s}\n' "$version" "$list" "$identity"
exit "$status"
