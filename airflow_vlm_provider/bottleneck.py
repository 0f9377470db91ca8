"""What a run waits for: its source, the preparation of media, the engine, or its own end.

Looked at a few times a second: the engine is what binds when as many requests are with it as it takes; else, when
requests are being prepared, the preparation; else the source, which has not brought samples enough (or the
destination, which takes no more of them). When the source has brought all there are, what is left is the end.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Literal

SAMPLE_SECONDS = 0.1
# Of fewer looks than these, a second's, nothing can be said.
FEWEST_LOOKS = 10
Stage = Literal["source", "preparation", "engine", "end"]


class Bottleneck:
    """Counts what a run waited for. For one thread.

    :param window: How many requests the engine takes at the moment.
    :param in_flight: How many of those that it was given are under way: the others wait in it.
    :param pressure: Why there are no more of them, and what to do about it, in a sentence; None if that is not known.
    """

    def __init__(
        self,
        window: Callable[[], int],
        in_flight: Callable[[], int] = lambda: 0,
        pressure: Callable[[], str | None] = lambda: None,
    ) -> None:
        self._window = window
        self._under_way = in_flight
        self._pressure = pressure
        self._preparing = 0
        self._asking = 0
        self._bound: Counter[Stage] = Counter()
        self._in_flight = 0
        self._room = 0
        self.source_has_ended = False
        """Whether there are no more samples to come."""

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """A request's media are fetched and made ready."""
        self._preparing += 1
        try:
            yield
        finally:
            self._preparing -= 1

    @contextlib.contextmanager
    def asking(self) -> Iterator[None]:
        """A request is with the engine."""
        self._asking += 1
        try:
            yield
        finally:
            self._asking -= 1

    @property
    def in_preparation(self) -> int:
        """How many requests' media are being fetched and made ready."""
        return self._preparing

    async def watch(self) -> None:
        """Look again and again, until cancelled."""
        while True:
            await asyncio.sleep(SAMPLE_SECONDS)
            self.look()

    def look(self) -> None:
        """Take one look."""
        window = self._window()
        self._in_flight += self._under_way()
        self._room += window
        if self._asking >= window:
            self._bound["engine"] += 1
        elif self._preparing:
            self._bound["preparation"] += 1
        else:
            self._bound["end" if self.source_has_ended else "source"] += 1

    def shares(self) -> dict[Stage, float]:
        """How large a part of the time each bound the run, from 0 to 1; empty before the first look."""
        looks = self._bound.total()
        return {stage: count / looks for stage, count in self._bound.most_common()}

    def sentence(self) -> str | None:
        """The same in a few sentences; None when the run was too short to tell."""
        looks = self._bound.total()
        if looks < FEWEST_LOOKS:
            return None
        shares = self.shares()
        said = ", ".join(f"{stage} {share:.0%}" for stage, share in shares.items())
        stage = next(iter(shares))
        why = (self._pressure() if stage == "engine" else None) or _HINTS[stage]
        return (
            f"What bound the run: {said} of the time. On average {self._in_flight / looks:.1f} requests were in flight, "
            f"and the window held {self._room / looks:.1f}. {why}"
        )


_HINTS: dict[Stage, str] = {
    "engine": "A faster engine, or fewer pixels and tokens for it, would make this faster.",
    "preparation": "A closer storage, more processor cores, or smaller media would make this faster.",
    "source": "A faster source or destination, or smaller rows, would make this faster.",
    "end": "More shards for each task would make this faster: at its end, the engine is left with few requests.",
}
