"""The window of requests in flight."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from airflow_vlm_provider.engines.window import Window
from tests.support.virtual_time import run_in_virtual_time


def _play(
    size: int, script: Callable[[Window, list[int], list[asyncio.Task[None]]], Awaitable[None]]
) -> list[int]:
    """Ten that want in, one after the other, and stay until they are cancelled; in what order they got in."""

    async def main() -> list[int]:
        window, inside = Window(size), []

        async def one(number: int) -> None:
            async with window:
                inside.append(number)
                await asyncio.Event().wait()

        tasks = [asyncio.create_task(one(number)) for number in range(10)]
        await asyncio.sleep(1)
        await script(window, inside, tasks)
        await asyncio.sleep(1)
        entered = list(inside)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert (window.in_flight, window.waiting) == (0, 0)
        return entered

    return run_in_virtual_time(main())


def test_no_more_are_inside_than_its_size_and_who_leaves_lets_the_first_of_those_who_wait_in():
    async def script(window, inside, tasks):
        assert (window.size, window.in_flight, window.waiting, inside) == (3, 3, 7, [0, 1, 2])
        tasks[1].cancel()
        await asyncio.sleep(1)
        assert (window.in_flight, window.waiting) == (3, 6)

    assert _play(3, script) == [0, 1, 2, 3]


def test_a_larger_size_lets_more_in_at_once():
    async def script(window, inside, tasks):
        window.resize(6)

    assert _play(2, script) == [0, 1, 2, 3, 4, 5]


def test_a_smaller_size_lets_nobody_in_until_enough_have_left():
    async def script(window, inside, tasks):
        window.resize(2)
        for task in tasks[:2]:
            task.cancel()
        await asyncio.sleep(1)
        assert (window.in_flight, len(inside)) == (2, 4)
        tasks[2].cancel()

    assert _play(4, script) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("same_moment", [False, True])
def test_a_wait_that_is_cancelled_costs_nobody_a_place(same_moment):
    async def script(window, inside, tasks):
        # The first in line goes away as a place is given to it, or before.
        tasks[0].cancel()
        if same_moment:
            await asyncio.sleep(0)
        tasks[2].cancel()

    assert _play(2, script) == [0, 1, 3]


def test_who_comes_later_does_not_overtake_who_was_let_in_but_has_not_run_yet():
    async def main() -> list[str]:
        window, order = Window(1), []

        async def one(name: str) -> None:
            async with window:
                order.append(name)

        await window.acquire()
        first = asyncio.create_task(one("first"))
        await asyncio.sleep(1)
        window.release()
        await asyncio.gather(one("second"), first)
        return order

    assert run_in_virtual_time(main()) == ["first", "second"]
