"""The S3 store against a real server: what it lists, looks up, reads and writes."""

from __future__ import annotations

import collections
import itertools
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest

from airflow_vlm_provider.shards.opening import locate, open_store
from airflow_vlm_provider.shards.s3 import SPOOL_BYTES, S3Store
from airflow_vlm_provider.shards.stores import (
    ObjectTooLargeError,
    StoreError,
)
from demo.s3_server import S3Server, start_s3
from tests.support.faulty_proxy import Fault, faulty_proxy
from tests.support.s3_buckets import BODY, new_bucket, put, through

pytestmark = pytest.mark.integration


PAGE_SIZE = 7


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with start_s3(page_size=PAGE_SIZE) as running:
        yield running


@pytest.fixture
def bucket(server: S3Server) -> str:
    return new_bucket(server)


@pytest.fixture
def store(server: S3Server, bucket: str) -> S3Store:
    return S3Store(bucket=bucket, prefix="base", client_factory=server.client)


def put_all(server: S3Server, bucket: str, keys: Iterable[str]) -> None:
    client = server.client()
    for key in keys:
        client.put_object(Bucket=bucket, Key=key, Body=b"data")


def keys(server: S3Server, bucket: str) -> list[str]:
    return [entry["Key"] for entry in server.client().list_objects_v2(Bucket=bucket).get("Contents", ())]


# --- objects ---------------------------------------------------------------------------------------------------


def test_list_goes_through_all_pages_in_order_and_leaves_out_what_is_no_data(
    server: S3Server, bucket: str, store: S3Store
) -> None:
    client = server.client()
    expected = sorted(
        ["a/b", "a.txt", "a-b/c", "a0", "é", *(f"n/{number}" for number in range(3 * PAGE_SIZE))]
    )
    for name in [*expected, "_vlm/a", "x/_b", ".hidden", "x/.y/z"]:
        client.put_object(Bucket=bucket, Key=f"base/{name}", Body=name.encode())
    for key in ["base/", "base/folder/", "baseless", "other/a"]:
        client.put_object(Bucket=bucket, Key=key, Body=b"")
    found = list(store.list())
    assert [info.name for info in found] == expected
    assert [info.size for info in found] == [len(name.encode()) for name in expected]


class Counted:
    """A client that counts its requests, by operation."""

    def __init__(self, server: S3Server) -> None:
        self.client = server.client()
        self.requests: collections.Counter[str] = collections.Counter()
        self.client.meta.events.register(
            "before-send.s3.*", lambda event_name, **_: self.requests.update([event_name.rpartition(".")[2]])
        )


def test_hidden_folders_are_passed_over(server: S3Server, bucket: str) -> None:
    hidden_and_not = [
        *(f"_vlm/a.jsonl/step/journal/{number:03}" for number in range(6 * PAGE_SIZE)),
        *(f"b/.git/{number:03}" for number in range(4 * PAGE_SIZE)),
        *(f"b/{number}" for number in range(3)),
        "_vlm0",
        "_vlm\U0010ffff/x",
        # Beyond what passing over reaches.
        *(f"_w/\U0010ffff{number:03}" for number in range(2 * PAGE_SIZE)),
        "a",
        "c",
    ]
    put_all(server, bucket, hidden_and_not)
    counted = Counted(server)
    store = S3Store(bucket=bucket, client_factory=lambda: counted.client)
    assert [info.name for info in store.list()] == ["a", "b/0", "b/1", "b/2", "c"]
    # Of each of the first two, a page is seen; without passing over it would be thirteen pages and more.
    assert counted.requests["ListObjectsV2"] <= 7
    listed = [info.name for info in store.list("_vlm")]
    assert len(listed) == 6 * PAGE_SIZE


def test_many_are_looked_up_by_few_listings(server: S3Server, bucket: str) -> None:
    there = [f"base/{number:03}.jpg" for number in range(10 * PAGE_SIZE)]
    put_all(server, bucket, [*there, "base/é", "other/a", "base2/a"])

    def looked_up(wanted: list[str]) -> tuple[list[str], collections.Counter[str]]:
        counted = Counted(server)
        store = S3Store(bucket=bucket, prefix="base", client_factory=lambda: counted.client)
        found = list(store.stat_many(wanted))
        assert [name for name, _ in found] == wanted
        return [name for name, info in found if info is not None], counted.requests

    every = [f"{number:03}.jpg" for number in range(10 * PAGE_SIZE)]
    assert looked_up(every) == (every, {"ListObjectsV2": 10})
    # In far-off places, one listing finds one name: what lies between is not gone through.
    few = [every[0], every[30], every[-1]]
    assert looked_up(few) == (few, {"ListObjectsV2": 3})
    # Neighbours share a page.
    assert looked_up(every[30 : 30 + PAGE_SIZE]) == (every[30 : 30 + PAGE_SIZE], {"ListObjectsV2": 1})
    # When the end has been seen, nothing more is asked for.
    found, requests = looked_up([every[-1], *(f"zz{number:03}" for number in range(50)), "é"])
    assert (found, requests["ListObjectsV2"]) == ([every[-1], "é"], 1)
    # What begins like the name before it fills no page: of "p1..." nothing is seen on the way to "p2".
    put_all(server, bucket, [*(f"base/p1{number:02}" for number in range(2 * PAGE_SIZE)), "base/p2"])
    assert looked_up(["p2"]) == (["p2"], {"ListObjectsV2": 1})


