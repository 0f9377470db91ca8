"""What a run waited for."""

from __future__ import annotations

import asyncio

import pytest

from airflow_vlm_provider.bottleneck import FEWEST_LOOKS, Bottleneck
from tests.support.fakes import ScriptedEngine
from tests.support.place import Place


def test_the_engine_binds_when_it_has_as_many_as_it_takes_else_what_is_prepared_else_the_source():
    # Of three that the engine has, two are under way.
    under_way = 0
    gauge = Bottleneck(lambda: 2, lambda: under_way)
    for _ in range(2):
        gauge.look()
        with gauge.preparing():
            gauge.look()
            assert gauge.in_preparation == 1
            with gauge.asking():
                under_way = 1
                gauge.look()
                with gauge.asking():
                    under_way = 2
                    gauge.look()
        with gauge.asking(), gauge.asking(), gauge.asking():
            gauge.look()
        under_way = 0
    with pytest.raises(ValueError), gauge.preparing(), gauge.asking():
        raise ValueError
    assert gauge.in_preparation == 0
    assert gauge.shares() == {"source": 0.2, "preparation": 0.4, "engine": 0.4}
    sentence = gauge.sentence()
    assert sentence is not None
    assert "preparation 40%, engine 40%, source 20% of the time" in sentence
    # At two of five looks two, at one of them one.
    assert "1.0 requests were in flight, and the window held 2.0. A closer storage" in sentence


def test_of_a_run_that_was_too_short_to_tell_nothing_is_said():
    gauge = Bottleneck(lambda: 2)
    for _ in range(FEWEST_LOOKS - 1):
        gauge.look()
        assert gauge.sentence() is None
    gauge.look()
    assert "source 100%" in str(gauge.sentence())


def test_a_run_with_a_slow_engine_is_bound_by_it(tmp_path):
    place = Place(tmp_path)
    shard = place.shard("a.jsonl", [{"text": f"{number}"} for number in range(80)])
    engine = ScriptedEngine(delay=lambda about: 0.1, concurrency=4)
    runner = place.runner(engine)

    async def go() -> None:
        async with engine:
            await runner.run_all([shard])

    asyncio.run(go())
    shares = runner.bottleneck.shares()
    assert shares["engine"] > 0.5, shares


def test_why_the_engine_took_no_more_is_said_when_it_was_the_engine():
    said: list[str | None] = ["vLLM had 3.1 requests waiting on average. A faster GPU would help."]
    gauge = Bottleneck(lambda: 1, lambda: 1, lambda: said[0])
    for _ in range(10):
        gauge.look()
    assert str(gauge.sentence()).endswith(
        "A faster source or destination, or smaller rows, would make this faster."
    )
    with gauge.asking():
        for _ in range(30):
            gauge.look()
    # What helps is said once, and by whom it is known.
    assert str(gauge.sentence()).endswith(f"the window held 1.0. {said[0]}")
    said[0] = None
    assert str(gauge.sentence()).endswith(
        "the window held 1.0. A faster engine, or fewer pixels and tokens for it, would make this faster."
    )


def test_when_there_are_no_more_samples_it_is_the_end_and_not_the_source():
    gauge = Bottleneck(lambda: 2)
    gauge.look()
    gauge.source_has_ended = True
    for _ in range(6):
        with gauge.asking():
            gauge.look()
    with gauge.asking(), gauge.asking():
        gauge.look()
    with gauge.asking(), gauge.preparing():
        gauge.look()
    gauge.look()
    assert gauge.shares() == {"end": 0.7, "source": 0.1, "preparation": 0.1, "engine": 0.1}
    assert "More shards for each task would make this faster" in str(gauge.sentence())


def test_the_end_of_a_run_begins_when_its_last_shard_was_read(tmp_path):
    place = Place(tmp_path)
    shards = [
        place.shard(name, [{"text": f"{name} {number}"} for number in range(count)])
        for name, count in (("a.jsonl", 2), ("b.jsonl", 200))
    ]
    ended: list[bool] = []

    def delay(about: object) -> float:
        ended.append(runner.bottleneck.source_has_ended)
        return 0.01

    engine = ScriptedEngine(delay=delay, concurrency=4)
    runner = place.runner(engine)

    async def go() -> None:
        async with engine:
            await runner.run_all(shards)

    asyncio.run(go())
    assert len(ended) == 202
    assert not any(ended[:100])
    assert ended[-1]


def test_an_engine_that_takes_fewer_at_the_moment_binds_with_fewer():
    windows = iter([4, 1, 1, 4])
    gauge = Bottleneck(lambda: next(windows))
    with gauge.asking():
        for _ in range(4):
            gauge.look()
    assert gauge.shares() == {"engine": 0.5, "source": 0.5}
