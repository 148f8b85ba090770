"""An S3 on this machine that speaks HTTP: moto's server."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import boto3
from moto.server import ThreadedMotoServer


@contextmanager
def s3_server(*buckets: str) -> Iterator[str]:
    """Run the server with these buckets; yields its address.

    S3_ENDPOINT_URL and accepted keys are set in the environment.
    """
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    keys = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    address = f"http://{host}:{port}"
    with mock.patch.dict(os.environ, keys | {"S3_ENDPOINT_URL": address}):
        client = boto3.client("s3", endpoint_url=address)
        for bucket in buckets:
            client.create_bucket(Bucket=bucket)
        try:
            yield address
        finally:
            server.stop()
