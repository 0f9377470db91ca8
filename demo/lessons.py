"""What the demo model is taught with: drawings, questions about them, and the right answers, batch by batch.

In a batch all pictures have the same grid and all questions of one task the same words. Everything before the
picture then needs to be computed only once per batch, as an engine's prefix cache does it.
"""

from __future__ import annotations

import io
import json
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset
from transformers import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize

from airflow_vlm_provider.steps import prompts
from demo.drawings import BACKGROUNDS, COLOURS, SHAPES, SIZES, Drawing, draw

PATCH, MERGE = 14, 2
# At most 4 by 4 visual tokens for a picture of any size. The bounds lie beside the squares of 84 and 112, where
# rounding would decide.
MIN_PIXELS, MAX_PIXELS = 96 * 96, 114 * 114
CLOSE_UP = 56
ATTRIBUTES: dict[str, list[str]] = {
    "colour": list(COLOURS),
    "shape": list(SHAPES),
    "size": list(SIZES),
    "background": list(BACKGROUNDS),
}

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
OTHER_SYSTEMS = ("You are a helpful assistant.", "Answer briefly.")
CONTEXTS = ("a picture", "photo 17", "no text", "see below", "made by hand", "from the archive, 2024")


def tagging_answer(drawing: Drawing) -> str:
    return json.dumps({"tags": drawing.tags})


def captioning_answer(drawing: Drawing) -> str:
    return drawing.caption


@dataclass(frozen=True)
class Task:
    """One of the two questions that the model learns to answer."""

    system: str
    text: str
    other_texts: tuple[str, ...]
    answer: Callable[[Drawing], str]

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
        content = [{"type": "image"}, {"type": "text", "text": text}]
        head = [{"role": "system", "content": system}] if system else []
        return [*head, {"role": "user", "content": content}]


TASKS = (
    Task(prompts.TAGGING_SYSTEM, prompts.TAGGING_INPUT, TAGGING_INPUTS, tagging_answer),
    Task(prompts.CAPTIONING_SYSTEM, prompts.CAPTIONING_INPUT, CAPTIONING_INPUTS, captioning_answer),
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
    pixels: torch.Tensor  # (B * patches, 3 * 2 * 14 * 14)
    grid: tuple[int, int]  # in patches
    attributes: torch.Tensor  # (B, 4)
    questions: list[Question]


@dataclass(frozen=True)
class Stage:
    """A part of the training; it ends early once the shape's loss, a mean over 50 steps, is under ``enough``."""

    name: str
    steps: int
    batch: int
    enough: float = 0.0
    close_up: bool = False
    questions: bool = False


def travel(rng: random.Random, drawing: Drawing) -> Image.Image:
    """The picture after what may befall it between its file and the model: compression, shrinking."""
    image = drawing.image
    if rng.random() < 0.5:
        image = Image.open(io.BytesIO(drawing.encode("JPEG", quality=rng.randint(60, 95)))).convert("RGB")
    if rng.random() < 0.2:
        image = image.resize((image.width * 4 // 5, image.height * 4 // 5), Image.Resampling.BILINEAR)
    return image


class Lessons(IterableDataset[Batch]):
    """Batches without end; the same seed gives the same batches."""

    def __init__(self, processor: Qwen2_5_VLProcessor, *, stage: Stage, seed: int) -> None:
        self.processor, self.stage, self.seed = processor, stage, seed

    def __iter__(self) -> Iterator[Batch]:
        torch.set_num_threads(1)
        rng = random.Random(self.seed)
        waiting: dict[tuple[int, int], list[tuple[Drawing, np.ndarray]]] = defaultdict(list)
        while True:
            if self.stage.close_up:
                drawing = draw(rng, size="large", aspect=(1.0, 1.0), side=rng.randint(CLOSE_UP, 2 * CLOSE_UP))
                image, height, width = drawing.image, CLOSE_UP, CLOSE_UP
            else:
                drawing = draw(rng)
                image = travel(rng, drawing)
                height, width = smart_resize(
                    image.height, image.width, PATCH * MERGE, min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS
                )
            bucket = waiting[height // PATCH, width // PATCH]
            bucket.append((drawing, np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))))
            if len(bucket) == self.stage.batch:
                yield self._batch(rng, (height // PATCH, width // PATCH), bucket)
                bucket.clear()

    def _batch(
        self, rng: random.Random, grid: tuple[int, int], bucket: list[tuple[Drawing, np.ndarray]]
    ) -> Batch:
        drawings = [drawing for drawing, _ in bucket]
        return Batch(
            pixels=self._patches(np.stack([pixels for _, pixels in bucket]), grid),
            grid=grid,
            attributes=torch.tensor(
                [[names.index(getattr(d, key)) for key, names in ATTRIBUTES.items()] for d in drawings]
            ),
            questions=[self._question(rng, grid, task, drawings) for task in TASKS]
            if self.stage.questions
            else [],
        )

    def _patches(self, pixels: np.ndarray, grid: tuple[int, int]) -> torch.Tensor:
        """What the image processor makes of pictures that are resized already, for all of them at once."""
        processor = self.processor.image_processor
        mean, std = np.float32(processor.image_mean), np.float32(processor.image_std)
        normal = torch.from_numpy((pixels.astype(np.float32) / 255 - mean) / std)
        rows, columns = grid[0] // MERGE, grid[1] // MERGE
        patches = normal.view(-1, rows, MERGE, PATCH, columns, MERGE, PATCH, 3)
        patches = patches.permute(0, 1, 4, 2, 5, 7, 3, 6).flatten(0, 4)[:, :, None]
        return patches.expand(-1, -1, 2, -1, -1).reshape(len(patches), -1)

    def _question(
        self, rng: random.Random, grid: tuple[int, int], task: Task, drawings: list[Drawing]
    ) -> Question:
        tokenizer = self.processor.tokenizer
        text = tokenizer.apply_chat_template(task.messages(rng), tokenize=False, add_generation_prompt=True)
        before, after = text.split("<|image_pad|>")
        prefix, suffix = tokenizer.encode(before), tokenizer.encode(after)
        height, width = grid[0] // MERGE, grid[1] // MERGE
        picture = [tokenizer.convert_tokens_to_ids("<|image_pad|>")] * (height * width)
        answers = [tokenizer.encode(task.answer(drawing) + "<|im_end|>") for drawing in drawings]
        longest = max(map(len, answers))
        quiet = len(picture) + len(suffix)
        rest = [picture + suffix + a + [tokenizer.pad_token_id] * (longest - len(a)) for a in answers]
        labels = [[-100] * quiet + a + [-100] * (longest - len(a)) for a in answers]

        start, cells = len(prefix), torch.arange(height * width)
        text_start = start + max(height, width)
        positions = torch.cat(
            [
                torch.arange(start).expand(3, -1),
                torch.stack([torch.zeros_like(cells), cells // width, cells % width]) + start,
                torch.arange(text_start, text_start + len(suffix) + longest).expand(3, -1),
            ],
            dim=1,
        )
        return Question(torch.tensor([prefix]), torch.tensor(rest), torch.tensor(labels), positions[:, None])
