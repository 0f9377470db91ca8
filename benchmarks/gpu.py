"""What a GPU does through this provider, beside what it can do: ``python benchmarks/gpu.py``.

A model of Qwen2.5-VL-7B's shape with random weights; nothing is downloaded. Two comparisons, each in one run:

- ``vllm``: N pictures end to end through ``VLMMapOperator`` with the engine ``vllm`` (shards in, shards and ledger out,
  server on this machine), beside ``vllm bench throughput`` with as many pictures of the same kind, the same engine
  arguments, and as many tokens in and out. Both see a few other requests first. The goal is 90 %.
- ``transformers``: batches in the transformers engine beside one picture at a time.

Where there is no GPU it says so and ends well. ``--tiny`` runs all of it on the CPU with a model of two layers: to
try the benchmark, not to measure anything. Whatever was started is ended, however this ends.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shutil
import signal
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from pathlib import Path

from dataset import BENCH, ROOT
from gpu_parts import NotRunError, run
from gpu_vllm import compare_vllm

# 17 GB of weights in bfloat16, and what else a run leaves.
FREE_DISK = 24 * 2**30
NEEDED = ("airflow", "openai", "PIL", "psutil", "transformers")


def gpu() -> str | None:
    """The first GPU, as ``nvidia-smi`` names it; None where there is none."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def compare_transformers(scratch: Path, options: argparse.Namespace) -> bool:
    """Print the second comparison."""
    if not options.tiny and (free := shutil.disk_usage(scratch).free) < FREE_DISK:
        raise NotRunError(
            f"{free / 2**30:.0f} GiB are free in {scratch}, and {FREE_DISK / 2**30:.0f} are needed"
        )
    sizes = {"pictures": 32, "pixels": options.pixels, "tokens": 64, "batch": 16, "rounds": 1}
    if options.tiny:
        sizes.update(pictures=8, tokens=8, batch=4)
    command = [sys.executable, str(ROOT / "benchmarks" / "gpu_transformers.py")]
    command += [f"--folder={scratch / 'checkpoint'}", f"--result={scratch / 'transformers.json'}"]
    command += [f"--{name}={value}" for name, value in sizes.items()]
    run([*command, *(["--tiny"] if options.tiny else [])], scratch / "transformers.log")
    found = json.loads((scratch / "transformers.json").read_text(encoding="utf-8"))
    print(
        f"\ntransformers engine, {sizes['pictures']} pictures of {options.pixels} x {options.pixels}, "
        f"{found['tokens'] / sizes['pictures']:.0f} tokens each\n"
    )
    print("| | images/s | times |")
    print("|---|--:|--:|")
    print(f"| one at a time | {found['alone']:.2f} | 1.0 |")
    print(
        f"| batches of {sizes['batch']} | {found['together']:.2f} | {found['together'] / found['alone']:.1f} |"
    )
    print(f"\n{found['equal']} of {sizes['pictures']} captions are the same both ways")
    return True


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("vllm", "transformers"), help="one of the two comparisons")
    parser.add_argument("--images", type=int, help="pictures through vLLM (default: 2000)")
    parser.add_argument("--pixels", type=int, help="to a side (default: 448)")
    parser.add_argument("--prompt", type=int, help="words of each question (default: 64)")
    parser.add_argument("--tokens", type=int, help="of each answer (default: 128)")
    parser.add_argument("--in-flight", type=int, help="requests of the operator at a time (default: 512)")
    parser.add_argument(
        "--vllm-python",
        default=sys.executable,
        help="Python of the environment with vLLM (default: this one)",
    )
    parser.add_argument("--tiny", action="store_true", help="a model of two layers, on the CPU")
    options = parser.parse_args()
    # Its processes run elsewhere.
    options.vllm_python = str(Path(shutil.which(options.vllm_python) or options.vllm_python).absolute())
    defaults = {"images": 2000, "pixels": 448, "prompt": 64, "tokens": 128, "in_flight": 512}
    if options.tiny:
        defaults = {"images": 64, "pixels": 112, "prompt": 32, "tokens": 16, "in_flight": 32}
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    return options


def main() -> int:
    options = read_options()
    found = None if options.tiny else gpu()
    if not options.tiny and found is None:
        print("There is no NVIDIA GPU here (nvidia-smi shows none), so there is nothing to measure.")
        return 0
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        print(f"This Python has no {', '.join(missing)}: `make setup` makes a .venv with all that is needed.")
        return 2
    from harness import machine

    # Whoever ends this benchmark means what it has started, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    print(f"{machine()}; {found or 'no GPU'}", flush=True)
    BENCH.mkdir(exist_ok=True)
    parts = {"vllm": compare_vllm, "transformers": compare_transformers}
    met = True
    for name in [options.only] if options.only else list(parts):
        # A folder for each: the first one's model is gone before the second one's is written.
        with tempfile.TemporaryDirectory(dir=BENCH, prefix="scratch-") as folder:
            try:
                met = parts[name](Path(folder), options) and met
            except NotRunError as why:
                print(f"\n{name}: not run: {why}", flush=True)
                met = False
            finally:
                keep_logs(Path(folder))
    return int(not met)


def keep_logs(scratch: Path) -> None:
    """Copy what processes have said to where it stays."""
    logs = BENCH / "logs"
    logs.mkdir(exist_ok=True)
    stamp = f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}"
    for log in (*scratch.glob("*.log"), *scratch.glob("engines/*/server.log")):
        shutil.copy(log, logs / f"gpu-{stamp}-{log.name}")


if __name__ == "__main__":
    sys.exit(main())
