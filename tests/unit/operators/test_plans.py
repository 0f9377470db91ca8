from __future__ import annotations

import pytest

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.ledger.plans import PlanReference, save_plan
from airflow_vlm_provider.operators.plans import resolve_shards, shards_label
from airflow_vlm_provider.shards.opening import open_store


@pytest.fixture
def reference(tmp_path):
    root = f"file://{tmp_path}/"
    name = save_plan(open_store(root), [["a.jsonl"], ["b.jsonl", "c.jsonl"]])
    return str(PlanReference(root, name, 1, "b.jsonl and 1 more"))


def never(uri: str):
    raise AssertionError(f"{uri} was opened")


def test_names_stay_names_and_open_nothing():
    assert resolve_shards(None, open_store=never) is None
    assert resolve_shards("a.jsonl", open_store=never) == ["a.jsonl"]
    assert resolve_shards(["a.jsonl", "b/c.jsonl"], open_store=never) == ["a.jsonl", "b/c.jsonl"]
    assert resolve_shards([], open_store=never) == []


def test_a_reference_stands_for_its_groups_names(reference):
    assert resolve_shards(reference, open_store=open_store) == ["b.jsonl", "c.jsonl"]
    assert resolve_shards([reference, "z.jsonl"], open_store=open_store) == ["b.jsonl", "c.jsonl", "z.jsonl"]


def test_a_plan_that_is_gone_says_what_to_clear(reference, tmp_path):
    for path in (tmp_path / "_vlm" / "_plans").iterdir():
        path.unlink()
    with pytest.raises(ConfigError, match=r"The plan file://.*jsonl\.zst is gone.*task that planned"):
        resolve_shards(reference, open_store=open_store)


def test_a_group_is_named_without_looking_at_its_plan(reference):
    assert shards_label(reference) == shards_label([reference]) == "b.jsonl and 1 more"
    assert shards_label("a.jsonl") == "a.jsonl"
    assert shards_label(["a.jsonl", "b.jsonl"]) == "a.jsonl and 1 more"
    assert shards_label([]) == "nothing"
