"""Which engine answers: chosen from the operator's parameters and the connection, in this order."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from airflow_vlm_provider.errors import ConfigError

if TYPE_CHECKING:
    from airflow_vlm_provider.engines.base import Engine
    from airflow_vlm_provider.hooks.vlm import VLMHook

DEFAULT_MODEL = "Qwen/Qwen2.5-VL-7B-Instruct"
DEFAULT_CONCURRENCY = 32


@dataclass(frozen=True)
class EngineOptions:
    """What a kind of operator wants of its engine.

    :param model: Model where neither operator nor connection names one, by engine; for engines that are not in it,
        :data:`DEFAULT_MODEL`.
    :param detail: ``detail`` of every image (``openai`` engine only).
    :param local: Arguments of the engines that load a model themselves.
    """

    model: Mapping[str, str] = field(default_factory=dict)
    detail: str | None = None
    local: Mapping[str, Any] = field(default_factory=dict)


def make_engine(
    hook: VLMHook,
    *,
    engine: str | None,
    model: str | None,
    concurrency: int | None,
    api_endpoint: str | None,
    response_path: str | None,
    model_params: Mapping[str, Any] | None,
    options: EngineOptions | None = None,
) -> Engine:
    """Make the engine that answers; what the operator leaves open, the connection decides.

    :raises ConfigError: the engine is not known or not to be had, or a parameter does not fit it.
    """
    options = options or EngineOptions()
    settings = hook.settings
    kind = engine or settings.engine
    model = model or settings.model or options.model.get(kind, DEFAULT_MODEL)
    if kind == "openai":
        from airflow_vlm_provider.engines.openai import OpenAIEngine

        # Not the hook's client: the engine's own sits on aiohttp, which takes a third less CPU, and it closes it.
        client = hook.client_options()
        return OpenAIEngine(
            base_url=client["base_url"],
            api_key=client["api_key"],
            headers=client["default_headers"],
            name=f"connection {hook.vlm_conn_id!r}",
            model=model,
            concurrency=concurrency or settings.max_concurrency or DEFAULT_CONCURRENCY,
            requests_per_minute=settings.requests_per_minute,
            tokens_per_minute=settings.tokens_per_minute,
            timeout=settings.timeout,
            api_endpoint=api_endpoint,
            response_path=response_path,
            model_params=model_params,
            detail=options.detail,
        )
    for name, value in (("api_endpoint", api_endpoint), ("response_path", response_path)):
        if value is not None:
            raise ConfigError(
                f"{name}={value!r} is for the engine openai; leave it out with engine {kind!r}."
            )
    if kind == "transformers":
        from airflow_vlm_provider.engines.transformers import TransformersEngine

        params = {**settings.engine_args, **options.local, **(model_params or {})}
        if "gpu_batch_size" in params:
            params["gpu_batch_size"] = _whole("gpu_batch_size", params["gpu_batch_size"])
        own = {
            name: params.pop(name)
            for name in ("revision", "gpu_batch_size", "device", "dtype", "trust_remote_code")
            if name in params
        }
        return TransformersEngine(
            model=model,
            concurrency=concurrency or settings.max_concurrency,
            model_params=params,
            **own,
        )
    if kind == "vllm":
        raise ConfigError(
            f"Engine 'vllm' (connection {hook.vlm_conn_id!r}) is not part of this version: it cannot start vLLM by "
            "itself yet. Run 'vllm serve' on the GPU machine and use the engine 'openai' with that server as host."
        )
    raise ConfigError(f"engine={kind!r} is not known; use 'openai', 'vllm' or 'transformers'.")


def _whole(name: str, value: Any) -> int:
    # In a connection that is written as a URI, numbers are strings.
    if isinstance(value, bool) or not str(value).isdecimal() or int(value) < 1:
        raise ConfigError(f"{name}={value!r} must be a whole number of at least 1.")
    return int(value)
