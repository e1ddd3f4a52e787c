"""The further Python packages that find credentials by themselves: one function for each, named on the command line.

What speaks S3 only asks for the object `whoami`: the stand-in answers with the ARN and the access key of who has signed.
"""

import asyncio
import importlib.metadata
import os
import sys

import client

REGION = os.environ["AWS_REGION"]
ADDRESS = (client.ENDPOINT or "").removeprefix("http://")
LOOP = asyncio.new_event_loop()


def s3(whoami):
    """A client that shows its access key nowhere but in a request."""
    answer = []

    def load():
        answer[:] = bytes(whoami()).decode().split()
        return answer[1]

    return load, lambda: answer[0]


def aiobotocore():
    from aiobotocore.session import get_session

    session = get_session()

    async def load():
        found = await session.get_credentials()
        if found is None:
            raise LookupError("Unable to locate credentials")
        return (await found.get_frozen_credentials()).access_key

    async def identify():
        async with session.create_client("sts", endpoint_url=client.ENDPOINT) as sts:
            return (await sts.get_caller_identity())["Arn"]

    return lambda: LOOP.run_until_complete(load()), lambda: LOOP.run_until_complete(identify())


def awscrt():
    from urllib.request import Request, urlopen

    from awscrt.auth import AwsCredentialsProvider, AwsSigningAlgorithm, AwsSigningConfig, aws_sign_request
    from awscrt.http import HttpHeaders, HttpRequest

    provider = AwsCredentialsProvider.new_default_chain()

    def identify():
        path = "/?Action=GetCallerIdentity&Version=2011-06-15"
        request = HttpRequest("GET", path, HttpHeaders([("host", ADDRESS)]))
        config = AwsSigningConfig(
            algorithm=AwsSigningAlgorithm.V4, credentials_provider=provider, region=REGION, service="sts"
        )
        signed = aws_sign_request(request, config).result(10)
        with urlopen(Request(client.ENDPOINT + path, headers=dict(signed.headers)), timeout=10) as answer:
            return answer.read().decode().split("<Arn>")[1].split("<")[0]

    return lambda: provider.get_credentials().result(30).access_key_id, identify


def aws_sdk_sts():
    from aws_credentials_imds import IMDSCredentialsResolver
    from aws_sdk_sts.client import AsyncSTSClient
    from aws_sdk_sts.config import AsyncSTSConfig
    from aws_sdk_sts.models import GetCallerIdentityInput

    async def make():  # inside of the loop that it is for
        return IMDSCredentialsResolver()

    resolver = LOOP.run_until_complete(make())

    async def identify():
        config = await AsyncSTSConfig.resolve(
            endpoint_uri=client.ENDPOINT, region=REGION, aws_credentials_identity_resolver=resolver
        )
        return (await AsyncSTSClient(config).get_caller_identity(GetCallerIdentityInput())).arn

    def load():
        return LOOP.run_until_complete(resolver.get_identity(properties={})).access_key_id

    return load, lambda: LOOP.run_until_complete(identify())


def pyarrow():
    from pyarrow.fs import S3FileSystem

    files = S3FileSystem(region=REGION, endpoint_override=ADDRESS, scheme="http")
    return s3(lambda: files.open_input_stream("bucket/whoami").read())


def obstore():
    import obstore
    from obstore.store import S3Store

    store = S3Store("bucket", endpoint=client.ENDPOINT, region=REGION, client_options={"allow_http": True})
    return s3(lambda: obstore.get(store, "whoami").bytes())


def opendal():
    import opendal

    store = opendal.Operator("s3", bucket="bucket", endpoint=client.ENDPOINT, region=REGION)
    return s3(lambda: store.read("whoami"))


def minio():
    from minio import Minio
    from minio.credentials import IamAwsProvider

    provider = IamAwsProvider()
    files = Minio(ADDRESS, credentials=provider, secure=False, region=REGION)

    def identify():
        return files.get_object("bucket", "whoami").read().decode().split()[0]

    return lambda: provider.retrieve().access_key, identify


name = sys.argv[1]
client.run(importlib.metadata.version(name), globals()[name.replace("-", "_")])
