"""The process of a vLLM server and what belongs to it: its port, its log, and its end.

vLLM's engine processes live on when its API server is killed, and keep their GPU's memory. So a server leads a
session of its own, and all of its processes are ended together.
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
from collections.abc import Callable
from pathlib import Path

from airflow_vlm_provider.engines.process_table import kill_all, members, pipe_name
from airflow_vlm_provider.engines.vllm_spec import ServerSpec

log = logging.getLogger("vlm.keeper")

STOP_SECONDS = 20.0
LOG_BYTES = 16 * 1024 * 1024
# Something that prints without ever ending a line must not fill the memory.
LINE_BYTES = 64 * 1024
KEPT_LINES = 400


class ServerProcess:
    """A running server.

    :param spec: What it is started with.
    :param port: Where it listens on 127.0.0.1.
    :param api_key: What requests are authorized by. Should the server ever print it, the log does not show it.
    :param log: Takes what it prints; at :data:`LOG_BYTES` it begins anew, and the old one is kept once.
    :param tell: Takes the name of the pipe that it prints to, before there is a process: should this one be killed then,
        somebody is to know what to end.
    :raises OSError: there is no such command.
    """

    def __init__(
        self, spec: ServerSpec, *, port: int, api_key: str, log: Path, tell: Callable[[str], None]
    ) -> None:
        self._log = log
        self._secret = api_key
        self._lines: deque[str] = deque(maxlen=KEPT_LINES)
        read, write = os.pipe2(os.O_CLOEXEC)
        with contextlib.ExitStack() as failed:
            failed.callback(os.close, read)
            try:
                self.output = pipe_name(read)
                tell(self.output)
                self._process = subprocess.Popen(
                    spec.argv(port=port),
                    env=spec.environment(api_key=api_key),
                    stdin=subprocess.DEVNULL,
                    stdout=write,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            finally:
                os.close(write)
            self.pid = self._process.pid
            self._pump = threading.Thread(target=self._write_log, args=(read,), daemon=True)
            # Without it, nobody would know of the server.
            failed.callback(self._kill)
            self._pump.start()
            failed.pop_all()

    def status(self) -> int | None:
        """Its exit status, as :mod:`subprocess` has it; None while it runs."""
        return self._process.poll()

    def last_lines(self) -> list[str]:
        """What it has printed last."""
        return list(self._lines)

    def end(self, *, gently: bool) -> None:
        """End it with all that belong to it.

        :param gently: It may take its time to end by itself, up to :data:`STOP_SECONDS`.
        """
        # Its number is its own until its status is taken.
        if gently and self._process.poll() is None:
            os.killpg(self.pid, signal.SIGTERM)
            # What was halted takes no signal before it goes on.
            os.killpg(self.pid, signal.SIGCONT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
        self._kill()
        self._pump.join(5)

    def _kill(self) -> None:
        if left := kill_all(lambda: members(session=self.pid, output=self.output)):
            log.error(
                "Even SIGKILL does not end the processes %s: the kernel waits for a device", sorted(left)
            )
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5)

    def _write_log(self, pipe: int) -> None:
        handler = _Log(self._log, maxBytes=LOG_BYTES, backupCount=1, encoding="utf-8", delay=True)
        with os.fdopen(pipe, "rb") as output, contextlib.suppress(OSError), contextlib.closing(handler):
            while raw := output.readline(LINE_BYTES):
                # Of a progress bar, where it came to.
                line = raw.decode(errors="replace").rstrip("\r\n").rpartition("\r")[2]
                line = line.replace(self._secret, "***")
                self._lines.append(line)
                handler.emit(logging.LogRecord("", logging.INFO, "", 0, line, None, None))


class _Log(logging.handlers.RotatingFileHandler):
    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802 - logging's name
        """A full disk costs lines, and nothing else: a server whose output nobody takes would halt."""


class Port:
    """A port of 127.0.0.1 that is kept for a server, also while that is down.

    It is bound here but not listened on, so that nobody is given it by chance, while the server, which says that it
    does not mind (``SO_REUSEADDR``), may listen.
    """

    def __init__(self) -> None:
        self._socket = _bound(0)
        self.number: int = self._socket.getsockname()[1]

    def is_free(self) -> bool:
        """Whether nobody listens on it."""
        try:
            _bound(self.number).close()
        except OSError:
            return False
        return True

    def close(self) -> None:
        """Give it up."""
        self._socket.close()


def _bound(port: int) -> socket.socket:
    bound = socket.socket()
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(("127.0.0.1", port))
    except BaseException:
        bound.close()
        raise
    return bound
