"""Whose turn it is to be asked of a vLLM server, when one of the requests may be what kills it.

Most requests are asked beside each other. A suspect is asked alone, with no other request of any task on the server beside
it: only then has it itself to blame if the server is lost once more.

Invariants:

- Who has ``suspect.lock`` asks a suspect, or is about to; no other request begins meanwhile.
- ``asking.lock`` is shared by all tasks that have other requests in flight. Who has the first asks when the second is free.
- A suspect that takes too long, or for which the others do, goes on as one of the others: it has its part in the second
  before it gives the first back. It is not alone then, and a loss does not tell against it.
- A lock that can't be had, as when the folder was deleted, keeps no request from being answered; nobody is alone then.

Locks are looked at in the event loop: none is waited for there, and on a local disk a look takes 10 microseconds, less than
to hand it to a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import os
from collections.abc import AsyncIterator, Callable

from airflow_vlm_provider.engines.vllm_folder import ServerFolder

POLL = 0.1


class SuspectsTurn:
    """What :meth:`Turns.alone` gives.

    :ivar is_alone: Whether there was nothing else in flight since it began, of any task.
    """

    def __init__(self, *, patience: float, go_beside: Callable[[], None]) -> None:
        self.is_alone = True
        self._patience = patience
        self._go_beside = go_beside
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """The suspect is asked now: others wait for it so long, and no longer."""
        if self.is_alone:
            self._timer = asyncio.get_running_loop().call_later(self._patience, self.go_beside)

    def go_beside(self) -> None:
        """Keep the others waiting no more."""
        self.is_alone = False
        self._go_beside()

    def end(self) -> None:
        """Over."""
        if self._timer is not None:
            self._timer.cancel()


class Turns:
    """One task's part in it. Inside of an event loop.

    :param server: The server's folder.
    :param patience: Seconds that a suspect waits at most for the requests in flight, as a child of a task that has ended
        may hold what that had open; and that they wait at most for it, once it is asked.
    """

    def __init__(self, server: ServerFolder, *, patience: float) -> None:
        self._server = server
        self._patience = patience
        # One at a time looks whether others may begin, and one suspect at a time contends with other tasks'.
        self._entry = asyncio.Lock()
        self._suspects = asyncio.Lock()
        # Requests of this task beside each other, and the lock that they share.
        self._asking = 0
        self._shared: int | None = None

    @contextlib.asynccontextmanager
    async def beside_others(self) -> AsyncIterator[None]:
        """Wait until no suspect is asked; none is asked before this ends."""
        async with self._entry:
            while not self._may_begin():  # noqa: ASYNC110 - it is for other processes, too
                await asyncio.sleep(POLL)
            self._asking += 1
        try:
            yield
        finally:
            self._end_beside()

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncIterator[SuspectsTurn]:
        """Wait until nothing else is asked, of any task; nothing else begins before this ends, or has taken too long."""
        await self._suspects.acquire()
        with contextlib.ExitStack() as beside, contextlib.ExitStack() as held:
            held.callback(self._suspects.release)

            def go_beside() -> None:
                self._asking += 1
                beside.callback(self._end_beside)
                with contextlib.suppress(OSError):
                    self._share()
                held.close()

            turn = SuspectsTurn(patience=self._patience, go_beside=go_beside)
            held.callback(turn.end)
            try:
                while (suspect := self._server.try_suspect()) is None:  # noqa: ASYNC110 - other processes have it
                    await asyncio.sleep(POLL)
                held.callback(_unlock, suspect)
                is_alone = await self._have_others_ended()
            except OSError:
                is_alone = False
            if not is_alone:
                turn.go_beside()
            yield turn

    def _may_begin(self) -> bool:
        try:
            # In this order: who becomes a suspect between the two waits for what is shared.
            begins = self._share() and not self._server.has_suspect()
        except OSError:
            # The folder was deleted, or there are too many open files: no reason to keep a request from being answered.
            return True
        if not begins:
            self._let_go()
        return begins

    def _end_beside(self) -> None:
        self._asking -= 1
        self._let_go()

    def _share(self) -> bool:
        """Have this task's part in what those share who ask beside each other; whether it has."""
        if self._shared is None:
            self._shared = self._server.try_asking(shared=True)
        return self._shared is not None

    def _let_go(self) -> None:
        if not self._asking and self._shared is not None:
            _unlock(self._shared)
            self._shared = None

    async def _have_others_ended(self) -> bool:
        """Wait until they have; False when they don't."""
        loop = asyncio.get_running_loop()
        until = loop.time() + self._patience
        while loop.time() < until:
            if (file := self._server.try_asking(shared=False)) is not None:
                _unlock(file)
                return True
            await asyncio.sleep(POLL)
        return False


def _unlock(file: int) -> None:
    # Closed alone, it would stay locked for as long as a child lives that was forked meanwhile.
    fcntl.flock(file, fcntl.LOCK_UN)
    os.close(file)
