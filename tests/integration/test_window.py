"""The engine's window against a server in a process of its own that tells of itself as vLLM does, or does not."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

import pytest

from airflow_vlm_provider.engines.openai import OpenAIEngine
from airflow_vlm_provider.engines.pressure import FIRST_SIZE
from tests.support.openai_engines import engine_for, request_about, run_engine
from tests.support.place import Place
from tests.support.stub_endpoint import StubServer, start_stub

pytestmark = [pytest.mark.integration, pytest.mark.timeout(120)]


async def _ask_on(engine: OpenAIEngine, at_once: int) -> None:
    """Ask until cancelled, so many at once."""

    async def one(number: int) -> None:
        while True:
            await engine.ask(request_about(number))

    await asyncio.gather(*(one(number) for number in range(at_once)))


async def _watched(
    engines: list[OpenAIEngine], stub: StubServer, *, settle: float, looks: int
) -> list[dict[str, Any]]:
    """Ask with all engines at once, and look at the server and their windows now and then once it has settled."""
    async with engines[0]:
        asking = [asyncio.create_task(_ask_on(engines[0], 100))]
        for engine in engines[1:]:
            await engine.__aenter__()
            asking.append(asyncio.create_task(_ask_on(engine, 100)))
        try:
            await asyncio.sleep(settle)
            seen = []
            for _ in range(looks):
                await asyncio.sleep(0.2)
                stats = await asyncio.to_thread(stub.stats)
                seen.append({**stats, "windows": [engine.window for engine in engines]})
            return seen
        finally:
            for task in asking:
                task.cancel()
            await asyncio.gather(*asking, return_exceptions=True)
            for engine in engines[1:]:
                await engine.__aexit__(None, None, None)


def test_the_window_follows_what_vllm_tells_of_itself(caplog):
    caplog.set_level(logging.INFO, logger="airflow_vlm_provider")
    with start_stub(latency=0.5, jitter=1.0, capacity=12, metrics=True) as stub:
        engine = engine_for(stub, concurrency=96)
        seen = asyncio.run(_watched([engine], stub, settle=8.0, looks=10))
    # All of its places are taken, and few requests wait for one.
    assert sum(stats["serving"] for stats in seen) / len(seen) >= 10
    assert sum(stats["waiting"] for stats in seen) / len(seen) <= 8
    assert 12 < engine.window <= 20
    assert "requests waiting on average" in str(engine.pressure)
    said = [record.message for record in caplog.records if "can't take more" in record.message]
    assert len(said) == 1


def test_two_tasks_on_one_vllm_get_the_same_window():
    with start_stub(latency=0.5, jitter=1.0, capacity=24, metrics=True) as stub:
        engines = [engine_for(stub, concurrency=96) for _ in range(2)]
        seen = asyncio.run(_watched(engines, stub, settle=15.0, looks=30))
    # From moment to moment they differ more.
    first, second = (
        sum(sizes) / len(seen) for sizes in zip(*(each["windows"] for each in seen), strict=True)
    )
    assert max(first, second) <= 1.3 * min(first, second) + 1
    assert sum(stats["serving"] for stats in seen) / len(seen) >= 20
    assert sum(stats["waiting"] for stats in seen) / len(seen) <= 14


def test_a_server_with_room_gets_all_that_the_author_allows():
    with start_stub(latency=0.5, capacity=500, metrics=True) as stub:
        engine = engine_for(stub, concurrency=96)
        asyncio.run(_watched([engine], stub, settle=4.0, looks=1))
        assert engine.window == 96
        assert stub.stats()["max_concurrent"] == 96


def test_whoever_tells_nothing_is_asked_once_and_nobody_notices(caplog):
    caplog.set_level(logging.INFO, logger="airflow_vlm_provider")
    with start_stub(latency=1.0) as stub:
        engine = engine_for(stub, concurrency=40)
        seen = asyncio.run(_watched([engine], stub, settle=3.5, looks=1))
    assert seen[-1]["looks"] == 1
    assert set(seen[-1]["by_status"]) == {"200"}
    assert engine.window == 40
    assert not caplog.records


def test_a_server_that_is_not_at_work_is_not_looked_at():
    with start_stub(metrics=True) as stub:

        async def use(engine: OpenAIEngine) -> None:
            await engine.ask(request_about())
            await asyncio.sleep(2.5)

        run_engine(engine_for(stub), use)
        assert stub.stats()["looks"] == 0


@pytest.mark.parametrize("path", ["v2", "openai"])
def test_only_beside_v1_there_may_be_metrics(path):
    with start_stub(metrics=True) as stub:

        async def use(engine: OpenAIEngine) -> None:
            asking = asyncio.create_task(_ask_on(engine, 2))
            await asyncio.wait([asking], timeout=2.0)
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

        run_engine(engine_for(stub, base_url=f"{stub.root}/{path}"), use)
        assert stub.stats()["looks"] == 0


def test_with_rates_that_bind_few_requests_are_in_flight_and_larger_rates_are_what_helps(tmp_path):
    place = Place(tmp_path)
    shard = place.shard("a.jsonl", [{"text": f"{number}"} for number in range(120)])
    with start_stub(latency=0.1) as stub:
        engine = engine_for(stub, requests_per_minute=1200, concurrency=32)
        runner: Any = place.runner(engine)  # type: ignore[arg-type]

        async def run() -> None:
            async with engine:
                await runner.run_all([shard])

        asyncio.run(run())
    said = runner.bottleneck.sentence()
    assert said.startswith("What bound the run: engine ")
    assert float(said.partition("On average ")[2].split()[0]) < 8
    assert "of 120 requests were held back by the connection's rates per minute. Larger ones" in said
    assert "A faster engine" not in said
    assert engine.in_flight == 0


def test_refusals_make_the_window_small_and_are_told_of():
    with start_stub(latency=0.2, faults={"rate_limit_bare": 0.2}) as stub:
        engine = engine_for(stub, concurrency=64)
        asyncio.run(_watched([engine], stub, settle=3.0, looks=1))
        assert engine.window < FIRST_SIZE
        assert "were turned away or not answered in time" in str(engine.pressure)
