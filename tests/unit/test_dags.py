"""DAG files are imported again and again by the DAG processor: they parse, and bring nothing heavy along."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk import DAG
from airflow.sdk.definitions.param import process_params
from airflow.sdk.exceptions import AirflowFailException, ParamValidationError
from airflow.sdk.execution_time import macros

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
    assert [path.stem for path in DAGS] == [
        *("instruction_data", "nightly_image_captioning", "nightly_image_tagging", "tag_then_caption"),
        "video_captioning",
    ]


# --- the nightly DAG -------------------------------------------------------------------------------------------


@pytest.fixture
def nightly() -> DAG:
    # Imported anew, since a run's values stay with the params of the DAG that they were given to.
    (path,) = (path for path in DAGS if path.stem == "nightly_image_tagging")
    return runpy.run_path(str(path))["dag"]


def rendered(dag: DAG, task_id: str, *, logical_date: datetime | None = None, **conf: Any) -> Any:
    """A task as a run with this date, or with these values of its form, makes it."""
    task = dag.get_task(task_id)
    if task.is_mapped:
        task = task.unmap({"shards": ["a.jsonl"]})
    run_after = datetime(2026, 7, 1, tzinfo=timezone.utc)
    dag_run = SimpleNamespace(logical_date=logical_date, run_after=run_after, conf=conf)
    params = process_params(dag, task, conf, suppress_exception=False)
    task = task.prepare_for_execution()
    task.render_template_fields({"dag_run": dag_run, "params": params, "macros": macros})
    return task


@pytest.mark.parametrize(
    ("given", "day", "day_before"),
    [
        ({"logical_date": datetime(2026, 3, 1, tzinfo=timezone.utc)}, "2026-03-01", "2026-02-28"),
        (
            {"day": "2026-01-01", "logical_date": datetime(2026, 3, 1, tzinfo=timezone.utc)},
            "2026-01-01",
            "2025-12-31",
        ),
        ({}, "2026-07-01", "2026-06-30"),
    ],
)
def test_a_night_works_on_its_day_and_reuses_the_day_before(nightly, given, day, day_before):
    given = {"source": "s3://b/raw", "destination": "s3://b/tagged", "max_tasks": 7, **given}
    plan, tag = rendered(nightly, "plan", **given), rendered(nightly, "tag", **given)
    assert (plan.source, plan.max_tasks) == (f"s3://b/raw/{day}/", "7")
    assert (tag.source, tag.destination) == (f"s3://b/raw/{day}/", f"s3://b/tagged/{day}/")
    assert tag.reuse_from == [f"s3://b/tagged/{day_before}/"]


def test_a_day_that_is_none_is_refused_before_anything_runs(nightly):
    with pytest.raises(ParamValidationError, match="yesterday"):
        rendered(nightly, "plan", day="yesterday")


def manifest(**counts: Any) -> dict[str, Any]:
    names = ("shards_unchanged", "rows_out", "ok", "cached", "skipped", "failed", "requests", "prompt_tokens")
    rest = {"shards": 1, "rows_in": 10, "completion_tokens": 0, "cost_usd": None}
    return {**dict.fromkeys(names, 0), **rest, **counts}


def summary(nightly: DAG, manifests: list[dict[str, Any] | None], **pulled: Any) -> dict[str, Any]:
    def xcom_pull(task_ids, key="return_value", map_indexes=None):
        if task_ids == "plan":
            return pulled.get(key)
        return [manifests[index] if index < len(manifests) else None for index in map_indexes]

    function = nightly.get_task("summary").python_callable
    return function(params={"max_error_rate": 0.1}, ti=SimpleNamespace(xcom_pull=xcom_pull))


def test_the_summary_adds_up_what_ran_and_what_was_done_before(nightly):
    plan = ["s3://b/_vlm/_plans/0.jsonl.zst#0 a.jsonl", "s3://b/_vlm/_plans/0.jsonl.zst#1 b.jsonl"]
    before = {"tag": manifest(shards=3, shards_unchanged=3, cached=28, failed=2, rows_in=30, cost_usd=0)}
    total = summary(nightly, [manifest(ok=10, requests=10)] * 2, return_value=plan, done=before)
    assert (total["shards"], total["shards_unchanged"], total["rows_in"]) == (5, 3, 50)
    assert (total["ok"], total["cached"], total["failed"], total["requests"]) == (20, 28, 2, 20)
    assert "cost_usd" not in total


def test_a_night_of_which_all_is_done_is_a_success(nightly, capsys):
    before = {"tag": manifest(shards=3, shards_unchanged=3, cached=30, rows_in=30, cost_usd=0)}
    total = summary(nightly, [], return_value=[], done=before)
    assert (total["shards_unchanged"], total["cached"], total["requests"]) == (3, 30, 0)
    assert "All was done already" in capsys.readouterr().out


def test_what_tasks_of_an_earlier_and_larger_plan_returned_does_not_count(nightly):
    before = {"tag": manifest(shards=1, shards_unchanged=1, cached=10, rows_in=10, cost_usd=0)}
    total = summary(nightly, [manifest(ok=10), manifest(ok=10)], return_value=[["a.jsonl"]], done=before)
    assert (total["rows_in"], total["ok"], total["cached"]) == (20, 10, 10)
    with pytest.raises(AirflowFailException, match="Only 0 of 1 groups"):
        summary(nightly, [None, manifest(ok=10)], return_value=[["a.jsonl"]])


def test_a_night_with_too_many_failures_stays_a_failure_when_it_is_run_again(nightly):
    before = {"tag": manifest(cached=20, failed=10, rows_in=30)}
    with pytest.raises(AirflowFailException, match="10 of 30 rows failed"):
        summary(nightly, [], return_value=[], done=before)
    with pytest.raises(AirflowFailException, match="10 of 40 rows failed"):
        summary(nightly, [manifest(ok=10)], return_value=[["a.jsonl"]], done=before)


def test_a_night_without_a_plan_or_with_groups_missing_is_a_failure(nightly):
    with pytest.raises(AirflowFailException, match="no plan"):
        summary(nightly, [])
    with pytest.raises(AirflowFailException, match="Only 1 of 2 groups"):
        summary(nightly, [manifest(ok=10)], return_value=[["a.jsonl"], ["b.jsonl"]])
