"""What the demo model is taught with: drawings, questions about them, and the right answers, batch by batch.

A batch holds either still or moving pictures, which all have the same grid, and all questions of one task have the
same words. Everything before the picture then needs to be computed only once per batch, as an engine's prefix cache
does it.
"""

from __future__ import annotations

import io
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset
from transformers import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from airflow_vlm_provider.steps import prompts
from demo.drawings import BACKGROUNDS, COLOURS, SHAPES, SIZES, Drawing, draw
from demo.moving import MOTIONS, MovingDrawing, decode, draw_moving, encode

PATCH, MERGE, TEMPORAL = 14, 2, 2
# At most 4 by 4 visual tokens for a picture of any size. The bounds lie beside the squares of 84 and 112, where
# rounding would decide.
MIN_PIXELS, MAX_PIXELS = 96 * 96, 114 * 114
CLOSE_UP = 56
ATTRIBUTES: dict[str, list[str]] = {
    "colour": list(COLOURS),
    "shape": list(SHAPES),
    "size": list(SIZES),
    "background": list(BACKGROUNDS),
    "motion": list(MOTIONS),
}
STILL = "stays still"
# Smaller than they may be: what large ones hold is lost when they are resized, and drawing them takes longest.
MOVING_SIDES = (96, 180)
# Pairs of frames in a moving picture, and how often.
PAIRS = {1: 1, 2: 4, 3: 3, 4: 8, 6: 2, 8: 1}
# Positions from one pair of frames to the next: two a second (the model's tokens_per_second), two frames a pair.
# Where nobody knows the rate, transformers assumes 24 frames a second.
INTERVALS = tuple(2 * TEMPORAL / fps for fps in (0.25, 0.5, 1, 1, 2, 2, 2, 2, 3, 4, 24))

TAGGING_INPUTS = (
    "Tag this picture.",
    "Tag the image.",
    "Give tags for this image.",
    "Which tags fit this image?",
    "List the tags of this picture as JSON.",
    "Tags?",
)
CAPTIONING_INPUTS = (
    "Describe this picture.",
    "Describe the image.",
    "What does this image show?",
    "Write a caption for this image.",
    "Caption this picture in one sentence.",
    "Caption?",
)
VIDEO_CAPTIONING_INPUTS = (
    "Describe the video.",
    "Describe this clip.",
    "What happens in this video?",
    "What does this video show?",
    "Write a caption for this video.",
    "Caption this video in one sentence.",
    "Caption?",
)
OTHER_SYSTEMS = ("You are a helpful assistant.", "Answer briefly.")
CONTEXTS = ("a picture", "photo 17", "no text", "see below", "made by hand", "from the archive, 2024")


def tagging_answer(drawing: Any) -> str:
    return json.dumps({"tags": drawing.tags})


def captioning_answer(drawing: Any) -> str:
    return drawing.caption


@dataclass(frozen=True)
class Task:
    """One of the questions that the model learns to answer.

    :param kind: what it is about: ``image`` (a :class:`Drawing`) or ``video`` (a :class:`MovingDrawing`).
    """

    name: str
    system: str
    text: str
    other_texts: tuple[str, ...]
    answer: Callable[[Any], str]
    kind: str = "image"

    def messages(self, rng: random.Random) -> list[dict[str, Any]]:
        """Mostly the project's own words; else the same question put differently."""
        system: str | None = self.system
        text = self.text if rng.random() < 0.6 else rng.choice(self.other_texts)
        chance = rng.random()
        if chance < 0.15:
            system = None
        elif chance < 0.2:
            system = rng.choice(OTHER_SYSTEMS)
        if rng.random() < 0.1:
            text += f"\nText: {rng.choice(CONTEXTS)}"
        content = [{"type": self.kind}, {"type": "text", "text": text}]
        head = [{"role": "system", "content": system}] if system else []
        return [*head, {"role": "user", "content": content}]


TASKS = (
    Task("tags", prompts.TAGGING_SYSTEM, prompts.TAGGING_INPUT, TAGGING_INPUTS, tagging_answer),
    Task(
        "caption",
        prompts.CAPTIONING_SYSTEM,
        prompts.CAPTIONING_INPUT,
        CAPTIONING_INPUTS,
        captioning_answer,
    ),
)
MOVING_TASKS = (
    Task(
        "video",
        prompts.VIDEO_CAPTIONING_SYSTEM,
        prompts.VIDEO_CAPTIONING_INPUT,
        VIDEO_CAPTIONING_INPUTS,
        captioning_answer,
        kind="video",
    ),
)


