"""A plan that is made again in a run that has mapped tasks already: none of them is left out without a word."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk import DAG, task_group
from airflow.sdk.exceptions import AirflowFailException
from airflow.sdk.execution_time.xcom import XCom

from airflow_vlm_provider.operators.image_tagging import ImageTaggingVLMOperator
from airflow_vlm_provider.operators.mapped_tasks import mapped_tasks
from airflow_vlm_provider.operators.shards import PlanShardsOperator


@pytest.fixture
def pushed(monkeypatch) -> list[dict[str, Any]]:
    """What is pushed with a number of groups to map over."""
    found: list[dict[str, Any]] = []
    monkeypatch.setattr(XCom, "set", lambda **given: found.append(given))
    return found


@pytest.fixture
def plan(tmp_path) -> PlanShardsOperator:
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("{}\n")
    with DAG("d"):
        made = PlanShardsOperator(task_id="plan", source=str(tmp_path))
        ImageTaggingVLMOperator.partial(
            task_id="tag", source=str(tmp_path), destination="/elsewhere", vlm_conn_id="none"
        ).expand(shards=made.output)
    return made


def context(*, try_number: int = 2, states: dict[str, str | None]) -> Any:
    def get_task_states(*, dag_id, task_ids, run_ids):
        assert (dag_id, run_ids) == ("d", ["r"])
        own = {name: state for name, state in states.items() if name.rpartition("_")[0] in task_ids}
        return {"r": own} if own else {}

    ti = SimpleNamespace(dag_id="d", run_id="r", task_id="plan", map_index=-1, try_number=try_number)
    ti.get_task_states = get_task_states
    ti.xcom_push = lambda **given: None
    return {"ti": ti, "params": {}}


def test_a_plan_has_no_more_groups_than_there_are_tasks_left_for(plan, pushed, tmp_path):
    states = {"tag_0": None, "tag_1": "removed", "tag_2": None, "other_0": "removed"}
    assert plan.execute(context(states=states)) == [["a.jsonl", "b.jsonl"]]
    (tmp_path / "c.jsonl").write_text("{}\n")
    states = {"tag_0": None, "tag_1": "success", "tag_2": "removed"}
    groups = plan.execute(context(states=states))
    assert sorted(name for group in groups for name in group) == ["a.jsonl", "b.jsonl", "c.jsonl"]
    assert len(groups) == 2
    assert pushed == []


def test_a_plan_with_something_for_removed_tasks_alone_fails_and_is_known_when_the_run_is_cleared_again(
    plan, pushed
):
    given = context(states={"tag_0": "removed", "tag_1": "removed"})
    with pytest.raises(
        AirflowFailException, match=r"has removed tag\[0\], tag\[1\] from this run.*Clear the run once more"
    ):
        plan.execute(given)
    (only,) = pushed
    assert (only["key"], only["value"]) == ("return_value", [["a.jsonl"], ["b.jsonl"]])
    assert (only["task_id"], only["run_id"], only["_mapped_length"]) == ("plan", "r", 2)


def test_many_removed_tasks_are_counted(plan, pushed, tmp_path):
    for number in range(10):
        (tmp_path / f"{number}.jsonl").write_text("{}\n")
    states: dict[str, str | None] = {f"tag_{number}": "removed" for number in range(20)}
    with pytest.raises(AirflowFailException, match=r"removed tag\[0\], tag\[1\], tag\[2\] and 9 more from"):
        plan.execute(context(states=states))
    assert pushed[0]["_mapped_length"] == 12


@pytest.mark.parametrize(
    "given",
    [
        {"states": {"tag_0": None, "tag_1": "success"}},
        {"states": {"tag_0": None, "tag_1": None, "tag_2": "removed"}},
        {"states": {}},
        # The first time, Airflow is not even asked.
        {"states": {"tag_0": "removed"}, "try_number": 1},
    ],
)
def test_a_plan_that_all_tasks_are_there_for_is_returned(plan, pushed, given):
    assert plan.execute(context(**given)) == [["a.jsonl"], ["b.jsonl"]]
    assert pushed == []


def test_with_nothing_left_to_do_one_of_the_tasks_that_are_there_has_nothing_to_do(plan, pushed, monkeypatch):
    monkeypatch.setattr(PlanShardsOperator, "_done", lambda *_: ({"a.jsonl", "b.jsonl"}, {}))
    assert plan.execute(context(states={"tag_0": None, "tag_1": None})) == [[]]
    assert plan.execute(context(states={"tag_0": None, "tag_1": "removed"})) == [[]]
    assert plan.execute(context(states={})) == []
    with pytest.raises(AirflowFailException, match=r"removed tag\[0\] from"):
        plan.execute(context(states={"tag_0": "removed"}))


def test_the_tasks_of_a_mapped_group_are_known_by_their_whole_names(tmp_path):
    with DAG("d"):
        plan = PlanShardsOperator(task_id="plan", source=str(tmp_path))

        @task_group(group_id="both")
        def group(shards):
            for name in ("tag_me", "caption"):
                ImageTaggingVLMOperator(
                    task_id=name, source=str(tmp_path), destination="/elsewhere", shards=shards
                )

        group.expand(shards=plan.output)
    given = context(states={"both.tag_me_0": "removed", "both.caption_1": None, "both.tag_me": "skipped"})
    assert mapped_tasks(plan, given) == {("both.tag_me", 0): "removed", ("both.caption", 1): None}
