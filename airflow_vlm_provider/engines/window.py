"""A window of requests in flight whose size may change while it is in use.

Invariants:

- Places are given first come, first served; nobody overtakes who waits.
- A place that was given is taken back only by its holder: a smaller size lets those in flight end, and a larger one
  wakes those who wait at once.
- A wait that is cancelled costs nobody a place.
"""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType


class Window:
    """An asynchronous context manager: inside of it, there are never more than its size. For one event loop.

    :param size: How many may be inside; at least 1.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._in_flight = 0
        self._waiters: deque[asyncio.Future[None]] = deque()

    @property
    def size(self) -> int:
        """How many may be inside."""
        return self._size

    @property
    def in_flight(self) -> int:
        """How many are inside: for a while more than :attr:`size`, after that has shrunk."""
        return self._in_flight

    @property
    def waiting(self) -> int:
        """How many wait to be let in."""
        return len(self._waiters)

    def resize(self, size: int) -> None:
        """Let more in from now on, or fewer."""
        self._size = size
        self._let_in()

    async def acquire(self) -> None:
        """Wait for a place."""
        if self._in_flight < self._size:
            self._in_flight += 1
            return
        waiter = asyncio.get_running_loop().create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            if not waiter.cancelled():
                self.release()
            elif waiter in self._waiters:
                self._waiters.remove(waiter)
            raise

    def release(self) -> None:
        """Give a place back."""
        self._in_flight -= 1
        self._let_in()

    def _let_in(self) -> None:
        while self._waiters and self._in_flight < self._size:
            waiter = self._waiters.popleft()
            if not waiter.done():
                self._in_flight += 1
                waiter.set_result(None)

    async def __aenter__(self) -> Window:
        await self.acquire()
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()
