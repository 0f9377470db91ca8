"""Videos, candidates and schemas through real vLLM servers with tiny models, whose weights and words are random."""

from __future__ import annotations

import asyncio
import io
import json
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from airflow_vlm_provider.engines.openai import OpenAIEngine
from airflow_vlm_provider.errors import ConfigError, NoVideoError, SampleError
from airflow_vlm_provider.shards.media import MediaLoader
from airflow_vlm_provider.types import Answer, Media, Request
from demo.moving import MovingDrawing, draw_moving
from tests.support.openai_engines import ask, ask_all, run_engine
from tests.support.place import Place
from tests.support.video_step import VideoStep
from tests.support.vllm_server import BLOCK_SIZE, count, require_vllm, start_together, start_vllm

pytestmark = pytest.mark.integration

SIDE = 64
# A picture of this size, and the same place in two frames of a clip, are so many tokens to either model.
PATCHES = 4
MAX_MODEL_LEN = 1024


@dataclass(frozen=True)
class Server:
    """A model that is served.

    :param per_two_frames: Tokens that two frames of a clip take.
    """

    base_url: str
    per_two_frames: int


@pytest.fixture(scope="module")
def urls(tiny, tiny_qwen3, tmp_path_factory) -> Iterator[dict[str, str]]:
    require_vllm()
    folder: Path = tmp_path_factory.mktemp("vllm")
    servers = {
        "qwen2.5-vl": start_vllm(Path(tiny), folder / "qwen.log", images=8),
        "qwen3-vl": start_vllm(Path(tiny_qwen3), folder / "qwen3.log", images=8),
        "images only": start_vllm(Path(tiny), folder / "images.log", videos=0),
    }
    with start_together(*servers.values()) as started:
        yield dict(zip(servers, started, strict=True))


@pytest.fixture(params=["qwen2.5-vl", "qwen3-vl"])
def server(urls, request) -> Server:
    # Qwen3-VL reads the time in front of every two frames: "<0.2 seconds>", a token for each character and marker.
    return Server(urls[request.param], PATCHES if request.param == "qwen2.5-vl" else PATCHES + 14)


def engine_at(base_url: str, **options: Any) -> OpenAIEngine:
    return OpenAIEngine(**{"base_url": base_url, "model": "demo", "timeout": 120.0, **options})


def moving(count: int, *, seed: int = 0, fps: float = 2.0, side: int = SIDE) -> MovingDrawing:
    return draw_moving(random.Random(seed), side=side, aspect=(1.0, 1.0), seconds=count / fps, fps=fps)


def clip(frames: int, **options: Any) -> Media:
    return Media("video", "video/mp4", moving(frames, **options).encode(), "clip.mp4")


def about(*parts: Any, **more: Any) -> Request:
    sampling = {"temperature": 0, "max_tokens": 8, **more.pop("sampling", {})}
    return Request(None, (*parts, "Describe."), sampling=sampling, **more)


def prompt_tokens(server: Server, *requests: Request) -> list[int]:
    answers = ask_all(engine_at(server.base_url), list(requests))
    assert [type(answer) for answer in answers] == [Answer] * len(requests)
    return [answer.usage.prompt_tokens for answer in answers]


# Videos and frames


