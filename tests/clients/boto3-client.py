"""A boto3 program as people write it: asks for credentials, says which it got, in one line of JSON.

Usage: boto3-client.py [ATTEMPTS]. Nothing is configured but the region. With STS_ENDPOINT it also asks
that STS whose credentials they are. Exits 3 when an attempt got none.
"""

import json
import logging
import os
import sys
import time

import boto3


class RoleName(logging.Handler):
    """botocore tells the name of the role to nobody but its log."""

    name_seen = None

    def emit(self, record):
        if record.msg.startswith("Found credentials from IAM Role"):
            self.name_seen = record.args[0]


def load(roles):
    """One attempt with a session of its own, so that nothing comes from a cache."""
    roles.name_seen = None
    attempt = {"access_key": None, "role_name": None, "error": None}
    session = boto3.session.Session()
    credentials = None
    begin = time.monotonic()
    try:
        found = session.get_credentials()
        if found is None:
            attempt["error"] = "Unable to locate credentials"
        else:
            credentials = found.get_frozen_credentials()
            attempt["access_key"] = credentials.access_key
    except Exception as error:  # whatever it is, it belongs into the report
        attempt["error"] = f"{type(error).__name__}: {error}"
    attempt["ms"] = round((time.monotonic() - begin) * 1000, 3)
    attempt["role_name"] = roles.name_seen
    return attempt, credentials


def identify(endpoint, credentials):
    sts = boto3.client(
        "sts",
        endpoint_url=endpoint,
        aws_access_key_id=credentials.access_key,
        aws_secret_access_key=credentials.secret_key,
        aws_session_token=credentials.token,
    )
    return sts.get_caller_identity()["Arn"]


def main():
    attempts = int(sys.argv[1]) if len(sys.argv) > 1 else 2
    roles = RoleName()
    log = logging.getLogger("botocore.credentials")
    log.setLevel(logging.INFO)
    log.addHandler(roles)
    log.propagate = False

    report = {"client": "boto3", "version": boto3.__version__, "attempts": [], "identity": None, "identity_error": None}
    credentials = None
    for _ in range(attempts):
        attempt, loaded = load(roles)
        report["attempts"].append(attempt)
        credentials = loaded or credentials
    endpoint = os.environ.get("STS_ENDPOINT")
    if endpoint and credentials:
        try:
            report["identity"] = identify(endpoint, credentials)
        except Exception as error:
            report["identity_error"] = f"{type(error).__name__}: {error}"
    print(json.dumps(report), flush=True)
    return 3 if any(attempt["error"] for attempt in report["attempts"]) else 0


if __name__ == "__main__":
    sys.exit(main())
