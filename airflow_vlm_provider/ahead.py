"""How many requests may have their media in memory at once, so that the engine never waits and little is held.

Twice as many as the engine takes, and a few: what it takes may double in a moment. The engine has those, or they are
ready for it. Requests that are on their way to it come on top, as many as there are on average: the longer media take to
come, the more have to be fetched at once for the engine to get as many as it takes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from airflow_vlm_provider.bottleneck import SAMPLE_SECONDS
from airflow_vlm_provider.engines.window import Window

SPARE = 8
# Long enough that media which all come at once are not taken for many more that are wanted.
AVERAGE_SECONDS = 5.0


class Ahead:
    """Bounds the requests whose media are in memory. For one event loop.

    :param window: How many requests the engine takes at the moment.
    :param with_engine: How many it was given and has not answered.
    :param most: The most that may be in memory, whatever the engine takes.
    """

    def __init__(self, *, window: Callable[[], int], with_engine: Callable[[], int], most: int) -> None:
        self._window = window
        self._with_engine = with_engine
        self._most = most
        self._on_their_way = 0.0
        self.places = Window(self._size())
        """Held by each of them for as long as its media are in memory."""

    async def watch(self) -> None:
        """Follow what the engine takes, until cancelled."""
        while True:
            await asyncio.sleep(SAMPLE_SECONDS)
            now = self.places.in_flight - self._with_engine()
            self._on_their_way += (now - self._on_their_way) * SAMPLE_SECONDS / AVERAGE_SECONDS
            self.places.resize(self._size())

    def _size(self) -> int:
        return min(self._most, 2 * self._window() + SPARE + int(self._on_their_way))
