from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[3] / "benchmarks" / "warm_engine.py"
WITHOUT_VLLM = f"""
import importlib.util, runpy, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *more: None if name == "vllm" else find(name, *more)
sys.path.insert(0, {str(SCRIPT.parent)!r})
sys.argv = ["warm_engine.py"]
runpy.run_path({str(SCRIPT)!r}, run_name="__main__")
"""


def test_without_vllm_it_says_so_and_starts_nothing():
    done = subprocess.run([sys.executable, "-c", WITHOUT_VLLM], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("vLLM is not installed here, so there is nothing to measure: `make setup`")
