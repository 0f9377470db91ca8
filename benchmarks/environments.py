"""Environments of their own for the systems measured beside ours, made with uv below ``.bench/``."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from dataset import BENCH, ROOT

sys.path.insert(0, str(ROOT))
from scripts.setup_env import VLLM_CPU_TORCH, find_links

# Data-Juicer installs what it finds missing while it works (torch's CUDA build, some gigabytes, among it) and does
# not declare all that it imports: installed beforehand, no run downloads anything, and torch's CPU build will do.
SATURATE = [["saturate==0.2.0"]]
DATA_JUICER = [
    ["py-data-juicer==1.6.1", "openai", "aiohttp", "ray==2.60.0", VLLM_CPU_TORCH],
    ["--torch-backend", "cpu", "py-data-juicer==1.6.1", "openai", "aiohttp", "ray==2.60.0", "torch"],
]


class NotInstalledError(Exception):
    """An environment could not be made; the message is what the installer said."""


def environment(name: str, alternatives: Sequence[Sequence[str]]) -> Path:
    """The Python of an environment that holds the first of ``alternatives`` that can be installed.

    :raises NotInstalledError: None of them could be.
    """
    folder = BENCH / "envs" / name
    python = folder / "bin" / "python"
    complete = folder / ".complete"
    if complete.exists():
        return python
    uv = Path(sys.executable).with_name("uv")
    said = ""
    subprocess.run(
        [str(uv), "venv", "--quiet", "--clear", "--python", sys.executable, str(folder)], check=True
    )
    for wanted in alternatives:
        command = [str(uv), "pip", "install", "--quiet", "--python", str(python), *find_links(), *wanted]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            complete.touch()
            return python
        said = done.stderr.strip()
    raise NotInstalledError(" ".join(said.split())[:300] or "uv gave no reason")
