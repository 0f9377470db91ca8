from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.ledger.write_behind import FlushPolicy, Window, WriteBehind
from tests.support.virtual_time import run_in_virtual_time


class Storage:
    """Storage on a virtual clock: each write takes a while, and may fail.

    :param seconds: How long each write takes; the last goes on for ever.
    :param errors: What the writes raise, one after another.
    """

    def __init__(self, *seconds: float, errors: Sequence[BaseException | None] = ()) -> None:
        self.seconds = list(seconds) or [0.0]
        self.errors = list(errors)
        self.written: list[list[bytes]] = []
        self.began: list[float] = []
        self.failures: list[BaseException] = []
        self.writing = self.most_writing = 0

    def write(self, lines: Sequence[bytes]) -> None:
        if self.errors and (error := self.errors.pop(0)) is not None:
            raise error
        self.written.append(list(lines))

    async def in_thread(self, function: Callable[[], Any]) -> Any:
        self.began.append(asyncio.get_running_loop().time())
        self.writing += 1
        self.most_writing = max(self.most_writing, self.writing)
        try:
            await asyncio.sleep(self.seconds[0] if len(self.seconds) == 1 else self.seconds.pop(0))
            return function()
        finally:
            self.writing -= 1

    @property
    def durable(self) -> list[bytes]:
        return [line for lines in self.written for line in lines]

    def writer(self, **policy: Any) -> WriteBehind:
        return WriteBehind(
            self.write,
            window=Window(FlushPolicy(**policy)),
            in_thread=self.in_thread,
            on_failure=self.failures.append,
        )


def line(number: int, size: int = 8) -> bytes:
    return b"%0*d" % (size, number)


def lines(count: int) -> list[bytes]:
    return [line(number) for number in range(count)]


def now() -> float:
    return asyncio.get_running_loop().time()


@given(
    policy=st.builds(
        dict, answers=st.integers(1, 9), bytes=st.integers(1, 200), seconds=st.sampled_from([0.5, 3.0])
    ),
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("append"), st.integers(1, 90)),
            st.tuples(st.just("sleep"), st.sampled_from([0.0, 0.4, 2.0])),
            st.just(("flush", 0)),
        ),
        max_size=40,
    ),
    seconds=st.lists(st.sampled_from([0.0, 0.1, 1.0]), min_size=1, max_size=4),
)
@settings(max_examples=150, deadline=None)
def test_what_waits_is_bounded_and_flushed_lines_are_durable_in_order(policy, steps, seconds):
    storage = Storage(*seconds)

    async def go() -> None:
        writer, appended = storage.writer(**policy), []
        for what, argument in steps:
            if what == "append":
                appended.append(line(len(appended), argument))
                await writer.append(appended[-1])
                waiting = appended[len(storage.durable) :]
                assert len(waiting) <= policy["answers"]
                assert sum(map(len, waiting)) <= policy["bytes"]
                assert writer.waiting == len(waiting)
            elif what == "sleep":
                await asyncio.sleep(argument)
            else:
                await writer.flush()
                assert storage.durable == appended
        assert storage.durable == appended[: len(storage.durable)]
        assert await writer.close(seconds=60) is None
        assert storage.durable == appended

    run_in_virtual_time(go())
    assert storage.most_writing <= 1
    assert not storage.failures


def test_nobody_waits_while_there_is_room_and_writing_goes_on_beside():
    storage = Storage(10.0)

    async def go() -> float:
        writer = storage.writer(answers=100)
        for each in lines(100):
            await writer.append(each)
        return now()

    # 50 are being written and 50 have come since; it was for the first 50 that the writing began.
    assert run_in_virtual_time(go()) < 1
    assert len(storage.began) == 1


def test_whoever_appends_too_much_waits_for_the_store_and_no_longer():
    storage = Storage(10.0)

    async def go() -> list[float]:
        writer = storage.writer(answers=100)
        times = []
        for each in lines(151):
            await writer.append(each)
            times.append(now())
        return times

    times = run_in_virtual_time(go())
    assert times[99] < 1
    assert [round(time) for time in times[100:150]] == [10] * 50
    # The second write began when the first had ended.
    assert round(times[150]) == 20


