"""The contract of stores, kept by S3."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from airflow_vlm_provider.shards.s3 import S3Store
from demo.s3_server import S3Server, start_s3
from tests.support.store_contract import Opener, StoreContract

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    # Pages so short that every listing has several.
    with start_s3(page_size=3) as running:
        yield running


class TestS3Store(StoreContract):
    has_directories = False

    @pytest.fixture
    def opener(self, server: S3Server) -> Opener:
        bucket = f"bucket-{uuid.uuid4().hex}"
        server.client().create_bucket(Bucket=bucket)
        return lambda: S3Store(bucket=bucket, prefix="base", client_factory=server.client)