def test_odd_names_are_looked_up_too(server: S3Server, bucket: str, store: S3Store) -> None:
    there = sorted(["\x01", "!", "\ue000", "\U00010000", "x" * 1019])
    # More than a page lies between them, so that each is looked for by a listing of its own.
    between = [f"{name}-{number:03}" for name in ("!", "x", "y") for number in range(PAGE_SIZE + 1)]
    put_all(server, bucket, [f"base/{name}" for name in [*there, *between]])
    wanted = sorted([*there, "\x02", "x" * 1018, "x" * 1020, "\ue001"])
    found = [name for name, info in store.stat_many(wanted) if info is not None]
    assert found == there


def test_a_listing_without_order_is_refused(
    server: S3Server, bucket: str, store: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    put_all(server, bucket, [f"base/{name}" for name in "abc"])
    client = server.client()
    list_in_order = client.list_objects_v2

    def list_backwards(**kwargs: Any) -> Any:
        page = list_in_order(**kwargs)
        page["Contents"] = page.get("Contents", [])[::-1]
        return page

    monkeypatch.setattr(client, "list_objects_v2", list_backwards)
    store = S3Store(bucket=bucket, prefix="base", client_factory=lambda: client)
    with pytest.raises(StoreError, match="listed in no order"):
        list(store.stat_many(["b"]))
    with pytest.raises(StoreError, match="listed in no order"):
        list(store.list())


def test_identity_is_the_same_for_list_and_stat_and_changes_with_the_content(
    server: S3Server, bucket: str, store: S3Store
) -> None:
    put(server, bucket, "base/a", b"1")
    (before,) = store.list()
    assert store.stat("a") == before
    put(server, bucket, "base/a", b"2")
    assert store.stat("a").identity != before.identity
    put(server, bucket, "base/a", b"1")
    assert store.stat("a") == before


def test_a_bucket_without_prefix(server: S3Server, bucket: str) -> None:
    store = open_store(f"s3://{bucket}", s3_client=server.client)
    with store.create("a/b") as stream:
        stream.write(b"x")
    assert [info.name for info in store.list()] == ["a/b"]
    assert keys(server, bucket) == ["a/b"]


def test_what_is_missing_is_named(server: S3Server, store: S3Store) -> None:
    calls: list[Callable[[S3Store], Any]] = [
        lambda store: store.stat("none"),
        lambda store: store.open("none"),
        lambda store: store.read("none", max_bytes=1),
    ]
    for call in calls:
        with pytest.raises(FileNotFoundError, match=r"No such object: 's3://bucket-.*/base/none'"):
            call(store)
    assert list(store.list()) == []
    nowhere = S3Store(bucket="no-such-bucket", client_factory=server.client)
    for call in [*calls[1:], lambda store: list(store.list())]:
        with pytest.raises(FileNotFoundError, match=r"No such bucket: 's3://no-such-bucket/"):
            call(nowhere)
    with pytest.raises(FileNotFoundError, match="No such bucket"), nowhere.create("a") as stream:
        stream.write(b"x")


def test_read_takes_an_object_up_to_its_bound(server: S3Server, bucket: str) -> None:
    put(server, bucket, "large", BODY)
    put(server, bucket, "empty", b"")
    with faulty_proxy(server.endpoint_url) as proxy:
        store = S3Store(bucket=bucket, client_factory=through(server, proxy))
        assert store.read("large", max_bytes=len(BODY)) == BODY
        assert store.read("empty", max_bytes=0) == b""
        with pytest.raises(ObjectTooLargeError, match=rf"large has {len(BODY)} bytes"):
            store.read("large", max_bytes=len(BODY) - 1)


def test_locate_prefers_an_object_of_this_very_key(server: S3Server, bucket: str) -> None:
    put(server, bucket, "p/a.jsonl")
    put(server, bucket, "p/a.jsonl/b")

    def located(uri: str) -> tuple[str, str | None]:
        store, name = locate(uri, s3_client=server.client)
        return store.uri, name

    assert located(f"s3://{bucket}/p/a.jsonl") == (f"s3://{bucket}/p/", "a.jsonl")
    assert located(f"s3://{bucket}/p/a.jsonl/") == (f"s3://{bucket}/p/a.jsonl/", None)
    assert located(f"s3://{bucket}/p") == (f"s3://{bucket}/p/", None)
    assert located(f"s3://{bucket}") == (f"s3://{bucket}/", None)
    assert located(f"s3://{bucket}/none") == (f"s3://{bucket}/none/", None)


# --- writing ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 10, SPOOL_BYTES + 2**20])
def test_create_shows_the_object_whole_at_the_end(
    server: S3Server, bucket: str, store: S3Store, size: int
) -> None:
    data = os.urandom(size)
    put(server, bucket, "base/a", b"old")
    with store.create("a") as stream:
        stream.write(data)
        assert store.read("a", max_bytes=3) == b"old"
    assert store.read("a", max_bytes=size) == data
    assert keys(server, bucket) == ["base/a"]
    assert uploads(server, bucket) == []


def test_create_leaves_nothing_when_the_body_raises(server: S3Server, bucket: str, store: S3Store) -> None:
    def fail(size: int) -> None:
        with store.create("a") as stream:
            stream.write(bytes(size))
            raise RuntimeError("half")

    for size in (10, SPOOL_BYTES + 2**20):
        with pytest.raises(RuntimeError, match="half"):
            fail(size)
    assert keys(server, bucket) == []
    assert uploads(server, bucket) == []


def uploads(server: S3Server, bucket: str) -> list[Any]:
    return list(server.client().list_multipart_uploads(Bucket=bucket).get("Uploads", ()))


def test_an_upload_that_fails_leaves_nothing(server: S3Server, bucket: str) -> None:
    # The first connection begins the multipart upload, one of the next takes a part and is cut.
    plan = [None, Fault("reset", 10), Fault("reset", 10)]
    with faulty_proxy(server.endpoint_url, plan) as proxy:
        store = S3Store(bucket=bucket, client_factory=through(server, proxy))
        with pytest.raises(ConnectionError), store.create("a") as stream:
            stream.write(bytes(SPOOL_BYTES + 2**20))
        assert proxy.faults
    assert keys(server, bucket) == []
    assert uploads(server, bucket) == []


KILLED = """
import sys
from demo.s3_server import S3Server
from airflow_vlm_provider.shards.s3 import S3Store
server = S3Server(sys.argv[1])
with S3Store(bucket=sys.argv[2], client_factory=server.client).create("a.jsonl") as stream:
    stream.write(b"half" * 5_000_000)
    if sys.argv[3] == "body":
        print("now", flush=True)
        sys.stdin.read()
"""


def test_a_writer_killed_in_its_body_leaves_nothing_visible(server: S3Server, bucket: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, server.endpoint_url, bucket, "body"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline() == b"now\n"
        writer.send_signal(signal.SIGKILL)
    assert keys(server, bucket) == []


def test_a_writer_killed_in_its_upload_leaves_nothing_visible(server: S3Server, bucket: str) -> None:
    # The upload has begun and its parts get no answer: there the writer hangs when it is killed.
    plan = itertools.chain([None], itertools.repeat(Fault("stall", 0)))
    with (
        faulty_proxy(server.endpoint_url, plan) as proxy,
        subprocess.Popen([sys.executable, "-c", KILLED, proxy.endpoint_url, bucket, "upload"]) as writer,
    ):
        while not proxy.faults and writer.poll() is None:
            threading.Event().wait(0.05)
        writer.send_signal(signal.SIGKILL)
    assert writer.returncode == -signal.SIGKILL
    assert keys(server, bucket) == []


def test_writers_at_once_do_not_mix(store: S3Store) -> None:
    writers = 4
    meeting = threading.Barrier(writers)
    seen: list[bytes] = []

    def write(number: int) -> None:
        with store.create("a") as stream:
            stream.write(bytes([number]) * 300_000)
            meeting.wait()
        seen.append(store.read("a", max_bytes=10**6))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(writers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(seen) == writers
    assert all(len(data) == 300_000 and len(set(data)) == 1 for data in seen)


def test_threads_share_one_client(server: S3Server, bucket: str) -> None:
    made = []

    def factory() -> Any:
        made.append(1)
        return server.client()

    store = S3Store(bucket=bucket, client_factory=factory)
    put(server, bucket, "a", b"data")
    read: list[bytes] = []
    threads = [threading.Thread(target=lambda: read.append(store.read("a", max_bytes=4))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (read, made) == ([b"data"] * 8, [1])
