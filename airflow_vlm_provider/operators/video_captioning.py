"""The operator that captions videos."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from airflow_vlm_provider.operators.aliases import model_alias
from airflow_vlm_provider.operators.base import ShardOperator
from airflow_vlm_provider.operators.engines import EngineOptions
from airflow_vlm_provider.operators.parameters import (
    ENGINES,
    ParameterError,
    check_parameters,
    special_tokens,
)
from airflow_vlm_provider.steps.base import Step
from airflow_vlm_provider.steps.video_captioning import VideoCaptioningStep

if TYPE_CHECKING:
    from airflow.sdk.definitions.mappedoperator import OperatorPartial

DEFAULT_MODEL = "Qwen/Qwen3-VL-8B-Instruct"
# What qwen-vl-utils, Qwen's own preprocessing, gives a frame of a video at most (VIDEO_MAX_PIXELS): 768 patches of
# 28 x 28 pixels, a token each.
MAX_PIXELS = 768 * 28 * 28


class VideoCaptioningFromVLMOperator(ShardOperator):
    """
    Caption the videos of every sample with a vision-language model.

    For every sample with videos there is one more, whose text has a caption behind each video's placeholder in place
    of the words that were there. Samples without videos are left as they are. Of N samples with videos come 2N, or N
    without the original ones; with ``keep_candidate_mode="all"`` and M candidates it is (1 + M)N or MN. Takes the
    parameters of Data-Juicer's ``video_captioning_from_vlm_mapper``, and what :class:`ShardOperator` documents.

    :param hf_model: Model to ask; another name for ``api_or_hf_model``. None takes the connection's, or else
        Qwen/Qwen3-VL-8B-Instruct (templated).
    :param enable_vllm: True is another spelling of ``engine="vllm"``.
    :param caption_num: Candidate captions of each video: one request, whose video is read once.
    :param keep_candidate_mode: ``random_any`` (one of them, the same in every run), ``similar_one_simhash`` (the one
        most like the text that is there) or ``all`` (as many new samples as candidates).
    :param keep_original_sample: False writes only the new samples.
    :param prompt: What the model is asked instead of the project's own prompt, taken as it is: prompts are no Jinja
        templates.
    :param prompt_key: Field of the row whose text, where there is one, is the prompt.
    :param system_prompt: System prompt. None is the project's own, and none beside a prompt of yours.
    :param sampling_params: Sampling parameters by their OpenAI names (``temperature``, ``max_tokens``, ...);
        ``max_new_tokens`` and ``do_sample`` are understood.
    :param fps: Frames that are looked at of every second of a video.
    :param max_frames: Most frames of a video, or of a window of it, spread evenly.
    :param max_pixels: Shrink larger frames to so many pixels (width x height); None leaves them as they are. The
        default is the limit of Qwen's own preprocessing.
    :param window_seconds: Caption longer videos in parts of so many seconds, and sum these captions up; None shows the
        model each video at once.
    :param transport: ``video`` sends videos as such, ``frames`` their frames as images, ``auto`` as a video where the
        model takes one.
    :param windows_field_name: Field under ``meta_key`` that takes the windows with their captions.
    :param seed: Seed of the sampling; None leaves it to the engine.
    :param try_num: How often is asked at most until there are captions.
    :param missing_placeholders: ``error`` fails a sample whose text has no placeholder for its videos; ``prepend``
        puts them before the text.
    """

    def __init__(
        self,
        *,
        hf_model: str | None = None,
        enable_vllm: bool = False,
        caption_num: int = 1,
        keep_candidate_mode: str = "random_any",
        keep_original_sample: bool = True,
        prompt: str | None = None,
        prompt_key: str | None = None,
        system_prompt: str | None = None,
        sampling_params: Mapping[str, Any] | None = None,
        fps: float = 2.0,
        max_frames: int = 32,
        max_pixels: int | None = MAX_PIXELS,
        window_seconds: float | None = None,
        transport: str = "auto",
        windows_field_name: str = "video_windows",
        seed: int | None = None,
        try_num: int = 3,
        missing_placeholders: str = "error",
        **kwargs: Any,
    ) -> None:
        # A template, too, because api_or_hf_model is one.
        meant = _model_and_engine({"hf_model": hf_model, "enable_vllm": enable_vllm, **kwargs})
        super().__init__(max_pixels=max_pixels, **{**kwargs, **meant})
        self.hf_model = hf_model
        self.enable_vllm = enable_vllm
        self.caption_num = caption_num
        self.keep_candidate_mode = keep_candidate_mode
        self.keep_original_sample = keep_original_sample
        self.prompt = prompt
        self.prompt_key = prompt_key
        self.system_prompt = system_prompt
        self.sampling_params = sampling_params
        self.fps = fps
        self.max_frames = max_frames
        self.window_seconds = window_seconds
        self.transport = transport
        self.windows_field_name = windows_field_name
        self.seed = seed
        self.try_num = try_num
        self.missing_placeholders = missing_placeholders
        check_parameters(self)

    @classmethod
    def partial(cls, **kwargs: Any) -> OperatorPartial:
        """Begin a mapped operator; what it is given is checked now, when the DAG is parsed.

        :raises ConfigError: a parameter is wrong.
        """
        _model_and_engine(kwargs)
        return super().partial(**kwargs)

    @classmethod
    def local_engine(cls, told: Mapping[str, Any]) -> str | None:
        """The engine that an operator with these arguments has by its own word."""
        return "vllm" if told.get("enable_vllm") else super().local_engine(told)

    def engine_options(self) -> EngineOptions:
        """Videos are asked of a model that takes them."""
        return EngineOptions(model=dict.fromkeys(ENGINES, DEFAULT_MODEL))

    def make_step(self) -> Step:
        """The captioning step with this operator's parameters.

        :raises ConfigError: one of them is wrong.
        """
        return VideoCaptioningStep(
            caption_num=self.caption_num,
            keep_candidate_mode=self.keep_candidate_mode,
            keep_original_sample=self.keep_original_sample,
            prompt=self.prompt,
            prompt_key=self.prompt_key,
            system_prompt=self.system_prompt,
            sampling_params=self.sampling_params,
            fps=self.fps,
            max_frames=self.max_frames,
            window_seconds=self.window_seconds,
            transport=self.transport,
            windows_field_name=self.windows_field_name,
            seed=self.seed,
            try_num=self.try_num,
            missing_placeholders=self.missing_placeholders,
            text_key=self.text_key,
            video_key=self.video_key,
            meta_key=self.meta_key,
            special_tokens=special_tokens(self),
        )


def _model_and_engine(given: Mapping[str, Any]) -> dict[str, Any]:
    """What Data-Juicer's names for model and engine mean by the names that all operators know.

    :raises ParameterError: model or engine are given twice.
    """
    meant = model_alias("hf_model", given)
    enable_vllm, engine = given.get("enable_vllm", False), given.get("engine")
    if not isinstance(enable_vllm, bool):
        raise ParameterError(f"enable_vllm={enable_vllm!r} must be True or False.")
    if enable_vllm:
        if engine not in (None, "vllm"):
            raise ParameterError(f"enable_vllm=True contradicts engine={engine!r}. Leave one of them out.")
        if given.get("is_api_model"):
            raise ParameterError("enable_vllm=True contradicts is_api_model=True. Leave one of them out.")
        meant["engine"] = "vllm"
    return meant
