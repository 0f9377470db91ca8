from __future__ import annotations

import asyncio
import logging

import pytest

from airflow_vlm_provider.engines.failures import PassingError
from airflow_vlm_provider.engines.limits import Limits, TokenEstimate
from airflow_vlm_provider.engines.pressure import FIRST_SIZE
from airflow_vlm_provider.errors import SampleError
from airflow_vlm_provider.types import Answer, Media, Request, Usage
from tests.support.virtual_time import run_in_virtual_time


async def _send(limits: Limits, amounts: list[float]) -> list[tuple[float, int]]:
    """Ask for all permits at once; when each was given, in order."""
    given: list[tuple[float, int]] = []

    async def one(index: int, tokens: float) -> None:
        await limits.permit(tokens)
        given.append((asyncio.get_running_loop().time(), index))

    await asyncio.gather(*(one(index, tokens) for index, tokens in enumerate(amounts)))
    return given


def _most_in_a_minute(given: list[tuple[float, int]], amounts: list[float]) -> float:
    return max(sum(amounts[i] for at, i in given if start <= at < start + 60) for start, _ in given)


@pytest.mark.parametrize("rate", [6, 60, 600])
def test_no_minute_sees_more_requests_than_its_due(rate):
    amounts = [1.0] * (rate * 3)
    given = run_in_virtual_time(_send(Limits(concurrency=1000, requests_per_minute=rate), amounts))
    # One second's worth may go out at once.
    assert _most_in_a_minute(given, amounts) <= rate + max(1, rate / 60)
    # And no time is wasted: three minutes' worth takes three minutes.
    assert given[-1][0] == pytest.approx(180, rel=0.2)


def test_no_minute_sees_many_more_tokens_than_its_due():
    amounts = [3000.0, 50.0] * 100
    given = run_in_virtual_time(_send(Limits(concurrency=1000, tokens_per_minute=60_000), amounts))
    assert _most_in_a_minute(given, amounts) <= 60_000 * 7 / 6 + 3000
    assert given[-1][0] == pytest.approx(sum(amounts) / 1000, rel=0.1)


def test_a_request_larger_than_the_bucket_passes_and_is_paid_for_in_full():
    given = run_in_virtual_time(_send(Limits(concurrency=10, tokens_per_minute=600), [1200.0, 1.0]))
    assert [index for _, index in given] == [0, 1]
    assert given[0][0] == pytest.approx((1200 - 100) / 10)


def test_first_come_first_served_whatever_the_size():
    amounts = [5000.0, 10.0, 4000.0, 10.0, 3000.0, 10.0]
    given = run_in_virtual_time(_send(Limits(concurrency=10, tokens_per_minute=6000), amounts))
    assert [index for _, index in given] == [0, 1, 2, 3, 4, 5]


def test_a_pause_holds_everybody_and_the_longer_one_counts():
    async def run() -> list[tuple[float, int]]:
        limits = Limits(concurrency=10)
        limits.pause(30)
        limits.pause(5)
        return await _send(limits, [1.0] * 5)

    given = run_in_virtual_time(run())
    assert len(given) == 5
    assert all(at >= 30 for at, _ in given)


def test_a_pause_that_grows_while_it_is_waited_out_is_waited_out_to_its_new_end():
    async def run() -> list[tuple[float, int]]:
        limits = Limits(concurrency=10)
        limits.pause(10)
        asyncio.get_running_loop().call_later(5, limits.pause, 20)
        return await _send(limits, [1.0])

    assert run_in_virtual_time(run())[0][0] >= 25


def test_closing_ends_sleeps_and_pauses_at_once():
    async def run() -> float:
        limits = Limits(concurrency=10)
        limits.pause(1000)
        asyncio.get_running_loop().call_later(1, limits.close)
        await asyncio.gather(limits.sleep(500), *(limits.permit(1.0) for _ in range(3)))
        await limits.sleep(500)
        return asyncio.get_running_loop().time()

    assert run_in_virtual_time(run()) == pytest.approx(1, abs=0.01)


def test_a_cancelled_wait_holds_nobody_up():
    async def run() -> float:
        limits = Limits(concurrency=10, requests_per_minute=1)
        await limits.permit(0)
        waiting = asyncio.ensure_future(limits.permit(0))
        await asyncio.sleep(1)
        waiting.cancel()
        await limits.permit(0)
        return asyncio.get_running_loop().time()

    assert run_in_virtual_time(run()) == pytest.approx(60, rel=0.01)


def _request(text: str = "x" * 400, n: int = 1) -> Request:
    return Request(None, (Media("image", "image/jpeg", b"", "a"), text), n=n)


def test_the_estimate_learns_what_prompts_are_billed_and_keeps_what_is_reserved():
    estimate = TokenEstimate()
    first = estimate.of(_request(), max_tokens=500)
    for _ in range(10):
        estimate.learn(_request(), Usage(1, 220, 3))
    assert first > 1000
    assert estimate.of(_request(), max_tokens=500) == pytest.approx(220 + 500)
    assert estimate.of(_request(n=4), max_tokens=500) == pytest.approx(220 + 2000)


