"""Pictures through the operator with the engine ``vllm``, beside ``vllm bench throughput``: a part of ``gpu.py``."""

from __future__ import annotations

import argparse
import io
import json
import random
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset import ROOT
from gpu_model import SEVEN_B, TINY, end_token, make_folder, words
from gpu_parts import NotRunError, run

GOAL = 0.9  # of vllm bench throughput
SAME_TOKENS = 0.03  # by how much the tokens of a request may differ, as a part
WARM_UP = 64  # requests
ROWS_PER_SHARD = 250
OPERATOR = "vlm_map.VLMMapOperator"
# Of no account where there is a GPU.
CPU_ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1"}
# For both; otherwise vLLM chooses other sizes for a server than for a benchmark.
ENGINE_ARGS = {
    "load_format": "dummy",
    "max_model_len": 4096,
    "max_num_seqs": 256,
    "max_num_batched_tokens": 16384,
    "limit_mm_per_prompt": {"image": 1, "video": 0},
}
TINY_ENGINE_ARGS = {
    **ENGINE_ARGS,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 4096,
    "enforce_eager": True,
    "block_size": 32,
}


@dataclass(frozen=True)
class Rate:
    """What one side of the comparison did.

    :param images: A second.
    :param tokens_in: Of each request, the picture's among them.
    :param tokens_out: Of each answer.
    """

    label: str
    images: float
    tokens_in: float
    tokens_out: float


def noise(number: int, pixels: int) -> bytes:
    """A picture as ``vllm bench throughput`` makes them: noise, as a JPEG of Pillow's default quality."""
    from PIL import Image

    buffer = io.BytesIO()
    data = random.Random(number).randbytes(pixels * pixels * 3)
    Image.frombytes("RGB", (pixels, pixels), data).save(buffer, "JPEG")
    return buffer.getvalue()


def write_shards(folder: Path, *, first: int, count: int, options: argparse.Namespace) -> None:
    shape = TINY if options.tiny else SEVEN_B
    folder.mkdir()
    for start in range(0, count, ROWS_PER_SHARD):
        rows = []
        for number in range(first + start, first + min(count, start + ROWS_PER_SHARD)):
            (folder / f"{number:06d}.jpg").write_bytes(noise(number, options.pixels))
            rows.append(
                {
                    "images": [f"{number:06d}.jpg"],
                    "question": words(options.prompt, number, shape),
                    "text": "",
                }
            )
        shard = folder / f"part-{start // ROWS_PER_SHARD:05d}.jsonl"
        shard.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def through_operator(
    model: Path, engine_args: Mapping[str, Any], scratch: Path, options: argparse.Namespace
) -> Rate:
    """N pictures through the operator, the server being warm.

    :raises NotRunError: a row has no answer, or one of another length than it should have.
    """
    from engine_tasks import TaskFailedError, Work, connection, engine_tasks

    write_shards(scratch / "warm-up", first=0, count=WARM_UP, options=options)
    write_shards(scratch / "data", first=WARM_UP, count=options.images, options=options)
    # Every answer as long as the others, and none cut: it may not end before its last token, and then has to.
    sampling = {
        "temperature": 1.0,
        "min_tokens": options.tokens - 1,
        "max_tokens": options.tokens,
        "logit_bias": {str(end_token(model)): 100},
    }
    runs = [
        {
            "source": str(scratch / name),
            "destination": str(scratch / f"{name}-out"),
            "prompt": "{question}",
            "sampling_params": sampling,
            "concurrency": options.in_flight,
            "try_num": 1,
        }
        for name in ("warm-up", "data")
    ]
    environment = {
        **CPU_ENVIRONMENT,
        **connection(model, engine_args),
        "AIRFLOW__VLM__VLLM_COMMAND": shlex.join(
            [options.vllm_python, "-m", "vllm.entrypoints.openai.api_server"]
        ),
    }
    try:
        with engine_tasks(scratch, environment) as tasks:
            (done,) = tasks.run([Work("operator", scratch / "engines", OPERATOR, runs)], at_once=1)
    except TaskFailedError as why:
        raise NotRunError(str(why)) from why
    summary = done.summary
    if summary["ok"] != options.images:
        raise NotRunError(f"{summary['ok']} of {options.images} rows were answered")
    return Rate(
        "VLMMapOperator, engine vllm",
        options.images / done.seconds,
        summary["prompt_tokens"] / options.images,
        summary["completion_tokens"] / options.images,
    )


