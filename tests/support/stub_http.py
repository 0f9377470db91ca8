"""The stub endpoint's HTTP: one process, no framework, so that it costs little beside the client under test."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import socket
import struct
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from email.utils import formatdate
from typing import Any

from tests.support.stub_answers import compose, fault_response, refused


@dataclass
class StubOptions:
    """How the endpoint behaves.

    :param latency: Seconds from the start of serving to the answer.
    :param jitter: Up to this many seconds more, drawn by the media: answers then come out of order.
    :param capacity: How many requests are served at once; the others queue. 0 is no bound.
    :param faults: Probability of each fault by name; :mod:`tests.support.stub_answers` lists them, besides
        ``reset`` (TCP reset in the middle of the answer), ``disconnect`` (closed without an answer),
        ``truncated`` (closed before the promised length), ``drip`` (ten bytes a second) and ``hang`` (no
        answer, ever).
    :param image_faults: The fault of every request whose first image this is, by the first 8 digits of its SHA-256.
    :param script: Faults for the first requests in order of arrival; ``ok`` is none.
    :param seed: Which requests fail.
    :param retry_after: ``Retry-After`` of ``rate_limit``, in seconds, ``date:<seconds>`` for an HTTP date, or
        ``ms:<milliseconds>`` for ``retry-after-ms``.
    :param models: What ``/v1/models`` lists; when given, any other model is a 404.
    :param api_key: The key that is required; any other is a 401 that quotes the headers it was sent.
    :param reject: Body parameters that are answered with a 400.
    :param videos: Whether the model takes videos; without, they are answered with a 400.
    :param most_choices: How many candidates are given, however many are asked for.
    :param max_body: Bytes of a body; what is announced to be larger is answered with a 413 before it is read, as
        gateways do. 0 is no bound.
    :param metrics: Whether ``/metrics`` tells, as vLLM's does, how many requests are served and how many queue. Looks at
        it are counted, answered or not.
    """

    latency: float = 0.0
    jitter: float = 0.0
    capacity: int = 0
    faults: dict[str, float] = field(default_factory=dict)
    image_faults: dict[str, str] = field(default_factory=dict)
    script: list[str] = field(default_factory=list)
    seed: int = 0
    retry_after: str = "1"
    models: list[str] = field(default_factory=list)
    api_key: str = ""
    reject: list[str] = field(default_factory=list)
    videos: bool = True
    most_choices: int = 100
    max_body: int = 0
    metrics: bool = False


class StubState:
    """The state that all connections share."""

    def __init__(self, options: StubOptions) -> None:
        self.options = options
        self.serving = 0
        self.waiting: deque[StubConnection] = deque()
        self.in_flight = 0
        self.max_in_flight = 0
        self.max_serving = 0
        self.abandoned = 0
        self.by_status: Counter[str] = Counter()
        self.by_fault: Counter[str] = Counter()
        self.by_image: Counter[str] = Counter()
        self.by_media: Counter[str] = Counter()
        self.system_prompts: Counter[str] = Counter()
        self.log: deque[tuple[float, str, str]] = deque(maxlen=100_000)
        self.scripted = 0
        self.looks = 0

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
            "by_media": dict(self.by_media),
            "system_prompts": dict(self.system_prompts),
            "log": list(self.log),
            "serving": self.serving,
            "waiting": len(self.waiting),
            "looks": self.looks,
        }

    def metrics(self) -> bytes:
        """What vLLM would tell of itself: gauges of two engines that share the load, and counters."""
        lines = ["# HELP vllm:num_requests_running Number of requests in model execution batches."]
        for engine, share in ((0, lambda number: number - number // 2), (1, lambda number: number // 2)):
            labels = f'{{engine="{engine}",model_name="stub"}}'
            lines += [
                f"vllm:num_requests_running{labels} {share(self.serving)}.0",
                f"vllm:num_requests_waiting{labels} {share(len(self.waiting))}.0",
                f"vllm:kv_cache_usage_perc{labels} {self.serving / max(1, self.options.capacity or 1000):.4f}",
                f"vllm:generation_tokens_total{labels} {self.by_status['200']}.0",
            ]
        return "\n".join([*lines, ""]).encode()

    def draw(self, image: str, attempt: int) -> tuple[str, float]:
        """The fault of this request (or ``ok``), and a number in [0, 1) for whatever else is to be drawn."""
        options = self.options
        digest = hashlib.blake2b(f"{options.seed}:{image}:{attempt}".encode(), digest_size=16).digest()
        chance, other = (int.from_bytes(half, "big") / 2**64 for half in (digest[:8], digest[8:]))
        if self.scripted < len(options.script):
            self.scripted += 1
            return options.script[self.scripted - 1], other
        if image in options.image_faults:
            return options.image_faults[image], other
        for name, probability in options.faults.items():
            chance -= probability
            if chance < 0:
                return name, other
        return "ok", other


class StubConnection(asyncio.Protocol):
    """One client connection: HTTP/1.1, keep-alive, a request at a time, bodies with a Content-Length."""

    def __init__(self, server: StubState) -> None:
        self.server = server
        self.buffer = bytearray()
        self.need = 0
        self.busy = False
        self.is_served = False
        self.timer: asyncio.TimerHandle | None = None
        self.reply: tuple[int, Mapping[str, str], bytes] = (200, {}, b"")
        self.fault = "ok"
        self.delay = 0.0
        self.discards = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        if self.discards:
            return
        self.buffer += data
        if self.busy or len(self.buffer) < self.need:
            return
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0:
            return
        method, path, headers = _parse_head(bytes(self.buffer[:end]))
        announced = int(headers.get("content-length", 0))
        if 0 < self.server.options.max_body < announced:
            self.turn_away()
            return
        self.need = end + 4 + announced
        if len(self.buffer) < self.need:
            return
        body = bytes(self.buffer[end + 4 : self.need])
        del self.buffer[: self.need]
        self.need = 0
        self.busy = True
        self.receive(method, path.partition("?")[0], headers, body)

    def turn_away(self) -> None:
        """Refuse a body that is too large at once; what still comes of it is thrown away."""
        self.discards = True
        self.buffer.clear()
        self.refuse(413, {"Connection": "close"}, {"error": {"message": "Request Entity Too Large"}})
        asyncio.get_running_loop().call_later(1.0, self.transport.close)

    def receive(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> None:
        server = self.server
        if (method, path) == ("GET", "/stats"):
            self.send_json(200, server.stats())
        elif (method, path) == ("GET", "/metrics"):
            server.looks += 1
            self.busy = False
            known = server.options.metrics
            self.write(
                200 if known else 404,
                {"Content-Type": "text/plain"},
                server.metrics() if known else b"Not Found",
            )
        elif (method, path) == ("POST", "/options"):
            server.options = StubOptions(**{**asdict(server.options), **json.loads(body)})
            server.scripted = 0
            self.send_json(200, {})
        elif server.options.api_key and headers.get("authorization") != f"Bearer {server.options.api_key}":
            self.refuse(*fault_response("unauthorized", quoting=str(headers)))
        elif (method, path) == ("GET", "/v1/models"):
            listed = [{"id": name, "object": "model"} for name in server.options.models or ["stub"]]
            self.send_json(200, {"object": "list", "data": listed})
        elif (method, path) == ("POST", "/v1/chat/completions"):
            self.complete(json.loads(body))
        else:
            self.refuse(404, {}, {"detail": "Not Found"})

    def complete(self, body: dict[str, Any]) -> None:
        server, options = self.server, self.server.options
        digests, kinds, system = _media_and_system(body)
        image = digests[0][:8]
        server.by_image[image] += 1
        server.by_media.update(kinds)
        server.system_prompts[system] += 1
        server.in_flight += 1
        server.max_in_flight = max(server.max_in_flight, server.in_flight)
        self.fault, other = server.draw(image, server.by_image[image])
        if fault := refused(body, kinds, reject=options.reject, models=options.models, videos=options.videos):
            self.fault = fault
        server.log.append((time.monotonic(), image, self.fault))
        server.by_fault[self.fault] += 1
        status, headers, content = fault_response(self.fault) or (
            200,
            {},
            compose(body, digests, self.fault, most_choices=options.most_choices),
        )
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
        elif self.fault == "drip":
            self.send(status, {"Content-Length": str(len(content))}, b"")
            self.drip(content)
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

    def drip(self, content: bytes) -> None:
        if content and not self.transport.is_closing():
            self.transport.write(content[:1])
            asyncio.get_running_loop().call_later(0.1, self.drip, content[1:])

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


def _media_and_system(body: Mapping[str, Any]) -> tuple[list[str], list[str], str]:
    """SHA-256 (of the text when there are none) and type of each medium, in order, and the system prompt."""
    digests: list[str] = []
    kinds: list[str] = []
    text, system = "", ""
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
                    kinds.append(part["type"])
    return digests or [hashlib.sha256(text.encode()).hexdigest()], kinds, system


def _retry_after(spec: str) -> dict[str, str]:
    form, _, value = spec.rpartition(":")
    if form == "date":
        return {"Retry-After": formatdate(time.time() + float(value), usegmt=True)}
    return {"retry-after-ms": value} if form == "ms" else {"Retry-After": value}
