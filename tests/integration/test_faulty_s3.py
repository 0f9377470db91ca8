"""S3 out of order: whatever breaks, nothing is lost, no torn object shows, and errors are those of the contract."""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
import signal
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import boto3
import pytest
from botocore.config import Config

from airflow_vlm_provider.shards.s3 import S3Store
from airflow_vlm_provider.shards.stores import ObjectChangedError, ObjectInfo
from demo.s3_server import ACCESS_KEY, REGION, SECRET_KEY, S3Server, start_s3
from tests.support.faulty_proxy import Fault, FaultyProxy, faulty_proxy

pytestmark = pytest.mark.integration

# Longer than what socket buffers swallow, so that a fault hits the reader in the middle of the body.
BODY = random.Random(0).randbytes(2 * 2**20)
OTHER = random.Random(1).randbytes(2 * 2**20)
# Longer than what is uploaded in one request.
LONG = random.Random(2).randbytes(9 * 2**20)
NAMES = [f"n/{number:03}" for number in range(120)]


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with start_s3(page_size=50) as running:
        yield running


@pytest.fixture(scope="module")
def filled(server: S3Server) -> str:
    """A bucket that tests only read."""
    client = server.client()
    client.create_bucket(Bucket="filled")
    client.put_object(Bucket="filled", Key="large", Body=BODY)
    for name in NAMES:
        client.put_object(Bucket="filled", Key=name, Body=name.encode())
    return "filled"


@pytest.fixture
def bucket(server: S3Server) -> str:
    name = f"bucket-{uuid.uuid4().hex}"
    server.client().create_bucket(Bucket=name)
    return name


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("airflow_vlm_provider.shards.s3_reader.FIRST_WAIT_S", 0)


@functools.cache
def session() -> Any:
    """All clients' session: to make one takes longer than most tests."""
    return boto3.session.Session()


def through(proxy: FaultyProxy, bucket: str, *, attempts: int) -> S3Store:
    """Open a bucket through the proxy; the client tries each request so often."""
    config = Config(retries={"mode": "standard", "total_max_attempts": attempts}, read_timeout=1)
    client = session().client(
        "s3",
        endpoint_url=proxy.endpoint_url,
        region_name=REGION,
        aws_access_key_id=ACCESS_KEY,
        aws_secret_access_key=SECRET_KEY,
        config=config,
    )
    return S3Store(bucket=bucket, client_factory=lambda: client)


def whole(stream: Any) -> bytes:
    with stream:
        return b"".join(iter(lambda: stream.read(300_000), b""))


def here_and_there(stream: Any) -> bytes:
    with stream:
        stream.seek(1_000_000)
        end = stream.read()
        stream.seek(0)
        return bytes(stream.read(1_000_000)) + bytes(end)


def entries(store: S3Store) -> list[ObjectInfo | None]:
    return [info for _, info in store.stat_many([NAMES[0], NAMES[70], NAMES[-1]])]


@dataclass(frozen=True)
class Operation:
    """Something that reads a store.

    :param before: How many connections come before the one whose response has a body worth breaking off.
    :param place: How many bytes of that response are well into its body (or, of a HEAD, its head).
    """

    run: Callable[[S3Store], Any]
    before: int
    place: int


OPERATIONS = {
    "list": Operation(lambda store: list(store.list("n")), 1, 3000),
    "stat_many": Operation(entries, 1, 3000),
    "stat": Operation(lambda store: store.stat("large"), 0, 60),
    "fetch": Operation(lambda store: store.fetch("large", max_bytes=len(BODY)), 0, 500_000),
    "open": Operation(lambda store: whole(store.open("large")), 0, 500_000),
    "open_seekable": Operation(lambda store: here_and_there(store.open_seekable("large")), 1, 500_000),
}


def faults(place: int) -> dict[str, Fault]:
    return {
        "500": Fault("error", status=500),
        "503": Fault("error", status=503),
        "reset": Fault("reset"),
        "reset in body": Fault("reset", place),
        "cut short": Fault("close", place),
        "silence in body": Fault("stall", place),
        "slow": Fault("slow", place),
    }


