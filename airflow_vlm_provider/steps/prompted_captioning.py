"""What the image and the video captioning step share besides: a prompt, sampling, and candidates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.steps.candidates import Candidates
from airflow_vlm_provider.steps.captioning import CaptioningStep
from airflow_vlm_provider.steps.captions import read_caption
from airflow_vlm_provider.steps.sampling import RETRY_TEMPERATURE, read_sampling
from airflow_vlm_provider.types import MediaRef, Request, Row

Self = TypeVar("Self", bound="PromptedCaptioningStep")

MAX_TOKENS = 256
"""How long an answer may be where nobody says."""

# The names by which sampling_params may say how long an answer may be.
_LIMITS = ("max_tokens", "max_new_tokens", "max_completion_tokens")


class PromptedCaptioningStep(CaptioningStep):
    """Base of the steps that ask with a prompt, or the project's own, and draw candidates.

    :param caption_num: How many candidates are drawn of each caption, by one request.
    :param keep_candidate_mode: Which are kept: ``random_any`` (one, drawn so that reruns agree),
        ``similar_one_simhash`` (the one most similar to the text that there was) or ``all``, each in a row of its own.
    :param prompt: What the model is asked; None is the project's own prompt, and an empty string sends none.
    :param prompt_key: Field of the row whose string, where there is one, is asked instead.
    :param system_prompt: System prompt; None is the project's own beside its own prompt, and none beside another.
    :param sampling_params: Sampling parameters, as
        :func:`~airflow_vlm_provider.steps.sampling.read_sampling` takes them, over the defaults: at most 256 tokens,
        and temperature 0, or 1.0 where several candidates are drawn.
    :param max_new_tokens: How long an answer may be, in tokens; None leaves it to ``sampling_params``.
    :param seed: Seed of what is drawn, for engines that take one; None leaves it to ``sampling_params``.
    :param try_num: How often a medium is asked about at most, the first time included, until there are as many
        usable captions as are kept.
    :param kwargs: What :class:`~airflow_vlm_provider.steps.captioning.CaptioningStep` takes.
    :raises ConfigError: A parameter is wrong.
    """

    own_prompts: Mapping[str, str]
    """The prompts where none is given: ``system`` and ``prompt``."""

    asking = frozenset(
        {
            "caption_num",
            "prompt",
            "prompt_key",
            "system_prompt",
            "own_prompts",
            "sampling",
            "retry_temperature",
        }
    )
    derived: ClassVar[frozenset[str]] = frozenset(
        {"own_prompts", "sampling", "retry_temperature", "captions_version"}
    )
    """Names of the :meth:`parameters` that are no parameters of the constructor."""

    def __init__(
        self,
        *,
        caption_num: int,
        keep_candidate_mode: str,
        prompt: str | None,
        prompt_key: str | None,
        system_prompt: str | None,
        sampling_params: Mapping[str, Any] | None,
        max_new_tokens: int | None,
        seed: int | None,
        try_num: int,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for parameter, value in {"prompt": prompt, "system_prompt": system_prompt}.items():
            if value is not None and not isinstance(value, str):
                raise ConfigError(f"{parameter} is {value!r}; give a string, or None for the project's own.")
        if prompt_key is not None and (not isinstance(prompt_key, str) or not prompt_key):
            raise ConfigError(f"prompt_key is {prompt_key!r}; give the name of a field, or None.")
        self.candidates = Candidates(
            number=caption_num,
            mode=keep_candidate_mode,
            try_num=try_num,
            read=lambda choice: read_caption(choice, tokens=self.special_tokens),
        )
        self.prompt = prompt
        self.prompt_key = prompt_key
        self.system_prompt = system_prompt
        self.sampling = _read_sampling(sampling_params, max_new_tokens, seed, several=caption_num > 1)
        self.candidates.check_sampling(self.sampling)

    @property
    def new_rows(self) -> int:
        """See :class:`~airflow_vlm_provider.steps.captioning.CaptioningStep`."""
        return self.candidates.kept

    def parameters(self) -> Mapping[str, Any]:
        """Everything that decides what is asked and written, as JSON values."""
        return {
            **super().parameters(),
            "caption_num": self.candidates.number,
            "keep_candidate_mode": self.candidates.mode,
            "prompt": self.prompt,
            "prompt_key": self.prompt_key,
            "system_prompt": self.system_prompt,
            "own_prompts": dict(self.own_prompts),
            "sampling": dict(self.sampling),
            "retry_temperature": RETRY_TEMPERATURE,
            "try_num": self.candidates.try_num,
        }

    @classmethod
    def from_parameters(cls: type[Self], parameters: Mapping[str, Any]) -> Self:
        """The step whose :meth:`parameters` these are, as this version of the package reads answers."""
        # The defaults stand in the recorded sampling already: what is not there was removed on purpose.
        sampling = {**dict.fromkeys(_defaults(several=False)), **parameters["sampling"]}
        given = {name: value for name, value in parameters.items() if name not in cls.derived}
        step = cls(sampling_params=sampling, **given)
        step.own_prompts = dict(parameters["own_prompts"])
        return step

    def _request(self, row: Row, *media: MediaRef) -> Request:
        """What a model is asked about media; how many candidates is up to the candidates."""
        prompt = self.prompt
        if self.prompt_key is not None and isinstance(own := row.get(self.prompt_key), str):
            prompt = own
        if prompt is None:
            system = self.own_prompts["system"] if self.system_prompt is None else self.system_prompt
            text, completion = self.own_prompts["prompt"], ""
        else:
            system, text, completion = self.system_prompt or "", prompt, prompt
        return Request(
            system=system or None,
            parts=(*media, text) if text else media,
            sampling=self.sampling,
            completion=completion,
        )


def _defaults(*, several: bool) -> dict[str, Any]:
    return {"temperature": 1.0 if several else 0, "max_tokens": MAX_TOKENS}


def _read_sampling(
    sampling_params: Mapping[str, Any] | None, max_new_tokens: int | None, seed: int | None, *, several: bool
) -> dict[str, Any]:
    sampling = read_sampling(sampling_params, defaults=_defaults(several=several))
    for parameter, value, names, least in (
        ("max_new_tokens", max_new_tokens, _LIMITS, 1),
        ("seed", seed, ("seed",), 0),
    ):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ConfigError(f"{parameter} is {value!r}; give a whole number from {least} on, or None.")
        twice: Sequence[str] = [name for name in names if (sampling_params or {}).get(name) is not None]
        if twice:
            raise ConfigError(
                f"{parameter}={value} and {twice[0]} in sampling_params say the same; keep one."
            )
        sampling["max_tokens" if names is _LIMITS else parameter] = value
    return sampling
