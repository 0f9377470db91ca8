"""A recipe under the real scheduler: each group of shards goes through its steps by itself."""

from __future__ import annotations

import json

import pytest

from tests.support.stub_endpoint import tag_of
from tests.system.conftest import Deployment, tags

pytestmark = pytest.mark.system

DAG, GROUP = "recipe", "tag_and_caption"
TAG, CAPTION = f"{GROUP}.shards.image_tagging", f"{GROUP}.shards.image_captioning"


def states(deployment: Deployment, run_id: str) -> dict[tuple[str, int], str]:
    tasks = deployment.airflow.task_instances(DAG, run_id)
    return {(each["task_id"], each["map_index"]): each["state"] for each in tasks}


def assert_right(deployment: Deployment, prefix: str, shard: str, *, number: int, rows: int) -> None:
    """The result has every row, tagged and captioned by its own picture."""
    found = deployment.rows("users", f"out/{prefix}{shard}")
    assert [row["id"] for row in found] == list(range(rows))
    for row in found:
        name = tag_of(deployment.pictures[f"users/{prefix}images/{number:02}-{row['id']:03}.png"])
        assert tags(row)[0][0] == name
        assert row["text"].startswith("<__dj__image> A picture of " + name)


def data(deployment: Deployment, prefix: str) -> set[str]:
    """What whoever takes the destination for a source would find."""
    keys = [key.removeprefix(prefix) for key in deployment.keys("users", prefix)]
    return {key for key in keys if not key.startswith("_")}


def test_a_recipe_tags_and_captions_a_bucket_and_run_again_asks_nothing(deployment):
    prefix = "recipe/"
    shards = deployment.dataset("users", prefix, shards=4, rows=5, seed=21)
    asked = deployment.asked()
    first = deployment.run(DAG, prefix)
    assert deployment.asked() - asked == 2 * 4 * 5

    assert data(deployment, f"out/{prefix}") == set(shards)
    for number, shard in enumerate(shards):
        assert_right(deployment, prefix, shard, number=number, rows=5)
    plan = deployment.airflow.xcom(DAG, first, f"{GROUP}.plan")
    assert sorted(name for group in plan for name in group) == shards
    expected = {(task, index): "success" for task in (TAG, CAPTION) for index in range(3)}
    assert states(deployment, first) == {**expected, (f"{GROUP}.plan", -1): "success"}
    labels = {
        (each["map_index"], each["rendered_map_index"])
        for each in deployment.airflow.task_instances(DAG, first)
        if each["task_id"] in (TAG, CAPTION)
    }
    names = {group[0] + (" and 1 more" if len(group) > 1 else "") for group in plan}
    assert {label for _, label in labels} == names
    assert len(labels) == 3
    manifest = deployment.json("users", f"out/{prefix}_vlm/{shards[0]}/image_captioning/manifest.json")
    assert (manifest["task_id"], manifest["rows_in"], manifest["failed"]) == (CAPTION, 5, 0)

    asked, written = deployment.asked(), deployment.written("users", f"out/{prefix}")
    run_id = deployment.run(DAG, prefix)
    assert deployment.airflow.xcom(DAG, run_id, f"{GROUP}.plan") == []
    assert {state for (task, _), state in states(deployment, run_id).items() if task in (TAG, CAPTION)} == {
        "skipped"
    }
    done = deployment.airflow.xcom(DAG, run_id, f"{GROUP}.plan", key="done")
    assert {task: each["rows_in"] for task, each in done.items()} == {TAG: 20, CAPTION: 20}
    assert deployment.asked() == asked
    assert deployment.written("users", f"out/{prefix}") == written

    # Cleared, the first run has its tasks already, and they find nothing to do.
    deployment.clear(DAG, first)
    deployment.wait_for_success(DAG, first)
    assert deployment.asked() == asked


def test_a_shard_that_can_not_be_read_keeps_no_other_from_the_next_step(deployment):
    prefix = "recipe-broken/"
    shards = deployment.dataset("users", prefix, shards=3, rows=4, seed=22)
    good = deployment.get("users", prefix + shards[1])
    broken = shards[1] + ".gz"
    deployment.s3.delete_object(Bucket="users", Key=prefix + shards[1])
    deployment.put("users", prefix + broken, b"this was never compressed")
    run_id = deployment.run(DAG, prefix, wait=False)
    assert deployment.airflow.wait_for_run(DAG, run_id) == "failed"

    plan = deployment.airflow.xcom(DAG, run_id, f"{GROUP}.plan")
    bad = plan.index([broken])
    for (task, index), state in states(deployment, run_id).items():
        if task in (TAG, CAPTION):
            failed = {TAG: "failed", CAPTION: "upstream_failed"}
            assert state == (failed[task] if index == bad else "success"), (task, index)
    assert data(deployment, f"out/{prefix}") == {shards[0], shards[2]}
    for number in (0, 2):
        assert_right(deployment, prefix, shards[number], number=number, rows=4)

    # Mended, it is all that is left to do.
    deployment.s3.delete_object(Bucket="users", Key=prefix + broken)
    deployment.put("users", prefix + shards[1], good)
    asked = deployment.asked()
    run_id = deployment.run(DAG, prefix)
    assert deployment.airflow.xcom(DAG, run_id, f"{GROUP}.plan") == [[shards[1]]]
    assert deployment.asked() - asked == 2 * 4
    assert_right(deployment, prefix, shards[1], number=1, rows=4)


def test_a_picture_that_is_missing_is_a_dead_letter_of_every_step(deployment):
    prefix = "recipe-missing/"
    (shard,) = deployment.dataset("users", prefix, shards=1, rows=20, seed=23)
    deployment.s3.delete_object(Bucket="users", Key=prefix + "images/00-007.png")
    deployment.run(DAG, prefix)
    rows = deployment.rows("users", f"out/{prefix}{shard}")
    assert [row["id"] for row in rows] == list(range(20))
    before = deployment.rows("users", prefix + shard)[7]
    assert rows[7] == before
    for folder, step in (("_steps/image_tagging/", "image_tagging"), ("", "image_captioning")):
        errors = deployment.get("users", f"out/{prefix}{folder}_vlm/{shard}/{step}/errors.jsonl")
        (letter,) = map(json.loads, errors.splitlines())
        assert (letter["row"], letter["kind"], letter["media"]) == (7, "media_missing", "images/00-007.png")
