"""Which engine answers: chosen from the operator's parameters and the connection, in this order."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from airflow_vlm_provider.errors import ConfigError

if TYPE_CHECKING:
    from airflow_vlm_provider.engines.base import Engine
    from airflow_vlm_provider.hooks.vlm import VLMHook

DEFAULT_MODEL = "Qwen/Qwen2.5-VL-7B-Instruct"
DEFAULT_CONCURRENCY = 32


def make_engine(
    hook: VLMHook,
    *,
    engine: str | None,
    model: str | None,
    concurrency: int | None,
    api_endpoint: str | None,
    response_path: str | None,
    model_params: Mapping[str, Any] | None,
) -> Engine:
    """Make the engine that answers; what the operator leaves open, the connection decides.

    :raises ConfigError: the engine is not known or not to be had, or a parameter does not fit it.
    """
    settings = hook.settings
    kind = engine or settings.engine
    model = model or settings.model or DEFAULT_MODEL
    if kind == "openai":
        from airflow_vlm_provider.engines.openai import OpenAIEngine

        # Not the hook's client: the engine's own sits on aiohttp, which takes a third less CPU, and it closes it.
        options = hook.client_options()
        return OpenAIEngine(
            base_url=options["base_url"],
            api_key=options["api_key"],
            headers=options["default_headers"],
            name=f"connection {hook.vlm_conn_id!r}",
            model=model,
            concurrency=concurrency or settings.max_concurrency or DEFAULT_CONCURRENCY,
            requests_per_minute=settings.requests_per_minute,
            tokens_per_minute=settings.tokens_per_minute,
            timeout=settings.timeout,
            api_endpoint=api_endpoint,
            response_path=response_path,
            model_params=model_params,
        )
    for name, value in (("api_endpoint", api_endpoint), ("response_path", response_path)):
        if value is not None:
            raise ConfigError(
                f"{name}={value!r} is for the engine openai; leave it out with engine {kind!r}."
            )
    if kind == "transformers":
        from airflow_vlm_provider.engines.transformers import TransformersEngine

        params = {**settings.engine_args, **(model_params or {})}
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
