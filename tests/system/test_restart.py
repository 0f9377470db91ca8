"""A task is killed, and then everything of Airflow: what comes back goes on from the journal."""

from __future__ import annotations

import os
import random
import signal
from collections import Counter

import pytest

from tests.support.stub_endpoint import tag_of
from tests.system.conftest import FLUSH_ANSWERS, Deployment, tags

pytestmark = pytest.mark.system

ROWS = 80
IN_FLIGHT = 4
KILLS = 2


def test_a_killed_task_and_a_killed_airflow_cost_at_most_a_window_each(deployment):
    prefix = "killed-twice/"
    shards = deployment.dataset("users", prefix, shards=2, rows=ROWS, seed=11)
    pictures = [
        deployment.pictures[f"users/{prefix}images/{shard:02}-{row:03}.png"]
        for shard in range(2)
        for row in range(ROWS)
    ]
    deployment.stub.set(latency=0.2, jitter=0.1)
    before = deployment.asked()
    run_id = deployment.run("one_task", prefix, wait=False)

    first, second = random.randint(2, 60), random.randint(75, 130)
    wait_until_asked(deployment, before + first)
    os.kill(task(deployment, run_id)["pid"], signal.SIGKILL)
    wait_until_asked(deployment, before + second)
    assert task(deployment, run_id)["try_number"] == 2
    assert task(deployment, run_id)["state"] == "running"
    deployment.kill_airflow()
    at_kill = deployment.asked()
    assert at_kill - before < 2 * ROWS, "it was killed too late for this test to show anything"

    deployment.stub.set(latency=0.0, jitter=0.0)
    deployment.restart()
    deployment.wait_for_success("one_task", run_id)

    sent = Counter(deployment.stub.stats()["by_image"])
    asked = [sent[tag_of(picture).removeprefix("img-")] for picture in pictures]
    assert min(asked) == 1
    repeated = sum(asked) - len(asked)
    assert repeated <= KILLS * (IN_FLIGHT + FLUSH_ANSWERS), (first, second)
    rows = [row for shard in shards for row in deployment.rows("users", f"out/{prefix}{shard}")]
    assert [row["id"] for row in rows] == 2 * list(range(ROWS))
    assert [tags(row)[0][0] for row in rows] == [tag_of(picture) for picture in pictures]


def task(deployment: Deployment, run_id: str) -> dict:
    (found,) = deployment.airflow.task_instances("one_task", run_id)
    return found


def wait_until_asked(deployment: Deployment, count: int) -> None:
    deployment.wait_for(lambda: deployment.asked() >= count, f"{count} requests", interval=0.05)