def test_without_max_tokens_the_answers_length_is_learnt_too():
    estimate = TokenEstimate()
    for _ in range(10_000):
        estimate.learn(_request(), Usage(1, 220, 30))
    assert estimate.of(_request(), max_tokens=None) == pytest.approx(250, rel=0.01)


def test_an_endpoint_that_reports_no_usage_leaves_the_guess():
    estimate = TokenEstimate()
    before = estimate.of(_request(), max_tokens=10)
    estimate.learn(_request(), Usage(1, 0, 0))
    assert estimate.of(_request(), max_tokens=10) == before


def _asked_through(limits: Limits, endings: list[Answer | Exception]) -> None:
    async def main() -> None:
        async def end(ending: Answer | Exception) -> Answer | Exception:
            await asyncio.sleep(1)
            return ending

        async def one(ending: Answer | Exception) -> None:
            async with limits.window:
                assert await limits.watched(end(ending)) is ending

        await asyncio.gather(*map(one, endings))

    run_in_virtual_time(main())


@pytest.mark.parametrize(
    ("ending", "smaller"),
    [
        (PassingError("busy", reason="rate_limit"), True),
        (PassingError("slow", reason="timeout"), True),
        (PassingError("gone", reason="unreachable"), False),
        (PassingError("odd"), False),
        (SampleError("rejected", "too large"), False),
        (Answer((), "m"), False),
    ],
    ids=lambda value: str(value)[:10],
)
def test_only_what_the_endpoint_can_not_take_makes_the_window_smaller(ending, smaller):
    limits = Limits(concurrency=20)
    _asked_through(limits, [ending] * 20)
    assert limits.window.size == (10 if smaller else 20)
    assert (limits.window.in_flight, limits.pressure.in_flight) == (0, 0)


def test_a_request_that_is_cancelled_is_not_in_flight_any_more():
    async def main() -> int:
        limits = Limits(concurrency=2)
        asking = asyncio.ensure_future(limits.watched(asyncio.Event().wait()))
        await asyncio.sleep(1)
        asking.cancel()
        await asyncio.wait([asking])
        return limits.pressure.in_flight

    assert run_in_virtual_time(main()) == 0


def test_that_the_endpoint_takes_no_more_is_logged_once(caplog):
    caplog.set_level(logging.INFO, logger="airflow_vlm_provider")
    limits = Limits(concurrency=64)
    for _ in range(3):
        _asked_through(limits, [PassingError("busy", reason="rate_limit")] * 64)
    assert [record.message for record in caplog.records] == [
        "The endpoint can't take more for now: 31 requests in flight, which follow its load"
    ]


def _let_through(limits: Limits, number: int, *, seconds: float = 0.5) -> None:
    """Ask as the engine does: in the window, permitted, sent."""

    async def main() -> None:
        async def answer() -> Answer:
            await asyncio.sleep(seconds)
            return Answer((), "m")

        async def one() -> None:
            async with limits.window:
                await limits.permit(1.0)
                await limits.watched(answer())

        await asyncio.gather(*(one() for _ in range(number)))

    run_in_virtual_time(main())


@pytest.mark.parametrize("rates", [{"requests_per_minute": 60}, {"tokens_per_minute": 6}], ids=str)
def test_that_the_connections_rates_bind_is_said_and_that_larger_ones_would_help(rates):
    limits = Limits(concurrency=32, **rates)
    _let_through(limits, 62)
    said = str(limits.sentence())
    assert " of 62 requests were held back by the connection's rates per minute." in said
    assert "requests_per_minute" in said
    assert "faster GPU" not in said
    assert "concurrency" not in said


def test_rates_that_hold_back_a_few_now_and_then_are_not_what_binds():
    limits = Limits(concurrency=20, requests_per_minute=600)
    # Ten of the first twenty wait; after that as many as come are let through.
    _let_through(limits, 400, seconds=2.5)
    assert "rates" not in str(limits.sentence())


def test_a_pause_that_the_endpoint_asks_for_is_not_the_connections_rates():
    async def main(limits: Limits) -> None:
        for _ in range(10):
            limits.pause(5)
            await asyncio.gather(*(limits.permit(1.0) for _ in range(3)))

    for rates in ({}, {"requests_per_minute": 6000}):
        limits = Limits(concurrency=32, **rates)
        run_in_virtual_time(main(limits))
        assert "rates" not in str(limits.sentence())


def test_who_waits_behind_others_that_the_rates_hold_back_is_held_back_too():
    # Each waits a few milliseconds for the bucket, and much longer for those before it.
    limits = Limits(concurrency=1000, requests_per_minute=30_000)
    run_in_virtual_time(_send(limits, [1.0] * 2000))
    assert int(str(limits.sentence()).split(" of 2000 requests")[0]) > 1400


def test_it_begins_with_the_first_window_that_it_is_given():
    assert Limits(concurrency=64, first_window=8).window.size == 8
    assert Limits(concurrency=4, first_window=8).window.size == 4
    assert Limits(concurrency=64).window.size == FIRST_SIZE
