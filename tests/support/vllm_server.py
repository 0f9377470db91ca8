"""Real vLLM servers on this machine's CPU, with models from folders."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path

import pytest

START_TIMEOUT = 900.0
# Tokens that the cache of prompts keeps and shares as a whole; vLLM's own for CPUs is longer than most test prompts.
BLOCK_SIZE = 32


def require_vllm() -> None:
    """Skip the test where vLLM could not be installed; on CI that is a failure."""
    if importlib.util.find_spec("vllm") is None:
        reason = "vLLM is not installed: its CPU build needs a CPU build of torch (see scripts/setup_env.py)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)


@contextlib.contextmanager
def start_vllm(
    model: Path,
    log: Path,
    *,
    served_as: str = "demo",
    api_key: str | None = None,
    max_model_len: int = 1024,
    images: int = 4,
    videos: int = 2,
) -> Iterator[str]:
    """Serve a model until the block ends; yields the base URL.

    Nearly all of the time that a start takes goes into importing vLLM three times over, in three processes.

    :param model: Folder of the model.
    :param log: Takes what the server prints.
    :param max_model_len: Tokens of a prompt and its answer together.
    :param images: Most images in a prompt.
    :param videos: Most videos in a prompt; with 0 the model is one that takes none.
    :raises RuntimeError: it did not come up; the message holds the end of its log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
        *("--model", str(model), "--served-model-name", served_as),
        *("--host", "127.0.0.1", "--port", str(port)),
        *("--enforce-eager", "--max-model-len", str(max_model_len), "--max-num-seqs", "16"),
        *("--limit-mm-per-prompt", json.dumps({"image": images, "video": videos})),
        *("--block-size", str(BLOCK_SIZE)),
        *(("--api-key", api_key) if api_key else ()),
    ]
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    with log.open("wb") as output:
        # The engine runs in a process of its own, and both must end.
        process = subprocess.Popen(
            command, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    root = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            with contextlib.suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(f"{root}/health", timeout=5).close()
                break
            if process.poll() is not None or time.monotonic() > deadline:
                tail = log.read_bytes()[-6000:].decode(errors="replace")
                raise RuntimeError(f"vLLM did not come up ({process.poll()}):\n{tail}")
            time.sleep(0.5)
        yield f"{root}/v1"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(20)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def start_together(*servers: AbstractContextManager[str]) -> Iterator[list[str]]:
    """Enter several servers at once, which takes not much longer than one; yields their base URLs in order."""
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(len(servers)) as threads:
        yield list(threads.map(stack.enter_context, servers))


def metrics(base_url: str) -> str:
    """What the server tells of itself."""
    with urllib.request.urlopen(base_url.removesuffix("/v1") + "/metrics", timeout=30) as response:
        text: str = response.read().decode()
    return text


def count(base_url: str, metric: str, **labels: str) -> float:
    """What the server itself has counted: the sum of a metric over all its labels but those that are given."""
    from prometheus_client.parser import text_string_to_metric_families

    families = list(text_string_to_metric_families(metrics(base_url)))
    samples = [sample for family in families for sample in family.samples if sample.name == metric]
    assert samples, f"{base_url} has no {metric}"
    return sum(sample.value for sample in samples if labels.items() <= sample.labels.items())
