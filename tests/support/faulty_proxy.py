"""A TCP proxy on loopback that breaks connections as planned, to put between a client and a real server."""

from __future__ import annotations

import contextlib
import itertools
import select
import socket
import struct
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

CHUNK_BYTES = 16 * 1024
POLL_S = 0.05
# Two megabytes a second.
TRICKLE_BYTES, TRICKLE_S = 8 * 1024, 0.004
S3_CODES = {500: "InternalError", 503: "SlowDown"}


@dataclass(frozen=True, slots=True)
class Fault:
    """What happens to one connection.

    :param kind: ``reset`` (RST), ``close`` (FIN, as if the response were complete), ``stall`` (silence until
        the client goes away), ``corrupt`` (one bit flips and the response goes on), ``slow`` (from here on it trickles),
        ``error`` (an S3 error instead of a response; the server is not asked at all).
    :param after_bytes: How many bytes of response, its head included, get through before.
    :param of: What the bytes are counted of, and cut off in: the response, or the request (``reset`` and ``stall``).
    :param status: With ``error``, the HTTP status.
    """

    kind: Literal["reset", "close", "stall", "corrupt", "slow", "error"]
    after_bytes: int = 0
    of: Literal["response", "request"] = "response"
    status: int = 500


class FaultyProxy:
    """A running proxy.

    :ivar endpoint_url: Where the client connects to.
    :ivar requests: What the client sent first on each connection, in the order of connections.
    :ivar faults: The faults that have happened so far.
    """

    def __init__(self, upstream_url: str, plan: Iterable[Fault | None]) -> None:
        upstream = urlsplit(upstream_url)
        self._upstream = (upstream.hostname, upstream.port)
        self._plan = itertools.chain(plan, itertools.repeat(None))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.settimeout(POLL_S)
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._accepting = threading.Thread(target=self._accept, daemon=True)
        self.endpoint_url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.requests: list[bytes] = []
        self.faults: list[Fault] = []

    def start(self) -> None:
        self._accepting.start()

    def stop(self) -> None:
        self._stopping.set()
        self._accepting.join()
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while not self._stopping.is_set():
            try:
                client, _ = self._listener.accept()
            except TimeoutError:
                continue
            index = len(self.requests)
            self.requests.append(b"")
            thread = threading.Thread(target=self._serve, args=(client, index, next(self._plan)), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, client: socket.socket, index: int, fault: Fault | None) -> None:
        asked = answered = 0
        slow = False
        with client, socket.create_connection(self._upstream) as upstream, contextlib.suppress(OSError):
            while not self._stopping.is_set():
                ready, _, _ = select.select([client, upstream], [], [], POLL_S)
                if client in ready:
                    data = client.recv(CHUNK_BYTES)
                    if not data:
                        return
                    self.requests[index] = self.requests[index] or data
                    if fault is not None and fault.kind == "error":
                        self._answer(fault, client)
                        return
                    if fault is not None and fault.of == "request" and asked + len(data) > fault.after_bytes:
                        upstream.sendall(data[: fault.after_bytes - asked])
                        self._break_off(fault, client)
                        return
                    upstream.sendall(data)
                    asked += len(data)
                if upstream in ready:
                    data = upstream.recv(CHUNK_BYTES)
                    if not data:
                        return
                    if (
                        fault is not None
                        and fault.of == "response"
                        and answered + len(data) > fault.after_bytes
                    ):
                        data = self._fail(fault, client, data, fault.after_bytes - answered)
                        if not data:
                            return
                        slow = slow or fault.kind == "slow"
                        fault = None
                    step, pause = (TRICKLE_BYTES, TRICKLE_S) if slow else (CHUNK_BYTES, 0)
                    for start in range(0, len(data), step):
                        client.sendall(data[start : start + step])
                        self._stopping.wait(pause)
                    answered += len(data)

    def _answer(self, fault: Fault, client: socket.socket) -> None:
        """Answer as S3 does when it is out of order."""
        self.faults.append(fault)
        code = S3_CODES[fault.status]
        body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>Planned.</Message></Error>".encode()
        head = (
            f"HTTP/1.1 {fault.status} {code}\r\nContent-Type: application/xml\r\n"
            f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        )
        client.sendall(head.encode() + body)
        client.shutdown(socket.SHUT_WR)
        # Data that nobody has read would turn the end of the answer into a reset.
        client.settimeout(1)
        while client.recv(CHUNK_BYTES):
            pass

    def _fail(self, fault: Fault, client: socket.socket, data: bytes, place: int) -> bytes:
        """Let the fault happen at a place in the data; return what is still to be sent, or nothing."""
        if fault.kind == "slow":
            self.faults.append(fault)
            return data
        if fault.kind == "corrupt":
            self.faults.append(fault)
            return data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        client.sendall(data[:place])
        self._break_off(fault, client)
        return b""

    def _break_off(self, fault: Fault, client: socket.socket) -> None:
        self.faults.append(fault)
        if fault.kind == "reset":
            # Closing a socket that lingers for no time sends RST instead of FIN.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        if fault.kind == "stall":
            while not self._stopping.is_set():
                if select.select([client], [], [], POLL_S)[0] and not client.recv(CHUNK_BYTES):
                    break


@contextlib.contextmanager
def faulty_proxy(upstream_url: str, plan: Iterable[Fault | None] = ()) -> Iterator[FaultyProxy]:
    """
    Start a proxy and stop it at the end.

    :param upstream_url: The real server, ``http://127.0.0.1:<port>``.
    :param plan: The fault of the first connection, of the second, ...; None lets one alone. Connections after
        the plan's end are let alone.
    """
    proxy = FaultyProxy(upstream_url, plan)
    proxy.start()
    try:
        yield proxy
    finally:
        proxy.stop()
