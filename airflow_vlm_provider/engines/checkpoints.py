"""Loads a model and its processor, and says what is wrong with a checkpoint in terms of the parameters."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from airflow_vlm_provider.engines.devices import is_device_lost, is_out_of_memory, pick_device, pick_dtype
from airflow_vlm_provider.errors import ConfigError, EngineError

T = TypeVar("T")

# Among what from_pretrained takes, what says where a checkpoint's files are: the processor's lie there, too.
_HUB = ("cache_dir", "force_download", "local_files_only", "subfolder", "token")

# `generate` fills what a call leaves open from these. How tokens are picked is the request's affair.
_PICKING = {
    "do_sample": False,
    "num_beams": 1,
    "early_stopping": False,
    "length_penalty": 1.0,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": None,
    "min_p": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "max_length": None,
}


@dataclass
class Checkpoint:
    """A loaded model with what belongs to it.

    :param eos_ids: Tokens that end an answer.
    :param vocabulary: How many logits the model computes.
    :param context: How many tokens prompt and answer may have together; None when the checkpoint names no limit.
    :param placeholders: What stands for media in a prompt.
    :param conversational: Whether it has a chat template. Without one, all that can be asked of it is to go on with
        a text.
    :param starts_freely: Whether the model itself chooses the first token of an answer.
    """

    model: Any
    processor: Any
    tokenizer: Any
    eos_ids: frozenset[int]
    vocabulary: int
    context: int | None
    placeholders: tuple[str, ...]
    conversational: bool
    starts_freely: bool


def load_checkpoint(
    model: str,
    *,
    revision: str | None,
    device: str | None,
    dtype: Any,
    trust_remote_code: bool,
    model_params: Mapping[str, Any],
) -> Checkpoint:
    """Load a model onto its device. Takes seconds to minutes.

    :raises ConfigError: libraries are missing, or the checkpoint is missing, of another kind or incomplete.
    :raises EngineError: the device has no memory for it, or failed.
    """
    try:
        import torch  # noqa: F401
        import transformers
        import xgrammar  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"The transformers engine needs {error.name or error}: pip install 'airflow-provider-vlm[transformers]'"
        ) from error
    if (model.startswith((".", "~")) or Path(model).is_absolute()) and not Path(model).is_dir():
        raise ConfigError(f"model={model!r} is no folder on this worker")
    source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    source.update((name, model_params[name]) for name in _HUB if name in model_params)
    placement = pick_device(device)

    def load() -> Checkpoint:
        # Drawn on standard error, a progress bar is an error in a task's log.
        transformers.utils.logging.disable_progress_bar()
        config = transformers.AutoConfig.from_pretrained(model, **source)
        if (
            type(config) not in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
            and "AutoModelForImageTextToText" not in getattr(config, "auto_map", {})
        ):
            raise ConfigError(
                f"model={model!r} is of type {config.model_type!r}, which transformers does not know as an "
                "image-text-to-text model; choose a vision-language chat model, or a captioner such as BLIP-2"
            )
        processor = transformers.AutoProcessor.from_pretrained(model, **source)
        tokenizer = _tokenizer(processor, model)
        params = {"dtype": pick_dtype(dtype, placement), **source, **model_params}
        network = transformers.AutoModelForImageTextToText.from_pretrained(model, **params)
        if "device_map" not in model_params:
            network.to(placement)
        return _checkpoint(network.eval(), processor, tokenizer)

    return _explained(load, model)


def _tokenizer(processor: Any, model: str) -> Any:
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or getattr(processor, "image_processor", None) is None:
        raise ConfigError(
            f"model={model!r} has no processor for images and text together; choose another vision-language model, "
            "or add the preprocessor files to the checkpoint"
        )
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _checkpoint(network: Any, processor: Any, tokenizer: Any) -> Checkpoint:
    # The model's own and, where it leaves the writing to a language model inside, that one's.
    defaults = [
        module.generation_config
        for module in network.modules()
        if getattr(module, "generation_config", None) is not None
    ]
    text_config = network.config.get_text_config()
    eos_ids = _eos_ids(defaults, text_config, tokenizer)
    for config in defaults:
        for name, value in {
            **_PICKING,
            "eos_token_id": sorted(eos_ids),
            "pad_token_id": tokenizer.pad_token_id,
        }.items():
            setattr(config, name, value)
    _complete_image_tokens(network.config, processor, tokenizer)
    head = network.get_output_embeddings()
    names = ("image_token", "video_token", "boi_token")
    return Checkpoint(
        model=network,
        processor=processor,
        tokenizer=tokenizer,
        eos_ids=eos_ids,
        vocabulary=head.weight.shape[0] if head is not None else text_config.vocab_size,
        context=getattr(text_config, "max_position_embeddings", None),
        placeholders=tuple({str(token) for name in names if (token := getattr(processor, name, None))}),
        conversational=bool(
            getattr(processor, "chat_template", None) or getattr(tokenizer, "chat_template", None)
        ),
        starts_freely=all(config.forced_bos_token_id is None for config in defaults),
    )


def _eos_ids(defaults: Sequence[Any], text_config: Any, tokenizer: Any) -> frozenset[int]:
    found: set[int] = set()
    for value in (
        *(config.eos_token_id for config in defaults),
        # BLIP's decoder ends with this one, whatever its generation_config.json says.
        getattr(text_config, "sep_token_id", None),
    ):
        found.update([value] if isinstance(value, int) else value or ())
    if not found and tokenizer.eos_token_id is not None:
        found.add(tokenizer.eos_token_id)
    if not found:
        raise ConfigError(
            "The checkpoint names no end-of-sequence token; set eos_token_id in generation_config.json"
        )
    return frozenset(found)


def _complete_image_tokens(config: Any, processor: Any, tokenizer: Any) -> None:
    """Let model and processor agree on what stands for a picture, which older BLIP-2 checkpoints leave open.

    Without it, the picture would be left out silently.
    """
    if getattr(processor, "num_query_tokens", 0) is None:
        processor.num_query_tokens = config.num_query_tokens
    if getattr(config, "image_token_id", 0) is None and getattr(processor, "image_token", None) is not None:
        config.image_token_id = tokenizer.convert_tokens_to_ids(str(processor.image_token))


def _explained(load: Callable[[], T], model: str) -> T:
    """Run ``load`` and say what its errors mean."""
    try:
        return load()
    except ConfigError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        if is_out_of_memory(error) or is_device_lost(error):
            raise EngineError(f"model={model!r} could not be loaded onto the device: {reason}") from error
        if "trust_remote_code" in reason:
            raise ConfigError(
                f"model={model!r} brings code of its own; after reading it, allow it with trust_remote_code=True"
            ) from error
        if isinstance(error, OSError) and not Path(model).is_dir():
            hub = (
                "HF_HUB_OFFLINE is set"
                if os.environ.get("HF_HUB_OFFLINE")
                else "it could not be had from the hub"
            )
            raise ConfigError(
                f"model={model!r} is neither a folder nor in this worker's cache of the Hugging Face hub, and {hub}; "
                f"check the name, the revision and access, or give a folder ({reason})"
            ) from error
        raise ConfigError(f"model={model!r} could not be loaded: {type(error).__name__}: {reason}") from error
