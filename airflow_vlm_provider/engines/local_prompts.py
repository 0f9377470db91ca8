"""What a request becomes before a model in this process reads it; common to chat models and captioners."""

from __future__ import annotations

import io
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from airflow_vlm_provider.errors import SampleError
from airflow_vlm_provider.types import Media, Request


@dataclass(frozen=True)
class Prompt:
    """A request's question, ready to be put together with others.

    :param group: Only prompts of equal groups can be read in one batch.
    :param content: What the reader that made it needs to put a batch together.
    """

    group: Hashable
    content: Any = field(repr=False)


class Reader(Protocol):
    """Makes model inputs of requests."""

    takes_video: bool
    """Whether the model takes videos as such."""

    def read(self, request: Request) -> Prompt:
        """Make a request ready.

        :raises SampleError: the model can't be asked this, or its media are broken.
        :raises NoVideoError: it holds a video, and the model takes none.
        :raises ConfigError: nothing can be asked of this model in this way.
        """

    def collate(self, prompts: Sequence[Prompt]) -> Any:
        """Put prompts of one group together to what the model's ``generate`` takes, on the CPU.

        Among it is an ``attention_mask``, whose rows say how many tokens each prompt has.
        """


def decode_image(media: Media) -> Any:
    """The picture as the processors take it.

    :raises SampleError: ``media_corrupt``: it can't be decoded.
    """
    from PIL import Image

    try:
        return Image.open(io.BytesIO(media.data)).convert("RGB")
    except Exception as error:
        raise SampleError("media_corrupt", f"The image can't be decoded: {error}", media=media.ref) from error
