"""A store below a prefix of an S3 bucket, or of anything else that speaks S3's protocol."""

from __future__ import annotations

import contextlib
import io
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from typing import Any, BinaryIO, cast

from airflow_vlm_provider.shards.s3_errors import BrokenResponseError, s3_errors
from airflow_vlm_provider.shards.s3_reader import ResumingReader, entity
from airflow_vlm_provider.shards.stores import (
    InvalidNameError,
    ObjectInfo,
    ObjectTooLargeError,
    check_name,
    is_hidden,
)

READ_BUFFER_BYTES = 256 * 1024
SPOOL_BYTES = 8 * 1024 * 1024
MAX_KEY_BYTES = 1024


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
        below = self._key(folder) + "/" if folder else self._prefix
        for entry in chain.from_iterable(self._pages(below)):
            name = entry["Key"][len(self._prefix) :]
            # Keys that end in "/" are the folders that consoles draw.
            if entry["Key"] != below and not name.endswith("/") and not is_hidden(entry["Key"][len(below) :]):
                yield _listed(name, entry)

    def stat(self, name: str) -> ObjectInfo:
        key, client = self._key(name), self._s3()
        with s3_errors(self.uri + name):
            head = client.head_object(Bucket=self._bucket, Key=key)
        return _object_info(name, *entity(head, self.uri + name))

    def open(self, name: str) -> BinaryIO:
        return self._buffered(self._reader(name))

    def read(self, name: str, *, max_bytes: int) -> bytes:
        return self.fetch(name, max_bytes=max_bytes)[0]

    def fetch(self, name: str, *, max_bytes: int) -> tuple[bytes, ObjectInfo]:
        reader = self._reader(name)
        with self._buffered(reader) as stream:
            if reader.size > max_bytes:
                raise ObjectTooLargeError(
                    f"{self.uri + name} has {reader.size} bytes; at most {max_bytes} are taken."
                )
            return stream.read(reader.size), _object_info(name, *reader.entity)

    @contextlib.contextmanager
    def create(self, name: str) -> Iterator[BinaryIO]:
        """
        Write an object, whole or not at all.

        The content is spooled, in memory and then on disk, and uploaded when the body has ended. A worker
        killed during a multipart upload leaves invisible parts behind; a lifecycle rule of the bucket
        (AbortIncompleteMultipartUpload) clears them.
        """
        key, client = self._key(name), self._s3()
        with tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES) as spool:
            yield cast("BinaryIO", spool)
            spool.seek(0)
            with s3_errors(self.uri + name):
                client.upload_fileobj(spool, self._bucket, key)

    def delete(self, name: str) -> None:
        key, client = self._key(name), self._s3()
        with s3_errors(self.uri + name):
            client.delete_object(Bucket=self._bucket, Key=key)

    def _pages(self, prefix: str) -> Iterator[Sequence[dict[str, Any]]]:
        """Yield the listing of a prefix, page by page."""
        paginator = self._s3().get_paginator("list_objects_v2")
        with s3_errors(self.uri):
            # S3 lists keys in the order of their UTF-8 bytes, which is that of Python's strings.
            for page in paginator.paginate(Bucket=self._bucket, Prefix=prefix):
                # boto3 takes a response without a body, whose head was cut off, for an empty listing.
                if "IsTruncated" not in page:
                    raise BrokenResponseError(f"{self.uri}: the connection broke off while S3 listed it.")
                yield page.get("Contents", [])

    def _key(self, name: str) -> str:
        check_name(name)
        key = self._prefix + name
        if len(key.encode()) > MAX_KEY_BYTES:
            raise InvalidNameError(
                f"{self.uri + name} cannot be an object: its key has over {MAX_KEY_BYTES} bytes."
            )
        return key

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


def _object_info(name: str, etag: str, size: int, modified: float) -> ObjectInfo:
    return ObjectInfo(name=name, size=size, identity=f"{etag.strip(chr(34))}-{size}", modified=modified)


def _listed(name: str, entry: dict[str, Any]) -> ObjectInfo:
    return _object_info(name, entry["ETag"], entry["Size"], entry["LastModified"].timestamp())
