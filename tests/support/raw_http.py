"""An HTTP server on loopback whose every byte a test decides: right, wrong, slow, endless or broken off."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import ssl
import struct
import threading
from collections.abc import Callable, Iterator

Handler = Callable[[socket.socket], None]


class RawServer(socketserver.ThreadingTCPServer):
    """
    Answers its connections one after the other by plan; the last entry answers all further ones.

    :ivar connections: How many connections were accepted.
    :ivar requests: The head of every request, in order.
    """

    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 128

    def __init__(self, plan: list[Handler], tls: ssl.SSLContext | None) -> None:
        super().__init__(("127.0.0.1", 0), _Connection)
        self.plan = plan
        self.tls = tls
        self.connections = 0
        self.requests: list[bytes] = []
        self.lock = threading.Lock()

    @property
    def port(self) -> int:
        return int(self.server_address[1])

    def url(self, path: str = "/", host: str = "127.0.0.1") -> str:
        return f"{'https' if self.tls else 'http'}://{host}:{self.port}{path}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away in the middle is what many tests are about."""


class _Connection(socketserver.BaseRequestHandler):
    server: RawServer

    def handle(self) -> None:
        with self.server.lock:
            handler = self.server.plan[min(self.server.connections, len(self.server.plan) - 1)]
            self.server.connections += 1
        sock: socket.socket = self.request
        if self.server.tls is not None:
            sock = self.server.tls.wrap_socket(sock, server_side=True)
        with sock:
            head = b""
            while b"\r\n\r\n" not in head:
                data = sock.recv(65536)
                if not data:
                    return
                head += data
            with self.server.lock:
                self.server.requests.append(head)
            with contextlib.suppress(OSError):
                handler(sock)


@contextlib.contextmanager
def raw_server(*plan: Handler | bytes, tls: ssl.SSLContext | None = None) -> Iterator[RawServer]:
    """
    Start a server and stop it at the end.

    :param plan: What answers each connection: bytes to send before closing, or what to do with the socket.
    """
    handlers = [send(step) if isinstance(step, bytes) else step for step in plan]
    with RawServer(handlers, tls) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def answer(body: bytes, *, status: str = "200 OK", headers: str = "", length: int | None = None) -> bytes:
    """
    Write a response.

    :param headers: More header lines, each with its line end.
    :param length: Declared length, when it is not to be the true one.
    """
    declared = len(body) if length is None else length
    return f"HTTP/1.1 {status}\r\nContent-Length: {declared}\r\n{headers}\r\n".encode() + body


def redirect(location: str, status: str = "302 Found") -> bytes:
    return answer(b"", status=status, headers=f"Location: {location}\r\n")


def send(data: bytes) -> Handler:
    return lambda sock: sock.sendall(data)


def reset(after: bytes = b"") -> Handler:
    """Send something, then break the connection off with RST."""

    def handler(sock: socket.socket) -> None:
        sock.sendall(after)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    return handler


def hang(after: bytes = b"") -> Handler:
    """Send something, then nothing until the client goes away."""

    def handler(sock: socket.socket) -> None:
        sock.sendall(after)
        while sock.recv(4096):
            pass

    return handler


def drip(start: bytes, piece: bytes, interval: float = 0.05) -> Handler:
    """Send something, then a little more now and then until the client goes away."""

    def handler(sock: socket.socket) -> None:
        sock.sendall(start)
        sock.settimeout(interval)
        while True:
            with contextlib.suppress(TimeoutError):
                if not sock.recv(4096):
                    return
            sock.sendall(piece)

    return handler


def flood(start: bytes, piece: bytes) -> Handler:
    """Send something, then more of it as fast as it goes until the client goes away."""

    def handler(sock: socket.socket) -> None:
        sock.sendall(start)
        while True:
            sock.sendall(piece)

    return handler
