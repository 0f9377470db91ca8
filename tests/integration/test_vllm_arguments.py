"""The command line that engine arguments become, read by the parser of the vLLM that is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from airflow_vlm_provider.engines.vllm_spec import _NO_INFLUENCE, _OWN, _SET_ONLY, ServerSpec
from tests.support.vllm_server import require_vllm

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

ARGUMENTS = {
    "tensor_parallel_size": 2,
    "pipeline-parallel-size": 2,
    "data_parallel_size": "4",
    "dtype": "bfloat16",
    "quantization": "awq",
    "max_model_len": 8192,
    "max_num_seqs": 64,
    "max_num_batched_tokens": 16384,
    "gpu_memory_utilization": 0.85,
    "kv_cache_dtype": "fp8",
    "limit_mm_per_prompt": {"image": 4, "video": {"count": 1, "num_frames": 32}},
    "mm_processor_cache_gb": 2.5,
    "mm_processor_kwargs": {"max_pixels": 1003520, "fps": 2},
    "media_io_kwargs": {"video": {"num_frames": -1}},
    "mm_encoder_tp_mode": "data",
    "enable_prefix_caching": False,
    "enable_chunked_prefill": True,
    "enforce_eager": True,
    "trust_remote_code": True,
    "disable_log_stats": True,
    "aggregate_engine_logging": False,
    "allowed_media_domains": ["a.example", "b.example"],
    "allowed_origins": ["http://localhost"],
    "hf_overrides": {"architectures": ["X"]},
    "override_generation_config": {"temperature": 0.5},
    "compilation_config": {"mode": 0},
    "lora_modules": [{"name": "a", "path": "/a"}, {"name": "b", "path": "/b"}],
    "chat_template": "{% for message in messages %}-- {{ message }}{% endfor %}",
    "seed": 7,
    "generation_config": "vllm",
    "swap_space": None,
}

# What a parser makes of a command line, and all names that it knows.
PARSE = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = make_arg_parser(FlexibleArgumentParser())
parsed = [vars(parser.parse_args(argv)) for argv in json.loads(sys.argv[1])]
bare = [each.dest for each in parser._actions if type(each).__name__ == "_StoreTrueAction"]
result = {"parsed": parsed, "known": [each.dest for each in parser._actions], "bare": bare}
print("RESULT" + json.dumps(result, default=str))
"""


@pytest.fixture(scope="module")
def parser(tmp_path_factory):
    require_vllm()
    spec = ServerSpec(model="org/m", gpus=("0",), revision="abc", args=ARGUMENTS, command=("vllm",))
    lines = [spec.argv(port=8123)[1:], ServerSpec(model="org/m", gpus=(), command=("vllm",)).argv(port=1)[1:]]
    done = subprocess.run(
        [sys.executable, "-c", PARSE, json.dumps(lines)],
        capture_output=True,
        text=True,
        cwd=tmp_path_factory.mktemp("parser"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.partition("RESULT")[2])


def test_every_argument_comes_out_as_it_was_given(parser):
    parsed, defaults = parser["parsed"]
    given = {name.replace("-", "_"): value for name, value in ARGUMENTS.items() if value is not None}
    found = {name: parsed[name] for name in given}
    # These become records of vLLM's own.
    assert "path='/b'" in str(found.pop("lora_modules"))
    assert "mode" in str(found.pop("compilation_config"))
    assert found.pop("data_parallel_size") == 4
    assert found == {name: given[name] for name in found}
    assert (parsed["model"], parsed["served_model_name"], parsed["revision"]) == ("org/m", ["org/m"], "abc")
    assert (parsed["host"], parsed["port"]) == ("127.0.0.1", 8123)
    # And nothing else does.
    own = {*given, "revision", "port"}
    assert {name for name in parsed if parsed[name] != defaults[name]} <= own


def test_names_that_are_special_are_names_of_vllms(parser):
    known = set(parser["known"])
    assert _NO_INFLUENCE - known == set()
    assert _OWN - known == set()
    # Without --no-...; those that are not refused are left out when they are False.
    assert set(parser["bare"]) <= _SET_ONLY | _OWN
    assert set(parser["bare"]) >= _SET_ONLY


def test_the_module_that_is_run_is_there():
    require_vllm()
    import importlib.util

    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    assert (Path(spec.origin).parent / "entrypoints" / "openai" / "api_server.py").is_file()
