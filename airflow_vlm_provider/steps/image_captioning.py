"""The step that captions images with a chat model, or a model that only continues a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from airflow_vlm_provider.steps.captioning import Captioned, Captioning
from airflow_vlm_provider.steps.chunks import SpecialTokens
from airflow_vlm_provider.steps.prompted_captioning import PromptedCaptioningStep
from airflow_vlm_provider.steps.prompts import CAPTIONING_INPUT, CAPTIONING_SYSTEM
from airflow_vlm_provider.types import MediaKind, MediaRef, Row


class ImageCaptioningStep(PromptedCaptioningStep):
    """Write a caption behind every image of a sample's text, in place of the words that were there.

    A sample becomes itself, where ``keep_original_sample`` says so, and a new one, or ``caption_num`` new ones where
    all candidates are kept. Samples without images are skipped.

    All parameters are those of :class:`~airflow_vlm_provider.steps.prompted_captioning.PromptedCaptioningStep` and
    :class:`~airflow_vlm_provider.steps.captioning.CaptioningStep`.

    :param image_key: Field of the image references.
    :raises ConfigError: A parameter is wrong.
    """

    name = "image_captioning"
    kind: ClassVar[MediaKind] = "image"
    own_prompts: Mapping[str, str] = {"system": CAPTIONING_SYSTEM, "prompt": CAPTIONING_INPUT}

    def __init__(
        self,
        *,
        caption_num: int = 1,
        keep_candidate_mode: str = "random_any",
        keep_original_sample: bool = True,
        prompt: str | None = None,
        prompt_key: str | None = None,
        system_prompt: str | None = None,
        sampling_params: Mapping[str, Any] | None = None,
        max_new_tokens: int | None = None,
        seed: int | None = None,
        try_num: int = 3,
        missing_placeholders: str = "error",
        text_key: str = "text",
        image_key: str = "images",
        special_tokens: Sequence[str] = SpecialTokens(),
    ) -> None:
        super().__init__(
            caption_num=caption_num,
            keep_candidate_mode=keep_candidate_mode,
            keep_original_sample=keep_original_sample,
            prompt=prompt,
            prompt_key=prompt_key,
            system_prompt=system_prompt,
            sampling_params=sampling_params,
            max_new_tokens=max_new_tokens,
            seed=seed,
            try_num=try_num,
            missing_placeholders=missing_placeholders,
            text_key=text_key,
            media_key=image_key,
            special_tokens=special_tokens,
        )

    def _captions(self, row: Row, words: str, ref: str) -> Captioning:
        request = self._request(row, MediaRef("image", ref))
        return Captioned((yield from self.candidates.draw(request, text=words, media=ref)))
