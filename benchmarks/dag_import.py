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

# Airflow answers the first Asset with a URI by importing the code of every provider that knows some URIs, Amazon's
# with boto3 among it. That is the same for every DAG that has one, so it is shown apart.
PROBE = """
import json, runpy, sys, time
from airflow.sdk import DAG, Asset, BaseHook, BaseOperator, Context, conf, dag, task, task_group
from airflow.sdk.exceptions import AirflowFailException
if sys.argv[2] == "asset":
    Asset(name="benchmark", uri="s3://bucket/folder")
airflow = set(sys.modules)
wall, cpu = time.perf_counter(), time.process_time()
runpy.run_path(sys.argv[1])
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
print(json.dumps({"wall": wall, "cpu": cpu, "modules": sorted(set(sys.modules) - airflow)}))
"""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dag", type=Path, nargs="?", default=ROOT / "dags" / "nightly_image_tagging.py")
    parser.add_argument("--rounds", type=int, default=5, help="medians are printed (default: 5)")
    options = parser.parse_args()
    environ = {**os.environ, "AIRFLOW_HOME": str(BENCH / "airflow"), "PYTHONPATH": str(ROOT)}
    print(machine())
    met = True
    for baseline, words in (("plain", "Airflow"), ("asset", "Airflow with an Asset that has a URI")):
        command = [sys.executable, "-c", PROBE, str(options.dag), baseline]
        # The first import writes byte code and fills the disk's cache; it does not count.
        runs = [
            json.loads(subprocess.check_output(command, env=environ, text=True).splitlines()[-1])
            for _ in range(options.rounds + 1)
        ][1:]
        wall, cpu = (statistics.median(run[part] for run in runs) for part in ("wall", "cpu"))
        heavy = [name for name in HEAVY if name in runs[0]["modules"]]
        print(
            f"{options.dag.name} beyond {words}: {wall:.2f} s ({cpu:.2f} s CPU); "
            f"heavy modules: {', '.join(heavy) or 'none'}"
        )
        met = met and wall <= GOAL
    print(f"goal: {GOAL} s: {'met' if met else 'missed'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
