"""Dead letters are asked for again from a user's DAG, and what the ledger holds is shown on the command line."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from tests.support.stub_endpoint import tag_of
from tests.system.conftest import tags

pytestmark = pytest.mark.system


def test_a_redrive_asks_for_what_can_have_changed_and_merges_it(deployment):
    prefix = "dead/"
    good, bad = deployment.dataset("users", prefix, shards=2, rows=40, seed=9)
    names = [row["images"][0] for row in deployment.rows("users", prefix + bad)]
    corrupt, missing, spoiled = names[4], names[17], names[31]
    pictures = {name: deployment.pictures[f"users/{prefix}{name}"] for name in names}
    deployment.put("users", prefix + corrupt, pictures[corrupt][:200])
    deployment.s3.delete_object(Bucket="users", Key=prefix + missing)
    deployment.stub.set(image_faults={tag_of(pictures[spoiled]).removeprefix("img-"): "empty"})
    deployment.run("users_own", prefix)

    def letters() -> dict[str, str]:
        found = deployment.rows("users", f"out/{prefix}_vlm/{bad}/image_tagging/errors.jsonl")
        return {letter["media"]: letter["kind"] for letter in found}

    assert letters() == {corrupt: "media_corrupt", missing: "media_missing", spoiled: "unparsable"}
    before = deployment.get("users", f"out/{prefix}{bad}").splitlines()
    written = deployment.written("users", f"out/{prefix}{good}")

    deployment.put("users", prefix + missing, pictures[missing])
    deployment.stub.set(image_faults={})
    sent = Counter(deployment.stub.stats()["by_image"])
    run_id = deployment.run("dead_letters", prefix)

    new = Counter(deployment.stub.stats()["by_image"]) - sent
    assert new == {tag_of(pictures[name]).removeprefix("img-"): 1 for name in (missing, spoiled)}
    result = deployment.airflow.xcom("dead_letters", run_id, "redrive")
    assert (result["redriven"], result["recovered"], result["still_failed"]) == (3, 2, 1)
    assert letters() == {corrupt: "media_corrupt"}
    after = deployment.get("users", f"out/{prefix}{bad}").splitlines()
    assert len(after) == len(before) == 40
    for name, old, line in zip(names, before, after, strict=True):
        if name in (missing, spoiled):
            assert tags(json.loads(line))[0][0] == tag_of(pictures[name])
            row = json.loads(line)
            assert {key: row[key] for key in json.loads(old)} == json.loads(old)
        else:
            assert line == old
    assert deployment.written("users", f"out/{prefix}{good}") == written


def test_the_command_line_shows_and_prunes_the_ledger(deployment, finished):
    airflow = deployment.airflow
    destination = f"s3://users/out/{finished.prefix}"
    (shown,) = json.loads(
        airflow.cli("vlm", "ledger", "show", destination + finished.shards[1], "-o", "json")
    )["steps"]
    assert shown["step"] == "image_tagging"
    assert (shown["manifest"]["rows_in"], shown["manifest"]["dag_id"]) == (12, "users_own")
    assert shown["dead_letters"] == {"media_missing": 1}
    assert sum(segment["answers"] for segment in shown["segments"]) == 11

    keys = deployment.keys("users", f"out/{finished.prefix}")
    said = airflow.cli("vlm", "ledger", "prune", destination, "--older-than", "1", "--dry-run")
    assert said.startswith("Would remove 0 journal segments")
    assert deployment.keys("users", f"out/{finished.prefix}") == keys
