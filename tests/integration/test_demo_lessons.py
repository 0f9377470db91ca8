"""Lessons: what the model is taught with is what the processor and the engines make of the same drawings."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor

from demo.lessons import MERGE, MOVING_TASKS, TASKS, Batch, Lessons, Seen, Stage

pytestmark = pytest.mark.integration

MODEL = Path(__file__).parents[2] / "demo" / "model"


@pytest.fixture(scope="module")
def processor():
    return Qwen2_5_VLProcessor.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model():
    return Qwen2_5_VLForConditionalGeneration.from_pretrained(MODEL).model


def taught(processor, monkeypatch, kind: str, seed: int) -> tuple[Batch, list[np.ndarray]]:
    """A batch, and the frames of its drawings as they were before they became patches."""
    frames: list[np.ndarray] = []
    inner = Lessons._batch

    def overheard(self: Lessons, rng: random.Random, bucket: list[Seen]) -> Batch:
        frames.extend(seen.pixels for seen in bucket)
        return inner(self, rng, bucket)

    monkeypatch.setattr(Lessons, "_batch", overheard)
    stage = Stage("test", steps=1, batch=2, pictures=(kind,), questions=True)
    return next(iter(Lessons(processor, stage=stage, seed=seed))), frames


@pytest.mark.parametrize("seed", range(3))
def test_patches_of_moving_pictures_are_the_video_processors(processor, monkeypatch, seed):
    batch, frames = taught(processor, monkeypatch, "moving", seed)
    videos = [[Image.fromarray(frame) for frame in pixels] for pixels in frames]
    made = processor.video_processor(videos=videos, do_sample_frames=False, return_tensors="pt")

    assert made["video_grid_thw"].tolist() == [list(batch.grid)] * 2
    torch.testing.assert_close(batch.pixels, made["pixel_values_videos"], atol=1e-5, rtol=0)


def test_patches_of_still_pictures_are_the_image_processors(processor, monkeypatch):
    batch, frames = taught(processor, monkeypatch, "still", 0)
    images = [Image.fromarray(pixels[0]) for pixels in frames]
    made = processor.image_processor(images=images, return_tensors="pt")

    assert made["image_grid_thw"].tolist() == [list(batch.grid)] * 2
    torch.testing.assert_close(batch.pixels, made["pixel_values"], atol=1e-5, rtol=0)


@pytest.mark.parametrize("seed", range(6))
def test_positions_are_those_of_transformers_or_of_vllm(processor, model, monkeypatch, seed):
    batch, _ = taught(processor, monkeypatch, "moving", seed)
    (question,) = batch.questions.values()
    tokens = torch.cat([question.prefix, question.rest[:1]], dim=1)
    video = tokens == processor.tokenizer.convert_tokens_to_ids("<|video_pad|>")
    pairs, height, width = batch.grid
    assert video.sum() == pairs * height * width // MERGE**2

    times = question.positions[0, 0, video[0]]
    interval = (times.max() - times.min()).item() / max(1, pairs - 1)
    expected, _ = model.get_rope_index(
        tokens,
        video.int() * 2,
        video_grid_thw=torch.tensor([batch.grid]),
        second_per_grid_ts=torch.tensor([interval / model.config.vision_config.tokens_per_second]),
    )
    # vLLM goes on behind the last moment of the video, transformers behind its height and width.
    before, behind = video[0].nonzero().flatten()[[0, -1]].tolist()
    ahead = expected[:, 0, : behind + 1].max() + 1 - expected[0, 0, behind + 1]
    vllm = expected.clone()
    vllm[:, :, behind + 1 :] += ahead
    if interval == int(interval):
        assert any(torch.equal(question.positions, rule) for rule in (expected, vllm))
    else:
        torch.testing.assert_close(question.positions[1:, 0, before:behind], expected[1:, 0, before:behind])


def test_both_ways_to_go_on_behind_a_video_are_taught(processor, monkeypatch):
    starts = set()
    for seed in range(12):
        batch, _ = taught(processor, monkeypatch, "moving", seed)
        (question,) = batch.questions.values()
        first = question.prefix.shape[1]
        behind = first + int(np.prod(batch.grid)) // MERGE**2
        times, places = question.positions[0, 0, first:behind], question.positions[1:, 0, first:behind]
        if times.max() > places.max():
            starts.add(bool(question.positions[0, 0, behind] > times.max()))

    assert starts == {True, False}


@pytest.mark.parametrize(("kind", "tasks"), [("still", TASKS), ("moving", MOVING_TASKS)])
def test_answers_are_learnt_whole_and_nothing_else_is(processor, monkeypatch, kind, tasks):
    batch, _ = taught(processor, monkeypatch, kind, 1)

    assert list(batch.questions) == [task.name for task in tasks]
    for question in batch.questions.values():
        for rest, labels in zip(question.rest, question.labels, strict=True):
            learnt = labels != -100
            assert torch.equal(rest[learnt], labels[learnt])
            asked, answer = (processor.tokenizer.decode(rest[part]) for part in (~learnt, learnt))
            assert answer.endswith((".<|im_end|>", "]}<|im_end|>"))
            assert asked.replace("<|endoftext|>", "").endswith("<|im_start|>assistant\n")


def test_the_same_seed_gives_the_same_batches(processor):
    stage = Stage("test", steps=1, batch=2, pictures=("still", "moving"), questions=True)

    def first(seed: int) -> list[list[float]]:
        batches = iter(Lessons(processor, stage=stage, seed=seed))
        return [next(batches).pixels.flatten()[:1000].tolist() for _ in range(2)]

    assert first(1) == first(1)
    assert first(1) != first(2)
