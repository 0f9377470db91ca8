from __future__ import annotations

import pytest
from airflow.sdk.exceptions import AirflowFailException
from hypothesis import given
from hypothesis import strategies as st

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.operators.shards import PlanShardsOperator, deal
from airflow_vlm_provider.shards.stores import ObjectInfo


def shard(name: str, size: int) -> ObjectInfo:
    return ObjectInfo(name=name, size=size, identity="")


@given(sizes=st.lists(st.integers(0, 10**9), min_size=1, max_size=60), max_tasks=st.integers(1, 20))
def test_every_shard_is_dealt_once_and_the_load_is_even(sizes, max_tasks):
    shards = [shard(f"{i:03}.jsonl", size) for i, size in enumerate(sizes)]
    groups = deal(shards, max_tasks)
    assert sorted(name for group in groups for name in group) == [each.name for each in shards]
    assert len(groups) == min(max_tasks, len(shards))
    assert all(group == sorted(group) for group in groups)
    weight = {each.name: each.size + 64 * 1024 for each in shards}
    loads = [sum(weight[name] for name in group) for group in groups]
    # What greedy dealing promises: the heaviest group is at most one shard above the mean.
    assert max(loads) <= sum(loads) / len(loads) + max(weight.values())


def test_empty_shards_are_not_all_dealt_to_one_task():
    groups = deal([shard(f"{i}.jsonl", 0) for i in range(100)], 10)
    assert [len(group) for group in groups] == [10] * 10


def test_a_plan_over_a_folder(tmp_path):
    for name in ("a.jsonl", "b/c.jsonl.gz", "_vlm/a.jsonl/x.jsonl", ".hidden.jsonl", "picture.png"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    plan = PlanShardsOperator(task_id="plan", source=str(tmp_path))
    assert plan.execute({}) == [["a.jsonl"], ["b/c.jsonl.gz"]]
    plan = PlanShardsOperator(task_id="plan", source=str(tmp_path), pattern="b/*")
    assert plan.execute({}) == [["b/c.jsonl.gz"]]


def test_a_plan_of_nothing_says_what_to_look_at(tmp_path):
    with pytest.raises(AirflowFailException, match="holds no shards"):
        PlanShardsOperator(task_id="plan", source=str(tmp_path)).execute({})
    (tmp_path / "a.jsonl").write_bytes(b"")
    with pytest.raises(AirflowFailException, match=r"None of the 1 shards .* pattern='b\*'"):
        PlanShardsOperator(task_id="plan", source=str(tmp_path), pattern="b*").execute({})


def test_more_groups_than_airflow_maps_over_are_refused(tmp_path):
    with pytest.raises(AirflowFailException, match="max_map_length"):
        PlanShardsOperator(task_id="plan", source=str(tmp_path), max_tasks=2000).execute({})
    for wrong in (0, True, 1.5, "many", None):
        with pytest.raises(ConfigError, match=f"max_tasks={wrong!r}"):
            PlanShardsOperator(task_id="plan", source=str(tmp_path), max_tasks=wrong)


def test_the_number_of_groups_may_be_templated(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_bytes(b"")
    plan = PlanShardsOperator(task_id="plan", source=str(tmp_path), max_tasks="{{ params.most }}")
    plan.render_template_fields({"params": {"most": 2}})
    assert len(plan.execute({})) == 2
