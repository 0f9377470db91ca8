"""The promises, kept under a real scheduler."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from urllib.parse import quote

import pytest

from tests.support.stub_endpoint import tag_of
from tests.system.conftest import API_KEY, tags

pytestmark = pytest.mark.system


def test_a_users_own_dag_tags_a_bucket_through_an_unreliable_endpoint(deployment):
    prefix = "unreliable/"
    deployment.stub.set(
        faults={"rate_limit": 0.10, "server_error": 0.05, "reset": 0.02}, latency=0.02, jitter=0.05
    )
    shards = deployment.dataset("users", prefix, shards=5, rows=40, seed=1)
    # Five bad pictures, each bad in its own way, in the second shard.
    bad = {3: "images/absent.png", 7: "images/empty.png", 11: "images/cut.png", 20: "images/text.jpg"}
    bad[33] = "../../etc/passwd"
    good = deployment.pictures[f"users/{prefix}images/01-003.png"]
    deployment.put("users", prefix + "images/empty.png", b"")
    deployment.put("users", prefix + "images/cut.png", good[: len(good) // 2])
    deployment.put("users", prefix + "images/text.jpg", b"this is no picture\n" * 20)
    rows = deployment.rows("users", prefix + shards[1])
    for number, name in bad.items():
        rows[number]["images"] = [name]
    deployment.put("users", prefix + shards[1], b"".join(json.dumps(row).encode() + b"\n" for row in rows))

    run_id = deployment.run("users_own", prefix)

    for number, shard in enumerate(shards):
        before = deployment.rows("users", prefix + shard)
        after = deployment.rows("users", f"out/{prefix}{shard}")
        assert len(after) == len(before) == 40
        for i, (old, new) in enumerate(zip(before, after, strict=True)):
            if number == 1 and i in bad:
                assert new == old
                continue
            assert {key: new[key] for key in old} == old
            picture = deployment.pictures[f"users/{prefix}{old['images'][0]}"]
            assert tags(new)[0][0] == tag_of(picture), (shard, i)
        manifest = deployment.json("users", f"out/{prefix}_vlm/{shard}/image_tagging/manifest.json")
        failed = len(bad) if number == 1 else 0
        assert (manifest["rows_in"], manifest["rows_out"], manifest["failed"]) == (40, 40, failed)
        assert manifest["ok"] + manifest["cached"] + manifest["skipped"] == 40 - failed
        assert (manifest["dag_id"], manifest["run_id"], manifest["task_id"]) == ("users_own", run_id, "tag")
    errors = deployment.rows("users", f"out/{prefix}_vlm/{shards[1]}/image_tagging/errors.jsonl")
    assert {each["row"]: each["media"] for each in errors} == bad
    assert [each["kind"] for each in sorted(errors, key=lambda each: each["row"])] == [
        *("media_missing", "media_corrupt", "media_corrupt", "media_corrupt", "media_refused")
    ]

    statuses = deployment.stub.stats()["by_status"]
    assert int(statuses["429"]) > 5
    assert int(statuses["500"]) > 2
    results = [
        deployment.airflow.xcom("users_own", run_id, "tag", map_index=index)
        for index in range(len(deployment.airflow.xcom("users_own", run_id, "plan")))
    ]
    assert Counter(shards=sum(each["shards"] for each in results))["shards"] == 5
    assert sum(each["rows_in"] for each in results) == 200
    assert sum(each["ok"] for each in results) == 195

    tasks = [
        each for each in deployment.airflow.task_instances("users_own", run_id) if each["task_id"] == "tag"
    ]
    assert len(tasks) == 3
    labels = sorted(each["rendered_map_index"] for each in tasks)
    plan = deployment.airflow.xcom("users_own", run_id, "plan")
    assert labels == sorted(
        f"{names[0]} and {len(names) - 1} more".removesuffix(" and 0 more") for names in plan
    )
    events = deployment.airflow.api("GET", "assets/events", params={"source_dag_id": "users_own"})
    extras = [each["extra"] for each in events["asset_events"] if each["source_run_id"] == run_id]
    assert sorted(each["rows_in"] for each in extras) == sorted(each["rows_in"] for each in results)


def test_the_progress_is_in_the_log_and_in_the_task_state_store(deployment):
    prefix = "progress/"
    deployment.dataset("users", prefix, shards=2, rows=30, seed=2)
    run_id = deployment.run("one_task", prefix)
    log = deployment.airflow.task_log("one_task", run_id, "tag")
    assert "2 of 2 shards committed, 60 rows done (0 failed, 0 skipped)" in log
    (task,) = deployment.airflow.task_instances("one_task", run_id)
    path = f"dags/one_task/dagRuns/{quote(run_id)}/taskInstances/tag/state-store"
    stored = deployment.airflow.api("GET", path, params={"map_index": task["map_index"]})
    (progress,) = [each["value"] for each in stored["task_state_store"] if each["key"] == "progress"]
    assert (progress["rows"], progress["failed"], progress["percent"]) == (60, 0, 100.0)


def test_clearing_a_finished_task_asks_nothing_again(deployment):
    prefix = "cleared/"
    deployment.dataset("users", prefix, shards=3, rows=10, seed=3)
    run_id = deployment.run("one_task", prefix)
    before = deployment.stub.stats()["requests"]
    deployment.clear("one_task", run_id)
    deployment.wait_for(
        lambda: deployment.airflow.task_instances("one_task", run_id)[0]["try_number"] == 2, "a second try"
    )
    assert deployment.airflow.wait_for_run("one_task", run_id) == "success"
    assert deployment.stub.stats()["requests"] == before
    result = deployment.airflow.xcom("one_task", run_id, "tag")
    assert (result["rows_in"], result["cached"], result["ok"], result["requests"]) == (30, 30, 0, 0)
    assert result["shards_unchanged"] == 3


def test_a_killed_task_is_retried_and_committed_shards_are_not_asked_again(deployment):
    prefix = "killed/"
    shards = deployment.dataset("users", prefix, shards=6, rows=20, seed=4)
    deployment.stub.set(latency=0.25)
    run_id = deployment.run("one_task", prefix, wait=False)

    def manifests() -> list[str]:
        return [
            key for key in deployment.keys("users", f"out/{prefix}_vlm/") if key.endswith("manifest.json")
        ]

    deployment.wait_for(lambda: len(manifests()) >= 2, "two committed shards")
    (task,) = deployment.airflow.task_instances("one_task", run_id)
    os.kill(task["pid"], signal.SIGKILL)
    committed = manifests()
    visible = {key for key in deployment.keys("users", f"out/{prefix}") if "/_vlm/" not in key}
    # Never a torn object: what is visible is whole.
    for key in visible:
        assert len(deployment.rows("users", key)) == 20
    assert len(committed) < 6, "the task was killed too late for this test to show anything"
    deployment.stub.set(latency=0.0)
    assert deployment.airflow.wait_for_run("one_task", run_id) == "success"
    (task,) = deployment.airflow.task_instances("one_task", run_id)
    assert task["try_number"] == 2
    asked = deployment.stub.stats()["by_image"]
    for number, shard in enumerate(shards):
        rows = deployment.rows("users", f"out/{prefix}{shard}")
        assert [row["id"] for row in rows] == list(range(20))
        for i, row in enumerate(rows):
            picture = deployment.pictures[f"users/{prefix}images/{number:02}-{i:03}.png"]
            assert tags(row)[0][0] == tag_of(picture)
            if any(f"/{shard}/" in key for key in committed):
                assert asked[tag_of(picture).removeprefix("img-")] == 1


def test_clearing_a_running_task_stops_it_within_five_seconds_and_the_next_try_finishes(deployment):
    prefix = "stopped/"
    shards = deployment.dataset("users", prefix, shards=3, rows=40, seed=5)
    # Each request takes long: whoever waits for the ones in flight is killed instead of ending by itself.
    deployment.stub.set(latency=8.0)
    before = deployment.stub.stats()["requests"]
    run_id = deployment.run("one_task", prefix, wait=False)
    deployment.wait_for(lambda: deployment.stub.stats()["requests"] > before, "the first requests")
    deployment.clear("one_task", run_id)
    deployment.wait_for(lambda: deployment.stub.stats()["in_flight"] == 0, "the requests to be dropped", 60)
    assert not [key for key in deployment.keys("users", f"out/{prefix}") if "/_vlm/" not in key]
    deployment.stub.set(latency=0.0)
    assert deployment.airflow.wait_for_run("one_task", run_id) == "success"
    log = deployment.airflow.task_log("one_task", run_id, "tag", try_number=1)
    assert "The task was told to stop" in log
    for shard in shards:
        assert len(deployment.rows("users", f"out/{prefix}{shard}")) == 40


def test_a_wrong_key_fails_at_once_without_retries_and_stays_secret(deployment):
    prefix = "secret/"
    deployment.dataset("users", prefix, shards=1, rows=5, seed=6)
    run_id = deployment.airflow.trigger_dag("wrong_key", {"source": f"s3://users/{prefix}"})
    assert deployment.airflow.wait_for_run("wrong_key", run_id) == "failed"
    (task,) = deployment.airflow.task_instances("wrong_key", run_id)
    assert task["try_number"] == 1
    log = deployment.airflow.task_log("wrong_key", run_id, "tag")
    assert "vlm_wrong_key" in log
    everything = log + json.dumps(task) + deployment.airflow.tail()
    everything += "".join(
        path.read_text(errors="replace") for path in deployment.airflow.log_dir.rglob("*.log")
    )
    assert "sk-wrong-key-90125" not in everything
    assert API_KEY not in everything


def test_a_night_without_shards_is_a_failed_run_and_not_a_green_one(deployment):
    deployment.put("datasets", "images/2026-04-01/picture.png", b"no shard")
    run_id = deployment.airflow.trigger_dag("nightly_image_tagging", {"day": "2026-04-01"})
    assert deployment.airflow.wait_for_run("nightly_image_tagging", run_id) == "failed"
    log = deployment.airflow.task_log("nightly_image_tagging", run_id, "plan")
    assert "holds no shards" in log
    assert "There is no plan" in deployment.airflow.task_log("nightly_image_tagging", run_id, "summary")
