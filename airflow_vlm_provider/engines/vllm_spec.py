"""What a vLLM server is started with: its command line, its environment, and the key that tells it from others.

Two tasks share a server when model, revision, engine arguments, GPUs and command are the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from airflow_vlm_provider.errors import ConfigError

# Not `vllm serve`: that asks for a distribution named vllm, which its builds for CPUs are not.
DEFAULT_COMMAND = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
_DEVICES, _DRIVER = Path("/dev"), Path("/proc/driver/nvidia/gpus")
CPU = "cpu"
"""Stands for the GPUs of a machine that has none: there, too, one server at a time has the memory to itself."""

# Decided here: where the server is found, who may ask it, and what its model is called by those who do.
_OWN = frozenset(
    {
        *("model", "model_tag", "revision", "served_model_name"),
        *("host", "port", "uds", "root_path", "grpc", "grpc_port", "headless"),
        *("api_key", "ssl_keyfile", "ssl_certfile", "ssl_ca_certs", "ssl_cert_reqs"),
    }
)
# Each of these copies or parts of the model has a GPU of its own. (Those of decode_context_parallel_size share them.)
_PARALLEL_SIZES = (
    "tensor_parallel_size",
    "pipeline_parallel_size",
    "prefill_context_parallel_size",
    "data_parallel_size",
)
# Flags that can only be set; they are off by default.
_SET_ONLY = frozenset(
    {"aggregate_engine_logging", "data_parallel_multi_port_external_lb", "disable_log_stats"}
)
# Lists that it takes as JSON, and not word by word.
_JSON_LISTS = frozenset({"allowed_headers", "allowed_methods", "allowed_origins"})
# Arguments of vLLM's that decide where and how fast answers are made, but not what they are.
_NO_INFLUENCE = frozenset(
    {
        "aggregate_engine_logging",
        "api_server_count",
        "async_scheduling",
        "attention_backend",
        "block_size",
        "collect_detailed_traces",
        "compilation_config",
        "cpu_offload_gb",
        "cpu_offload_params",
        "cudagraph_capture_sizes",
        "data_parallel_backend",
        "data_parallel_size",
        "data_parallel_size_local",
        "disable_access_log_for_endpoints",
        "disable_custom_all_reduce",
        "disable_log_stats",
        "disable_uvicorn_access_log",
        "distributed_executor_backend",
        "distributed_timeout_seconds",
        "download_dir",
        "enable_chunked_prefill",
        "enable_expert_parallel",
        "enable_log_outputs",
        "enable_log_requests",
        "enable_prefix_caching",
        "enable_prompt_tokens_details",
        "enable_server_load_tracking",
        "enable_sleep_mode",
        "enforce_eager",
        "gpu_memory_utilization",
        "kv_cache_memory_bytes",
        "kv_cache_metrics",
        "kv_offloading_size",
        "limit_mm_per_prompt",
        "log_error_stack",
        "long_prefill_token_threshold",
        "max_cudagraph_capture_size",
        "max_log_len",
        "max_model_len",
        "max_num_batched_tokens",
        "max_num_queued_reqs",
        "max_num_queued_tokens",
        "max_num_scheduled_tokens",
        "max_num_seqs",
        "max_parallel_loading_workers",
        "mm_encoder_tp_mode",
        "mm_processor_cache_gb",
        "mm_processor_cache_type",
        "mm_shm_cache_max_object_size_mb",
        "num_gpu_blocks_override",
        "numa_bind",
        "optimization_level",
        "otlp_traces_endpoint",
        "performance_mode",
        "pipeline_parallel_size",
        "prefill_context_parallel_size",
        "renderer_num_workers",
        "safetensors_load_strategy",
        "scheduling_policy",
        "shutdown_timeout",
        "skip_mm_profiling",
        "stream_interval",
        "tensor_parallel_size",
        "use_tqdm_on_load",
        "uvicorn_log_level",
    }
)


@dataclass(frozen=True)
class ServerSpec:
    """What a server is started with.

    :param model: Name on the Hugging Face hub, or a folder.
    :param revision: Branch, tag or commit on the hub.
    :param args: Engine arguments by vLLM's own names, with underscores: ``{"tensor_parallel_size": 2}``.
    :param gpus: The GPUs that it runs on, as ``CUDA_VISIBLE_DEVICES`` names them; ``("cpu",)`` for none.
    :param command: What starts vLLM's OpenAI-compatible server, without arguments.
    """

    model: str
    gpus: tuple[str, ...]
    revision: str | None = None
    args: Mapping[str, Any] = field(default_factory=dict)
    command: tuple[str, ...] = DEFAULT_COMMAND

    def __post_init__(self) -> None:
        for name in map(_plain, self.args):
            if name in _OWN:
                raise ConfigError(
                    f"The engine argument {name!r} can't be given: address, key and name of a server on the worker are "
                    "its own. The model is the operator's or the connection's."
                )
            if name == "hf_token":
                raise ConfigError(
                    "The engine argument 'hf_token' can't be given, as anybody on the machine could read it from the "
                    "command line. Set the environment variable HF_TOKEN for the worker."
                )
            if name == "device_ids":
                raise ConfigError("The engine argument 'device_ids' can't be given; name the GPUs in 'gpus'.")

    @property
    def key(self) -> str:
        """16 hexadecimal digits that tell this server from others on the worker."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()[:16]

    def to_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        return {
            "model": self.model,
            "revision": self.revision,
            "args": {_plain(name): value for name, value in self.args.items() if value is not None},
            "gpus": list(self.gpus),
            "command": list(self.command),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ServerSpec:
        """The spec that :meth:`to_json` gave these."""
        return cls(
            model=data["model"],
            revision=data["revision"],
            args=data["args"],
            gpus=tuple(data["gpus"]),
            command=tuple(data["command"]),
        )

    def argv(self, *, port: int) -> list[str]:
        """The command line. The API key is no part of it: other users of the machine can read it."""
        # `vllm serve` wants the model without a name, everything else with one.
        model = [self.model] if self.command[-1] == "serve" else ["--model", self.model]
        argv = [*self.command, *model, "--served-model-name", self.model]
        argv += ["--host", "127.0.0.1", "--port", str(port)]
        if self.revision is not None:
            argv += ["--revision", self.revision]
        for name, value in self.args.items():
            argv += _flag(_plain(name), value)
        return argv

    def environment(self, *, api_key: str) -> dict[str, str]:
        """The server's environment variables: this process's, without what is Airflow's."""
        env = without_secrets()
        if self.command[0] != sys.executable:
            # Another Python finds its own libraries, or the wrong ones.
            env.pop("PYTHONPATH", None)
            env.pop("PYTHONHOME", None)
        if self.gpus != (CPU,):
            env["CUDA_VISIBLE_DEVICES"] = ",".join(self.gpus)
        env["VLLM_API_KEY"] = api_key
        env.setdefault("VLLM_NO_USAGE_STATS", "1")
        return env


def without_secrets() -> dict[str, str]:
    """This process's environment variables, without what is Airflow's.

    Connections, keys of the metadata database, JWT secrets: a model's own code has no business to read them.
    """
    return {name: value for name, value in os.environ.items() if not name.lstrip("_").startswith("AIRFLOW")}


def influence(args: Mapping[str, Any]) -> dict[str, Any]:
    """The engine arguments that may decide what a model answers; those that are not known may."""
    named = {_plain(name): value for name, value in args.items() if value is not None}
    return {name: named[name] for name in sorted(named) if name not in _NO_INFLUENCE}


def read_command(command: str | None) -> tuple[str, ...]:
    """What starts vLLM, from a line as it would be typed; None and an empty one take the installed vLLM.

    :raises ConfigError: quotes in it are not closed.
    """
    try:
        return tuple(shlex.split(command or "")) or DEFAULT_COMMAND
    except ValueError as error:
        raise ConfigError(f"[vlm] vllm_command can't be read ({error}): {command}") from error


def pick_gpus(gpus: str | int | Sequence[Any] | None, args: Mapping[str, Any]) -> tuple[str, ...]:
    """The GPUs that a server gets: those that are named, or else as many of the worker's first as it needs.

    :param gpus: Such as ``"0,1"``, ``[0, 1]`` or ``1``; None leaves it open.
    :param args: The engine arguments, whose parallel sizes say how many are needed.
    :raises ConfigError: the worker has not so many, or more or fewer are named than needed.
    """
    needed, named_sizes = 1, {_plain(name): value for name, value in args.items() if value is not None}
    for name in _PARALLEL_SIZES:
        value = named_sizes.get(name, 1)
        if isinstance(value, bool) or not str(value).isdecimal() or int(value) < 1:
            raise ConfigError(f"{name}={value!r} must be a whole number of at least 1.")
        needed *= int(value)
    visible = _visible_gpus()
    if gpus is None:
        if not visible:
            return (CPU,)
        if len(visible) < needed:
            raise ConfigError(
                f"{needed} GPUs are asked for ({' x '.join(_PARALLEL_SIZES)}), and this worker has {len(visible)}: "
                f"{', '.join(visible)}."
            )
        return tuple(visible[:needed])
    named = (
        [each.strip() for each in str(gpus).split(",")]
        if isinstance(gpus, str | int)
        else [str(each) for each in gpus]
    )
    if len(set(named)) != len(named) or not all(named):
        raise ConfigError(f"gpus={gpus!r} must name each GPU once, as in '0,1'.")
    if len(named) != needed:
        raise ConfigError(f"gpus={gpus!r} names {len(named)} GPUs, but the parallel sizes ask for {needed}.")
    if missing := [each for each in named if each not in visible]:
        raise ConfigError(
            f"gpus={gpus!r}: this worker has no {', '.join(missing)}; it sees {', '.join(visible) or 'no GPU'}."
        )
    return tuple(named)


def _visible_gpus() -> list[str]:
    """What this process may use, by the names that ``CUDA_VISIBLE_DEVICES`` takes."""
    limited = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    if limited in ("", "none", "void", "-1"):
        return []
    if limited != "all":
        return [each.strip() for each in limited.split(",") if each.strip()]
    # Not by a library of CUDA's: a process that has asked it can't fork any more.
    found = [each for each in _DEVICES.glob("nvidia*") if each.name.removeprefix("nvidia").isdecimal()]
    # A machine may have no devices yet after it was started, but a container has those that it was given, and sees all of
    # the machine's in /proc. What it was given comes first: one that has its GPUs through CDI is told "void", too.
    if not found and os.environ.get("NVIDIA_VISIBLE_DEVICES") not in ("", "none", "void"):
        found = list(_DRIVER.glob("*"))
    return [str(number) for number, _ in enumerate(found)]


def _plain(name: str) -> str:
    return name.replace("-", "_")


def _flag(name: str, value: Any) -> list[str]:
    """An argument as vLLM's command line takes it; None is vLLM's default."""
    flag = f"--{name.replace('_', '-')}"
    if value is None or (value is False and name in _SET_ONLY):
        return []
    if isinstance(value, bool):
        return [flag if value else f"--no-{flag[2:]}"]
    if isinstance(value, Mapping) or name in _JSON_LISTS:
        return [flag, json.dumps(value)]
    if isinstance(value, list | tuple):
        return [flag, *(json.dumps(each) if isinstance(each, Mapping) else str(each) for each in value)]
    # In one word, as a value may begin like a flag.
    return [f"{flag}={value}"]
