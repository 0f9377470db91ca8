"""A store below a prefix of an S3 bucket, or of anything else that speaks S3's protocol."""

from __future__ import annotations

import contextlib
import io
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import Any, BinaryIO, cast

from airflow_vlm_provider.shards.s3_errors import BrokenResponseError, s3_errors
from airflow_vlm_provider.shards.s3_random_access import RandomAccessReader
from airflow_vlm_provider.shards.s3_reader import Entity, ResumingReader, again_when_broken, ask_for_entity
from airflow_vlm_provider.shards.stores import (
    InvalidNameError,
    ObjectInfo,
    ObjectTooLargeError,
    StoreError,
    check_name,
    in_order,
    is_hidden,
)

READ_BUFFER_BYTES = 256 * 1024
SPOOL_BYTES = 8 * 1024 * 1024
MAX_KEY_BYTES = 1024
# The last character that a request can hold and a key hardly begins with.
_HIGH = "\U0010fffd"
_BEFORE_SURROGATES, _AFTER_SURROGATES = 0xD7FF, 0xE000


class S3Store:
    """The objects of a bucket whose keys begin with a prefix.

    :param bucket: The bucket's name.
    :param prefix: What precedes every name, with or without a trailing slash; empty for the whole bucket.
    :param client_factory: Makes the boto3 client, called once when it is first needed; None uses boto3's own
        configuration. Retries of single requests, time limits and the endpoint are the client's.
    """

    def __init__(
        self, *, bucket: str, prefix: str = "", client_factory: Callable[[], Any] | None = None
    ) -> None:
        self._bucket = bucket
        self._prefix = prefix.rstrip("/") + "/" if prefix.rstrip("/") else ""
        self._client_factory = client_factory or _default_client
        self._client: Any = None
        self._client_lock = threading.Lock()

    @property
    def uri(self) -> str:
        return f"s3://{self._bucket}/{self._prefix}"

    def list(self, folder: str = "") -> Iterator[ObjectInfo]:
        """
        Yield every object below a prefix. Of folders that are hidden, at most a page is listed.
        """
        below = self._key(folder) + "/" if folder else self._prefix
        entries: Sequence[dict[str, Any]] = ()
        after, more = "", True
        while more:
            entries, more = self._page(below, after=after)
            for entry in entries:
                key = entry["Key"]
                # Keys that end in "/" are the folders that consoles draw.
                if key != below and not key.endswith("/") and not is_hidden(key[len(below) :]):
                    yield _listed(key[len(self._prefix) :], entry)
            if more:
                # A ledger has more objects than the data that it is about.
                after = _past_hidden_folder(entries[-1]["Key"], below)

    def stat(self, name: str) -> ObjectInfo:
        return _object_info(name, *self._head(name))

    def stat_many(self, names: Iterable[str]) -> Iterator[tuple[str, ObjectInfo | None]]:
        page: dict[str, dict[str, Any]] = {}
        last, more = "", True
        for name in in_order(names):
            try:
                key = self._key(name)
            except InvalidNameError:
                yield name, None
                continue
            # What lies between the end of a page and the next name is not listed: every page begins with a name.
            while more and key > last:
                entries, more = self._page(self._prefix, after=max(last, _just_before(key)))
                page = {entry["Key"]: entry for entry in entries}
                last = entries[-1]["Key"] if entries else last
            yield name, _listed(name, page[key]) if key in page else None

    def open(self, name: str) -> BinaryIO:
        return self._buffered(self._reader(name))

    def open_version(self, name: str) -> tuple[BinaryIO, ObjectInfo]:
        reader = self._reader(name)
        return self._buffered(reader), _object_info(name, *reader.entity)

    def open_seekable(self, name: str) -> BinaryIO:
        version = self._head(name)
        get_object = partial(self._s3().get_object, Bucket=self._bucket, Key=self._key(name))
        return cast("BinaryIO", RandomAccessReader(get_object, uri=self.uri + name, version=version))

    def read(self, name: str, *, max_bytes: int) -> bytes:
        return self.fetch(name, max_bytes=max_bytes)[0]

    def fetch(self, name: str, *, max_bytes: int) -> tuple[bytes, ObjectInfo]:
        stream, info = self.open_version(name)
        with stream:
            if info.size > max_bytes:
                raise ObjectTooLargeError(
                    f"{self.uri + name} has {info.size} bytes; at most {max_bytes} are taken."
                )
            return stream.read(info.size), info

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        """
        Write an object, whole or not at all.

        The content is spooled, in memory and then on disk, and uploaded when the body has ended. A worker
        killed during a multipart upload, or one that never got its answer, leaves invisible parts behind; a lifecycle
        rule of the bucket (AbortIncompleteMultipartUpload) clears them.
        """
        key, client = self._key(name), self._s3()
        with tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES) as spool:
            yield cast("BinaryIO", spool)

            def upload() -> None:
                spool.seek(0)
                with s3_errors(self.uri + name):
                    try:
                        client.upload_fileobj(spool, self._bucket, key)
                    except KeyError as error:
                        # boto3 takes a response without a body, whose head was cut off, for one to do with.
                        raise BrokenResponseError(
                            f"{self.uri + name}: the connection broke off while S3 took it."
                        ) from error

            again_when_broken()(upload)

    def delete(self, name: str) -> None:
        key, client = self._key(name), self._s3()
        with s3_errors(self.uri + name):
            client.delete_object(Bucket=self._bucket, Key=key)

    def _page(self, prefix: str, *, after: str) -> tuple[Sequence[dict[str, Any]], bool]:
        """Return the first page of a prefix's keys after a given one, and whether there are more."""
        uri = f"s3://{self._bucket}/{prefix}"
        position = {"StartAfter": after} if after else {}
        ask = partial(self._s3().list_objects_v2, Bucket=self._bucket, Prefix=prefix, **position)

        def listed() -> dict[str, Any]:
            with s3_errors(uri):
                page: dict[str, Any] = ask()
            # boto3 takes a response without a body, whose head was cut off, for an empty listing.
            if "IsTruncated" not in page:
                raise BrokenResponseError(f"{uri}: the connection broke off while S3 listed it.")
            return page

        page = again_when_broken()(listed)
        entries: Sequence[dict[str, Any]] = page.get("Contents", ())
        # S3 lists keys in the order of their UTF-8 bytes, which is that of Python's strings. Directory buckets don't.
        keys = [after, *(entry["Key"] for entry in entries)]
        if any(one >= other for one, other in pairwise(keys)) or (page["IsTruncated"] and not entries):
            raise StoreError(
                f"{uri} is listed in no order, so that not all of it can be found; use a general purpose bucket, not a "
                "directory bucket (S3 Express)."
            )
        return entries, page["IsTruncated"]

    def _key(self, name: str) -> str:
        check_name(name)
        key = self._prefix + name
        if len(key.encode()) > MAX_KEY_BYTES:
            raise InvalidNameError(
                f"{self.uri + name} cannot be an object: its key has over {MAX_KEY_BYTES} bytes."
            )
        return key

    def _head(self, name: str) -> Entity:
        key, client = self._key(name), self._s3()
        head_object = partial(client.head_object, Bucket=self._bucket, Key=key)
        return ask_for_entity(head_object, self.uri + name)[1]

    def _reader(self, name: str) -> ResumingReader:
        key = self._key(name)
        return ResumingReader(
            partial(self._s3().get_object, Bucket=self._bucket, Key=key), uri=self.uri + name
        )

    def _buffered(self, reader: ResumingReader) -> BinaryIO:
        return io.BufferedReader(reader, READ_BUFFER_BYTES)

    def _s3(self) -> Any:
        # boto3 clients may be shared by threads, but not made by several at once.
        with self._client_lock:
            if self._client is None:
                self._client = self._client_factory()
            return self._client


