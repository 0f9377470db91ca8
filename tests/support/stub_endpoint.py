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
import contextlib
import hashlib
import json
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from tests.support.stub_answers import tag_of_digest
from tests.support.stub_http import StubConnection, StubOptions, StubState

_REPOSITORY = Path(__file__).parents[2]


def tag_of(data: bytes) -> str:
    """The tag that names these media bytes in an answer."""
    return tag_of_digest(hashlib.sha256(data).hexdigest())


class StubServer:
    """A running endpoint: ask :attr:`base_url`."""

    def __init__(self, process: subprocess.Popen[str], port: int) -> None:
        self._process = process
        self.pid = process.pid
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
    state = StubState(options)
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: StubConnection(state), "127.0.0.1", port, backlog=1024)
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
