"""Fetching media over http and https without becoming the dataset's hand inside the network.

The name is resolved once per connection and the addresses are checked before anything is sent, not even a TLS
greeting; the connection then goes to just these addresses, so a name that resolves differently the next moment
gains nothing. Redirects are followed by hand, each checked as if it stood in the dataset. Proxies of the
environment are not used: what they may reach is not known here. No cookies, no credentials, no referrer.
"""

from __future__ import annotations

import http.client
import io
import logging
import socket
import ssl
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol, TypeVar
from urllib.parse import urljoin

import tenacity

from airflow_vlm_provider import __version__
from airflow_vlm_provider.errors import SampleError, TransientError
from airflow_vlm_provider.shards.addresses import Reach, address_refusal
from airflow_vlm_provider.shards.http_urls import HttpUrl, parse_url
from airflow_vlm_provider.shards.media_roots import shown

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

log = logging.getLogger(__name__)

MAX_REDIRECTS = 5
ATTEMPTS = 3
FIRST_WAIT_S = 0.5
LONGEST_WAIT_S = 20.0
CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 20.0
# One fetch with all its redirects, however slowly its bytes drip.
TOTAL_TIMEOUT_S = 60.0
# Of a video, so many bytes buy another second.
LEAST_BYTES_PER_S = 256 * 1024
_CHUNK_BYTES = 64 * 1024

_ACCEPT_IMAGE = "image/jpeg, image/png, image/webp, image/*;q=0.8, */*;q=0.1"
_ACCEPT_VIDEO = "video/mp4, video/*;q=0.9, */*;q=0.1"
_HEADERS = {
    "User-Agent": f"airflow-provider-vlm/{__version__}",
    "Accept-Encoding": "identity",
    "Connection": "close",
}
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_GONE = frozenset({404, 410})
_DENIED = frozenset({401, 403, 407, 451})
_LATER = frozenset({408, 425, 429})


class Sink(Protocol):
    """What takes a body as it comes, such as a file."""

    def write(self, data: bytes, /) -> object: ...


S = TypeVar("S", bound=Sink)


