"""What a vLLM server is started with: its command line, its environment, its GPUs, and what tells it from others."""

from __future__ import annotations

import json
import sys

import pytest

from airflow_vlm_provider.engines import vllm_spec
from airflow_vlm_provider.engines.vllm_spec import (
    CPU,
    DEFAULT_COMMAND,
    ServerSpec,
    influence,
    pick_gpus,
    read_command,
)
from airflow_vlm_provider.errors import ConfigError


def spec(**fields):
    return ServerSpec(**{"model": "org/m", "gpus": ("0",), **fields})


def flags(**args):
    """What the arguments make of the command line."""
    plain = spec().argv(port=1)
    return spec(args=args).argv(port=1)[len(plain) :]


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        ({"tensor_parallel_size": 2}, ["--tensor-parallel-size=2"]),
        ({"tensor-parallel-size": 2}, ["--tensor-parallel-size=2"]),
        ({"dtype": "bfloat16"}, ["--dtype=bfloat16"]),
        ({"gpu_memory_utilization": 0.9}, ["--gpu-memory-utilization=0.9"]),
        ({"enforce_eager": True}, ["--enforce-eager"]),
        ({"enable_prefix_caching": False}, ["--no-enable-prefix-caching"]),
        ({"disable_log_stats": True}, ["--disable-log-stats"]),
        ({"disable_log_stats": False}, []),
        ({"quantization": None}, []),
        ({"limit_mm_per_prompt": {"image": 4}}, ["--limit-mm-per-prompt", '{"image": 4}']),
        ({"middleware": ["a", "b"]}, ["--middleware", "a", "b"]),
        ({"lora_modules": [{"name": "x"}]}, ["--lora-modules", '{"name": "x"}']),
        ({"allowed_origins": ["a", "b"]}, ["--allowed-origins", '["a", "b"]']),
        # A value that looks like a flag stays a value.
        ({"chat_template": "--api-key=mine"}, ["--chat-template=--api-key=mine"]),
    ],
)
def test_arguments_become_flags(args, expected):
    assert flags(**args) == expected


def test_the_command_line_names_the_model_once_and_listens_on_loopback_alone():
    argv = spec(revision="abc").argv(port=8123)
    assert argv[: len(DEFAULT_COMMAND)] == list(DEFAULT_COMMAND)
    assert argv[len(DEFAULT_COMMAND) :] == [
        *("--model", "org/m", "--served-model-name", "org/m"),
        *("--host", "127.0.0.1", "--port", "8123", "--revision", "abc"),
    ]
    assert spec(command=("/opt/bin/vllm", "serve")).argv(port=1)[2:4] == ["org/m", "--served-model-name"]


@pytest.mark.parametrize(
    "name",
    [
        "api_key",
        "api-key",
        "port",
        "host",
        "uds",
        "served_model_name",
        "model",
        "revision",
        "ssl_keyfile",
        "grpc",
    ],
)
def test_address_key_and_name_are_the_servers_own(name):
    with pytest.raises(ConfigError, match=f"'{name.replace('-', '_')}' can't be given"):
        spec(args={name: "x"})


def test_a_token_is_not_put_where_everybody_sees_it():
    with pytest.raises(ConfigError, match="HF_TOKEN") as caught:
        spec(args={"hf_token": "hf_secret"})
    assert "hf_secret" not in str(caught.value)
    with pytest.raises(ConfigError, match="'gpus'"):
        spec(args={"device_ids": "0,1"})


def test_the_key_is_of_what_the_server_is_and_no_more():
    key = spec(args={"tensor_parallel_size": 2, "dtype": "half"}).key
    assert len(key) == 16
    # In any order, in either spelling, with or without vLLM's defaults.
    assert spec(args={"dtype": "half", "tensor-parallel-size": 2, "quantization": None}).key == key
    others = [
        spec(args={"tensor_parallel_size": 1, "dtype": "half"}),
        spec(args={"tensor_parallel_size": 2}),
        spec(args={"tensor_parallel_size": 2, "dtype": "half"}, gpus=("1",)),
        spec(args={"tensor_parallel_size": 2, "dtype": "half"}, revision="x"),
        spec(args={"tensor_parallel_size": 2, "dtype": "half"}, model="n"),
        spec(args={"tensor_parallel_size": 2, "dtype": "half"}, command=("vllm", "serve")),
    ]
    assert len({each.key for each in others} | {key}) == 7
    assert ServerSpec.from_json(json.loads(json.dumps(others[0].to_json()))).key == others[0].key


def test_the_environment_has_the_key_and_the_gpus_and_nothing_of_airflows(monkeypatch):
    monkeypatch.setenv("AIRFLOW__DATABASE__SQL_ALCHEMY_CONN", "secret")
    monkeypatch.setenv("__AIRFLOW_SUPERVISOR_FD", "3")
    monkeypatch.setenv("PYTHONPATH", "/somewhere")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    env = spec(gpus=("1", "2")).environment(api_key="sk")
    assert (env["VLLM_API_KEY"], env["CUDA_VISIBLE_DEVICES"]) == ("sk", "1,2")
    assert not any("AIRFLOW" in name for name in env)
    assert env["PYTHONPATH"] == "/somewhere"
    # Another environment's Python finds its own libraries.
    assert "PYTHONPATH" not in spec(command=("/opt/vllm/bin/vllm", "serve")).environment(api_key="sk")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "CUDA_VISIBLE_DEVICES" not in spec(gpus=(CPU,)).environment(api_key="sk")


