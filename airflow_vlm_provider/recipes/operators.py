"""Which of Data-Juicer's operators can be run, by which of this package's, and what their parameters mean here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Supported:
    """One of Data-Juicer's operators that can be run.

    :param module: Where the operator is.
    :param operator: Its class. Named and not imported: reading a recipe brings neither Airflow nor the others along.
    :param step: The step's name, which names tasks and folders.
    :param parameters: Parameters that mean the same in both, by the name that they have in both.
    :param own: What the operator of this package can besides.
    :param secrets: Parameters that belong in a connection.
    :param yielding: Parameters that say in Data-Juicer's way what an argument of all operators says, too: that
        argument's name. Who gives the one does not want the other.
    """

    module: str
    operator: str
    step: str
    parameters: tuple[str, ...]
    own: tuple[str, ...] = ()
    secrets: tuple[str, ...] = ()
    yielding: Mapping[str, str] = field(default_factory=dict)

    @property
    def known(self) -> tuple[str, ...]:
        """All parameters that a recipe may give."""
        return (*self.parameters, *self.own)


_CANDIDATES = ("caption_num", "keep_candidate_mode", "keep_original_sample")
_PROMPTS = ("prompt", "prompt_key")
_TRIES = ("try_num", "missing_placeholders")

SUPPORTED: Mapping[str, Supported] = {
    "image_tagging_vlm_mapper": Supported(
        module="airflow_vlm_provider.operators.image_tagging",
        operator="ImageTaggingVLMOperator",
        step="image_tagging",
        parameters=(
            "api_or_hf_model",
            "is_api_model",
            "tag_field_name",
            "api_endpoint",
            "response_path",
            "system_prompt",
            "input_template",
            "model_params",
            "sampling_params",
            "try_num",
        ),
        yielding={"is_api_model": "engine"},
    ),
    "image_captioning_mapper": Supported(
        module="airflow_vlm_provider.operators.image_captioning",
        operator="ImageCaptioningOperator",
        step="image_captioning",
        parameters=("hf_img2seq", "trust_remote_code", *_CANDIDATES, *_PROMPTS, "gpu_batch_size"),
        own=("system_prompt", "sampling_params", "max_new_tokens", "seed", *_TRIES),
        yielding={"hf_img2seq": "api_or_hf_model"},
    ),
    "image_captioning_from_gpt4v_mapper": Supported(
        module="airflow_vlm_provider.operators.image_captioning_gpt4v",
        operator="ImageCaptioningFromGPT4VOperator",
        step="image_captioning_gpt4v",
        parameters=(
            "mode",
            "max_token",
            "temperature",
            "system_prompt",
            "user_prompt",
            "user_prompt_key",
            "keep_original_sample",
            "any_or_all",
        ),
        own=("model", "detail", "missing_placeholders"),
        secrets=("api_key",),
        yielding={"model": "api_or_hf_model"},
    ),
    "video_captioning_from_vlm_mapper": Supported(
        module="airflow_vlm_provider.operators.video_captioning",
        operator="VideoCaptioningFromVLMOperator",
        step="video_captioning",
        parameters=(
            "hf_model",
            "enable_vllm",
            *_CANDIDATES,
            *_PROMPTS,
            "system_prompt",
            "model_params",
            "sampling_params",
        ),
        own=(
            "fps",
            "max_frames",
            "max_pixels",
            "window_seconds",
            "transport",
            "windows_field_name",
            "seed",
            *_TRIES,
        ),
        yielding={"hf_model": "api_or_hf_model", "enable_vllm": "engine"},
    ),
}
"""What can be run, by Data-Juicer's names."""

FIELDS = ("text_key", "image_key", "video_key")
"""Parameters of every operator: fields other than the recipe's own settings say."""

_RESOURCES = "what a task may use is Airflow's part: pool, queue, executor_config, concurrency"
_OTHER_FIELD = "the step has no use for that field"

IGNORED_PARAMETERS: Mapping[str, str] = {
    **dict.fromkeys(
        (
            "accelerator",
            "adaptive_batching",
            "auto_op_parallelism",
            "batch_mode",
            "batch_size",
            "cpu_required",
            "gpu_required",
            "input_columns",
            "mem_required",
            "memory",
            "num_cpus",
            "num_gpus",
            "num_proc",
            "output_columns",
            "ray_execution_mode",
            "runtime_env",
            "turbo",
            "work_dir",
        ),
        _RESOURCES,
    ),
    **dict.fromkeys(
        (
            "audio_key",
            "history_key",
            "image_bytes_key",
            "instruction_key",
            "query_key",
            "response_key",
            "system_key",
        ),
        _OTHER_FIELD,
    ),
    "skip_op_error": "a row that fails is a dead letter, and max_error_rate says how many may",
}
"""Parameters of every operator of Data-Juicer's that have no meaning here: why."""

REFUSED_PARAMETERS: Mapping[str, str] = {
    "index_key": "rows are not numbered here. Number them before, or remove it.",
}
"""Parameters of every operator of Data-Juicer's that would change the rows, and don't here. Null is fine."""
