"""A boto3 program as people write it; nothing is configured but the region."""

import boto3

import client


def make():
    session = boto3.session.Session()

    def load():
        found = session.get_credentials()
        if found is None:
            raise LookupError("Unable to locate credentials")
        return found.get_frozen_credentials().access_key

    return load, lambda: session.client("sts", endpoint_url=client.ENDPOINT).get_caller_identity()["Arn"]


client.run(boto3.__version__, make)