class HttpFetcher:
    """Fetches URLs that the roots allow. Safe to use from several threads at once.

    :param reach: Says how near a URL may come, or raises ``media_refused``; asked for every hop.
    :param max_bytes: Most bytes to take of one URL.
    :param accept: The kinds of content to ask for, as in HTTP's header.
    :param least_rate: Bytes that buy another second beyond ``total_timeout``; None lets it be the end for large bodies,
        too.
    """

    def __init__(
        self,
        *,
        reach: Callable[[HttpUrl], Reach],
        max_bytes: int,
        accept: str = _ACCEPT_IMAGE,
        least_rate: int | None = None,
        connect_timeout: float = CONNECT_TIMEOUT_S,
        read_timeout: float = READ_TIMEOUT_S,
        total_timeout: float = TOTAL_TIMEOUT_S,
        first_wait: float = FIRST_WAIT_S,
    ) -> None:
        self._reach = reach
        self._max_bytes = max_bytes
        self._accept = accept
        self._least_rate = least_rate
        self._connect_timeout = connect_timeout
        self._read_timeout = read_timeout
        self._total_timeout = total_timeout
        self._backoff = tenacity.wait_random_exponential(multiplier=first_wait, max=LONGEST_WAIT_S)
        self._tls_lock = threading.Lock()
        self._tls: ssl.SSLContext | None = None

    @classmethod
    def for_videos(cls, *, reach: Callable[[HttpUrl], Reach], max_bytes: int) -> HttpFetcher:
        """Make one that has more patience the more has arrived."""
        return cls(reach=reach, max_bytes=max_bytes, accept=_ACCEPT_VIDEO, least_rate=LEAST_BYTES_PER_S)

    def fetch(self, url: HttpUrl) -> bytes:
        """Return what a URL answers; see :meth:`download`."""
        return self.download(url, io.BytesIO).getvalue()

    def download(self, url: HttpUrl, sink: Callable[[], S]) -> S:
        """
        Take what a URL answers, trying again what is transient.

        :param sink: Makes what takes the body, anew for every attempt.
        :return: The one that has the whole body.
        :raises SampleError: ``media_refused``, ``media_missing``, ``media_unreadable`` or ``media_too_large``
        :raises TransientError: it could not be fetched this time.
        """
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(TransientError),
            stop=tenacity.stop_after_attempt(ATTEMPTS),
            wait=self._wait,
            before_sleep=tenacity.before_sleep_log(log, logging.INFO),
            reraise=True,
        )
        whole: S = retrying(self._download, url, sink)
        return whole

    def _wait(self, state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked = error.seconds if isinstance(error, _RetryLaterError) else 0.0
        return max(self._backoff(state), min(asked, LONGEST_WAIT_S))

    def _download(self, url: HttpUrl, sink: Callable[[], S]) -> S:
        reach = self._reach(url)
        deadline = time.monotonic() + self._total_timeout
        try:
            for _ in range(MAX_REDIRECTS + 1):
                whole, url, reach = self._hop(url, reach, deadline, sink)
                if whole is not None:
                    return whole
        except ssl.SSLCertVerificationError as error:
            raise SampleError(
                "media_unreadable",
                f"{shown(str(url))}: its certificate is not valid: {error.verify_message}.",
            ) from error
        except (OSError, http.client.HTTPException) as error:
            reason = str(error) or type(error).__name__
            raise TransientError(f"{shown(str(url))} could not be fetched: {reason[:200]}") from error
        raise SampleError("media_unreadable", f"{shown(str(url))}: more than {MAX_REDIRECTS} redirects.")

    def _hop(
        self, url: HttpUrl, reach: Reach, deadline: float, sink: Callable[[], S]
    ) -> tuple[S | None, HttpUrl, Reach]:
        """Ask one server: its answer's body, or None and where it says to go instead and how near that may come."""
        with self._connect(url, reach, deadline) as sock:
            connection = http.client.HTTPConnection(url.host, url.port)
            connection.sock = timed = _DeadlineSocket(sock, deadline, self._read_timeout)
            headers = {"Host": url.authority, "Accept": self._accept, **_HEADERS}
            connection.request("GET", url.target, headers=headers)
            response = connection.getresponse()
            if response.status in _REDIRECTS:
                return None, *self._redirected(url, response)
            if response.status != 200:
                raise _refusal(url, response)
            return self._body(url, response, timed, sink()), url, reach

    def _connect(self, url: HttpUrl, reach: Reach, deadline: float) -> socket.socket:
        last: OSError | None = None
        for family, kind, protocol, address in _resolve(url, reach):
            sock = socket.socket(family, kind, protocol)
            try:
                sock.settimeout(_remaining(deadline, self._connect_timeout))
                sock.connect(address)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return self._secured(sock, url) if url.scheme == "https" else sock
            except ssl.SSLCertVerificationError:
                sock.close()
                raise
            except OSError as error:
                sock.close()
                last = error
        raise last or OSError("the name has no addresses")

    def _secured(self, sock: socket.socket, url: HttpUrl) -> socket.socket:
        with self._tls_lock:
            if self._tls is None:
                # Reading the machine's certificates takes as long as several fetches.
                self._tls = ssl.create_default_context()
        return self._tls.wrap_socket(sock, server_hostname=url.host)

    def _redirected(self, url: HttpUrl, response: http.client.HTTPResponse) -> tuple[HttpUrl, Reach]:
        location = response.getheader("Location")
        if not location:
            raise SampleError("media_unreadable", f"{shown(str(url))} redirects, but does not say where to.")
        try:
            # http.client reads headers as Latin-1; servers mean UTF-8.
            target = parse_url(urljoin(str(url), location.encode("latin-1").decode("utf-8", "replace")))
            return target, self._reach(target)
        except SampleError as error:
            raise SampleError(error.kind, f"{shown(str(url))} redirects. {error.message}") from error
        except ValueError as error:
            raise SampleError(
                "media_refused", f"{shown(str(url))} redirects to what is no URL: {error}."
            ) from error

    def _body(self, url: HttpUrl, response: http.client.HTTPResponse, timed: _DeadlineSocket, sink: S) -> S:
        expected = response.length
        if expected is not None and expected > self._max_bytes:
            raise self._too_large(url)
        done = 0
        # Counted here: read1 neither stops at the declared length nor minds a connection that closes before it.
        while expected is None or done < expected:
            chunk = response.read1(_CHUNK_BYTES if expected is None else min(_CHUNK_BYTES, expected - done))
            if not chunk:
                break
            done += len(chunk)
            if done > self._max_bytes:
                raise self._too_large(url)
            sink.write(chunk)
            if self._least_rate is not None:
                timed.deadline += len(chunk) / self._least_rate
        if expected is not None and done < expected:
            raise ConnectionResetError(f"it broke off after {done} of {expected} bytes")
        return sink

    def _too_large(self, url: HttpUrl) -> SampleError:
        return SampleError(
            "media_too_large",
            f"{shown(str(url))} has more than the {self._max_bytes:,} bytes that are taken.",
        )


class _RetryLaterError(TransientError):
    """The server says when to come again."""

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.seconds = seconds


class _DeadlineSocket:
    """As much of a socket as http.client uses, which gives up at a deadline however slowly bytes drip.

    A socket's own timeout starts anew with every byte. Closing is left to whoever opened the socket.
    """

    def __init__(self, sock: socket.socket, deadline: float, read_timeout: float) -> None:
        self._sock = sock
        self.deadline = deadline
        self._read_timeout = read_timeout

    def sendall(self, data: bytes) -> None:
        self._sock.settimeout(_remaining(self.deadline, self._read_timeout))
        self._sock.sendall(data)

    def recv_into(self, buffer: WriteableBuffer) -> int:
        self._sock.settimeout(_remaining(self.deadline, self._read_timeout))
        return self._sock.recv_into(buffer)

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(_SocketReader(self), _CHUNK_BYTES)

    def close(self) -> None: ...


class _SocketReader(io.RawIOBase):
    def __init__(self, sock: _DeadlineSocket) -> None:
        super().__init__()
        self._sock = sock

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer) -> int:
        return self._sock.recv_into(buffer)


