"""The step that has a hosted chat model write instruction data or captions about images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from airflow_vlm_provider.errors import ConfigError, SampleError, TransientError
from airflow_vlm_provider.steps.candidates import Candidates
from airflow_vlm_provider.steps.captioning import Captioned, Captioning, CaptioningStep
from airflow_vlm_provider.steps.captions import read_caption
from airflow_vlm_provider.steps.chunks import SpecialTokens
from airflow_vlm_provider.steps.prompts import INSTRUCTION_SYSTEMS
from airflow_vlm_provider.types import MediaKind, MediaRef, Request, Row

MODES = (*INSTRUCTION_SYSTEMS, "custom")
ANY_OR_ALL = ("any", "all")
# Data-Juicer's spelling, which recipes hold.
_SPELLINGS = {"resoning": "reasoning"}


class ImageCaptioningFromGPT4VStep(CaptioningStep):
    """Write what a chat model says of every image behind its placeholder, in place of the words that were there.

    A sample becomes itself, where ``keep_original_sample`` says so, and a new one. Samples without images are skipped.

    :param mode: What is asked for: ``reasoning``, ``description`` or ``conversation`` with the project's own system
        prompts, or ``custom`` with ``system_prompt``.
    :param max_token: How long an answer may be, in tokens.
    :param temperature: From 0 to 1.
    :param system_prompt: System prompt of the mode ``custom``; empty sends none.
    :param user_prompt: What stands beside the image; empty sends nothing beside it.
    :param user_prompt_key: Field of the row whose string, where there is one, stands there instead.
    :param any_or_all: ``all`` fails a sample of which an image can't be captioned; ``any`` leaves that image's
        placeholder without a caption, and fails the sample only when none could be captioned, or when an image was
        merely out of luck (a timeout): the next run asks again about that one alone.
    :param image_key: Field of the image references.

    The other parameters are those of :class:`~airflow_vlm_provider.steps.captioning.CaptioningStep`.

    :raises ConfigError: A parameter is wrong.
    """

    name = "image_captioning_gpt4v"
    kind: ClassVar[MediaKind] = "image"
    asking = frozenset({"system_prompt", "user_prompt", "user_prompt_key", "max_token", "temperature"})

    def __init__(
        self,
        *,
        mode: str = "description",
        max_token: int = 500,
        temperature: float = 1.0,
        system_prompt: str = "",
        user_prompt: str = "",
        user_prompt_key: str | None = None,
        keep_original_sample: bool = True,
        any_or_all: str = "any",
        missing_placeholders: str = "error",
        text_key: str = "text",
        image_key: str = "images",
        special_tokens: Sequence[str] = SpecialTokens(),
    ) -> None:
        super().__init__(
            keep_original_sample=keep_original_sample,
            missing_placeholders=missing_placeholders,
            text_key=text_key,
            media_key=image_key,
            special_tokens=special_tokens,
        )
        mode = _SPELLINGS.get(mode, mode) if isinstance(mode, str) else mode
        if mode not in MODES:
            raise ConfigError(f"mode is {mode!r}; give one of {', '.join(map(repr, MODES))}.")
        if any_or_all not in ANY_OR_ALL:
            raise ConfigError(f"any_or_all is {any_or_all!r}; give 'any' or 'all'.")
        if isinstance(max_token, bool) or not isinstance(max_token, int) or max_token < 1:
            raise ConfigError(f"max_token is {max_token!r}; give a whole number from 1 on.")
        if (
            isinstance(temperature, bool)
            or not isinstance(temperature, int | float)
            or not 0 <= temperature <= 1
        ):
            raise ConfigError(f"temperature is {temperature!r}; give a number from 0 to 1.")
        for parameter, prompt in {"system_prompt": system_prompt, "user_prompt": user_prompt}.items():
            if not isinstance(prompt, str):
                raise ConfigError(f"{parameter} is {prompt!r}; give a string.")
        if user_prompt_key is not None and (not isinstance(user_prompt_key, str) or not user_prompt_key):
            raise ConfigError(f"user_prompt_key is {user_prompt_key!r}; give the name of a field, or None.")
        if system_prompt and mode != "custom":
            raise ConfigError(
                f"system_prompt is only used with mode='custom', and mode is {mode!r}, which has a system prompt of its "
                "own. Set mode='custom', or leave system_prompt out."
            )
        if mode == "custom" and not (system_prompt or user_prompt or user_prompt_key):
            raise ConfigError(
                "mode='custom' asks what you write: give system_prompt, user_prompt or user_prompt_key."
            )
        self.mode = mode
        self.max_token = max_token
        self.temperature = temperature
        self.system_prompt = INSTRUCTION_SYSTEMS.get(mode, system_prompt)
        self.user_prompt = user_prompt
        self.user_prompt_key = user_prompt_key
        self.any_or_all = any_or_all
        # A request to a hosted model has its price: who wants another try runs the dead letters again.
        self._one = Candidates(
            number=1,
            mode="random_any",
            try_num=1,
            read=lambda choice: read_caption(choice, tokens=self.special_tokens, limit="max_token"),
        )

    def parameters(self) -> Mapping[str, Any]:
        """Everything that decides what is asked and written, as JSON values."""
        return {
            **super().parameters(),
            "mode": self.mode,
            "max_token": self.max_token,
            "temperature": self.temperature,
            "system_prompt": self.system_prompt,
            "user_prompt": self.user_prompt,
            "user_prompt_key": self.user_prompt_key,
            "any_or_all": self.any_or_all,
        }

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> ImageCaptioningFromGPT4VStep:
        """The step whose :meth:`parameters` these are, as this version of the package reads answers."""
        given = {name: value for name, value in parameters.items() if name != "captions_version"}
        if given["mode"] != "custom":
            given["system_prompt"] = ""
        step = cls(**given)
        step.system_prompt = parameters["system_prompt"]
        return step

    def _captions(self, row: Row, words: str, ref: str) -> Captioning:
        prompt = self.user_prompt
        if self.user_prompt_key is not None and isinstance(own := row.get(self.user_prompt_key), str):
            prompt = own
        image = MediaRef("image", ref)
        request = Request(
            system=self.system_prompt or None,
            parts=(image, prompt) if prompt else (image,),
            sampling={"temperature": self.temperature, "max_tokens": self.max_token},
        )
        return Captioned((yield from self._one.draw(request, text=words, media=ref)))

    def _may_stay_bare(self, error: SampleError) -> bool:
        return self.any_or_all == "any" and not isinstance(error, TransientError)