def test_a_clip_is_looked_at_whole_and_costs_less_than_its_frames_as_images(server):
    frames = moving(8).frames
    images = [Media("image", "image/png", _png(frame), "") for frame in frames]
    text, pictures, *clips = prompt_tokens(
        server, about(), about(*images), *(about(clip(count)) for count in (2, 4, 8, 16))
    )
    # Each image and each clip has a token before and one after it.
    assert pictures == text + 8 * (PATCHES + 2)
    # Two frames of a clip are one to the model; none of them is left out.
    assert clips == [text + 2 + server.per_two_frames * count // 2 for count in (2, 4, 8, 16)]


def test_as_many_frames_as_a_step_takes_of_a_video_are_all_looked_at(server):
    some, all_of_them = prompt_tokens(server, about(clip(20)), about(clip(32)))
    assert all_of_them - some >= 6 * server.per_two_frames


def test_what_a_clip_shows_is_what_is_answered_about(server):
    clips = [clip(8, seed=seed) for seed in range(6)]
    answers = ask_all(engine_at(server.base_url), [about(each) for each in (*clips, *clips)])
    texts = [answer.choices[0].text for answer in answers]
    # The words are noise, but noise that the clip decides.
    assert texts[:6] == texts[6:]
    assert len(set(texts)) > 3


def test_a_schema_holds_for_what_is_said_of_a_video(server):
    schema = {
        "type": "object",
        "properties": {
            "motion": {"enum": ["left", "right", "up", "down", "none"]},
            "objects": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 3},
        },
        "required": ["motion", "objects"],
        "additionalProperties": False,
    }
    requests = [
        about(
            clip(4, seed=seed), schema=schema, sampling={"max_tokens": 300, "temperature": 1.0, "seed": seed}
        )
        for seed in range(4)
    ]
    for answer in ask_all(engine_at(server.base_url), requests):
        assert answer.choices[0].finish_reason == "stop"
        # Strings of a bounded length may hold control characters, as the grammar has it.
        said = json.loads(answer.choices[0].text, strict=False)
        assert set(said) == {"motion", "objects"}
        assert said["motion"] in ("left", "right", "up", "down", "none")
        assert all(len(each) <= 8 for each in said["objects"])


# Candidates


def test_four_candidates_are_one_request_and_the_prompt_is_read_once(server):
    url = server.base_url
    before = _counted(url)
    # Nobody has asked about these clips before, so nothing of them is kept yet.
    requests = [
        about(clip(16, seed=100 + n), n=4, sampling={"temperature": 1.0, "seed": n}) for n in range(3)
    ]
    answers = ask_all(engine_at(url), requests)
    prompt = sum(answer.usage.prompt_tokens for answer in answers)
    # vLLM counts every candidate as a sequence of its own.
    counted = _wait_for(url, before, sequences=12)
    assert counted["http"] == 3
    assert [len(answer.choices) for answer in answers] == [4] * 3
    assert all(len({choice.text for choice in answer.choices}) > 1 for answer in answers)
    assert sum(answer.usage.requests for answer in answers) == 3
    # Billed once, and computed once but for the last piece of each, which is not long enough to be shared.
    assert prompt <= counted["computed"] < prompt + 3 * 3 * BLOCK_SIZE
    assert counted["pictures"] == 3


def _counted(url: str) -> dict[str, float]:
    return {
        "http": count(url, "http_requests_total", handler="/v1/chat/completions"),
        "sequences": count(url, "vllm:request_success_total"),
        "computed": count(url, "vllm:prompt_tokens_by_source_total", source="local_compute"),
        "pictures": count(url, "vllm:mm_cache_queries_total"),
    }


def _wait_for(url: str, before: dict[str, float], *, sequences: int) -> dict[str, float]:
    """What has been counted since: the last answer is on its way a moment before it is."""
    deadline = time.monotonic() + 30
    while True:
        counted = {name: value - before[name] for name, value in _counted(url).items()}
        if counted["sequences"] >= sequences or time.monotonic() > deadline:
            assert counted["sequences"] == sequences
            return counted
        time.sleep(0.1)


# What goes wrong