@dataclass
class Question:
    """One task put to every picture of a batch: a shared beginning, the rest, and one answer for each picture."""

    prefix: torch.Tensor  # (1, P)
    rest: torch.Tensor  # (B, R): picture, text and answer; padded on the right
    labels: torch.Tensor  # (B, R): -100 where nothing is learnt
    positions: torch.Tensor  # (3, 1, P + R)


@dataclass
class Batch:
    """``N`` pictures, or ``N`` moving pictures of ``pairs`` pairs of frames each; a still picture is one pair."""

    pixels: torch.Tensor  # (N * pairs * patches, 3 * 2 * 14 * 14)
    grid: tuple[int, int, int]  # pairs, and height and width in patches
    attributes: torch.Tensor  # (N, 5)
    questions: dict[str, Question]  # by the task's name


@dataclass(frozen=True)
class Stage:
    """A part of the training.

    :param batch: drawings in a batch.
    :param rate: the learning rate at its highest.
    :param pictures: what the batches hold, in turn: ``still``, ``close-up``, ``moving``, or ``pair``: two frames of a
        moving picture.
    :param questions: the whole model learns, not the vision tower alone.
    :param enough: the stage ends early once the losses of these attributes, means over 50 steps, are all under theirs.
    """

    name: str
    steps: int
    batch: int
    rate: float = 1e-3
    pictures: tuple[str, ...] = ("still",)
    questions: bool = False
    enough: Mapping[str, float] = field(default_factory=dict)


