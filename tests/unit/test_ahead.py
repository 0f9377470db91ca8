"""How many requests have their media in memory: in virtual time, between slow media and a server with a window."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest

from airflow_vlm_provider.ahead import Ahead
from airflow_vlm_provider.engines.pressure import Pressure
from airflow_vlm_provider.engines.window import Window
from tests.support.simulated_server import LOOK_SECONDS, Server
from tests.support.virtual_time import run_in_virtual_time

MOST, THREADS = 192, 64
SETTLE, SECONDS = 60, 120


@dataclass
class Seen:
    """What came of a minute or two of it."""

    answered: int
    most_held: int


def run(slots: int, seconds: float, *, media_seconds: float) -> Seen:
    """Ask a server that works on so many requests at once, each with media that take a while to come."""

    async def main() -> Seen:
        on_their_way = 0
        server = Server(slots, lambda draw, running: seconds * draw.uniform(0.5, 1.5))
        pressure = Pressure(128)
        window = Window(pressure.size)
        ahead = Ahead(
            window=lambda: window.size,
            in_preparation=lambda: on_their_way,
            most=MOST,
        )
        threads = asyncio.Semaphore(THREADS)
        now = asyncio.get_running_loop().time

        async def one() -> None:
            nonlocal on_their_way
            while True:
                async with ahead.places:
                    on_their_way += 1
                    async with threads:
                        await asyncio.sleep(media_seconds * server.draw.uniform(0.5, 1.5))
                    on_their_way -= 1
                    async with window:
                        sent = pressure.send(now())
                        await server.ask()
                        pressure.end(sent, now(), "answered")

        async def look() -> None:
            while True:
                await asyncio.sleep(LOOK_SECONDS)
                pressure.look(server.metrics())
                window.resize(pressure.size)

        tasks = [
            asyncio.create_task(each) for each in (look(), ahead.watch(), *(one() for _ in range(2 * MOST)))
        ]
        await asyncio.sleep(SETTLE)
        before, held = server.answered, 0
        for _ in range(10 * SECONDS):
            await asyncio.sleep(0.1)
            held = max(held, ahead.places.in_flight)
        answered = server.answered - before
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        return Seen(answered, held)

    return run_in_virtual_time(main())


@pytest.mark.parametrize(
    ("slots", "seconds", "media_seconds"), [(4, 0.5, 3.0), (4, 0.5, 5.0), (8, 0.5, 2.0), (16, 0.25, 0.9)]
)
def test_a_server_is_not_starved_by_media_that_come_slowly(slots, seconds, media_seconds):
    seen = run(slots, seconds, media_seconds=media_seconds)
    assert seen.answered >= 0.93 * slots / seconds * SECONDS
    # As many as come in the time that one takes, and those that the engine has or may soon take.
    assert seen.most_held <= slots / seconds * media_seconds + 2 * (slots + 8) + 8 + 15


@pytest.mark.parametrize(("slots", "seconds"), [(4, 0.5), (4, 2.0)])
def test_with_media_that_come_fast_few_are_held(slots, seconds):
    seen = run(slots, seconds, media_seconds=0.05)
    assert seen.answered >= 0.95 * slots / seconds * SECONDS
    assert seen.most_held <= 2 * (slots + 6) + 8


def test_media_that_can_not_come_fast_enough_are_no_reason_to_hold_more_than_the_most():
    seen = run(64, 0.5, media_seconds=10.0)
    assert seen.most_held == MOST


def test_what_was_answered_and_can_not_be_saved_is_no_reason_to_ask_more():
    async def main() -> int:
        ahead = Ahead(window=lambda: 2, in_preparation=lambda: 0, most=MOST)
        watching = asyncio.create_task(ahead.watch())
        held = [asyncio.create_task(ahead.places.acquire()) for _ in range(MOST)]
        await asyncio.sleep(60)
        for task in (watching, *held):
            task.cancel()
        await asyncio.gather(watching, *held, return_exceptions=True)
        return ahead.places.in_flight

    assert run_in_virtual_time(main()) == 2 * 2 + 8
