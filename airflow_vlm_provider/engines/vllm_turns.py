"""Whose turn it is to be asked of a vLLM server, when one of the requests may be what kills it.

Most requests are asked beside each other. A suspect is asked alone, with no other request of any task on the server beside
it: only then has it itself to blame if the server is lost once more.

Invariants:

- Who has ``suspect.lock`` asks a suspect, or is about to; no other request begins meanwhile.
- ``asking.lock`` is shared by all tasks that have other requests in flight. Who has the first asks when the second is free.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator

from airflow_vlm_provider.engines.vllm_folder import ServerFolder

POLL = 0.1


class Turns:
    """One task's part in it. Inside of an event loop.

    :param server: The server's folder.
    :param patience: Seconds that a suspect waits at most for the requests in flight: a child of a task that has ended may
        hold what that had open.
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
            self._asking -= 1
            self._let_go()

    @contextlib.asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Wait until nothing else is asked, of any task; nothing else begins before this ends."""
        async with self._suspects:
            while (suspect := self._server.try_suspect()) is None:  # noqa: ASYNC110 - other processes have it
                await asyncio.sleep(POLL)
            try:
                await self._until_others_have_ended()
                yield
            finally:
                os.close(suspect)

    def _may_begin(self) -> bool:
        try:
            if self._shared is None:
                self._shared = self._server.try_asking(shared=True)
            # In this order: who becomes a suspect between the two waits for what is shared.
            begins = self._shared is not None and not self._server.has_suspect()
        except OSError:
            # The folder was deleted, or there are too many open files: no reason to keep a request from being answered.
            return True
        if not begins:
            self._let_go()
        return begins

    def _let_go(self) -> None:
        if not self._asking and self._shared is not None:
            os.close(self._shared)
            self._shared = None

    async def _until_others_have_ended(self) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + self._patience
        while loop.time() < until:
            if (file := self._server.try_asking(shared=False)) is not None:
                os.close(file)
                return
            await asyncio.sleep(POLL)
