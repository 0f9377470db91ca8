"""Reading one S3 object, or a part of it, to its end over connections that break."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import tenacity

from airflow_vlm_provider.shards.s3_errors import BrokenResponseError, s3_errors
from airflow_vlm_provider.shards.stores import ObjectChangedError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

log = logging.getLogger(__name__)

# Attempts to get on from one and the same byte; every byte read starts them anew.
ATTEMPTS = 6
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 10.0
# What has arrived of so much is lost when the connection breaks.
CHUNK_BYTES = 1024 * 1024


class Entity(NamedTuple):
    """What the head of a response tells about an object.

    :param size: Length of the body, in bytes.
    :param modified: Seconds since 1970; 0.0 when the server does not say.
    """

    etag: str
    size: int
    modified: float


class ResumingReader(io.RawIOBase):
    """The bytes of one version of an object, or a part of them.

    When the connection breaks, reading goes on from the same byte, asking for the same ETag. The end is where
    the object's size says, never where a body happened to stop.

    :param get_object: boto3's ``get_object``, bound to bucket and key.
    :param uri: The object's URI, for messages.
    :param version: The version to read, as an earlier response told of it; None asks for the one that is there.
    :param start: Where to begin, in bytes; only with ``version``.
    :param stop: Where to end, at most the version's size; None reads to its end.
    """

    def __init__(
        self,
        get_object: Callable[..., dict[str, Any]],
        *,
        uri: str,
        version: Entity | None = None,
        start: int = 0,
        stop: int | None = None,
    ) -> None:
        super().__init__()
        self._get_object = get_object
        self._uri = uri
        self._body: Any = None
        if version is None:
            response, version = ask_for_entity(get_object, uri)
            self._body = response["Body"]
        self.entity = version
        self._position = start
        self._stop = version.size if stop is None else stop
        self._retrying = again_when_broken(lambda: f"reading goes on from byte {self._position}")

    @property
    def name(self) -> str:
        return self._uri

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        wanted = min(len(view), self._stop - self._position, CHUNK_BYTES)
        if wanted == 0:
            return 0
        data: bytes = self._retrying(self._read, wanted)
        view[: len(data)] = data
        self._position += len(data)
        return len(data)

    def close(self) -> None:
        self._drop_body()
        super().close()

    def _read(self, wanted: int) -> bytes:
        """Read at least one byte and at most ``wanted`` from the current position."""
        if self._body is None:
            self._body = self._reopen()
        try:
            with s3_errors(self._uri):
                data: bytes = self._body.read(wanted)
                if self._position + len(data) == self._stop:
                    # botocore compares the checksum when it meets the end.
                    self._body.read(1)
        except ConnectionError as error:
            self._drop_body()
            raise BrokenResponseError(str(error)) from error
        except BaseException:
            self._drop_body()
            raise
        if not data:
            self._drop_body()
            raise BrokenResponseError(
                f"{self._uri} ended after {self._position} of {self.entity.size} bytes."
            )
        return data

    def _reopen(self) -> Any:
        last = self._stop - 1 if self._stop < self.entity.size else ""
        try:
            with s3_errors(self._uri):
                response = self._get_object(Range=f"bytes={self._position}-{last}", IfMatch=self.entity.etag)
        except FileNotFoundError as error:
            raise ObjectChangedError(f"{self._uri} was deleted while it was being read.") from error
        etag, size, _ = entity(response, self._uri)
        # Not every server knows If-Match and Range.
        if etag != self.entity.etag:
            raise ObjectChangedError(f"{self._uri} was replaced while it was being read; read it again.")
        if size != self._stop - self._position:
            raise BrokenResponseError(f"{self._uri}: the server did not return the range that was asked for.")
        return response["Body"]

    def _drop_body(self) -> None:
        body, self._body = self._body, None
        if body is not None:
            body.close()


def again_when_broken(what: Callable[[], str] = lambda: "asking again") -> tenacity.Retrying:
    """
    Ask again when a response does not arrive whole, as boto3 does when a request fails altogether.

    :param what: Says what is done then, for the log.
    """

    def log_break(state: tenacity.RetryCallState) -> None:
        log.warning("%s: %s", state.outcome.exception() if state.outcome else None, what())

    return tenacity.Retrying(
        retry=tenacity.retry_if_exception_type(BrokenResponseError),
        stop=tenacity.stop_after_attempt(ATTEMPTS),
        wait=tenacity.wait_random_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S),
        before_sleep=log_break,
        reraise=True,
    )


def ask_for_entity(ask: Callable[[], dict[str, Any]], uri: str) -> tuple[dict[str, Any], Entity]:
    """
    Return the response to ``head_object`` or ``get_object``, and what its head tells.

    :param ask: The one or the other, bound to bucket and key.
    """

    def once() -> tuple[dict[str, Any], Entity]:
        with s3_errors(uri):
            response = ask()
        return response, entity(response, uri)

    return again_when_broken()(once)


def entity(response: dict[str, Any], uri: str) -> Entity:
    """
    Return what a response's head tells.

    :raises BrokenResponseError: It lacks something. Python's HTTP client takes a head that is cut off for a whole one.
    """
    try:
        etag, size = response["ETag"], response["ContentLength"]
    except KeyError as error:
        raise BrokenResponseError(f"{uri}: the connection broke off in the head of S3's response.") from error
    modified = response.get("LastModified")
    return Entity(etag, size, modified.timestamp() if modified else 0.0)