def _default_client() -> Any:
    import boto3

    return boto3.session.Session().client("s3")


def _just_before(key: str) -> str:
    """Return a string that sorts before a key, with hardly a possible key between them."""
    head, last = key[:-1], ord(key[-1])
    before = _BEFORE_SURROGATES if last == _AFTER_SURROGATES else last - 1
    start = head + chr(before) + _HIGH
    # A control character's predecessor may be NUL, which no request can hold.
    return start if before and len(start.encode()) <= MAX_KEY_BYTES else head


def _past_hidden_folder(key: str, below: str) -> str:
    """Return what sorts after every key in the hidden folder that a key is in; the key itself when it is in none."""
    folders = key[len(below) :].split("/")[:-1]
    for depth, folder in enumerate(folders, 1):
        if is_hidden(folder):
            end = below + "/".join(folders[:depth]) + "/" + _HIGH
            return max(key, end) if len(end.encode()) <= MAX_KEY_BYTES else key
    return key


def _object_info(name: str, etag: str, size: int, modified: float) -> ObjectInfo:
    return ObjectInfo(name=name, size=size, identity=f"{etag.strip(chr(34))}-{size}", modified=modified)


def _listed(name: str, entry: dict[str, Any]) -> ObjectInfo:
    return _object_info(name, entry["ETag"], entry["Size"], entry["LastModified"].timestamp())
