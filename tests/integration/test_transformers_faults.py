from __future__ import annotations

import asyncio
import dataclasses
import io
import threading
import weakref
from typing import Any

import pytest
from PIL import Image

from airflow_vlm_provider.engines.transformers import TransformersEngine
from airflow_vlm_provider.errors import EngineError, SampleError
from airflow_vlm_provider.types import Answer, Media, Request
from tests.support.local_engines import (
    ENDLESS_SCHEMA,
    TAGS_SCHEMA,
    answers_of,
    ask_all,
    picture,
    request,
    with_engine,
)

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]


def corrupt() -> Request:
    media = picture(1)
    broken = dataclasses.replace(media, data=media.data[: len(media.data) // 2])
    return dataclasses.replace(request(), parts=(broken, "What?"))


def sliver() -> Request:
    """A picture so narrow that Qwen's processor refuses it."""
    buffer = io.BytesIO()
    Image.new("RGB", (2000, 2)).save(buffer, "PNG")
    return dataclasses.replace(
        request(), parts=(Media("image", "image/png", buffer.getvalue(), "s.png"), "What?")
    )


@pytest.mark.parametrize(
    ("bad", "kind", "says"),
    [
        (corrupt(), "media_corrupt", "decoded"),
        (sliver(), "rejected", "aspect ratio"),
        (request(text="word " * 3000), "rejected", "2048"),
        (request(text="<|image_pad|>"), "rejected", "image_pad"),
    ],
)
def test_a_bad_sample_fails_alone(tiny, bad, kind, says):
    good = [request(seed) for seed in range(7)]

    async def test(engine):
        return await ask_all(engine, [*good[:3], bad, *good[3:]]), await ask_all(engine, good)

    answers, expected = with_engine(tiny, test)
    failed = answers.pop(3)
    assert isinstance(failed, SampleError)
    assert failed.kind == kind
    assert says in failed.message
    assert answers == expected


def test_a_sample_that_breaks_the_forward_pass_fails_alone(tiny, generate):
    poison = request(99)

    def before(size, inputs):
        if (inputs["image_grid_thw"] == inputs["image_grid_thw"].max()).sum() and poison_pixels(inputs):
            raise IndexError("index out of range in self")

    marker: list[Any] = []

    def poison_pixels(inputs):
        import torch

        return any(torch.equal(row, marker[0]) for row in inputs["pixel_values"])

    async def test(engine):
        generate.before = lambda size, inputs: marker.append(inputs["pixel_values"][0].clone())
        await engine.ask(poison)
        generate.before = before
        return await ask_all(engine, [request(1), request(2), poison, request(3)])

    answers = with_engine(tiny, test)
    assert [type(answer) for answer in answers] == [Answer, Answer, SampleError, Answer]
    assert answers[2].kind == "rejected"


@pytest.mark.parametrize(
    "error",
    [
        lambda: __import__("torch").OutOfMemoryError("Allocation on device 0 would exceed allowed memory"),
        lambda: RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        lambda: RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_halves_the_batch_for_good(tiny, generate, error):
    def before(size, inputs):
        if size > 3:
            raise error()

    requests = [request(seed) for seed in range(8)]

    async def test(engine):
        whole = await ask_all(engine, requests)
        generate.before, generate.sizes = before, []
        halved = await ask_all(engine, requests)
        first, generate.sizes = generate.sizes, []
        return whole, halved, first, await ask_all(engine, requests)

    whole, halved, first, again = with_engine(tiny, test, gpu_batch_size=8)
    assert first == [8, 4, 2, 2, 2, 2]
    assert generate.sizes == [2, 2, 2, 2]
    assert whole == halved == again


def test_the_memory_of_a_failed_batch_is_free_when_its_halves_run(tiny, generate):
    import torch

    taken: list[weakref.ref[Any]] = []
    alive: list[bool] = []

    def before(size, inputs):
        alive.append(any(ref() is not None for ref in taken))
        taken.extend(weakref.ref(value) for value in inputs.values() if isinstance(value, torch.Tensor))
        # The precision of the inputs is not the model's, so that moving them makes a copy, as it does on a GPU.
        taken[:] = [ref for ref in taken if ref() is not None and ref().dtype == torch.bfloat16]
        if size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    generate.before = before
    answers = answers_of(tiny, [request(seed) for seed in range(4)], gpu_batch_size=4, dtype="bfloat16")
    assert [type(answer) for answer in answers] == [Answer] * 4
    assert generate.sizes == [4, 2, 1, 1, 1, 1]
    assert alive == [False] * 6


def test_a_sample_that_is_too_large_even_alone_becomes_a_dead_letter(tiny, generate):
    import torch

    def before(size, inputs):
        if inputs["input_ids"].shape[1] > 200:
            raise torch.OutOfMemoryError("CUDA out of memory")

    generate.before = before
    answers = answers_of(tiny, [request(1), request(2, "word " * 200), request(3)])
    assert [type(answer) for answer in answers] == [Answer, SampleError, Answer]
    assert answers[1].kind == "media_too_large"
    assert "max_pixels" in answers[1].message


def test_a_lost_device_ends_the_engine(tiny, generate):
    def before(size, inputs):
        raise RuntimeError("CUDA error: device-side assert triggered")

    async def test(engine):
        generate.before = before
        first = await ask_all(engine, [request(1), request(2)])
        generate.before = lambda size, inputs: None
        return [*first, *await ask_all(engine, [request(3)])]

    errors = with_engine(tiny, test)
    assert [type(error) for error in errors] == [EngineError] * 3
    assert len(generate.sizes) == 1


# Ends.


def test_a_cancelled_request_stops_generating_and_its_neighbour_is_answered(tiny, generate):
    started, cancelled = threading.Event(), threading.Event()
    neighbour = request(1, schema=TAGS_SCHEMA, max_tokens=500)

    async def test(engine):
        expected = await engine.ask(neighbour)
        generate.before = lambda size, inputs: (started.set(), cancelled.wait(60))
        generate.sizes, generate.lengths = [], []
        endless = asyncio.create_task(engine.ask(request(2, schema=ENDLESS_SCHEMA, max_tokens=500)))
        asking = asyncio.create_task(engine.ask(neighbour))
        assert await asyncio.to_thread(started.wait, 60)
        endless.cancel()
        await asyncio.wait([endless])
        cancelled.set()
        return expected, await asking

    expected, answer = with_engine(tiny, test)
    assert answer == expected
    assert generate.sizes == [2]
    assert generate.lengths == [answer.usage.completion_tokens]


def test_leaving_the_engine_stops_what_runs_and_ends_its_threads(tiny, generate):
    before = set(threading.enumerate())
    started = threading.Event()
    generate.before = lambda size, inputs: started.set()

    async def test(engine):
        tasks = [
            asyncio.create_task(engine.ask(request(seed, schema=ENDLESS_SCHEMA, max_tokens=1800)))
            for seed in range(20)
        ]
        assert await asyncio.to_thread(started.wait, 60)
        return tasks

    async def main():
        async with TransformersEngine(model=tiny, device="cpu") as engine:
            tasks = await test(engine)
        return await asyncio.gather(*tasks, return_exceptions=True)

    errors = asyncio.run(main())
    assert {type(error) for error in errors} == {EngineError}
    assert len(generate.lengths) == 1
    assert generate.lengths[0] < 1800
    for thread in set(threading.enumerate()) - before:
        if thread.name.startswith("vlm-"):
            thread.join(60)
            assert not thread.is_alive()


def test_asking_outside_the_context_is_refused(tiny):
    with pytest.raises(EngineError):
        asyncio.run(TransformersEngine(model=tiny).ask(request()))