def test_few_lines_are_written_when_the_first_of_them_is_old():
    storage = Storage()

    async def go() -> None:
        writer = storage.writer(seconds=5.0)
        await asyncio.sleep(1)
        await writer.append(line(0))
        await asyncio.sleep(3)
        await writer.append(line(1))
        await asyncio.sleep(60)
        await writer.append(line(2))
        await asyncio.sleep(60)

    run_in_virtual_time(go())
    assert storage.written == [[line(0), line(1)], [line(2)]]
    assert [round(time, 3) for time in storage.began] == [6.0, 69.0]


def test_lines_that_grow_old_while_others_are_written_come_right_after():
    storage = Storage(10.0)

    async def go() -> None:
        writer = storage.writer(answers=4, seconds=5.0)
        for each in lines(3):
            await writer.append(each)
        await asyncio.sleep(60)

    run_in_virtual_time(go())
    assert storage.written == [[line(0), line(1)], [line(2)]]
    assert [round(time, 3) for time in storage.began] == [0.0, 10.0]


def test_a_flush_makes_no_later_line_hurry():
    storage = Storage(1.0)

    async def go() -> None:
        writer = storage.writer()
        await writer.append(line(0))
        flush = asyncio.create_task(writer.flush())
        await asyncio.sleep(0.5)
        # Nothing is buffered now, and the first line not durable yet.
        await writer.flush()
        await flush
        await writer.append(line(1))
        await asyncio.sleep(3)
        assert storage.written == [[line(0)]]

    run_in_virtual_time(go())


def test_after_a_failure_everybody_is_told_and_closing_tries_once_more():
    error = ConnectionError("the store is away")
    storage = Storage(1.0, errors=[error])

    async def go() -> None:
        writer = storage.writer(answers=4)
        waiting = [asyncio.create_task(writer.append(each)) for each in lines(7)]
        await asyncio.wait(waiting)
        # The three that were over the bound learn it at once; to the others it had been promised to be saved.
        assert [task.exception() for task in waiting] == [None] * 4 + [error] * 3
        assert storage.failures == [error]
        for call in (lambda: writer.append(line(7)), writer.flush):
            with pytest.raises(ConnectionError, match="the store is away"):
                await call()
        await asyncio.sleep(60)
        assert len(storage.began) == 1
        assert await writer.close(seconds=2) is None

    run_in_virtual_time(go())
    assert storage.failures == [error]
    assert storage.durable == lines(8)


@pytest.mark.parametrize("answers", [1, 512])
def test_closing_does_not_wait_longer_than_it_may_and_says_what_was_given_up(answers):
    """Whether the writing has begun already or not."""
    storage = Storage(100.0)

    async def go() -> tuple[str | None, float, int]:
        writer = storage.writer(answers=answers)
        await writer.append(line(0))
        reason = await writer.close(seconds=2)
        return reason, now(), writer.waiting

    reason, time, waiting = run_in_virtual_time(go())
    assert reason == "the store took longer than 2 s"
    assert round(time, 3) == 2.0
    assert waiting == 1


def test_closing_after_a_store_that_stays_away_gives_its_error():
    storage = Storage(errors=[OSError("no route"), OSError("no route still")])

    async def go() -> str | None:
        writer = storage.writer()
        await writer.append(line(0))
        with pytest.raises(OSError, match="no route"):
            await writer.flush()
        return await writer.close(seconds=2)

    # The first error is what everything else came from.
    assert run_in_virtual_time(go()) == "OSError: no route"
    assert len(storage.failures) == 1


def test_a_failure_that_comes_at_the_end_stops_nobody_any_more():
    storage = Storage(errors=[OSError("no route")])

    async def go() -> str | None:
        writer = storage.writer()
        await writer.append(line(0))
        return await writer.close(seconds=2)

    assert run_in_virtual_time(go()) == "OSError: no route"
    assert storage.failures == []