def test_a_clip_that_cannot_be_read_or_is_too_long_is_at_fault_itself(server):
    whole = clip(16)
    broken = [b"", b"no video", whole.data[: len(whole.data) // 2], whole.data[:-100]]
    long = about(clip(32, side=224), clip(32, side=224, seed=1), "and so on " * MAX_MODEL_LEN)

    async def use(engine: OpenAIEngine) -> list[Any]:
        requests = [about(Media("video", "video/mp4", data, "broken.mp4")) for data in broken]
        errors = await asyncio.gather(*map(engine.ask, [*requests, long]), return_exceptions=True)
        assert engine.takes_video
        return [*errors, await engine.ask(about(whole))]

    *errors, answer = run_engine(engine_at(server.base_url), use)
    assert [(type(error), error.kind, error.attempts) for error in errors] == [
        (SampleError, "rejected", 1)
    ] * 5
    assert isinstance(answer, Answer)
    assert "maximum context length" in errors[-1].message
    assert "max_frames" in errors[-1].message


def test_more_videos_or_images_than_a_prompt_may_hold_is_the_samples_own_fault(server):
    image = Media("image", "image/png", _png(moving(1).frames[0]), "")
    errors = ask_all(engine_at(server.base_url), [about(*[clip(4)] * 3), about(*[image] * 9)])
    assert [(type(error), error.kind) for error in errors] == [(SampleError, "rejected")] * 2
    assert "At most 2 video(s)" in errors[0].message
    assert "At most 8 image(s)" in errors[1].message


def test_what_the_server_does_not_let_a_request_decide_is_named(server):
    engine = engine_at(server.base_url, model_params={"media_io_kwargs": {"video": {"num_frames": 8}}})
    error = ask(engine, about(clip(4)))
    assert isinstance(error, ConfigError)
    assert "'media_io_kwargs'" in str(error)
    assert "--trust-request-mm-kwargs" in str(error)


# A model without videos


def test_a_model_for_images_says_so_once(urls):
    async def use(engine: OpenAIEngine) -> list[Any]:
        requests = [about(clip(4, seed=seed)) for seed in range(12)]
        errors = await asyncio.gather(*map(engine.ask, requests), return_exceptions=True)
        assert not engine.takes_video
        image = Media("image", "image/png", _png(moving(1).frames[0]), "")
        return [*errors, await engine.ask(about(image))]

    *errors, answer = run_engine(engine_at(urls["images only"], concurrency=3), use)
    assert {type(error) for error in errors} == {NoVideoError}
    assert 1 <= sum(error.attempts for error in errors) <= 3
    assert isinstance(answer, Answer)


@pytest.fixture
def place(tmp_path) -> Place:
    place = Place(tmp_path)
    place.media = MediaLoader(source_uri=place.source.uri)  # type: ignore[assignment]
    for index in range(4):
        (place.source_path / f"{index}.mp4").write_bytes(moving(16, seed=index, fps=4).encode())
    return place


def _run(place: Place, url: str) -> tuple[Any, list[Any]]:
    """Caption the place's videos; the manifest and the rows."""
    shard = place.shard("a.jsonl", [{"video": f"{index}.mp4"} for index in range(4)])
    step = VideoStep("auto", fps=1.0, max_frames=4, max_tokens=8, temperature=0)
    (manifest,) = place.run(engine_at(url, concurrency=2), shard, step=step)  # type: ignore[arg-type]
    return manifest, place.output()


def test_a_shard_of_videos_is_committed_by_their_frames_where_the_model_is_one_for_images(urls, place):
    url = urls["images only"]
    before = count(url, "http_requests_total", handler="/v1/chat/completions")
    manifest, rows = _run(place, url)
    assert (manifest.counts.rows_in, manifest.counts.ok, manifest.counts.failed) == (4, 4, 0)
    assert len({row["caption"] for row in rows}) > 1
    # Four images each.
    assert manifest.counts.prompt_tokens > 4 * 4 * (PATCHES + 2)
    # The endpoint saw one request more for each that was in flight when it turned out.
    sent = count(url, "http_requests_total", handler="/v1/chat/completions") - before
    assert 4 < sent <= 6
    assert manifest.counts.requests == sent


def test_a_shard_of_videos_is_committed_by_videos_where_the_model_takes_them(server, place):
    manifest, rows = _run(place, server.base_url)
    assert (manifest.counts.ok, manifest.counts.failed, manifest.counts.requests) == (4, 0, 4)
    assert len({row["caption"] for row in rows}) > 1
    (text,) = prompt_tokens(server, Request(None, ("Describe this video.",), sampling={"max_tokens": 1}))
    # Four frames each, of which two make one place in time.
    assert manifest.counts.prompt_tokens == 4 * (text + 2 + 2 * server.per_two_frames)


def _png(frame: Any) -> bytes:
    out = io.BytesIO()
    frame.save(out, "PNG")
    return out.getvalue()