KINDS = list(faults(0))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_fault_that_passes_changes_nothing(server: S3Server, filled: str, name: str, kind: str) -> None:
    operation = OPERATIONS[name]
    fault = faults(operation.place)[kind]
    expected = operation.run(S3Store(bucket=filled, client_factory=server.client))
    plan = [*[None] * operation.before, fault]
    with faulty_proxy(server.endpoint_url, plan) as proxy:
        assert operation.run(through(proxy, filled, attempts=4)) == expected
        assert proxy.faults == [fault]
    # Where the client does not try again by itself, it is all or the contract's error.
    with faulty_proxy(server.endpoint_url, plan) as proxy:
        with contextlib.suppress(ConnectionError):
            assert operation.run(through(proxy, filled, attempts=1)) == expected
        assert proxy.faults == [fault]


@pytest.mark.parametrize(
    "fault",
    [Fault("error", status=503), Fault("reset"), Fault("close", 50)],
    ids=["503", "reset", "cut short"],
)
@pytest.mark.parametrize("name", OPERATIONS)
def test_a_fault_that_lasts_is_a_connection_error(
    server: S3Server, filled: str, name: str, fault: Fault
) -> None:
    operation = OPERATIONS[name]
    # It begins in the midst of the operation, when something has been read.
    plan = itertools.chain([None] * operation.before, itertools.repeat(fault))
    with faulty_proxy(server.endpoint_url, plan) as proxy:
        with pytest.raises(ConnectionError, match="s3://filled/"):
            operation.run(through(proxy, filled, attempts=2))
        assert len(proxy.faults) >= 2


# --- listings that are out of date ------------------------------------------------------------------------------


class Stale:
    """A client whose listings are those of a certain moment, as old object stores' and caches in between may be."""

    def __init__(self, client: Any) -> None:
        self._client = client
        self._pages: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)

    def list_objects_v2(self, **kwargs: Any) -> Any:
        return self._pages.setdefault(repr(sorted(kwargs.items())), self._client.list_objects_v2(**kwargs))


def test_what_a_stale_listing_says_is_not_taken_for_what_is_there(server: S3Server, bucket: str) -> None:
    client = Stale(server.client())
    store = S3Store(bucket=bucket, client_factory=lambda: client)
    for name in ["deleted", "replaced"]:
        with store.create(name) as stream:
            stream.write(b"old")
    listed = {info.name: info for info in store.list()}
    dict(store.stat_many(["deleted"]))
    store.delete("deleted")
    for name in ["replaced", "written"]:
        with store.create(name) as stream:
            stream.write(b"the new one")
    assert [info.name for info in store.list()] == ["deleted", "replaced"]
    for method in (store.stat, store.open, store.open_seekable, lambda name: store.fetch(name, max_bytes=99)):
        with pytest.raises(FileNotFoundError):
            method("deleted")
    # Bytes come with the entry that is theirs, whatever the listing said.
    data, info = store.fetch("replaced", max_bytes=99)
    assert data == b"the new one"
    assert info == store.stat("replaced") != listed["replaced"]
    # What the listing lacks is there for whoever knows its name.
    assert store.fetch("written", max_bytes=99)[0] == b"the new one"
    assert whole(store.open("written")) == b"the new one"
    store.delete("written")
    with pytest.raises(FileNotFoundError):
        store.stat("written")


# --- writing ----------------------------------------------------------------------------------------------------

WRITES = {
    "small": (OTHER, [Fault("reset", 500_000, of="request"), Fault("stall", 500_000, of="request")]),
    # The first connection begins the upload, the others bring the parts.
    "in parts": (LONG, [Fault("reset", 500_000, of="request"), Fault("reset", 3_000_000, of="request")]),
}
ANSWERS = [Fault("error", status=500), Fault("error", status=503), Fault("reset"), Fault("close", 50)]


