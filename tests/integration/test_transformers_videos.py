from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from airflow_vlm_provider.errors import NoVideoError, SampleError
from airflow_vlm_provider.types import Answer, Media, Request
from tests.support.clips import clip, frames
from tests.support.local_engines import (
    TAGS_SCHEMA,
    answers_of,
    ask_all,
    picture,
    request,
    texts,
    with_engine,
    work_of,
)

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]

HALVES = (0.0, 0.5, 1.0, 1.5)
every_model = pytest.mark.parametrize("name", ["tiny", "tiny_qwen3"])


@pytest.fixture
def model(name: str, tiny: str, tiny_qwen3: str) -> str:
    return {"tiny": tiny, "tiny_qwen3": tiny_qwen3}[name]


def about(*media: Media, text: str = "What happens?", **changes: Any) -> Request:
    sampling = {"max_tokens": 16, **changes.pop("sampling", {})}
    return Request(system="You watch videos.", parts=(*media, text), sampling=sampling, **changes)


def shown(count: int = 4, first: int = 0, size: tuple[int, int] = (96, 64)) -> Media:
    return clip(frames(count, first=first, size=size), times=[number / 2 for number in range(count)])


@every_model
def test_a_model_with_a_video_processor_takes_videos(model):
    async def test(engine):
        return engine.takes_video, await engine.ask(about(shown()))

    takes_video, answer = with_engine(model, test)
    assert takes_video
    assert isinstance(answer, Answer)
    assert answer.usage.prompt_tokens > 20


@every_model
def test_what_is_seen_in_which_order_and_when_decides_the_answer(model):
    pictures = frames(4)
    asked = [
        about(clip(pictures, times=HALVES)),
        about(clip(pictures[::-1], times=HALVES)),
        about(clip(frames(4, first=2), times=HALVES)),
        about(clip(pictures, times=[20 * time for time in HALVES])),
        about(clip(pictures, times=HALVES)),
    ]
    answers = answers_of(model, asked)
    said = [texts(answer)[0] for answer in answers]
    assert len(set(said[:4])) == 4
    assert said[0] == said[4]


@every_model
def test_videos_and_images_in_a_batch_are_answered_as_each_alone(model, generate):
    asked = [
        about(shown(4)),
        about(shown(7, first=3, size=(64, 96)), text="What? " * 9),
        about(shown(2), shown(5, first=1), text="Compare."),
        about(shown(3), picture(1, side=60), picture(2, side=90)),
        about(picture(3, side=70), shown(6, first=4)),
        request(5, max_tokens=16),
    ]

    async def test(engine):
        return await ask_all(engine, asked), [await engine.ask(each) for each in asked]

    together, alone = with_engine(model, test, gpu_batch_size=8)
    assert generate.sizes[:3] == [3, 2, 1]
    assert together == alone
    assert len({texts(answer)[0] for answer in alone}) == len(asked)


def inputs_of(model: str, generate: Any, *asked: Request) -> list[dict[str, Any]]:
    """What the model is given for each request, with its prompt's text."""
    from transformers import AutoTokenizer

    seen: list[dict[str, Any]] = []
    generate.before = lambda _, inputs: seen.append(inputs)

    async def test(engine):
        return [await engine.ask(each) for each in asked]

    with_engine(model, test)
    tokenizer = AutoTokenizer.from_pretrained(model)
    return [{**inputs, "text": tokenizer.decode(inputs["input_ids"][0])} for inputs in seen]


@pytest.mark.parametrize("name", ["tiny"])
def test_qwen2_5_is_told_how_long_two_frames_last(model, generate):
    slow, fast, uneven = inputs_of(
        model,
        generate,
        about(clip(frames(4), times=[0, 2, 4, 6])),
        about(clip(frames(6), times=[0.1, 0.35, 0.6, 0.85, 1.1, 1.35])),
        about(clip(frames(4), times=[0, 0.5, 0.75, 3])),
    )
    assert slow["second_per_grid_ts"].tolist() == [4.0]
    assert fast["second_per_grid_ts"].tolist() == [0.5]
    assert uneven["second_per_grid_ts"].tolist() == [2.0]
    assert slow["video_grid_thw"][0, 0] == 2
    assert fast["video_grid_thw"][0, 0] == 3


@pytest.mark.parametrize("name", ["tiny_qwen3"])
def test_qwen3_reads_when_each_pair_of_frames_is_seen(model, generate):
    uneven, late = inputs_of(
        model,
        generate,
        about(clip(frames(4), times=[0, 0.5, 7.75, 13])),
        about(clip(frames(3), times=[60, 62, 64])),
    )
    start, end = "<|vision_start|>", "<|vision_end|>"
    marked = uneven["text"].replace("<|video_pad|>", "")
    # Marks around each pair, and none around the video, as the model was taught.
    assert f"user\n<0.2 seconds>{start}{end}<10.4 seconds>{start}{end}What happens?" in marked
    assert "<61.0 seconds>" in late["text"]
    assert "<64.0 seconds>" in late["text"]


@every_model
def test_a_clip_of_one_frame_is_a_video_too(model):
    one, other = answers_of(model, [about(shown(1)), about(shown(1, first=3))])
    assert isinstance(one, Answer)
    assert texts(one) != texts(other)


@every_model
def test_a_broken_clip_fails_alone(model):
    whole = shown()
    broken = [
        dataclasses.replace(whole, data=whole.data[: len(whole.data) // 2]),
        dataclasses.replace(whole, data=b""),
        # What other formats refer to is none of this machine's business.
        clip(frames(4), times=HALVES, container="matroska"),
    ]
    answers = answers_of(model, [about(whole), *map(about, broken), about(whole)])
    assert answers[0] == answers[4]
    assert isinstance(answers[0], Answer)
    for error in answers[1:4]:
        assert isinstance(error, SampleError)
        assert (error.kind, error.media) == ("media_corrupt", "clip.mp4")


@every_model
def test_candidates_cost_one_look_at_the_video(model):
    sampling = {"temperature": 1.0, "seed": 1, "max_tokens": 1}
    one, four = work_of(model, [about(shown(), n=n, sampling=sampling) for n in (1, 4)])
    assert one == four
    assert one["Conv3d"] > 0


@every_model
def test_a_schema_is_kept_about_videos(model):
    (answer,) = answers_of(model, [about(shown(), schema=TAGS_SCHEMA, sampling={"max_tokens": 120})])
    found = json.loads(texts(answer)[0])
    jsonschema.validate(found, TAGS_SCHEMA)
    assert found.keys() == {"tags"}


def without_videos(checkpoint: str, folder: Path) -> str:
    """A copy of a chat model whose template has no place for a video."""
    shutil.copytree(checkpoint, folder)
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("part.type == 'video'", "false"))
    return str(folder)


def test_a_model_without_videos_says_so_when_loaded_and_when_asked(tiny, tmp_path):
    async def test(engine):
        return engine.takes_video, await ask_all(engine, [about(shown()), request(1)])

    takes_video, (error, answer) = with_engine(without_videos(tiny, tmp_path / "model"), test)
    assert not takes_video
    assert isinstance(error, NoVideoError)
    assert isinstance(answer, Answer)
