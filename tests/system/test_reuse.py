"""What is done is not asked again: cleared runs, backfills over days that are done, and yesterday's pictures."""

from __future__ import annotations

import json
import time
from datetime import date, timedelta
from typing import Any

import pytest

from demo.airflow_instance import AirflowError
from tests.support.stub_endpoint import tag_of
from tests.system.conftest import Deployment, tags

pytestmark = pytest.mark.system

NIGHTLY = "nightly_image_tagging"
FIRST_DAY = date(2026, 3, 1)
ROWS = 12


def test_clearing_a_finished_run_through_the_rest_api_asks_nothing(deployment, finished):
    airflow = deployment.airflow
    asked = deployment.asked()
    written = deployment.written("users", f"out/{finished.prefix}")
    deployment.clear("users_own", finished.run_id)
    deployment.wait_for_success("users_own", finished.run_id)

    assert deployment.asked() == asked
    assert deployment.written("users", f"out/{finished.prefix}") == written
    # The plan was made again: there is nothing left to do, and it says what there is.
    assert airflow.xcom("users_own", finished.run_id, "plan") == [[]]
    done = airflow.xcom("users_own", finished.run_id, "plan", key="done")["tag"]
    assert (done["shards"], done["rows_in"], done["failed"]) == (3, finished.rows, 1)
    assert (done["cached"], done["ok"], done["requests"]) == (finished.rows - 1, 0, 0)


def test_a_longer_plan_of_a_cleared_run_is_done_whole(deployment):
    prefix = "longer/"
    shards = deployment.dataset("users", prefix, shards=2, rows=3, seed=12)
    run_id = deployment.run("users_own", prefix)

    def clear() -> str:
        # As `airflow backfill create --reprocess-behavior` does it, and whoever wants a changed DAG to be run.
        deployment.clear("users_own", run_id, run_on_latest_version=True)
        return deployment.airflow.wait_for_run("users_own", run_id)

    assert clear() == "success"
    assert deployment.airflow.xcom("users_own", run_id, "plan") == [[]]
    # All pictures are replaced, so that there is something to do for two tasks again, of which Airflow has left one.
    deployment.dataset("users", prefix, shards=2, rows=3, seed=13)
    asked = deployment.asked()
    assert clear() == "success"
    (group,) = deployment.airflow.xcom("users_own", run_id, "plan")
    assert sorted(group) == sorted(shards)
    assert deployment.asked() == asked + 6
    for number, shard in enumerate(shards):
        for i, row in enumerate(deployment.rows("users", f"out/{prefix}{shard}")):
            replaced = deployment.pictures[f"users/{prefix}images/{number:02}-{i:03}.png"]
            assert tags(row)[0][0] == tag_of(replaced)


def test_a_backfill_over_seven_days_of_which_five_are_done_asks_for_two(deployment):
    days = [str(FIRST_DAY + timedelta(days=number)) for number in range(8)]
    for number, day in enumerate(days[:7]):
        deployment.dataset("datasets", f"images/{day}/", shards=2, rows=ROWS, seed=100 + number)
    airflow = deployment.airflow
    deployment.wait_for(
        lambda: any(dag["dag_id"] == NIGHTLY for dag in airflow.api("GET", "dags")["dags"]),
        "the nightly DAG to be parsed",
    )
    airflow.api("PATCH", f"dags/{NIGHTLY}", {"is_paused": False})

    asked = deployment.asked()
    runs = backfill(deployment, days[0], days[4])
    assert list(runs) == days[:5]
    assert deployment.asked() - asked == 5 * 2 * ROWS
    assert_tagged(deployment, days[:5])

    # One picture is there twice on the sixth day.
    again = deployment.rows("datasets", f"images/{days[5]}/part-00.jsonl")
    again[1]["images"] = again[0]["images"]
    deployment.put("datasets", f"images/{days[5]}/part-00.jsonl", lines(again))
    asked = deployment.asked()
    runs = backfill(deployment, days[0], days[6], "--reprocess-behavior", "completed")
    assert list(runs) == days[:7]
    assert deployment.asked() - asked == distinct(deployment, days[5:7]) == 2 * 2 * ROWS - 1
    assert_tagged(deployment, days[:7])
    for day in days[:5]:
        assert airflow.xcom(NIGHTLY, runs[day], "plan") == [[]]
        assert counted(deployment, runs[day]) == {"rows_in": 2 * ROWS, "cached": 2 * ROWS, "ok": 0}
    assert counted(deployment, runs[days[6]]) == {"rows_in": 2 * ROWS, "cached": 0, "ok": 2 * ROWS}

    # The eighth day has the seventh's pictures under other names, in other shards.
    move(deployment, days[6], days[7])
    asked = deployment.asked()
    run_id = airflow.trigger_dag(NIGHTLY, {"day": days[7], "max_tasks": 1})
    deployment.wait_for_success(NIGHTLY, run_id)
    assert deployment.asked() == asked
    assert counted(deployment, run_id) == {"rows_in": 2 * ROWS, "cached": 2 * ROWS, "ok": 0}
    assert_tagged(deployment, days[7:])


def lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def counted(deployment: Deployment, run_id: str) -> dict[str, int]:
    summary = deployment.airflow.xcom(NIGHTLY, run_id, "summary")
    assert summary["requests"] == summary["ok"]
    return {name: summary[name] for name in ("rows_in", "cached", "ok")}


def shards_of(deployment: Deployment, day: str) -> list[str]:
    keys = deployment.keys("datasets", f"images/{day}/")
    return [key.rpartition("/")[2] for key in keys if key.endswith(".jsonl")]


def picture(deployment: Deployment, day: str, row: dict[str, Any]) -> bytes:
    return deployment.pictures[f"datasets/images/{day}/{row['images'][0]}"]


def distinct(deployment: Deployment, days: list[str]) -> int:
    return len(
        {
            picture(deployment, day, row)
            for day in days
            for shard in shards_of(deployment, day)
            for row in deployment.rows("datasets", f"images/{day}/{shard}")
        }
    )


def assert_tagged(deployment: Deployment, days: list[str]) -> None:
    """Each row of these days has the tags of its own picture."""
    for day in days:
        shards = shards_of(deployment, day)
        assert shards
        for shard in shards:
            before = deployment.rows("datasets", f"images/{day}/{shard}")
            after = deployment.rows("datasets", f"images-tagged/{day}/{shard}")
            assert [row["id"] for row in after] == [row["id"] for row in before]
            for row in after:
                assert tags(row)[0][0] == tag_of(picture(deployment, day, row)), (day, shard)


def move(deployment: Deployment, day: str, other: str) -> None:
    """Put a day's pictures there as another day's: renamed, in reverse order, three shards instead of two."""
    rows = [
        row
        for shard in shards_of(deployment, day)
        for row in deployment.rows("datasets", f"images/{day}/{shard}")
    ]
    moved = []
    for number, row in enumerate(reversed(rows)):
        name = f"photos/{number}.png"
        deployment.pictures[f"datasets/images/{other}/{name}"] = picture(deployment, day, row)
        deployment.put("datasets", f"images/{other}/{name}", picture(deployment, day, row))
        moved.append({"id": number, "images": [name], "text": "moved"})
    third = len(moved) // 3
    for number in range(3):
        part = moved[number * third : (number + 1) * third]
        deployment.put("datasets", f"images/{other}/batch-{number}.jsonl", lines(part))


def backfill(deployment: Deployment, first: str, last: str, *options: str) -> dict[str, str]:
    """Run ``airflow backfill create`` and wait until all its runs have ended well; returns their ids by day."""
    # One task a day: what is under test is what they ask for, not how they share it.
    conf = json.dumps({"max_tasks": 1})
    dates = ("--dag-id", NIGHTLY, "--from-date", first, "--to-date", last)
    # Airflow closes a backfill a while after its last run, and takes no other one before.
    deployment.wait_for(lambda: not open_backfills(deployment), "the backfill before to be closed")
    create_backfill(deployment, *dates, "--dag-run-conf", conf, "--max-active-runs", "4", *options)
    days = (date.fromisoformat(last) - date.fromisoformat(first)).days + 1

    def ended() -> list[dict[str, Any]] | None:
        path = f"dags/{NIGHTLY}/dagRuns"
        runs = deployment.airflow.api("GET", path, params={"limit": 100, "order_by": "logical_date"})[
            "dag_runs"
        ]
        runs = [each for each in runs if each["run_type"] == "backfill"]
        over = [each for each in runs if each["state"] in ("success", "failed")]
        return runs if len(over) == len(runs) == days else None

    found = deployment.wait_for(ended, f"{days} runs of a backfill", 600)
    assert {each["state"] for each in found} == {"success"}, found
    return {each["logical_date"][:10]: each["dag_run_id"] for each in found}


def open_backfills(deployment: Deployment) -> list[int]:
    listed = deployment.airflow.api("GET", "backfills", params={"dag_id": NIGHTLY})["backfills"]
    return [each["id"] for each in listed if not each["completed_at"]]


def create_backfill(deployment: Deployment, *options: str) -> None:
    """Run ``airflow backfill create``, again if it meets a lock of the scheduler's on SQLite.

    Airflow undoes a backfill that it could not create because of a lock, so that its user can try again.
    """
    for attempt in range(6):
        try:
            deployment.airflow.cli("backfill", "create", *options)
            return
        except AirflowError as error:
            if "database is locked" not in str(error) or attempt == 5:
                raise
        time.sleep(2)
        for each in open_backfills(deployment):
            deployment.airflow.api("PUT", f"backfills/{each}/cancel")
