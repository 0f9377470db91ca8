"""Which engine answers: chosen from the operator's parameters and the connection, in this order."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow.sdk import conf

from airflow_vlm_provider.errors import ConfigError

if TYPE_CHECKING:
    from airflow_vlm_provider.engines.base import Engine
    from airflow_vlm_provider.engines.vllm import VLLMEngine
    from airflow_vlm_provider.engines.vllm_settings import KeeperSettings
    from airflow_vlm_provider.hooks.vlm import VLMHook

DEFAULT_MODEL = "Qwen/Qwen2.5-VL-7B-Instruct"
DEFAULT_CONCURRENCY = 32
# vLLM computes as many at once as fit; what waits there is ready when there is room.
VLLM_CONCURRENCY = 128


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
    holder: Mapping[str, Any] | None = None,
) -> Engine:
    """Make the engine that answers; what the operator leaves open, the connection decides.

    :param holder: Who will ask, for people who look at a worker's servers: DAG, run, task.
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
        return make_vllm_engine(
            hook,
            model=model,
            concurrency=concurrency,
            # vLLM makes its own batches.
            model_params={
                **{name: value for name, value in options.local.items() if name != "gpu_batch_size"},
                **(model_params or {}),
            },
            detail=options.detail,
            holder=holder,
        )
    raise ConfigError(f"engine={kind!r} is not known; use 'openai', 'vllm' or 'transformers'.")


def make_vllm_engine(
    hook: VLMHook,
    *,
    model: str | None,
    model_params: Mapping[str, Any] | None,
    concurrency: int | None = None,
    detail: str | None = None,
    holder: Mapping[str, Any] | None = None,
) -> VLLMEngine:
    """Make the engine that asks a vLLM server of the worker.

    :param model_params: Engine arguments by vLLM's own names, over the connection's.
    :raises ConfigError: an argument can't be given, or Airflow's configuration is wrong.
    """
    from airflow_vlm_provider.engines.vllm import VLLMEngine
    from airflow_vlm_provider.engines.vllm_spec import read_command

    settings, configured = hook.settings, engine_config()
    args = {**settings.engine_args, **(model_params or {})}
    return VLLMEngine(
        model=model or settings.model or DEFAULT_MODEL,
        folder=configured.folder,
        revision=args.pop("revision", None),
        gpus=args.pop("gpus", None),
        engine_args=args,
        command=read_command(configured.command),
        settings=configured.keeper,
        holder=holder,
        concurrency=concurrency or settings.max_concurrency or VLLM_CONCURRENCY,
        timeout=settings.timeout,
        detail=detail,
    )


@dataclass(frozen=True)
class EngineConfig:
    """What ``[vlm]`` in Airflow's configuration says of a worker's vLLM servers.

    :param folder: Where they are found.
    :param command: What starts vLLM, as it would be typed; empty for the installed one.
    """

    folder: str
    command: str
    keeper: KeeperSettings


def engine_config() -> EngineConfig:
    """Read the configuration.

    :raises ConfigError: a value is not above 0.
    """
    from airflow_vlm_provider.engines.vllm_settings import KeeperSettings

    default = KeeperSettings()
    seconds = {
        name: conf.getfloat("vlm", f"engine_{name}", fallback=getattr(default, name))
        for name in ("idle_timeout", "start_timeout")
    }
    for name, value in seconds.items():
        if not value > 0:
            raise ConfigError(
                f"Airflow's configuration, section [vlm]: engine_{name}={value} must be above 0."
            )
    return EngineConfig(
        folder=conf.get("vlm", "engine_dir", fallback="")
        or str(Path(tempfile.gettempdir()) / f"airflow-vlm-{os.geteuid()}"),
        command=conf.get("vlm", "vllm_command", fallback=""),
        keeper=KeeperSettings(**seconds),
    )


def _whole(name: str, value: Any) -> int:
    # In a connection that is written as a URI, numbers are strings.
    if isinstance(value, bool) or not str(value).isdecimal() or int(value) < 1:
        raise ConfigError(f"{name}={value!r} must be a whole number of at least 1.")
    return int(value)
