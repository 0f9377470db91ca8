"""How many requests stand ready follows how many the engine takes at the moment."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from airflow_vlm_provider.types import Answer, MediaRef, Request, SourceMedia
from tests.support.fakes import FakeMedia, ScriptedEngine
from tests.support.place import Place


class PatientMedia(FakeMedia):
    """Media that come as soon as so many are fetched at once."""

    remote = True

    def __init__(self, at_once: int) -> None:
        super().__init__()
        self.at_once = threading.Barrier(at_once)

    def fetch(self, ref: MediaRef, **about: Any) -> SourceMedia:
        self.at_once.wait(timeout=30)
        return super().fetch(ref, **about)


class NarrowEngine(ScriptedEngine):
    """Takes few requests at the moment, and all that it may once so many were answered."""

    def __init__(self, *, until: int, **more: Any) -> None:
        super().__init__(**more)
        self.until = until
        self.ready = 0
        self.most_ready = {True: 0, False: 0}

    @property
    def window(self) -> int:
        return 2 if self.is_narrow else self.concurrency

    @property
    def is_narrow(self) -> bool:
        return len(self.asked) < self.until

    async def ask(self, request: Request) -> Answer:
        self.ready += 1
        self.most_ready[self.is_narrow] = max(self.most_ready[self.is_narrow], self.ready)
        try:
            return await super().ask(request)
        finally:
            self.ready -= 1


def _most_ready(tmp_path: Any, *, until: int) -> dict[bool, int]:
    place = Place(tmp_path)
    shard = place.shard("a.jsonl", [{"text": f"{number}"} for number in range(400)])
    engine = NarrowEngine(until=until, delay=lambda about: 0.05, concurrency=40)

    async def go() -> None:
        async with engine:
            await place.runner(engine).run_all([shard])

    asyncio.run(go())
    assert len(engine.asked) == 400
    return engine.most_ready


def test_no_more_are_made_ready_than_the_engine_may_soon_take(tmp_path):
    assert _most_ready(tmp_path, until=400)[True] == 2 * 2 + 8


def test_when_it_takes_more_more_are_made_ready(tmp_path):
    assert _most_ready(tmp_path, until=40)[False] == 40 + 20


def test_media_that_come_slowly_are_fetched_more_at_once(tmp_path):
    place = Place(tmp_path)
    place.media = PatientMedia(at_once=2 * 2 + 8 + 4)
    shard = place.shard("a.jsonl", [{"images": [f"{number}.png"]} for number in range(64)])
    (manifest,) = place.run(NarrowEngine(until=64, concurrency=40), shard)
    assert (manifest.counts.ok, manifest.counts.failed) == (64, 0)