def bench_throughput(
    model: Path, engine_args: Mapping[str, Any], scratch: Path, options: argparse.Namespace
) -> Rate:
    """As many pictures by ``vllm bench throughput``.

    :raises NotRunError: it failed.
    """
    one_image = {"image": 1, "video": 0}
    given = {
        "model": str(model),
        "backend": "vllm-chat",
        "dataset_name": "random-mm",
        # Without any, it takes another set of data, and says so in a line among thousands.
        "dataset_path": "random-mm",
        "num_prompts": options.images,
        "num_warmups": WARM_UP,
        "random_input_len": options.prompt,
        "random_output_len": options.tokens,
        "random_mm_base_items_per_request": 1,
        "random_mm_num_mm_items_range_ratio": 0,
        "random_mm_limit_mm_per_prompt": one_image,
        "random_mm_bucket_config": f"{{({options.pixels}, {options.pixels}, 1): 1.0}}",
        "output_json": str(scratch / "bench.json"),
        **engine_args,
    }
    command = [options.vllm_python, str(ROOT / "benchmarks" / "vllm_throughput.py")]
    for name, value in given.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            command.append(flag)
        else:
            command += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    run(command, scratch / "bench.log", environment=CPU_ENVIRONMENT)
    found = json.loads((scratch / "bench.json").read_text(encoding="utf-8"))
    tokens = found["total_num_tokens"] / options.images
    # It has every answer go on to its last token.
    return Rate(
        "vllm bench throughput", found["requests_per_second"], tokens - options.tokens, options.tokens
    )


def vllm_version(python: str) -> str:
    """The version of vLLM that a Python has.

    :raises NotRunError: none.
    """
    command = [python, "-c", "import vllm; print('vLLM', vllm.__version__)"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    except OSError as error:
        raise NotRunError(f"{python} can't be run: {error.strerror}") from error
    found = [line for line in done.stdout.splitlines() if line.startswith("vLLM ")]
    if done.returncode or not found:
        raise NotRunError(
            f"{python} has no vLLM: `pip install vllm` into an environment of its own, and give its Python as "
            f"--vllm-python\n{done.stderr[-500:]}"
        )
    return found[0]


def compare_vllm(scratch: Path, options: argparse.Namespace) -> bool:
    """Print the first comparison; whether the goal was met."""
    version = vllm_version(options.vllm_python)
    engine_args = TINY_ENGINE_ARGS if options.tiny else ENGINE_ARGS
    model = make_folder(TINY if options.tiny else SEVEN_B, scratch / "model")
    theirs = bench_throughput(model, engine_args, scratch, options)
    print(f"{theirs.label}: {theirs.images:.2f} images/s", file=sys.stderr, flush=True)
    ours = through_operator(model, engine_args, scratch, options)
    print(
        f"\n{version}, {options.images} pictures of {options.pixels} x {options.pixels}; "
        f"engine arguments: {json.dumps(engine_args)}\n"
    )
    print("| | images/s | tokens in | tokens out | of vllm bench throughput |")
    print("|---|--:|--:|--:|--:|")
    for rate in (theirs, ours):
        print(
            f"| {rate.label} | {rate.images:.2f} | {rate.tokens_in:.1f} | {rate.tokens_out:.1f} | "
            f"{rate.images / theirs.images:.2f} |"
        )
    sizes = [(ours.tokens_in, theirs.tokens_in), (ours.tokens_out, theirs.tokens_out)]
    if any(abs(one / other - 1) > SAME_TOKENS for one, other in sizes):
        raise NotRunError("The requests were not alike: their tokens differ too much for a comparison")
    share = ours.images / theirs.images
    print(
        f"\nShare of vllm bench throughput {share:.2f} (goal: {GOAL:g}): {'met' if share >= GOAL else 'missed'}"
    )
    return share >= GOAL
