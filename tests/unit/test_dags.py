"""DAG files are imported again and again by the DAG processor: they parse, and bring nothing heavy along."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

DAGS = sorted((Path(__file__).parents[2] / "dags").glob("*.py"))
HEAVY = {"torch", "vllm", "transformers", "xgrammar", "pyarrow", "av", "boto3", "botocore", "openai", "PIL"}
PROBE = """
import json, sys
import airflow.sdk
from airflow.dag_processing.dagbag import DagBag
before = set(sys.modules)
import runpy
made = runpy.run_path(sys.argv[1])
modules = sorted({name.partition(".")[0] for name in set(sys.modules) - before})
dags = [value for value in made.values() if isinstance(value, airflow.sdk.DAG)]
print(json.dumps({"modules": modules, "dags": {dag.dag_id: sorted(dag.task_ids) for dag in dags}}))
"""


@pytest.mark.parametrize("path", DAGS, ids=lambda path: path.stem)
def test_a_dag_parses_and_imports_nothing_heavy(path):
    done = subprocess.run(
        [sys.executable, "-c", PROBE, str(path)], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["dags"]
    assert all(found["dags"].values())
    assert not HEAVY & set(found["modules"])


def test_there_are_dags_to_look_at():
    assert [path.stem for path in DAGS] == ["nightly_image_tagging"]
