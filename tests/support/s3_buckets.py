"""Buckets of a real S3 server, what tests put into them, and clients that reach them through a proxy."""

from __future__ import annotations

import random
import uuid
from collections.abc import Callable
from typing import Any

from demo.s3_server import S3Server
from tests.support.faulty_proxy import FaultyProxy

# Longer than what socket buffers swallow, so that a fault hits the reader in the middle of the body.
BODY = random.Random(0).randbytes(3 * 2**20)


def new_bucket(server: S3Server) -> str:
    """Make a bucket that no other test has; return its name."""
    name = f"bucket-{uuid.uuid4().hex}"
    server.client().create_bucket(Bucket=name)
    return name


def put(server: S3Server, bucket: str, key: str, data: bytes = b"data") -> None:
    """Write an object past the store."""
    server.client().put_object(Bucket=bucket, Key=key, Body=data)


def through(server: S3Server, proxy: FaultyProxy, **config: Any) -> Callable[[], Any]:
    """Make a client that goes through the proxy and, so that the store alone does, does not retry."""
    config = {"retries": {"total_max_attempts": 1}, "read_timeout": 1, **config}
    return lambda: server.client(endpoint_url=proxy.endpoint_url, **config)
