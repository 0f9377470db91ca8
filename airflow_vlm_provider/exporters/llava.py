"""LLaVA's conversations: one JSON array, each item a question about images and the caption as its answer.

One image is a string, as LLaVA's own data has it; several images with one caption are one item with a list of them
and as many ``<image>`` in the question, as LLaVA-NeXT reads it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from airflow_vlm_provider.exporters.base import JsonArray
from airflow_vlm_provider.exporters.examples import Example

PROMPT = "Describe the image."
IMAGE_TOKEN = "<image>"
VIDEO_TOKEN = "<video>"


@dataclass(frozen=True)
class Llava:
    """LLaVA conversation JSON.

    :param prompt: What the human says after the images.
    """

    prompt: str = PROMPT
    suffixes = (".json",)
    # The readers count them, in answers too, and stop when there are more than images.
    reserved = (IMAGE_TOKEN, VIDEO_TOKEN)

    @contextlib.contextmanager
    def open(self, stream: BinaryIO) -> Iterator[LlavaSink]:
        sink = LlavaSink(JsonArray(stream), self.prompt)
        yield sink
        sink.array.end()
        stream.write(b"\n")


class LlavaSink:
    """A file of conversations. Rows without a name of their own are numbered."""

    def __init__(self, array: JsonArray, prompt: str) -> None:
        self.array = array
        self._prompt = prompt
        self._count = 0

    def add(self, examples: Sequence[Example]) -> int:
        for example in examples:
            self.array.append(conversation(example, number=self._count, prompt=self._prompt))
            self._count += 1
        return len(examples)


def conversation(example: Example, *, number: int, prompt: str) -> dict[str, Any]:
    """Return an example as a conversation.

    :param number: What it is called when the example has no name.
    """
    images = example.images
    return {
        "id": f"{number:09}" if example.name is None else example.name,
        "image": images[0] if len(images) == 1 else list(images),
        "conversations": [
            {"from": "human", "value": f"{IMAGE_TOKEN}\n" * len(images) + prompt},
            {"from": "gpt", "value": example.caption},
        ],
    }
