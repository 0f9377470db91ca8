"""What a run waited for."""

from __future__ import annotations

import asyncio

import pytest

from airflow_vlm_provider.bottleneck import Bottleneck
from tests.support.fakes import ScriptedEngine
from tests.support.place import Place


def test_the_engine_binds_when_it_has_as_many_as_it_takes_else_what_is_prepared_else_the_source():
    gauge = Bottleneck(lambda: 2)
    assert gauge.sentence() is None
    gauge.look()
    with gauge.preparing():
        gauge.look()
        with gauge.asking():
            gauge.look()
            with gauge.asking():
                gauge.look()
    with gauge.asking(), gauge.asking(), gauge.asking():
        gauge.look()
    with pytest.raises(ValueError), gauge.preparing(), gauge.asking():
        raise ValueError
    assert gauge.shares() == {"source": 0.2, "preparation": 0.4, "engine": 0.4}
    sentence = gauge.sentence()
    assert sentence is not None
    assert "preparation 40%, engine 40%, source 20% of the time" in sentence
    # Two of five looks at a full window of two, one at one request.
    assert "1.0 requests were with the engine, which took 2.0" in sentence


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
    said = "vLLM had 3.1 requests waiting on average, and 97% of its cache in use."
    gauge = Bottleneck(lambda: 1, lambda: said)
    gauge.look()
    assert said not in str(gauge.sentence())
    with gauge.asking():
        gauge.look()
        gauge.look()
    assert f"which took 1.0. {said} A faster engine" in str(gauge.sentence())


def test_an_engine_that_takes_fewer_at_the_moment_binds_with_fewer():
    windows = iter([4, 1, 1, 4])
    gauge = Bottleneck(lambda: next(windows))
    with gauge.asking():
        for _ in range(4):
            gauge.look()
    assert gauge.shares() == {"engine": 0.5, "source": 0.5}
