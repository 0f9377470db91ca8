"""The guard of a keeper: a process that does nothing but wait for its end, and then ends the keeper's server.

It is forked from the keeper, so it holds what that has open, the locks among it: they are free only when the server
has ended. It is not told to stop by any signal that can be caught, so that what stops the keeper does not stop it.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable

from airflow_vlm_provider.engines.process_table import kill_all, members

_NONE = "none"


class Guard:
    """Ends the server when this process has ended, however.

    :param last_words: Called in the guard when that has happened.
    """

    def __init__(self, last_words: Callable[[], None]) -> None:
        self._last_words = last_words
        self._told = _NONE
        self._pid = 0
        self._pipe = -1
        self._start()

    def watch(self, output: str, *, leader: int | None = None) -> None:
        """Tell it of a server: before it is started of the pipe that it will print to, then of its process, too."""
        self._tell(f"{leader or ''} {output}")

    def forget(self) -> None:
        """Tell it that the server has ended with all of its processes."""
        self._tell(_NONE)

    def renew(self) -> None:
        """See that there is one: it may have been killed."""
        if os.waitpid(self._pid, os.WNOHANG)[0]:
            os.close(self._pipe)
            self._start()
            self._tell(self._told)

    def _tell(self, what: str) -> None:
        self._told = what
        # Where it was killed, its successor is told.
        with contextlib.suppress(BrokenPipeError):
            os.write(self._pipe, f"{what}\n".encode())

    def _start(self) -> None:
        # While this process forks, nobody else may be importing.
        import psutil  # noqa: F401

        read, self._pipe = os.pipe2(os.O_CLOEXEC)
        self._pid = os.fork()
        if self._pid:
            os.close(read)
            return
        try:
            self._wait(read)
        finally:
            os._exit(0)

    def _wait(self, read: int) -> None:
        """What the guard does."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1):
            signal.signal(number, signal.SIG_IGN)
        os.close(self._pipe)
        with os.fdopen(read, "rb") as keeper:
            told = keeper.read().decode().splitlines()
        with contextlib.suppress(OSError):
            self._last_words()
        if told and told[-1] != _NONE:
            leader, output = told[-1].split(" ", 1)
            kill_all(lambda: members(session=int(leader) if leader else None, output=output))
