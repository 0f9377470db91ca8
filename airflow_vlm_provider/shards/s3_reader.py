"""Reading one S3 object to its end over connections that break, and what S3's errors mean."""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import ssl
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import tenacity

from airflow_vlm_provider.shards.stores import ObjectChangedError, StoreError

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

log = logging.getLogger(__name__)

# Attempts to get on from one and the same byte; every byte read starts them anew.
ATTEMPTS = 6
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 10.0


class ResumingReader(io.RawIOBase):
    """The bytes of one version of an object.

    When the connection breaks, reading goes on from the same byte, asking for the same ETag. The end is where
    the object's size says, never where a body happened to stop.

    :param get_object: boto3's ``get_object``, bound to bucket and key.
    :param uri: The object's URI, for messages.
    """

    def __init__(self, get_object: Callable[..., dict[str, Any]], *, uri: str) -> None:
        super().__init__()
        self._get_object = get_object
        self._uri = uri
        self._position = 0
        with s3_errors(uri):
            response = get_object()
        self._body: Any = response["Body"]
        self._etag: str = response["ETag"]
        self.size: int = response["ContentLength"]
        self._retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(ConnectionError),
            stop=tenacity.stop_after_attempt(ATTEMPTS),
            wait=tenacity.wait_random_exponential(multiplier=FIRST_WAIT_S, max=LONGEST_WAIT_S),
            before_sleep=self._log_break,
            reraise=True,
        )

    @property
    def name(self) -> str:
        return self._uri

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        view = memoryview(buffer).cast("B")
        wanted = min(len(view), self.size - self._position)
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
                if not data:
                    raise ConnectionResetError(
                        f"{self._uri} broke off after {self._position} of {self.size} bytes."
                    )
                if self._position + len(data) == self.size:
                    # botocore compares the checksum when it meets the end.
                    self._body.read(1)
        except BaseException:
            self._drop_body()
            raise
        return data

    def _reopen(self) -> Any:
        try:
            with s3_errors(self._uri):
                response = self._get_object(Range=f"bytes={self._position}-", IfMatch=self._etag)
        except FileNotFoundError as error:
            raise ObjectChangedError(f"{self._uri} was deleted while it was being read.") from error
        # A server that knows neither IfMatch nor Range must not be taken at its word.
        if response["ETag"] != self._etag or response["ContentLength"] != self.size - self._position:
            response["Body"].close()
            raise ObjectChangedError(f"{self._uri} was replaced while it was being read; read it again.")
        return response["Body"]

    def _drop_body(self) -> None:
        body, self._body = self._body, None
        if body is not None:
            body.close()

    def _log_break(self, state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        log.warning("%s: reading goes on from byte %d of %d: %s", self._uri, self._position, self.size, error)


@contextlib.contextmanager
def s3_errors(uri: str) -> Iterator[None]:
    """Raise what the contract of stores says in place of boto3's errors."""
    import urllib3.exceptions
    from botocore import exceptions as boto

    try:
        yield
    except boto.ClientError as error:
        raise _contract_error(error.response, uri) from error
    except (boto.NoCredentialsError, boto.PartialCredentialsError) as error:
        raise PermissionError(
            errno.EACCES,
            f"{error}; set the AWS connection's login and password, or give the worker a role",
            uri,
        ) from error
    except (
        boto.HTTPClientError,
        boto.ConnectionError,
        boto.IncompleteReadError,
        urllib3.exceptions.HTTPError,
        ssl.SSLError,
        TimeoutError,
    ) as error:
        raise ConnectionError(f"{uri}: the connection to S3 failed: {error}") from error
    except boto.BotoCoreError as error:
        raise StoreError(f"{uri}: {error}") from error


def _contract_error(response: dict[str, Any], uri: str) -> Exception:
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    code = response.get("Error", {}).get("Code", "")
    said = f"{code}: {response.get('Error', {}).get('Message', '')}"
    if code == "NoSuchBucket":
        return FileNotFoundError(errno.ENOENT, "No such bucket", uri)
    if status == 404:
        return FileNotFoundError(errno.ENOENT, "No such object", uri)
    if status in (401, 403) or code in ("ExpiredToken", "InvalidToken"):
        return PermissionError(
            errno.EACCES,
            f"S3 denies access ({said}); give the AWS connection's identity s3:ListBucket on the bucket and "
            "s3:GetObject and s3:PutObject on its objects, and check that its credentials are valid",
            uri,
        )
    if status == 412:
        return ObjectChangedError(f"{uri} was replaced while it was being read; read it again.")
    if status >= 500 or status == 429:
        return ConnectionError(f"{uri}: S3 could not answer ({said}).")
    return StoreError(f"{uri}: S3 refused the request ({said}).")
