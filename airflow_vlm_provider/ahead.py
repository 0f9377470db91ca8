"""How many requests may have their media in memory at once, so that the engine never waits and little is held.

Twice as many as the engine takes, and a few: what it takes may double in a moment. The engine has those, or they are
ready for it. Requests whose media are still on their way come on top, as many as there are on average: the longer media
take to come, the more have to be fetched at once for the engine to get as many as it takes. What was answered and could not
be saved yet does not: a storage that hangs is no reason to ask more.
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
    :param in_preparation: How many requests' media are being fetched and made ready.
    :param most: The most that may be in memory, whatever the engine takes.
    """

    def __init__(self, *, window: Callable[[], int], in_preparation: Callable[[], int], most: int) -> None:
        self._window = window
        self._in_preparation = in_preparation
        self._most = most
        self._on_their_way = 0.0
        self.places = Window(self._size())
        """Held by each of them for as long as its media are in memory."""

    async def watch(self) -> None:
        """Follow what the engine takes, until cancelled."""
        while True:
            await asyncio.sleep(SAMPLE_SECONDS)
            self._on_their_way += (
                (self._in_preparation() - self._on_their_way) * SAMPLE_SECONDS / AVERAGE_SECONDS
            )
            self.places.resize(self._size())

    def _size(self) -> int:
        return min(self._most, 2 * self._window() + SPARE + int(self._on_their_way))
