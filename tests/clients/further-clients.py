"""The further Python packages that find credentials by themselves: one function for each, named on the command line.

What speaks S3 only asks for the object `whoami`: the stand-in answers with the ARN and the access key of who has signed.
"""

import asyncio
import ctypes
import importlib.metadata
import importlib.resources
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


def duckdb():
    import duckdb

    base = duckdb.connect()
    # Else it goes on with what it has read, as long as the object's tag stays.
    base.execute("SET enable_external_file_cache = false")
    for name in ("httpfs", "aws"):
        folder = importlib.resources.files(f"duckdb_extension_{name}") / "extensions" / f"v{duckdb.__version__}"
        base.execute(f"LOAD '{folder / name}.duckdb_extension'")

    def whoami():
        base.execute(
            "CREATE SECRET IF NOT EXISTS role (TYPE s3, PROVIDER credential_chain, REFRESH auto, "
            f"REGION '{REGION}', ENDPOINT '{ADDRESS}', USE_SSL false, URL_STYLE 'path')"
        )
        return base.execute("SELECT content FROM read_blob('s3://bucket/whoami')").fetchone()[0]

    return s3(whoami)


def libgdal():
    """The library by itself: fiona brings it along, and has no use for a file that is no map."""
    (path,) = importlib.metadata.distribution("fiona").locate_file("fiona.libs").glob("libgdal*")
    library = ctypes.CDLL(path)
    library.GDALVersionInfo.restype = library.CPLGetLastErrorMsg.restype = ctypes.c_char_p
    library.VSIFOpenL.restype = ctypes.c_void_p
    library.VSIFReadL.argtypes = [ctypes.c_char_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_void_p]
    library.VSIFReadL.restype = ctypes.c_size_t
    library.VSIFCloseL.argtypes = [ctypes.c_void_p]
    return library


def gdal():
    library = libgdal()
    for name, value in [("AWS_S3_ENDPOINT", ADDRESS), ("AWS_HTTPS", "NO"), ("AWS_VIRTUAL_HOSTING", "FALSE")]:
        library.CPLSetConfigOption(name.encode(), value.encode())

    def whoami():
        library.VSICurlClearCache()  # of what it has read
        file = library.VSIFOpenL(b"/vsis3/bucket/whoami", b"rb")
        if not file:
            raise OSError(library.CPLGetLastErrorMsg().decode())
        buffer = ctypes.create_string_buffer(1024)
        length = library.VSIFReadL(buffer, 1, len(buffer), file)
        library.VSIFCloseL(file)
        return buffer.raw[:length]

    return s3(whoami)


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
version = libgdal().GDALVersionInfo(b"RELEASE_NAME").decode() if name == "gdal" else importlib.metadata.version(name)
client.run(version, globals()[name.replace("-", "_")])
