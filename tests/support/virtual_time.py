"""Runs coroutines on a clock of their own: waiting takes no time, and takes exactly as long as it should."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _Selector(selectors.DefaultSelector):  # type: ignore[misc,valid-type]
    now = 0.0

    def select(self, timeout: float | None = None) -> list[Any]:
        ready = super().select(0)
        # Time passes while there is work, too: code may wait for the clock to move by next to nothing.
        self.now += 1e-6 if ready or not timeout else timeout
        return ready


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """An event loop that jumps to the next timer whenever nothing is left to do. Not for threads or sockets."""

    def __init__(self) -> None:
        self._virtual = _Selector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now


def run_in_virtual_time(coroutine: Coroutine[Any, Any, T]) -> T:
    """Like :func:`asyncio.run`; ``asyncio.get_running_loop().time()`` starts at 0."""
    loop = VirtualTimeLoop()
    try:
        return loop.run_until_complete(coroutine)
    finally:
        loop.close()
