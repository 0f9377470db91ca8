"""Reading from a real S3 server over connections that really break."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest

from airflow_vlm_provider.shards.formats import RowKeys, shard_format
from airflow_vlm_provider.shards.s3 import S3Store
from airflow_vlm_provider.shards.s3_reader import ATTEMPTS
from airflow_vlm_provider.shards.stores import ObjectChangedError, StoreError
from demo.s3_server import S3Server, start_s3
from tests.support.faulty_proxy import Fault, faulty_proxy
from tests.support.s3_buckets import BODY, new_bucket, put, through

pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with start_s3() as running:
        yield running


@pytest.fixture
def bucket(server: S3Server) -> str:
    return new_bucket(server)


@pytest.fixture
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("airflow_vlm_provider.shards.s3_reader.FIRST_WAIT_S", 0)


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("kind", ["reset", "close", "stall"])
def test_a_body_that_breaks_off_is_resumed_where_it_broke(server: S3Server, bucket: str, kind: Any) -> None:
    put(server, bucket, "a", BODY)
    faults = [Fault(kind, 1_000_000), Fault(kind, 800_000), Fault(kind, 2000)]
    with faulty_proxy(server.endpoint_url, faults) as proxy:
        store = S3Store(bucket=bucket, client_factory=through(server, proxy))
        with store.open("a") as stream:
            data = stream.read()
        assert proxy.faults == faults
        ranges = [
            int(line.split(b"=")[1].rstrip(b"-"))
            for request in proxy.requests
            for line in request.splitlines()
            if line.startswith(b"Range:")
        ]
        matches = [request.count(b"If-Match:") for request in proxy.requests]
    assert hashlib.sha256(data).digest() == hashlib.sha256(BODY).digest()
    assert matches == [0, 1, 1, 1]
    # Each resumption begins past what had come before: nothing is read twice from the beginning.
    assert len(ranges) == 3
    assert 0 < ranges[0] <= 1_000_000
    assert ranges[0] < ranges[1] <= 1_800_000
    assert ranges[1] <= ranges[2] < len(BODY)


@pytest.mark.usefixtures("no_waiting")
def test_a_small_object_and_a_shard_survive_a_break_as_well(server: S3Server, bucket: str) -> None:
    rows = b"".join(b'{"i": %d, "text": "%s"}\n' % (index, b"x" * 200) for index in range(20_000))
    put(server, bucket, "a.jsonl", rows)
    with faulty_proxy(server.endpoint_url, [Fault("reset", 1_500_000), None, Fault("close", 900)]) as proxy:
        store = S3Store(bucket=bucket, client_factory=through(server, proxy))
        with store.open("a.jsonl") as stream, shard_format("a.jsonl").open(stream, keys=RowKeys()) as shard:
            read = [sample.row for sample in shard]
        assert store.read("a.jsonl", max_bytes=len(rows)) == rows
        assert len(proxy.faults) == 2
    assert [row["i"] for row in read if row] == list(range(20_000))


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize("fault", [Fault("reset", 2000), Fault("close", 50)], ids=["in body", "in head"])
def test_when_it_keeps_breaking_at_one_place_reading_raises(
    server: S3Server, bucket: str, fault: Fault
) -> None:
    put(server, bucket, "a", BODY)
    plan = itertools.chain([Fault("reset", 1_000_000)], itertools.repeat(fault))
    with faulty_proxy(server.endpoint_url, plan) as proxy:
        store = S3Store(bucket=bucket, client_factory=through(server, proxy))
        with store.open("a") as stream, pytest.raises(ConnectionError, match=r"s3://.*/a"):
            stream.read()
        assert len(proxy.requests) == ATTEMPTS
        # The failed reader lets no one take what it has read for the whole.
        with pytest.raises(ConnectionError):
            store.read("a", max_bytes=len(BODY))


@pytest.mark.usefixtures("no_waiting")
def test_a_head_cut_off_again_and_again_is_a_connection_error(server: S3Server, bucket: str) -> None:
    put(server, bucket, "a")
    with faulty_proxy(server.endpoint_url, itertools.repeat(Fault("close", 50))) as proxy:
        store = S3Store(bucket=bucket, client_factory=through(server, proxy))
        with pytest.raises(ConnectionError):
            store.stat("a")
        with pytest.raises(ConnectionError):
            store.open("a")
        with pytest.raises(ConnectionError):
            list(store.list())
        assert len(proxy.faults) == 3 * ATTEMPTS


@pytest.mark.usefixtures("no_waiting")
# boto3's parser complains of a date whose time zone was cut off.
@pytest.mark.filterwarnings("ignore:tzname")
def test_a_head_cut_off_anywhere_is_asked_for_again(server: S3Server, bucket: str) -> None:
    put(server, bucket, "a", BODY)
    for size in range(30, 350, 40):
        plan = [Fault("close", 1_000_000), Fault("close", size)]
        with faulty_proxy(server.endpoint_url, plan) as proxy:
            store = S3Store(bucket=bucket, client_factory=through(server, proxy))
            assert store.read("a", max_bytes=len(BODY)) == BODY
            assert proxy.faults == plan


@pytest.mark.usefixtures("no_waiting")
def test_an_object_replaced_meanwhile_is_not_spliced(server: S3Server, bucket: str) -> None:
    put(server, bucket, "a", BODY)
    with faulty_proxy(server.endpoint_url, [Fault("close", 1_000_000)]) as proxy:
        store = S3Store(bucket=bucket, client_factory=through(server, proxy))
        with store.open("a") as stream:
            stream.read(10)
            put(server, bucket, "a", BODY[::-1])
            with pytest.raises(ObjectChangedError, match="replaced while it was being read"):
                stream.read()


@pytest.mark.usefixtures("no_waiting")
def test_an_object_deleted_meanwhile_is_told(server: S3Server, bucket: str) -> None:
    put(server, bucket, "a", BODY)
    with faulty_proxy(server.endpoint_url, [Fault("close", 1_000_000)]) as proxy:
        store = S3Store(bucket=bucket, client_factory=through(server, proxy))
        with store.open("a") as stream:
            stream.read(10)
            server.client().delete_object(Bucket=bucket, Key="a")
            with pytest.raises(ObjectChangedError, match="deleted while it was being read"):
                stream.read()


def test_a_flipped_bit_is_noticed_by_the_checksum(server: S3Server, bucket: str) -> None:
    with S3Store(bucket=bucket, client_factory=server.client).create("a") as stream:
        stream.write(BODY)
    with faulty_proxy(server.endpoint_url, [Fault("corrupt", 1_000_000)] * 2) as proxy:
        store = S3Store(bucket=bucket, client_factory=through(server, proxy))
        with store.open("a") as stream, pytest.raises(StoreError, match="checksum"):
            stream.read()
        with pytest.raises(StoreError, match="checksum"):
            store.read("a", max_bytes=len(BODY))
        assert len(proxy.faults) == 2


def test_a_server_that_is_gone_is_a_connection_error(server: S3Server) -> None:
    with faulty_proxy(server.endpoint_url) as proxy:
        pass
    store = S3Store(bucket="bucket", client_factory=through(server, proxy))
    with pytest.raises(ConnectionError):
        store.stat("a")
    with pytest.raises(ConnectionError):
        list(store.list())
    with pytest.raises(ConnectionError), store.create("a"):
        pass
