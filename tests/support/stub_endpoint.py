"""An OpenAI-compatible endpoint that answers by the picture it is sent, and fails on purpose.

Tests and benchmarks run it in a process of its own::

    with start_stub(latency=0.2, faults={"rate_limit": 0.1}) as stub:
        ...  # ask stub.base_url
        assert stub.stats()["by_status"]["429"] > 0

or by hand: ``python -m tests.support.stub_endpoint --port 8000 --latency 0.2``. It prints one JSON line with
its port, then serves until it is ended.

An answer names the media it was made from (``img-`` and the first 8 hex digits of their SHA-256, see
:func:`tag_of`), so a test can tell whether every row got the answer to its own picture. Which requests fail
is drawn from the seed, the media and how often they were asked before: arrival order plays no part.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import hashlib
import json
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from email.utils import formatdate
from pathlib import Path
from typing import Any

from tests.support.stub_answers import compose, fault_response, refused_parameter, tag_of_digest

_REPOSITORY = Path(__file__).parents[2]


@dataclass
class StubOptions:
    """How the endpoint behaves.

    :param latency: Seconds from the start of serving to the answer.
    :param jitter: Up to this many seconds more, drawn by the media: answers then come out of order.
    :param capacity: How many requests are served at once; the others queue. 0 is no bound.
    :param faults: Probability of each fault by name; :mod:`tests.support.stub_answers` lists them, besides
        ``reset`` (TCP reset in the middle of the answer), ``disconnect`` (closed without an answer),
        ``truncated`` (closed before the promised length) and ``hang`` (no answer, ever).
    :param script: Faults for the first requests in order of arrival; ``ok`` is none.
    :param seed: Which requests fail.
    :param retry_after: ``Retry-After`` of ``rate_limit``, in seconds, ``date:<seconds>`` for an HTTP date, or
        ``ms:<milliseconds>`` for ``retry-after-ms``.
    :param models: What ``/v1/models`` lists; when given, any other model is a 404.
    :param api_key: The key that is required; any other is a 401 that quotes the key it was sent.
    :param reject: Body parameters that are answered with a 400.
    """

    latency: float = 0.0
    jitter: float = 0.0
    capacity: int = 0
    faults: dict[str, float] = field(default_factory=dict)
    script: list[str] = field(default_factory=list)
    seed: int = 0
    retry_after: str = "1"
    models: list[str] = field(default_factory=list)
    api_key: str = ""
    reject: list[str] = field(default_factory=list)


def tag_of(data: bytes) -> str:
    """The tag that names these media bytes in an answer."""
    return tag_of_digest(hashlib.sha256(data).hexdigest())


class _Server:
    """The state that all connections share."""

    def __init__(self, options: StubOptions) -> None:
        self.options = options
        self.serving = 0
        self.waiting: deque[_Connection] = deque()
        self.in_flight = 0
        self.max_in_flight = 0
        self.max_serving = 0
        self.abandoned = 0
        self.by_status: Counter[str] = Counter()
        self.by_fault: Counter[str] = Counter()
        self.by_image: Counter[str] = Counter()
        self.system_prompts: Counter[str] = Counter()
        self.log: deque[tuple[float, str, str]] = deque(maxlen=100_000)
        self.scripted = 0

    def stats(self) -> dict[str, Any]:
        return {
            "requests": sum(self.by_image.values()),
            "in_flight": self.in_flight,
            "max_concurrent": self.max_in_flight,
            "max_served": self.max_serving,
            "abandoned": self.abandoned,
            "by_status": dict(self.by_status),
            "by_fault": dict(self.by_fault),
            "by_image": dict(self.by_image),
            "system_prompts": dict(self.system_prompts),
            "log": list(self.log),
        }

    def draw(self, image: str, attempt: int) -> tuple[str, float]:
        """The fault of this request (or ``ok``), and a number in [0, 1) for whatever else is to be drawn."""
        options = self.options
        digest = hashlib.blake2b(f"{options.seed}:{image}:{attempt}".encode(), digest_size=16).digest()
        chance, other = (int.from_bytes(half, "big") / 2**64 for half in (digest[:8], digest[8:]))
        if self.scripted < len(options.script):
            self.scripted += 1
            return options.script[self.scripted - 1], other
        for name, probability in options.faults.items():
            chance -= probability
            if chance < 0:
                return name, other
        return "ok", other


class _Connection(asyncio.Protocol):
    """One client connection: HTTP/1.1, keep-alive, a request at a time, bodies with a Content-Length."""

    def __init__(self, server: _Server) -> None:
        self.server = server
        self.buffer = bytearray()
        self.need = 0
        self.busy = False
        self.is_served = False
        self.timer: asyncio.TimerHandle | None = None
        self.reply: tuple[int, Mapping[str, str], bytes] = (200, {}, b"")
        self.fault = "ok"
        self.delay = 0.0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        if self.busy or len(self.buffer) < self.need:
            return
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        method, path, headers = _parse_head(bytes(self.buffer[:end]))
        self.need = end + 4 + int(headers.get("content-length", 0))
        if len(self.buffer) < self.need:
            return
        body = bytes(self.buffer[end + 4 : self.need])
        del self.buffer[: self.need]
        self.need = 0
        self.busy = True
        self.receive(method, path.partition("?")[0], headers, body)

    def receive(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> None:
        server = self.server
        if (method, path) == ("GET", "/stats"):
            self.send_json(200, server.stats())
        elif (method, path) == ("POST", "/options"):
            server.options = StubOptions(**{**asdict(server.options), **json.loads(body)})
            server.scripted = 0
            self.send_json(200, {})
        elif server.options.api_key and headers.get("authorization") != f"Bearer {server.options.api_key}":
            self.refuse(*fault_response("unauthorized", quoting=headers.get("authorization", "")))
        elif (method, path) == ("GET", "/v1/models"):
            listed = [{"id": name, "object": "model"} for name in server.options.models or ["stub"]]
            self.send_json(200, {"object": "list", "data": listed})
        elif (method, path) == ("POST", "/v1/chat/completions"):
            self.complete(json.loads(body))
        else:
            self.refuse(404, {}, {"detail": "Not Found"})

    def complete(self, body: dict[str, Any]) -> None:
        server, options = self.server, self.server.options
        digests, system = _media_and_system(body)
        image = digests[0][:8]
        server.by_image[image] += 1
        server.system_prompts[system] += 1
        server.in_flight += 1
        server.max_in_flight = max(server.max_in_flight, server.in_flight)
        self.fault, other = server.draw(image, server.by_image[image])
        if refused := refused_parameter(body, options.reject, options.models):
            self.fault = refused
        server.log.append((time.monotonic(), image, self.fault))
        server.by_fault[self.fault] += 1
        status, headers, content = fault_response(self.fault) or (200, {}, compose(body, digests, self.fault))
        if self.fault == "rate_limit":
            headers = {**headers, **_retry_after(options.retry_after)}
        self.reply = (status, headers, json.dumps(content).encode())
        self.delay = options.latency + options.jitter * other
        if status != 200:
            # A refusal costs a real server next to nothing, so it does not queue behind what is being served.
            self.finish()
        elif options.capacity and server.serving >= options.capacity:
            server.waiting.append(self)
        else:
            self.serve()

    def serve(self) -> None:
        self.is_served = True
        self.server.serving += 1
        self.server.max_serving = max(self.server.max_serving, self.server.serving)
        if self.fault == "hang":
            return
        if self.delay > 0:
            self.timer = asyncio.get_running_loop().call_later(self.delay, self.finish)
        else:
            self.finish()

    def leave(self) -> None:
        """Give this request's place to the next that waits."""
        server = self.server
        server.in_flight -= 1
        self.timer = None
        if self.is_served:
            self.is_served = False
            server.serving -= 1
            if server.waiting:
                server.waiting.popleft().serve()
        elif self in server.waiting:
            server.waiting.remove(self)

    def finish(self) -> None:
        self.leave()
        status, headers, content = self.reply
        if self.fault in ("reset", "disconnect", "truncated"):
            self.server.by_status["none"] += 1
            self.break_off(content)
        elif self.fault == "truncated_json":
            self.send(status, headers, content[: len(content) // 2])
        elif self.fault == "not_json":
            self.send(status, {"Content-Type": "text/html"}, b"<html><body>gateway</body></html>")
        else:
            self.send(status, headers, content)

    def break_off(self, content: bytes) -> None:
        self.busy = False
        if self.fault != "disconnect":
            head = (
                f"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
            )
            self.transport.write(head.encode() + content[: len(content) // 2])
        if self.fault == "reset":
            connection: socket.socket = self.transport.get_extra_info("socket")
            # Lingering for zero seconds makes closing send RST instead of FIN.
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()
        else:
            self.transport.close()

    def refuse(self, status: int, headers: Mapping[str, str], content: Any) -> None:
        self.server.log.append((time.monotonic(), "", str(status)))
        self.send(status, headers, json.dumps(content).encode())

    def send_json(self, status: int, content: Any) -> None:
        self.busy = False
        self.write(status, {}, json.dumps(content).encode())

    def send(self, status: int, headers: Mapping[str, str], content: bytes) -> None:
        self.busy = False
        self.server.by_status[str(status)] += 1
        self.write(status, headers, content)

    def write(self, status: int, headers: Mapping[str, str], content: bytes) -> None:
        every = {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}
        lines = "".join(f"{name}: {value}\r\n" for name, value in every.items())
        self.transport.write(f"HTTP/1.1 {status} -\r\n{lines}\r\n".encode() + content)
        if self.buffer:
            asyncio.get_running_loop().call_soon(self.data_received, b"")

    def connection_lost(self, exc: Exception | None) -> None:
        if self.busy:
            self.busy = False
            self.server.abandoned += 1
            if self.timer:
                self.timer.cancel()
            self.leave()


def _parse_head(head: bytes) -> tuple[str, str, dict[str, str]]:
    request, *lines = head.decode("latin-1").split("\r\n")
    method, path, _ = request.split(" ", 2)
    headers = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers[name.lower()] = value.strip()
    return method, path, headers


def _media_and_system(body: Mapping[str, Any]) -> tuple[list[str], str]:
    """SHA-256 of each medium, in order (of the text when there is none), and the system prompt."""
    digests, text, system = [], "", ""
    for message in body["messages"]:
        content = message["content"]
        if message["role"] == "system":
            system = content
        elif isinstance(content, str):
            text += content
        else:
            for part in content:
                if part["type"] == "text":
                    text += part["text"]
                else:
                    data = part[part["type"]]["url"].partition("base64,")[2]
                    digests.append(hashlib.sha256(base64.b64decode(data)).hexdigest())
    return digests or [hashlib.sha256(text.encode()).hexdigest()], system


def _retry_after(spec: str) -> dict[str, str]:
    form, _, value = spec.rpartition(":")
    if form == "date":
        return {"Retry-After": formatdate(time.time() + float(value), usegmt=True)}
    return {"retry-after-ms": value} if form == "ms" else {"Retry-After": value}


class StubServer:
    """A running endpoint: ask :attr:`base_url`."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self._process = process
        self.pid = process.pid
        self.port = port
        self.root = f"http://127.0.0.1:{port}"
        self.base_url = f"{self.root}/v1"

    def stats(self) -> dict[str, Any]:
        with urllib.request.urlopen(f"{self.root}/stats", timeout=10) as response:
            return json.load(response)

    def set(self, **options: Any) -> None:
        """Change options while it runs; a script starts from its beginning."""
        urllib.request.urlopen(f"{self.root}/options", json.dumps(options).encode(), timeout=10).close()

    def stop(self) -> None:
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe:
                pipe.close()


@contextlib.contextmanager
def start_stub(*, port: int = 0, **options: Any) -> Iterator[StubServer]:
    """Run the endpoint in its own process on loopback; it ends with the block, or with this process."""
    arguments = [f"--{name}={json.dumps(value)}" for name, value in asdict(StubOptions(**options)).items()]
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.stub_endpoint", f"--port={port}", "--until-eof", *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=_REPOSITORY,
    )
    assert process.stdout is not None
    server = None
    try:
        server = StubServer(process, json.loads(process.stdout.readline())["port"])
        yield server
    finally:
        (server or StubServer(process, 0)).stop()


async def _serve(port: int, options: StubOptions, *, until_eof: bool) -> None:
    state = _Server(options)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: _Connection(state), "127.0.0.1", port, backlog=1024)
    print(json.dumps({"port": server.sockets[0].getsockname()[1]}), flush=True)
    ended = asyncio.Event()
    if until_eof:

        def wait_for_parent() -> None:
            sys.stdin.read()
            loop.call_soon_threadsafe(ended.set)

        threading.Thread(target=wait_for_parent, daemon=True).start()
    await ended.wait()


def main(arguments: Sequence[str] | None = None) -> None:
    def value(text: str) -> Any:
        try:
            return json.loads(text)
        except ValueError:
            return text

    parser = argparse.ArgumentParser(description="Fault-injecting OpenAI-compatible endpoint")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--until-eof", action="store_true", help="end when standard input does")
    for option in fields(StubOptions):
        parser.add_argument(f"--{option.name}", type=value, help="JSON or text", default=argparse.SUPPRESS)
    given = vars(parser.parse_args(arguments))
    port, until_eof = given.pop("port"), given.pop("until_eof")
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(_serve(port, StubOptions(**given), until_eof=until_eof))


if __name__ == "__main__":
    main()
