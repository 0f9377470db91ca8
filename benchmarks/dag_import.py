"""What a DAG of ours costs Airflow's DAG processor: ``python benchmarks/dag_import.py [DAG file]``.

Every few seconds Airflow imports each DAG file in a fresh process. Measured is what the file takes beyond an
import of Airflow itself, and that it imports nothing heavy.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path

from dataset import BENCH, ROOT
from harness import machine

GOAL = 0.5  # seconds
HEAVY = ("torch", "transformers", "vllm", "xgrammar", "pyarrow", "av", "boto3", "botocore", "openai", "PIL")
FORBIDDEN = {"torch", "transformers", "vllm", "pyarrow", "av"}

PROBE = """
import json, runpy, sys, time
start = time.perf_counter()
from airflow.sdk import DAG, Asset, BaseHook, BaseOperator, Context, conf, dag, task, task_group
from airflow.sdk.exceptions import AirflowFailException
airflow = time.perf_counter()
runpy.run_path(sys.argv[1])
end = time.perf_counter()
print(json.dumps({"airflow": airflow - start, "dag": end - airflow, "modules": sorted(sys.modules)}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dag", type=Path, nargs="?", default=ROOT / "dags" / "nightly_image_tagging.py")
    parser.add_argument("--rounds", type=int, default=5, help="medians are printed (default: 5)")
    options = parser.parse_args()
    environ = {**os.environ, "AIRFLOW_HOME": str(BENCH / "airflow"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", PROBE, str(options.dag)]
    # The first import writes byte code and fills the disk's cache; it does not count.
    runs = [
        json.loads(subprocess.check_output(command, env=environ, text=True).splitlines()[-1])
        for _ in range(options.rounds + 1)
    ][1:]
    airflow, own = (statistics.median(run[part] for run in runs) for part in ("airflow", "dag"))
    heavy = [name for name in HEAVY if name in runs[0]["modules"]]
    print(machine())
    print(
        f"importing Airflow takes {airflow:.2f} s; {options.dag.name} takes {own:.2f} s more (goal: {GOAL} s)"
    )
    print(f"heavy modules imported: {', '.join(heavy) or 'none'}")
    return int(own > GOAL or bool(FORBIDDEN & set(heavy)))


if __name__ == "__main__":
    sys.exit(main())
