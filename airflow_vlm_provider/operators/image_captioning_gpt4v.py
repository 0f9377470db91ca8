"""The operator that has a hosted chat model write instruction data or captions about images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from airflow_vlm_provider.operators.aliases import model_alias
from airflow_vlm_provider.operators.base import ShardOperator
from airflow_vlm_provider.operators.engines import EngineOptions
from airflow_vlm_provider.operators.parameters import ParameterError, check_parameters, special_tokens
from airflow_vlm_provider.steps.base import Step
from airflow_vlm_provider.steps.image_captioning_gpt4v import ImageCaptioningFromGPT4VStep

if TYPE_CHECKING:
    from airflow.sdk.definitions.mappedoperator import OperatorPartial

DETAILS = ("low", "high", "auto")


class ImageCaptioningFromGPT4VOperator(ShardOperator):
    """
    Have a chat model write about the images of every sample: questions and answers, descriptions, what you ask for.

    For every sample with images there is one more, whose text has what the model said behind each image's placeholder
    in place of the words that were there. Samples without images are left as they are. Takes the parameters of
    Data-Juicer's ``image_captioning_from_gpt4v_mapper``, and what :class:`ShardOperator` documents. The API key is the
    connection's password.

    :param mode: ``reasoning``, ``description`` or ``conversation`` (each with a system prompt of the project's own),
        or ``custom``.
    :param model: Model to ask, by the endpoint's name for it; another name for ``api_or_hf_model``. None takes the
        connection's (templated).
    :param max_token: How long an answer may be, in tokens.
    :param temperature: From 0 to 1.
    :param system_prompt: System prompt of the mode ``custom``, taken as it is: prompts are no Jinja templates.
    :param user_prompt: What stands beside the image; empty sends the image alone.
    :param user_prompt_key: Field of the row whose text, where there is one, stands there instead.
    :param keep_original_sample: False writes only the new samples.
    :param any_or_all: ``all`` fails a sample of which an image can't be captioned, ``any`` only one of which none can;
        the others' placeholders then have no text behind them.
    :param detail: How closely the model looks: ``low``, ``high`` or ``auto``; None leaves it to the endpoint
        (``openai`` engine only).
    :param missing_placeholders: ``error`` fails a sample whose text has words, but no placeholder for its images;
        ``prepend`` puts them before the text.
    """

    def __init__(
        self,
        *,
        mode: str = "description",
        model: str | None = None,
        max_token: int = 500,
        temperature: float = 1.0,
        system_prompt: str = "",
        user_prompt: str = "",
        user_prompt_key: str | None = None,
        keep_original_sample: bool = True,
        any_or_all: str = "any",
        detail: str | None = None,
        missing_placeholders: str = "error",
        **kwargs: Any,
    ) -> None:
        alias = model_alias("model", {"model": model, **kwargs})
        super().__init__(**{**kwargs, **alias})
        self.mode = mode
        self.model = model
        self.max_token = max_token
        self.temperature = temperature
        self.system_prompt = system_prompt
        self.user_prompt = user_prompt
        self.user_prompt_key = user_prompt_key
        self.keep_original_sample = keep_original_sample
        self.any_or_all = any_or_all
        self.detail = detail
        self.missing_placeholders = missing_placeholders
        check_parameters(self)

    @classmethod
    def partial(cls, **kwargs: Any) -> OperatorPartial:
        """Begin a mapped operator; what it is given is checked now, when the DAG is parsed.

        :raises ConfigError: a parameter is wrong.
        """
        model_alias("model", kwargs)
        return super().partial(**kwargs)

    def engine_options(self) -> EngineOptions:
        """See :class:`ShardOperator`."""
        return EngineOptions(detail=self.detail)

    def make_step(self) -> Step:
        """The captioning step with this operator's parameters.

        :raises ConfigError: one of them is wrong.
        """
        if self.detail not in (None, *DETAILS):
            raise ParameterError(f"detail={self.detail!r} must be 'low', 'high' or 'auto', or None.")
        if self.detail is not None and self.engine not in (None, "openai"):
            raise ParameterError(
                f"detail={self.detail!r} is for the engine openai; leave it out with engine={self.engine!r}."
            )
        return ImageCaptioningFromGPT4VStep(
            mode=self.mode,
            max_token=self.max_token,
            temperature=self.temperature,
            system_prompt=self.system_prompt,
            user_prompt=self.user_prompt,
            user_prompt_key=self.user_prompt_key,
            keep_original_sample=self.keep_original_sample,
            any_or_all=self.any_or_all,
            missing_placeholders=self.missing_placeholders,
            text_key=self.text_key,
            image_key=self.image_key,
            special_tokens=special_tokens(self),
        )