@pytest.mark.parametrize(
    ("size", "before"), [("small", 0), *(("in parts", connection) for connection in range(4))]
)
def test_a_fault_while_writing_shows_nothing_torn(
    server: S3Server, bucket: str, size: str, before: int
) -> None:
    data, cut = WRITES[size]
    direct = S3Store(bucket=bucket, client_factory=server.client)
    struck = []
    for fault, attempts in itertools.product([*cut, *ANSWERS], (4, 1)):
        with direct.create("a") as stream:
            stream.write(BODY)
        with faulty_proxy(server.endpoint_url, [*[None] * before, fault]) as proxy:
            store = through(proxy, bucket, attempts=attempts)
            failed = False
            try:
                with store.create("a") as stream:
                    stream.write(data)
            except ConnectionError:
                failed = True
            struck += proxy.faults
        # When it failed, the upload may have arrived all the same, and only the answer not.
        assert direct.read("a", max_bytes=len(LONG)) in ((BODY, data) if failed else (data,))
        assert not (failed and attempts > 1)
        assert [info.name for info in direct.list()] == ["a"]
    assert {fault.kind for fault in struck} >= {"error", "close", "reset"}


@pytest.mark.parametrize("fault", ANSWERS, ids=lambda fault: f"{fault.kind}-{fault.status}")
def test_a_fault_while_deleting(server: S3Server, bucket: str, fault: Fault) -> None:
    direct = S3Store(bucket=bucket, client_factory=server.client)
    for attempts in (4, 1):
        with direct.create("a") as stream:
            stream.write(BODY)
        with faulty_proxy(server.endpoint_url, [fault]) as proxy:
            try:
                through(proxy, bucket, attempts=attempts).delete("a")
            except ConnectionError:
                assert attempts == 1
                if fault.kind == "error":
                    assert direct.read("a", max_bytes=len(BODY)) == BODY
                continue
            assert proxy.faults == [fault]
        assert list(direct.list()) == []


@pytest.mark.parametrize("seekable", [False, True])
def test_replaced_between_two_faults(server: S3Server, bucket: str, seekable: bool) -> None:
    direct = S3Store(bucket=bucket, client_factory=server.client)
    with direct.create("a") as stream:
        stream.write(BODY)
    # Not a reset, which may also take what had arrived and was not read yet: then it is read anew before the change.
    plan = [*[None] * seekable, Fault("close", 700_000), Fault("error", status=503)]
    with faulty_proxy(server.endpoint_url, plan) as proxy:
        store = through(proxy, bucket, attempts=3)
        with (store.open_seekable if seekable else store.open)("a") as stream:
            assert stream.read(10) == BODY[:10]
            with direct.create("a") as writer:
                writer.write(OTHER)
            with pytest.raises(ObjectChangedError):
                whole(stream)


WRITER = """
import sys
from demo.s3_server import S3Server
from airflow_vlm_provider.shards.s3 import S3Store
client = S3Server(sys.argv[1]).client(retries={"mode": "standard", "total_max_attempts": 100})
with S3Store(bucket=sys.argv[2], client_factory=lambda: client).create("a.jsonl") as stream:
    stream.write(b"new" * int(sys.argv[3]))
"""


@pytest.mark.parametrize(("thirds", "before"), [(1_000_000, 0), (5_000_000, 1)], ids=["small", "in parts"])
def test_a_writer_killed_after_its_upload_broke_leaves_the_old_version(
    server: S3Server, bucket: str, thirds: int, before: int
) -> None:
    direct = S3Store(bucket=bucket, client_factory=server.client)
    with direct.create("a.jsonl") as stream:
        stream.write(BODY)
    plan = itertools.chain([None] * before, itertools.repeat(Fault("reset", 700_000, of="request")))
    with (
        faulty_proxy(server.endpoint_url, plan) as proxy,
        subprocess.Popen([sys.executable, "-c", WRITER, proxy.endpoint_url, bucket, str(thirds)]) as writer,
    ):
        while len(proxy.faults) < 2 and writer.poll() is None:
            threading.Event().wait(0.02)
        writer.send_signal(signal.SIGKILL)
    assert writer.returncode == -signal.SIGKILL
    assert direct.read("a.jsonl", max_bytes=len(BODY)) == BODY
    assert [info.name for info in direct.list()] == ["a.jsonl"]
    # And its successor is not in the way of anything.
    with direct.create("a.jsonl") as stream:
        stream.write(b"whole")
    assert direct.read("a.jsonl", max_bytes=5) == b"whole"