def travel(rng: random.Random, drawing: Drawing) -> Image.Image:
    """The picture after what may befall it between its file and the model: compression, shrinking."""
    image = drawing.image
    if rng.random() < 0.5:
        image = Image.open(io.BytesIO(drawing.encode("JPEG", quality=rng.randint(60, 95)))).convert("RGB")
    if rng.random() < 0.2:
        image = image.resize((image.width * 4 // 5, image.height * 4 // 5), Image.Resampling.BILINEAR)
    return image


def travel_moving(rng: random.Random, shown: Sequence[Image.Image], *, fps: float) -> list[Image.Image]:
    """The frames after what may befall them: video compression, frames sent as JPEGs, shrinking."""
    frames, chance = list(shown), rng.random()
    if rng.random() < 0.2:
        size = [round(side * 0.4) * 2 for side in frames[0].size]
        frames = [frame.resize((size[0], size[1]), Image.Resampling.BILINEAR) for frame in frames]
    if chance < 0.35:
        frames = decode(encode(frames, fps=fps, crf=rng.randint(15, 30)))
    elif chance < 0.6:
        quality = rng.randint(60, 95)
        for number, frame in enumerate(frames):
            buffer = io.BytesIO()
            frame.save(buffer, format="JPEG", quality=quality)
            frames[number] = Image.open(buffer).convert("RGB")
    return frames


@dataclass
class Seen:
    """A drawing, and its pixels as the model will get them: (frames, height, width, 3)."""

    drawing: Drawing | MovingDrawing
    pixels: np.ndarray


class Lessons(IterableDataset[Batch]):
    """Batches without end; the same seed gives the same batches."""

    def __init__(self, processor: Qwen2_5_VLProcessor, *, stage: Stage, seed: int) -> None:
        self.processor, self.stage, self.seed = processor, stage, seed

    def __iter__(self) -> Iterator[Batch]:
        torch.set_num_threads(1)
        rng = random.Random(self.seed)
        makers = {
            "still": self._still,
            "close-up": self._close_up,
            "moving": self._moving,
            "pair": self._pair,
        }
        kinds = [self._batches(rng, makers[name]) for name in self.stage.pictures]
        while True:
            yield from map(next, kinds)

    def _batches(self, rng: random.Random, make: Callable[[random.Random], Seen]) -> Iterator[Batch]:
        waiting: dict[tuple[int, ...], list[Seen]] = defaultdict(list)
        while True:
            seen = make(rng)
            bucket = waiting[seen.pixels.shape]
            bucket.append(seen)
            if len(bucket) == self.stage.batch:
                yield self._batch(rng, bucket)
                bucket.clear()

    def _still(self, rng: random.Random) -> Seen:
        drawing = draw(rng)
        return Seen(drawing, self._resized([travel(rng, drawing)]).repeat(TEMPORAL, axis=0))

    def _close_up(self, rng: random.Random) -> Seen:
        drawing = draw(rng, size="large", aspect=(1.0, 1.0), side=rng.randint(CLOSE_UP, 2 * CLOSE_UP))
        pixels = drawing.image.resize((CLOSE_UP, CLOSE_UP), Image.Resampling.BICUBIC)
        return Seen(drawing, np.asarray(pixels)[None].repeat(TEMPORAL, axis=0))

    def _moving(self, rng: random.Random) -> Seen:
        (pairs,) = rng.choices(list(PAIRS), weights=list(PAIRS.values()))
        seconds, odd = rng.uniform(2, 8), rng.random() < 0.15
        side = rng.randint(*MOVING_SIDES)
        drawing = draw_moving(rng, side=side, seconds=seconds, fps=(pairs * TEMPORAL - odd) / seconds)
        pixels = self._resized(travel_moving(rng, drawing.frames, fps=drawing.fps))
        # The last frame is shown twice where it has no partner.
        return Seen(drawing, np.concatenate([pixels, pixels[-1:]]) if odd else pixels)

    def _pair(self, rng: random.Random) -> Seen:
        frames = rng.randint(3, 12)
        drawing = draw_moving(rng, side=rng.randint(*MOVING_SIDES), seconds=frames, fps=1)
        first = rng.randint(0, frames - TEMPORAL)
        pair = travel_moving(rng, drawing.frames[first : first + TEMPORAL], fps=1)
        return Seen(drawing, self._resized(pair))

    @staticmethod
    def _resized(frames: list[Image.Image]) -> np.ndarray:
        height, width = smart_resize(
            frames[0].height,
            frames[0].width,
            PATCH * MERGE,
            min_pixels=MIN_PIXELS,
            max_pixels=MAX_PIXELS,
        )
        return np.stack([frame.resize((width, height), Image.Resampling.BICUBIC) for frame in frames])

    def _batch(self, rng: random.Random, bucket: list[Seen]) -> Batch:
        drawings = [seen.drawing for seen in bucket]
        frames, height, width, _ = bucket[0].pixels.shape
        grid = (frames // TEMPORAL, height // PATCH, width // PATCH)
        tasks = MOVING_TASKS if isinstance(drawings[0], MovingDrawing) else TASKS
        return Batch(
            pixels=self._patches(np.stack([seen.pixels for seen in bucket]), grid),
            grid=grid,
            attributes=torch.tensor(
                [
                    [names.index(getattr(drawing, key, STILL)) for key, names in ATTRIBUTES.items()]
                    for drawing in drawings
                ]
            ),
            questions={
                task.name: self._question(rng, grid, task, drawings) for task in tasks if self.stage.questions
            },
        )

    def _patches(self, pixels: np.ndarray, grid: tuple[int, int, int]) -> torch.Tensor:
        """What the processor makes of pictures that are resized already, for all of them at once."""
        processor = self.processor.image_processor
        mean, std = np.float32(processor.image_mean), np.float32(processor.image_std)
        normal = torch.from_numpy((pixels.astype(np.float32) / 255 - mean) / std)
        pairs, rows, columns = grid[0], grid[1] // MERGE, grid[2] // MERGE
        patches = normal.view(-1, pairs, TEMPORAL, rows, MERGE, PATCH, columns, MERGE, PATCH, 3)
        return patches.permute(0, 1, 3, 6, 4, 7, 9, 2, 5, 8).flatten(0, 5).flatten(1)

    def _question(
        self, rng: random.Random, grid: tuple[int, int, int], task: Task, drawings: list[Any]
    ) -> Question:
        tokenizer = self.processor.tokenizer
        text = tokenizer.apply_chat_template(task.messages(rng), tokenize=False, add_generation_prompt=True)
        placeholder = f"<|{task.kind}_pad|>"
        before, after = text.split(placeholder)
        prefix, suffix = tokenizer.encode(before), tokenizer.encode(after)
        pairs, height, width = grid[0], grid[1] // MERGE, grid[2] // MERGE
        picture = [tokenizer.convert_tokens_to_ids(placeholder)] * (pairs * height * width)
        answers = [tokenizer.encode(task.answer(drawing) + "<|im_end|>") for drawing in drawings]
        longest = max(map(len, answers))
        quiet = len(picture) + len(suffix)
        rest = [picture + suffix + a + [tokenizer.pad_token_id] * (longest - len(a)) for a in answers]
        labels = [[-100] * quiet + a + [-100] * (longest - len(a)) for a in answers]

        start = len(prefix)
        when = (torch.arange(pairs) * rng.choice(INTERVALS)).long()
        seen = torch.cartesian_prod(when, torch.arange(height), torch.arange(width)).T
        # After a video transformers goes on behind its height and width, vLLM behind its last moment, too.
        last = max(height, width) - 1 if rng.random() < 0.5 else int(seen.max())
        text_start = start + last + 1
        positions = torch.cat(
            [
                torch.arange(start).expand(3, -1),
                seen + start,
                torch.arange(text_start, text_start + len(suffix) + longest).expand(3, -1),
            ],
            dim=1,
        )
        return Question(torch.tensor([prefix]), torch.tensor(rest), torch.tensor(labels), positions[:, None])