def _remaining(deadline: float, most: float) -> float:
    left = deadline - time.monotonic()
    if left <= 0:
        raise TimeoutError("it took too long")
    return min(left, most)


def _resolve(url: HttpUrl, reach: Reach) -> list[tuple[Any, Any, int, Any]]:
    """
    Look a host up, and check every address that it has.

    :raises SampleError: ``media_refused`` when one of the addresses is out of reach, ``media_missing`` when there
        is no such host.
    """
    try:
        found = socket.getaddrinfo(url.host, url.port, type=socket.SOCK_STREAM)
    except socket.gaierror as error:
        if error.errno in (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)):
            raise SampleError("media_missing", f"{shown(str(url))}: there is no such host.") from error
        raise
    except UnicodeError as error:
        raise SampleError("media_refused", f"{shown(str(url))}: its host is malformed.") from error
    for *_, address in found:
        refusal = address_refusal(str(address[0]), reach)
        if refusal is not None:
            raise SampleError(
                "media_refused",
                f"{shown(str(url))} is refused: its address is {refusal}. "
                "If the dataset may read it, name this very host in media_roots."
                if refusal in ("private", "loopback")
                else f"{shown(str(url))} is refused: its address is {refusal}.",
            )
    return [(family, kind, protocol, address) for family, kind, protocol, _, address in found]


def _refusal(url: HttpUrl, response: http.client.HTTPResponse) -> SampleError:
    said = f"{shown(str(url))} answered {response.status} {response.reason[:50]}"
    if response.status in _GONE:
        return SampleError("media_missing", f"{said}.")
    if response.status in _DENIED:
        return SampleError("media_unreadable", f"{said}: it is not open to everyone.")
    if response.status >= 500 or response.status in _LATER:
        after = response.getheader("Retry-After", "")
        return _RetryLaterError(f"{said}.", float(after) if after.isascii() and after.isdigit() else 0.0)
    return SampleError("media_unreadable", f"{said}, not with the file.")
