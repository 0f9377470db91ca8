"""COCO captions: one JSON object with a list of images and a list of annotations that refer to them.

Of several images with one caption each has an annotation with it. An image that the next row has too, as the rows of
one image's several captions do, is listed once. Width and height are not told: no image is opened.
"""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO, cast

from airflow_vlm_provider.exporters.base import JsonArray, to_json
from airflow_vlm_provider.exporters.examples import Example

# Annotations come after all images: until then they wait in memory, and beyond this on disk.
SPOOL_BYTES = 16 * 1024 * 1024


@dataclass(frozen=True)
class Coco:
    """COCO captions JSON.

    :param description: Says in the file what it is.
    """

    description: str = ""
    suffixes = (".json",)
    reserved = ()

    @contextlib.contextmanager
    def open(self, stream: BinaryIO) -> Iterator[CocoSink]:
        with tempfile.SpooledTemporaryFile(max_size=SPOOL_BYTES) as spool:
            stream.write(b'{"info": ' + to_json({"description": self.description}) + b', "licenses": [],\n')
            stream.write(b'"images": ')
            annotations = cast("BinaryIO", spool)
            sink = CocoSink(JsonArray(stream), JsonArray(annotations))
            yield sink
            sink.images.end()
            sink.annotations.end()
            stream.write(b',\n"annotations": ')
            annotations.seek(0)
            shutil.copyfileobj(annotations, stream)
            stream.write(b"}\n")


class CocoSink:
    """A file of captions, images and annotations numbered from 1."""

    def __init__(self, images: JsonArray, annotations: JsonArray) -> None:
        self.images = images
        self.annotations = annotations
        self._images = self._annotations = 0
        self._last_row: dict[str, int] = {}

    def add(self, examples: Sequence[Example]) -> int:
        known, count = dict(self._last_row), self._annotations
        self._last_row = {}
        for example in examples:
            for image in example.images:
                if image not in known:
                    self._images += 1
                    known[image] = self._images
                    self.images.append({"id": self._images, "file_name": image})
                self._last_row[image] = known[image]
                self._annotations += 1
                self.annotations.append(
                    {"id": self._annotations, "image_id": known[image], "caption": example.caption}
                )
        return self._annotations - count
