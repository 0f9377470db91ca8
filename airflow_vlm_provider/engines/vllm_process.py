"""The process of a vLLM server and what belongs to it: its log, its end, and the guard that sees to it.

vLLM's engine processes live on when its API server is killed, and keep their GPU's memory. So a server leads a
session of its own, and all processes of the session are ended together.
"""

from __future__ import annotations

import contextlib
import logging
import logging.handlers
import os
import signal
import socket
import subprocess
import threading
from collections import deque
from pathlib import Path
from typing import IO

from airflow_vlm_provider.engines.vllm_spec import ServerSpec

STOP_SECONDS = 20.0
LOG_BYTES = 16 * 1024 * 1024
QUOTED_LINES = 25


class ServerProcess:
    """A running server.

    :param spec: What it is started with.
    :param port: Where it listens on 127.0.0.1.
    :param api_key: What requests are authorized by.
    :param log: Takes what it prints; at :data:`LOG_BYTES` it begins anew, and the old one is kept once.
    :raises OSError: there is no such command.
    """

    def __init__(self, spec: ServerSpec, *, port: int, api_key: str, log: Path) -> None:
        self._log = log
        self._tail: deque[str] = deque(maxlen=QUOTED_LINES)
        self._process = subprocess.Popen(
            spec.argv(port=port),
            env=spec.environment(api_key=api_key),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.pid = self._process.pid
        self._pump = threading.Thread(target=self._write_log, args=(self._process.stdout,), daemon=True)
        self._pump.start()

    def status(self) -> int | None:
        """Its exit status, as :mod:`subprocess` has it; None while it runs."""
        return self._process.poll()

    def last_lines(self) -> list[str]:
        """What it has printed last."""
        return list(self._tail)

    def end(self) -> None:
        """End it with all that belong to it: gently, then not."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGTERM)
            # What was halted takes no signal before it goes on.
            os.killpg(self.pid, signal.SIGCONT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(STOP_SECONDS)
        kill_session(self.pid)
        self._process.wait()
        self._pump.join(5)

    def _write_log(self, output: IO[bytes]) -> None:
        handler = _Log(self._log, maxBytes=LOG_BYTES, backupCount=1, encoding="utf-8", delay=True)
        with output, contextlib.closing(handler):
            for raw in output:
                line = raw.decode(errors="replace").rstrip("\n")
                self._tail.append(line)
                handler.emit(logging.LogRecord("", logging.INFO, "", 0, line, None, None))


class _Log(logging.handlers.RotatingFileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """A full disk costs lines, and nothing else: a server whose output nobody takes would halt."""


def start_guard() -> int:
    """Start a process that waits for the end of this one, and then ends the server.

    It holds what this process has open, locks among it: they are not free before the server has ended.

    :return: A descriptor that takes the number of the server's process, and a line end.
    """
    read, write = os.pipe2(os.O_CLOEXEC)
    if os.fork():
        os.close(read)
        return write
    os.close(write)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    with os.fdopen(read, "rb") as keeper:
        numbers = keeper.read().split()
    if numbers:
        kill_session(int(numbers[-1]))
    os._exit(0)


def kill_session(leader: int, *, key: str | None = None) -> None:
    """Kill all processes of a session.

    :param key: Only those that were started for the server of this key: the number may be another session's now.
    """
    import psutil

    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, ProcessLookupError, PermissionError):
            if os.getsid(process.pid) == leader and (
                key is None or process.environ().get("VLM_ENGINE_KEY") == key
            ):
                process.kill()


def started_at(pid: int) -> float | None:
    """When a process was started, to tell it from another of its number; None when there is none that runs."""
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        created: float = process.create_time()
        return created
    except psutil.Error:
        return None


def free_port(preferred: int = 0) -> int:
    """A free port on loopback: the preferred one if it still is."""
    for port in (preferred, 0):
        with socket.socket() as probe, contextlib.suppress(OSError):
            # As the server itself does it: what was closed a moment ago may be taken again.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
            found: int = probe.getsockname()[1]
            return found
    raise OSError("There is no free port on 127.0.0.1.")
