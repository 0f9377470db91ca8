"""The operator that captions images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from airflow_vlm_provider.operators.aliases import model_alias
from airflow_vlm_provider.operators.base import ShardOperator
from airflow_vlm_provider.operators.engines import EngineOptions
from airflow_vlm_provider.operators.parameters import ParameterError, check_parameters, special_tokens
from airflow_vlm_provider.steps.base import Step
from airflow_vlm_provider.steps.image_captioning import ImageCaptioningStep

if TYPE_CHECKING:
    from airflow.sdk.definitions.mappedoperator import OperatorPartial

# Where a chat model is not the rule.
TRANSFORMERS_MODEL = "Salesforce/blip2-opt-2.7b"


class ImageCaptioningOperator(ShardOperator):
    """
    Caption the images of every sample, with an image-to-text model or any vision-language model.

    For every sample with images there is one more, whose text has a caption behind each image's placeholder in place
    of the words that were there. Samples without images are left as they are. Of N samples with images come 2N, or
    N without the original ones; with ``keep_candidate_mode="all"`` and M candidates it is (1 + M)N or MN. Takes the
    parameters of Data-Juicer's ``image_captioning_mapper``, and what :class:`ShardOperator` documents.

    :param hf_img2seq: Model to ask; another name for ``api_or_hf_model``. None takes the connection's, or else
        Salesforce/blip2-opt-2.7b with the engine ``transformers``, and Qwen/Qwen2.5-VL-7B-Instruct with others
        (templated).
    :param trust_remote_code: Run the code that a checkpoint brings along; False leaves it to the connection's
        ``engine_args`` (only with engines that load the model themselves).
    :param caption_num: Candidate captions of each image: one request, whose image is read once.
    :param keep_candidate_mode: ``random_any`` (one of them, the same in every run), ``similar_one_simhash`` (the one
        most like the text that is there) or ``all`` (as many new samples as candidates).
    :param keep_original_sample: False writes only the new samples.
    :param prompt: What the model is asked instead of the project's own prompt, or begins its caption with if it knows
        no conversation; taken as it is: prompts are no Jinja templates.
    :param prompt_key: Field of the row whose text, where there is one, is the prompt.
    :param gpu_batch_size: How many captions are generated at once at most; None takes the one in the connection's
        ``engine_args``, or else 8 (only with engines that load the model themselves).
    :param system_prompt: System prompt. None is the project's own, and none beside a prompt of yours.
    :param sampling_params: Sampling parameters by their OpenAI names (``temperature``, ``top_p``, ...); ``do_sample``
        is understood. Without any, a single caption is the most likely one, and candidates are drawn at temperature
        1.0.
    :param max_new_tokens: How long a caption may be, in tokens; None is 256.
    :param seed: Seed of what is drawn; None leaves it to the engine.
    :param try_num: How often an image is asked about at most until there are as many captions as are kept.
    :param missing_placeholders: ``error`` fails a sample whose text has words, but no placeholder for its images;
        ``prepend`` puts them before the text.
    """

    def __init__(
        self,
        *,
        hf_img2seq: str | None = None,
        trust_remote_code: bool = False,
        caption_num: int = 1,
        keep_candidate_mode: str = "random_any",
        keep_original_sample: bool = True,
        prompt: str | None = None,
        prompt_key: str | None = None,
        gpu_batch_size: int | None = None,
        system_prompt: str | None = None,
        sampling_params: Mapping[str, Any] | None = None,
        max_new_tokens: int | None = None,
        seed: int | None = None,
        try_num: int = 3,
        missing_placeholders: str = "error",
        **kwargs: Any,
    ) -> None:
        # A template, too, because api_or_hf_model is one.
        model = model_alias("hf_img2seq", {"hf_img2seq": hf_img2seq, **kwargs})
        super().__init__(**{**kwargs, **model})
        self.hf_img2seq = hf_img2seq
        self.trust_remote_code = trust_remote_code
        self.caption_num = caption_num
        self.keep_candidate_mode = keep_candidate_mode
        self.keep_original_sample = keep_original_sample
        self.prompt = prompt
        self.prompt_key = prompt_key
        self.gpu_batch_size = gpu_batch_size
        self.system_prompt = system_prompt
        self.sampling_params = sampling_params
        self.max_new_tokens = max_new_tokens
        self.seed = seed
        self.try_num = try_num
        self.missing_placeholders = missing_placeholders
        check_parameters(self)

    @classmethod
    def partial(cls, **kwargs: Any) -> OperatorPartial:
        """Begin a mapped operator; what it is given is checked now, when the DAG is parsed.

        :raises ConfigError: a parameter is wrong.
        """
        model_alias("hf_img2seq", kwargs)
        return super().partial(**kwargs)

    def engine_options(self) -> EngineOptions:
        """See :class:`ShardOperator`."""
        local: dict[str, Any] = {}
        if self.trust_remote_code:
            local["trust_remote_code"] = True
        if self.gpu_batch_size is not None:
            local["gpu_batch_size"] = self.gpu_batch_size
        return EngineOptions(model={"transformers": TRANSFORMERS_MODEL}, local=local)

    def make_step(self) -> Step:
        """The captioning step with this operator's parameters.

        :raises ConfigError: one of them is wrong.
        """
        if not isinstance(self.trust_remote_code, bool):
            raise ParameterError(f"trust_remote_code={self.trust_remote_code!r} must be True or False.")
        size = self.gpu_batch_size
        if size is not None and (isinstance(size, bool) or not isinstance(size, int) or size < 1):
            raise ParameterError(f"gpu_batch_size={size!r} must be a whole number of at least 1, or None.")
        return ImageCaptioningStep(
            caption_num=self.caption_num,
            keep_candidate_mode=self.keep_candidate_mode,
            keep_original_sample=self.keep_original_sample,
            prompt=self.prompt,
            prompt_key=self.prompt_key,
            system_prompt=self.system_prompt,
            sampling_params=self.sampling_params,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            try_num=self.try_num,
            missing_placeholders=self.missing_placeholders,
            text_key=self.text_key,
            image_key=self.image_key,
            special_tokens=special_tokens(self),
        )
