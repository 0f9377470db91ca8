"""``@task.vlm`` under a real scheduler: mapped over a plan, shown by its name, done once."""

from __future__ import annotations

import pytest

from tests.support.stub_endpoint import tag_of

pytestmark = pytest.mark.system

SHARDS, ROWS = 3, 6
DONE = (0, 1, 4, 5)


def test_a_decorated_function_is_mapped_over_a_plan_and_asks_nothing_twice(deployment):
    prefix = "task_vlm/"
    shards = deployment.dataset("users", prefix, shards=SHARDS, rows=ROWS, seed=11)
    before = deployment.asked()
    run_id = deployment.run("task_vlm", prefix, style="few")

    tasks = deployment.airflow.task_instances("task_vlm", run_id)
    mapped = [each for each in tasks if each["task_id"] == "describe"]
    assert {each["operator_name"] for each in mapped} == {"@task.vlm"}
    assert {each["rendered_map_index"] for each in mapped} == set(shards)
    assert deployment.asked() - before == SHARDS * len(DONE)
    for number, shard in enumerate(shards):
        rows = deployment.rows("users", f"out/{prefix}{shard}")
        for row in rows:
            picture = deployment.pictures[f"users/{prefix}images/{number:02}-{row['id']:03}.png"]
            assert ("seen" in row) == (row["id"] in DONE)
            if row["id"] in DONE:
                assert row["seen"].keys() == {"caption", "tags"}
                assert row["seen"]["tags"][0] == tag_of(picture)
        (letter,) = deployment.rows("users", f"out/{prefix}_vlm/{shard}/vlm_map/errors.jsonl")
        assert (letter["row"], letter["kind"]) == (2, "internal")
        manifest = deployment.json("users", f"out/{prefix}_vlm/{shard}/vlm_map/manifest.json")
        assert (manifest["ok"], manifest["skipped"], manifest["failed"]) == (len(DONE), 1, 1)
    log = deployment.airflow.task_log("task_vlm", run_id, "describe", map_index=0)
    assert "there is no row 2 in my book" in log

    # The defect stays one, so its shards are done again, of what is known.
    deployment.run("task_vlm", prefix, style="few")
    assert deployment.asked() - before == SHARDS * len(DONE)
