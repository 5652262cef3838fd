"""A real S3 server (moto's) on a free port, for a session's tests; each test takes a bucket of its own."""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

CREDENTIALS = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_REQUEST_CHECKSUM_CALCULATION": "when_required",
}


@dataclass(frozen=True)
class ObjectStore:
    """The environment that finds the server, and a new bucket in it."""

    environment: dict[str, str]
    url: str

    def names(self) -> set[str]:
        """Every object in the bucket, without its prefix."""
        import boto3

        client = boto3.client("s3", endpoint_url=self.environment["AWS_ENDPOINT_URL"])
        bucket, _, prefix = self.url.removeprefix("s3://").partition("/")
        pages = client.get_paginator("list_objects_v2").paginate(Bucket=bucket)
        found = {one["Key"].removeprefix(f"{prefix}/") for page in pages for one in page.get("Contents", [])}
        client.close()
        return found


@contextmanager
def object_store() -> Iterator[ObjectStore]:
    """Within the block this process's environment finds the server too."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    environment = CREDENTIALS | {"AWS_ENDPOINT_URL": f"http://{host}:{port}"}
    before = {name: os.environ.get(name) for name in environment}
    os.environ.update(environment)
    try:
        bucket = f"bucket-{uuid.uuid4().hex[:12]}"
        client = boto3.client("s3")
        client.create_bucket(Bucket=bucket)
        client.close()
        yield ObjectStore(environment, f"s3://{bucket}/vlm-dft")
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        server.stop()