def test_closing_waits_for_what_is_written_and_writes_the_rest():
    storage = Storage(1.0)

    async def go() -> str | None:
        writer = storage.writer(answers=4)
        for each in lines(3):
            await writer.append(each)
        return await writer.close(seconds=3)

    assert run_in_virtual_time(go()) is None
    assert storage.written == [[line(0), line(1)], [line(2)]]
    assert storage.most_writing == 1


def test_a_line_whose_append_is_cancelled_is_kept():
    storage = Storage(1.0)

    async def go() -> None:
        writer = storage.writer(answers=2)
        tasks = [asyncio.create_task(writer.append(each)) for each in lines(5)]
        await asyncio.sleep(0.5)
        for task in tasks:
            task.cancel()
        assert await writer.close(seconds=5) is None

    run_in_virtual_time(go())
    assert storage.durable == lines(5)


def test_who_waits_and_is_cancelled_does_not_cancel_the_writing():
    storage = Storage(1.0)

    async def go() -> None:
        writer = storage.writer()
        await writer.append(line(0))
        flush = asyncio.create_task(writer.flush())
        await asyncio.sleep(0.5)
        flush.cancel()
        with suppress(asyncio.CancelledError):
            await flush
        await asyncio.sleep(1)

    run_in_virtual_time(go())
    assert storage.durable == lines(1)


def test_lines_of_a_write_that_is_cancelled_from_outside_are_written_by_the_next():
    storage = Storage(1.0)

    async def go() -> None:
        writer = storage.writer(answers=4)
        for each in lines(2):
            await writer.append(each)
        await asyncio.sleep(0.5)
        assert writer._writing is not None
        writer._writing.cancel()
        await asyncio.sleep(0)
        await writer.append(line(2))
        await writer.flush()

    run_in_virtual_time(go())
    assert storage.durable == lines(3)
    assert not storage.failures


def test_what_is_appended_after_the_end_is_refused():
    storage = Storage()

    async def go() -> None:
        writer = storage.writer()
        assert await writer.close(seconds=1) is None
        with pytest.raises(RuntimeError, match="closed"):
            await writer.append(line(0))
        await asyncio.sleep(60)

    run_in_virtual_time(go())
    assert storage.written == []


def test_no_timer_outlives_the_end():
    storage = Storage(100.0)

    async def go() -> list[Any]:
        writer = storage.writer(answers=2, seconds=5)
        for each in lines(2):
            await writer.append(each)
        timer = writer._timer
        assert timer is not None
        await writer.close(seconds=1)
        return [timer.cancelled(), writer._timer]

    assert run_in_virtual_time(go()) == [True, None]


@pytest.mark.parametrize(
    "wrong",
    [
        {"answers": 0},
        {"answers": -1},
        {"answers": 1.5},
        {"answers": True},
        {"bytes": 0},
        {"bytes": "1"},
        {"seconds": 0},
        {"seconds": -0.5},
        {"seconds": math.nan},
        {"seconds": None},
    ],
)
def test_a_policy_that_makes_no_sense_is_refused_with_the_remedy(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(ConfigError, match=f"{name}=.* give a .*number above 0") as caught:
        FlushPolicy(**wrong)
    assert repr(value) in str(caught.value)


def test_all_that_share_a_window_wait_together_and_make_room_for_each_other():
    async def go() -> None:
        store = Storage(1.0)
        window = Window(FlushPolicy(answers=10, seconds=3600))
        writers = [
            WriteBehind(
                store.write, window=window, in_thread=store.in_thread, on_failure=store.failures.append
            )
            for _ in range(3)
        ]
        # The first holds what fills the window nearly by half, which is no reason for it to write.
        for number in range(4):
            await writers[0].append(line(number))
        assert store.writing == 0
        most = 0
        for number in range(4, 60):
            await writers[1 + number % 2].append(line(number))
            most = max(most, sum(each.waiting for each in writers))
        assert most <= 10
        assert writers[0].waiting == 0, "it was asked to make room"
        for each in writers:
            await each.flush()
            assert await each.close(seconds=1) is None
        assert sorted(store.durable) == lines(60)

    run_in_virtual_time(go())