def test_what_decides_answers_is_told_from_what_only_decides_how_fast():
    args = {
        "tensor_parallel_size": 4,
        "data-parallel-size": 2,
        "gpu_memory_utilization": 0.8,
        "enable_prefix_caching": False,
        "mm_processor_cache_gb": 2,
        "max_num_seqs": 5,
        "dtype": "half",
        "quantization": "awq",
        "mm-processor-kwargs": {"max_pixels": 1},
        "kv_cache_dtype": None,
        "something_new": 1,
    }
    assert influence(args) == {
        "dtype": "half",
        "mm_processor_kwargs": {"max_pixels": 1},
        "quantization": "awq",
        "something_new": 1,
    }


@pytest.mark.parametrize(
    ("visible", "gpus", "args", "expected"),
    [
        ("0,1,2,3", None, {}, ("0",)),
        ("0,1,2,3", None, {"tensor_parallel_size": 2, "data-parallel-size": "2"}, ("0", "1", "2", "3")),
        (
            "0,1,2,3",
            None,
            {"prefill_context_parallel_size": 2, "pipeline-parallel-size": 2},
            ("0", "1", "2", "3"),
        ),
        # Parts that share the GPUs of the others.
        ("0,1", None, {"tensor_parallel_size": 2, "decode_context_parallel_size": 2}, ("0", "1")),
        # vLLM's defaults.
        ("0,1", None, {"tensor_parallel_size": None, "data-parallel-size": None}, ("0",)),
        ("GPU-a,GPU-b", "GPU-b", {}, ("GPU-b",)),
        ("0,1,2,3", [3, 1], {"tensor_parallel_size": 2}, ("3", "1")),
        ("0,1", 1, {}, ("1",)),
        ("", None, {}, (CPU,)),
        ("-1", None, {"tensor_parallel_size": 2}, (CPU,)),
    ],
)
def test_gpus_are_the_named_ones_or_the_first(monkeypatch, visible, gpus, args, expected):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert pick_gpus(gpus, args) == expected


@pytest.mark.parametrize(
    ("gpus", "args", "said"),
    [
        (None, {"tensor_parallel_size": 4}, "4 GPUs are asked for.*this worker has 2: 0, 1"),
        ("0", {"tensor_parallel_size": 2}, "names 1 GPUs, but the parallel sizes ask for 2"),
        ("0,0", {"tensor_parallel_size": 2}, "must name each GPU once"),
        ("0,", {}, "must name each GPU once"),
        ("7", {}, "this worker has no 7; it sees 0, 1"),
        (None, {"tensor_parallel_size": "two"}, "must be a whole number"),
        (None, {"pipeline_parallel_size": 0}, "must be a whole number"),
        (None, {"data_parallel_size": True}, "must be a whole number"),
    ],
)
def test_gpus_that_are_not_there_are_told(monkeypatch, gpus, args, said):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    with pytest.raises(ConfigError, match=said):
        pick_gpus(gpus, args)


def test_gpus_are_counted_by_their_devices_or_as_the_driver_says(monkeypatch, tmp_path):
    devices, driver = tmp_path / "dev", tmp_path / "gpus"
    monkeypatch.setattr(vllm_spec, "_DEVICES", devices)
    monkeypatch.setattr(vllm_spec, "_DRIVER", driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("NVIDIA_VISIBLE_DEVICES", raising=False)
    assert pick_gpus(None, {}) == (CPU,)
    devices.mkdir()
    driver.mkdir()
    for name in ("0000:01:00.0", "0000:02:00.0", "0000:03:00.0"):
        (driver / name).mkdir()
    (devices / "nvidiactl").touch()
    (devices / "nvidia-uvm").touch()
    assert pick_gpus(None, {"tensor_parallel_size": 3}) == ("0", "1", "2")
    # In a container that was given two of the machine's: CUDA numbers those.
    (devices / "nvidia1").touch()
    (devices / "nvidia2").touch()
    assert pick_gpus(None, {"tensor_parallel_size": 2}) == ("0", "1")
    with pytest.raises(ConfigError, match="this worker has 2: 0, 1"):
        pick_gpus(None, {"tensor_parallel_size": 3})
    # By CDI, it is told of none, and has them.
    monkeypatch.setenv("NVIDIA_VISIBLE_DEVICES", "void")
    assert pick_gpus(None, {"tensor_parallel_size": 2}) == ("0", "1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert pick_gpus(None, {}) == (CPU,)


@pytest.mark.parametrize("told", ["none", "void", ""])
def test_a_container_without_gpus_does_not_take_the_machines(monkeypatch, tmp_path, told):
    devices, driver = tmp_path / "dev", tmp_path / "gpus"
    monkeypatch.setattr(vllm_spec, "_DEVICES", devices)
    monkeypatch.setattr(vllm_spec, "_DRIVER", driver)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    devices.mkdir()
    (driver / "0000:01:00.0").mkdir(parents=True)
    monkeypatch.setenv("NVIDIA_VISIBLE_DEVICES", told)
    assert pick_gpus(None, {}) == (CPU,)
    monkeypatch.setenv("NVIDIA_VISIBLE_DEVICES", "all")
    assert pick_gpus(None, {}) == ("0",)


def test_a_command_is_read_as_it_would_be_typed():
    assert read_command(None) == read_command(" ") == DEFAULT_COMMAND
    assert DEFAULT_COMMAND[0] == sys.executable
    assert read_command("'/opt/my vllm/bin/vllm' serve") == ("/opt/my vllm/bin/vllm", "serve")
    with pytest.raises(ConfigError, match="vllm_command can't be read"):
        read_command("'vllm serve")
