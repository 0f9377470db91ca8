"""What a file system of fsspec's answers, as the contract has it: its entries, and its errors."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from datetime import datetime, timezone
from typing import Any

import pytest
from fsspec.exceptions import FSTimeoutError

from airflow_vlm_provider.shards.fsspec_entries import fsspec_errors, object_info
from airflow_vlm_provider.shards.fsspec_store import FsspecStore
from airflow_vlm_provider.shards.stores import InvalidNameError, StoreError
from tests.support.fsspec_stores import Watched, put, watched_store

URI = "gs://bucket/a"


@pytest.fixture
def fs() -> Watched:
    return Watched()


@pytest.fixture
def store(fs: Watched) -> FsspecStore:
    return watched_store(fs)


# ---------------------------------------------------------------- entries

FILE = {"type": "file", "size": 5}
MOMENT = datetime(2024, 5, 6, 7, 8, 9, tzinfo=timezone.utc)


@pytest.mark.parametrize(
    ("entry", "identity", "modified"),
    [
        # As Google's, Azure's (listing and lookup), SFTP's, HDFS's, WebHDFS's, FTP's and the local file system have it.
        ({"etag": "CJ+", "generation": "17", "md5Hash": "x==", "mtime": MOMENT}, "CJ+-5", MOMENT.timestamp()),
        ({"etag": "0x8D", "last_modified": MOMENT}, "0x8D-5", MOMENT.timestamp()),
        ({"etag": '"0x8D"', "last_modified": MOMENT}, "0x8D-5", MOMENT.timestamp()),
        ({"ETag": '"abc"', "LastModified": MOMENT}, "abc-5", MOMENT.timestamp()),
        ({"etag": None, "generation": 17, "updated": "2024-05-06T07:08:09.000Z"}, "17-5", MOMENT.timestamp()),
        ({"mtime": MOMENT.replace(tzinfo=None)}, "1714979289.0-5", MOMENT.timestamp()),
        ({"modificationTime": 1714979289500}, "1714979289.5-5", 1714979289.5),
        ({"mtime": 1714979289.25, "created": 3.0}, "1714979289.25-5", 1714979289.25),
        ({"etag": "x", "updated": "lately"}, "x-5", 0.0),
        ({"md5": "x"}, "x-5", 0.0),
    ],
)
def test_what_tells_versions_apart_is_found(entry: dict[str, Any], identity: str, modified: float) -> None:
    info = object_info("a", {**FILE, **entry}, URI)
    assert (info.name, info.size, info.identity, info.modified) == ("a", 5, identity, modified)


@pytest.mark.parametrize("entry", [FILE, {**FILE, "etag": "x", "size": None}, {**FILE, "updated": "lately"}])
def test_where_versions_can_not_be_told_apart_nothing_is_kept(entry: dict[str, Any]) -> None:
    with pytest.raises(StoreError, match="could not be told"):
        object_info("a", entry, URI)


# ---------------------------------------------------------------- errors


class HttpError(Exception):
    def __init__(self, text: str = "as the library puts it", **status: object) -> None:
        super().__init__(text)
        self.__dict__.update(status)


class ServiceRequestError(Exception):
    pass


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (FileNotFoundError("x"), FileNotFoundError),
        (NotADirectoryError("x"), FileNotFoundError),
        (IsADirectoryError("x"), IsADirectoryError),
        (HttpError(code=404), FileNotFoundError),
        (HttpError(status=401), PermissionError),
        (HttpError(status_code=403), PermissionError),
        (OSError("Forbidden: https://storage/b\nno"), PermissionError),
        (PermissionError("x"), PermissionError),
        (HttpError(code="503"), ConnectionError),
        (HttpError(status=429), ConnectionError),
        (ConnectionResetError("x"), ConnectionError),
        (FSTimeoutError(), ConnectionError),
        (asyncio.TimeoutError(), ConnectionError),
        (ServiceRequestError("x"), ConnectionError),
        (EOFError("x"), ConnectionError),
        (HttpError(status=400), StoreError),
        (HttpError(code=None), StoreError),
        (ValueError("Bad Request"), StoreError),
        (OSError(errno.EIO, "x"), StoreError),
        (OSError(errno.ENAMETOOLONG, "File name too long"), InvalidNameError),
    ],
    ids=repr,
)
def test_a_file_systems_errors_become_the_contracts(error: Exception, kind: type[Exception]) -> None:
    with pytest.raises(kind) as raised, fsspec_errors(URI):
        raise error
    assert isinstance(raised.value, kind)
    if not isinstance(error, kind):
        assert URI in str(raised.value)


def test_no_signature_gets_into_a_message() -> None:
    with pytest.raises(StoreError) as raised, fsspec_errors(URI):
        raise ValueError("400, url='https://x.blob.core.windows.net/c/a?sv=2024&sig=hush'")
    assert "hush" not in str(raised.value)


def test_interrupts_pass() -> None:
    with pytest.raises(KeyboardInterrupt), fsspec_errors(URI):
        raise KeyboardInterrupt


@pytest.mark.parametrize("method", ["info", "ls", "cat_file", "pipe_file"])
def test_every_call_is_translated(fs: Watched, store: FsspecStore, method: str) -> None:
    put(store, "a")

    def fail() -> None:
        raise HttpError(status=503)

    fs.before[method] = fail
    calls: dict[str, list[Callable[[], object]]] = {
        "info": [
            lambda: store.stat("a"),
            lambda: store.open("a"),
            lambda: store.open_seekable("a"),
            lambda: store.read("a", max_bytes=9),
        ],
        "ls": [lambda: list(store.list()), lambda: list(store.stat_many(["a"]))],
        "cat_file": [lambda: store.read("a", max_bytes=9), lambda: store.open("a").read()],
        "pipe_file": [lambda: put(store, "a")],
    }
    for call in calls[method]:
        with pytest.raises(ConnectionError, match="memory://bucket/base/"):
            call()
