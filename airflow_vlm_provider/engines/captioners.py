"""Models in this process that know no conversation: they go on with a text, beside one picture (BLIP, GIT, ...).

What such a model needs beside the picture differs, and its processor knows: tokens that stand for the picture, a
prompt in place of a task's name, a second tokenization. A processor's work is therefore taken as it is, with two
exceptions, which :class:`Captions` explains.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from airflow_vlm_provider.engines.checkpoints import Checkpoint
from airflow_vlm_provider.engines.local_prompts import Prompt, decode_image
from airflow_vlm_provider.errors import ConfigError, NoVideoError, SampleError
from airflow_vlm_provider.types import Media, Request


class Captions:
    """Makes a captioner's inputs of requests; a :class:`~airflow_vlm_provider.engines.local_prompts.Reader`.

    Every request is processed by itself, and requests share a batch where the inputs are of one shape: many of these
    models count positions from the left edge, or replace the first token, so that a padded prompt would be answered
    in another way than the same prompt alone.

    :param checkpoint: The model, without a chat template.
    :param model: Its name, for messages.
    """

    takes_video = False

    def __init__(self, checkpoint: Checkpoint, model: str) -> None:
        from transformers import GenerationMixin

        self._processor = checkpoint.processor
        self._tokenizer = checkpoint.tokenizer
        self._eos_ids = checkpoint.eos_ids
        self._model = model
        # Where the model makes its prompt of the inputs itself, or reads them before it writes, an end of the text
        # belongs there; where it goes on from the inputs as they are (GIT), it would end the answer.
        network = type(checkpoint.model)
        self._continues = (
            network.generate is GenerationMixin.generate and not checkpoint.model.config.is_encoder_decoder
        )
        self._placeholder = ""
        self._placeholder = self._missing_placeholder()

    def read(self, request: Request) -> Prompt:
        """Make a request ready.

        :raises SampleError: ``media_corrupt`` (not decodable), ``rejected`` (not one picture, or anything else that
            the processor can't take).
        :raises NoVideoError: it holds a video.
        :raises ConfigError: it says nothing that could be gone on with.
        """
        if request.completion is None:
            raise ConfigError(
                f"model={self._model!r} has no chat template: it only goes on with a text, and this step needs a "
                "model that follows instructions. Choose a vision-language chat model (for a model that is one, put "
                "a chat_template.jinja into the checkpoint's folder)"
            )
        media = [part for part in request.parts if not isinstance(part, str)]
        if not all(isinstance(part, Media) for part in media):
            raise ConfigError(f"The transformers engine takes texts and loaded media, not {media!r}")
        if any(part.kind == "video" for part in media):
            raise NoVideoError(f"model={self._model!r} takes no videos")
        if len(media) != 1:
            raise SampleError(
                "rejected",
                f"model={self._model!r} says something about one picture at a time, not about {len(media)} together; "
                "use a vision-language chat model for this",
            )
        image = decode_image(media[0])  # type: ignore[arg-type]
        try:
            inputs = self._process(request.completion, image)
        except Exception as error:
            raise SampleError(
                "rejected", f"The model's processor can't take this request: {type(error).__name__}: {error}"
            ) from error
        shapes = tuple((name, tuple(value.shape[1:])) for name, value in sorted(inputs.items()))
        return Prompt(group=shapes, content=inputs)

    def collate(self, prompts: Sequence[Prompt]) -> Any:
        """Put prompts of one shape together."""
        import torch

        return {name: torch.cat([prompt.content[name] for prompt in prompts]) for name in prompts[0].content}

    def _process(self, completion: str, image: Any) -> dict[str, Any]:
        import torch

        text = completion if self._placeholder in completion else self._placeholder + completion
        inputs = dict(self._processor(images=[image], text=[text], return_tensors="pt"))
        tokens = inputs["input_ids"]
        if self._continues and tokens.shape[1] > 1 and int(tokens[0, -1]) in self._eos_ids:
            for name, value in inputs.items():
                if value.shape[:2] == tokens.shape:
                    inputs[name] = value[:, :-1]
        inputs.setdefault("attention_mask", torch.ones_like(inputs["input_ids"]))
        return inputs

    def _missing_placeholder(self) -> str:
        """What has to stand for the picture in the text because the processor does not put it there."""
        from PIL import Image

        token = getattr(self._processor, "image_token", None)
        if token is None:
            return ""
        try:
            tokens = self._process("", Image.new("RGB", (64, 64)))["input_ids"]
        except Exception:
            # Some refuse a picture that no place in the text is meant for.
            return str(token)
        return "" if (tokens == self._tokenizer.convert_tokens_to_ids(str(token))).any() else str(token)
