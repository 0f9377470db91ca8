from __future__ import annotations

import json
import random
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk import DAG, BaseOperator, task, task_group
from airflow.sdk.exceptions import AirflowFailException
from hypothesis import given
from hypothesis import strategies as st

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.operators import runners
from airflow_vlm_provider.operators.image_tagging import ImageTaggingVLMOperator
from airflow_vlm_provider.operators.plans import resolve_shards, shards_label
from airflow_vlm_provider.operators.shards import PlanShardsOperator, deal
from airflow_vlm_provider.shards.opening import open_store
from airflow_vlm_provider.shards.stores import ObjectInfo
from demo.drawings import draw
from tests.support.fakes import ScriptedEngine

TAGS = json.dumps({"tags": ["one", "two", "three", "four", "five"]})
NAMES = ["a.jsonl", "b.jsonl", "c.jsonl"]


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
    assert plan.execute(context()) == [["a.jsonl"], ["b/c.jsonl.gz"]]
    plan = PlanShardsOperator(task_id="plan", source=str(tmp_path), pattern="b/*")
    assert plan.execute(context()) == [["b/c.jsonl.gz"]]


def test_a_plan_of_nothing_says_what_to_look_at(tmp_path):
    with pytest.raises(AirflowFailException, match="holds no shards"):
        PlanShardsOperator(task_id="plan", source=str(tmp_path)).execute(context())
    (tmp_path / "a.jsonl").write_bytes(b"")
    with pytest.raises(AirflowFailException, match=r"None of the 1 shards .* pattern='b\*'"):
        PlanShardsOperator(task_id="plan", source=str(tmp_path), pattern="b*").execute(context())


def test_more_groups_than_airflow_maps_over_are_refused(tmp_path):
    with pytest.raises(AirflowFailException, match="max_map_length"):
        PlanShardsOperator(task_id="plan", source=str(tmp_path), max_tasks=2000).execute(context())
    for wrong in (0, True, 1.5, "many", None):
        with pytest.raises(ConfigError, match=f"max_tasks={wrong!r}"):
            PlanShardsOperator(task_id="plan", source=str(tmp_path), max_tasks=wrong)


def test_the_number_of_groups_may_be_templated(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_bytes(b"")
    plan = PlanShardsOperator(task_id="plan", source=str(tmp_path), max_tasks="{{ params.most }}")
    plan.render_template_fields({"params": {"most": 2}})
    assert len(plan.execute(context())) == 2


# --- what is done already --------------------------------------------------------------------------------------


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Three shards of one picture each, and whatever a tagging task would need besides them."""
    source = tmp_path / "in"
    source.mkdir()
    for number, name in enumerate(NAMES):
        (source / f"{number}.png").write_bytes(draw(random.Random(number), side=64).encode())
        (source / name).write_text(json.dumps({"images": [f"{number}.png"]}) + "\n")
    monkeypatch.setenv("AIRFLOW_CONN_VLM_DEFAULT", json.dumps({"conn_type": "vlm", "host": "h"}))
    monkeypatch.setattr(runners, "make_engine", lambda *_, **__: ScriptedEngine(lambda about: TAGS))
    return tmp_path


def context(**more: Any) -> Any:
    ti = SimpleNamespace(dag_id="d", run_id="r", task_id="plan", map_index=-1, try_number=1, pushed={})
    ti.xcom_push = lambda key, value: ti.pushed.update({key: value})
    return {"ti": ti, "outlet_events": {}, "params": {}, **more}


def planning(place, **given: Any) -> PlanShardsOperator:
    return PlanShardsOperator(task_id="plan", source=str(place / "in"), max_tasks=3, **given)


def tagging(place, **given: Any) -> dict[str, Any]:
    return {"task_id": "tag", "source": str(place / "in"), "destination": str(place / "out"), **given}


def mapped(place, *taggings: dict[str, Any], **given: Any) -> PlanShardsOperator:
    """A plan with tagging operators that map over it."""
    with DAG("d"):
        plan = planning(place, **given)
        for parameters in taggings or [{}]:
            ImageTaggingVLMOperator.partial(**tagging(place, **parameters)).expand(shards=plan.output)
    return plan


def tag(place, *names: str, **given: Any) -> None:
    """Run a tagging task over some of the shards."""
    ImageTaggingVLMOperator(shards=list(names), **tagging(place, **given)).execute(context())


def run(plan: PlanShardsOperator, **more: Any) -> list[str]:
    """The names of all shards in a plan."""
    groups = plan.execute(context(**more))
    return sorted(name for group in groups for name in group)


def test_what_is_done_is_left_out_of_the_plan(place, capfd):
    plan = mapped(place)
    assert run(plan) == NAMES
    tag(place, "a.jsonl", "c.jsonl")
    assert run(plan) == ["b.jsonl"]
    said = capfd.readouterr().out
    assert "3 shards below file://" in said
    assert "2 of them done already, the rest in 1 groups" in said
    tag(place, *NAMES)
    assert run(plan) == []


def test_what_is_left_out_still_counts(place):
    (place / "in" / "0.png").write_bytes(b"no picture")
    tag(place, *NAMES[:2], max_error_rate=1.0)
    plan, given = mapped(place, {"max_error_rate": 1.0}), context()
    assert plan.execute(given) == [["c.jsonl"]]
    # As the task itself would have returned it.
    again = ImageTaggingVLMOperator(shards=NAMES[:2], max_error_rate=1.0, **tagging(place))
    summary = again.execute(context())
    left_out = given["ti"].pushed["done"]["tag"]
    assert (left_out["shards"], left_out["rows_in"], left_out["failed"]) == (2, 2, 1)
    assert left_out == {name: summary[name] or 0 for name in left_out}


def test_all_are_planned_on_demand(place):
    tag(place, *NAMES)
    assert run(mapped(place, skip_done=False)) == NAMES
    assert run(mapped(place, {"overwrite": True})) == NAMES


def test_a_replaced_picture_brings_its_shard_back_unless_media_are_trusted(place):
    tag(place, *NAMES)
    (place / "in" / "1.png").write_bytes(draw(random.Random(9), side=64).encode())
    assert run(mapped(place)) == ["b.jsonl"]
    assert run(mapped(place, {"trust_media": True})) == []


def test_what_another_parameter_would_change_is_not_done(place):
    tag(place, *NAMES)
    assert run(mapped(place, {"tag_field_name": "other"})) == NAMES
    assert run(mapped(place, {"max_pixels": 100})) == NAMES
    # This one decides nothing about the output.
    assert run(mapped(place, {"concurrency": 3})) == []


def test_templates_are_rendered_for_the_plans_run(place):
    plan = mapped(place, {"destination": "{{ params.place }}/{{ ds }}"})
    tag(place, "a.jsonl", destination=str(place / "2026-01-01"))
    day = {"params": {"place": str(place)}}
    assert run(plan, ds="2026-01-01", **day) == ["b.jsonl", "c.jsonl"]
    assert run(plan, ds="2026-01-02", **day) == NAMES


def test_an_operators_own_params_count_for_its_templates(place):
    with DAG("d", params={"place": str(place / "dag")}):
        plan = planning(place)
        ImageTaggingVLMOperator.partial(
            **tagging(place, destination="{{ params.place }}", params={"place": str(place / "own")})
        ).expand(shards=plan.output)
    tag(place, "a.jsonl", destination=str(place / "own"))
    tag(place, "b.jsonl", destination=str(place / "dag"))
    dag_run = SimpleNamespace(conf={})
    assert run(plan, dag_run=dag_run, params={"place": str(place / "dag")}) == ["b.jsonl", "c.jsonl"]


def test_of_several_operators_each_must_have_done_a_shard(place):
    second = {"tag_field_name": "second", "destination": str(place / "second")}
    one, two = {"task_id": "one"}, {"task_id": "two", **second}
    tag(place, *NAMES)
    assert run(mapped(place, one, two)) == run(mapped(place, two, one)) == NAMES
    tag(place, "b.jsonl", **second)
    assert run(mapped(place, one, two)) == run(mapped(place, two, one)) == ["a.jsonl", "c.jsonl"]


def test_one_steps_output_is_the_next_ones_source(place):
    second = {"source": str(place / "out"), "destination": str(place / "second"), "tag_field_name": "second"}
    second["media_roots"] = [str(place / "in")]
    plan = mapped(place, {}, {"task_id": "next", **second})
    assert run(plan) == NAMES
    tag(place, *NAMES)
    assert run(plan) == NAMES
    tag(place, "a.jsonl", "b.jsonl", **second)
    assert run(plan) == ["c.jsonl"]
    # Done anew by the first, and so not yet by the second.
    tag(place, "a.jsonl", "b.jsonl", overwrite=True)
    assert run(plan) == NAMES


def test_only_shards_with_dead_letters_are_planned_for_a_redrive(place):
    (place / "in" / "0.png").write_bytes(b"no picture")
    tag(place, *NAMES, max_error_rate=1.0)
    assert run(mapped(place, {"max_error_rate": 1.0})) == []
    assert run(mapped(place, {"max_error_rate": 0.5})) == ["a.jsonl"]
    assert run(mapped(place, {"max_error_rate": 1.0, "failed_only": True})) == ["a.jsonl"]


def test_a_mapped_task_group_counts_too(place):
    @task_group
    def work(shards):
        ImageTaggingVLMOperator(**tagging(place), shards=shards)

    with DAG("d") as dag:
        plan = planning(place)
        work.expand(shards=plan.output)
    tag(place, "a.jsonl")
    assert run(plan) == ["b.jsonl", "c.jsonl"]
    assert dag.get_task("work.tag").shards is not None


# --- what can't be told ----------------------------------------------------------------------------------------


def assert_all_planned(plan: PlanShardsOperator, why: str, capfd, **more: Any) -> None:
    assert run(plan, **more) == NAMES
    (said,) = [line for line in capfd.readouterr().out.splitlines() if "left out" in line]
    assert why in said


@pytest.fixture
def done(place):
    tag(place, *NAMES)
    assert run(mapped(place)) == []
    return place


def test_nothing_maps_over_the_plan(done, capfd):
    assert_all_planned(planning(done), "nothing in the DAG maps over the plan", capfd)


def test_something_else_maps_over_the_plan_too(done, capfd):
    @task
    def look(shards):
        pass

    plan = mapped(done)
    with plan.dag:
        look.expand(shards=plan.output)
    assert_all_planned(plan, "'look' maps over the plan too", capfd)


def test_an_operator_maps_over_more_than_the_plan(done, capfd):
    with DAG("d"):
        plan = planning(done)
        parameters = tagging(done)
        del parameters["source"]
        ImageTaggingVLMOperator.partial(**parameters).expand(shards=plan.output, source=[str(done / "in")])
    assert_all_planned(plan, "'tag' maps over more than the plan's groups", capfd)


def test_an_operator_maps_over_what_was_made_of_the_plan(done, capfd):
    with DAG("d"):
        plan = planning(done)
        ImageTaggingVLMOperator.partial(**tagging(done)).expand(
            shards=plan.output.map(lambda group: group[:1])
        )
    assert_all_planned(plan, "'tag' maps over more than the plan's groups", capfd)


def test_a_connection_is_missing(done, capfd, monkeypatch):
    monkeypatch.delenv("AIRFLOW_CONN_VLM_DEFAULT")
    assert_all_planned(mapped(done), "vlm_default", capfd)


def test_a_template_can_not_be_rendered(done, capfd):
    assert_all_planned(mapped(done, {"destination": "{{ params.place.deep }}"}), "parameters of 'tag'", capfd)


def test_a_parameter_comes_from_a_task_that_has_not_run(done, capfd):
    class Where(BaseOperator):
        def execute(self, context):
            return str(done / "out")

    with DAG("d"):
        plan, where = planning(done), Where(task_id="where")
        parameters = tagging(done, destination=where.output)
        ImageTaggingVLMOperator.partial(**parameters).expand(shards=plan.output)
    more = context()
    more["ti"].xcom_pull = lambda **_: None
    assert_all_planned(plan, "parameters of 'tag'", capfd, **more)


# --- large plans -----------------------------------------------------------------------------------------------


@pytest.fixture
def many(place):
    for number in range(1001):
        (place / "in" / f"part-{number:04}.jsonl").touch()
    for name in NAMES:
        (place / "in" / name).unlink()
    return place


def test_a_large_plan_is_kept_beside_the_ledger_and_mapped_by_name(many):
    plan = mapped(many)
    references = plan.execute(context())
    assert len(references) == 3
    assert all(isinstance(each, str) for each in references)
    assert len(json.dumps(references)) < 1000
    groups = [resolve_shards(each, open_store=open_store) for each in references]
    assert sorted(name for group in groups for name in group) == [f"part-{n:04}.jsonl" for n in range(1001)]
    assert [shards_label(each) for each in references] == [
        f"{group[0]} and {len(group) - 1} more" for group in groups
    ]
    # A retry writes the same.
    assert plan.execute(context()) == references
    assert len(list((many / "out" / "_vlm" / "_plans").iterdir())) == 1


def test_a_task_takes_a_group_by_its_reference(many):
    reference = mapped(many).execute(context())[1]
    (name, *rest) = resolve_shards(reference, open_store=open_store)
    summary = ImageTaggingVLMOperator(**tagging(many), shards=reference).execute(context())
    assert summary["shards"] == 1 + len(rest)
    assert (many / "out" / name).exists()


def test_up_to_a_thousand_short_names_are_listed(many):
    (many / "in" / "part-0000.jsonl").unlink()
    assert sum(map(len, mapped(many).execute(context()))) == 1000
    assert not (many / "out").exists()


def test_long_names_count_by_their_length(place):
    for number in range(400):
        (place / "in" / f"{'long-' * 40}{number:04}.jsonl").touch()
    references = mapped(place).execute(context())
    assert all(isinstance(each, str) for each in references)
    assert len(json.dumps(references)) < 1000


def test_a_large_plan_that_nothing_maps_over_is_listed_and_says_so(many, capfd):
    groups = planning(many).execute(context())
    assert sum(map(len, groups)) == 1001
    assert "names of all shards go to XCom" in capfd.readouterr().out


def test_a_large_plan_has_its_place_also_where_it_can_not_be_told_what_is_done(many, monkeypatch):
    monkeypatch.delenv("AIRFLOW_CONN_VLM_DEFAULT")
    assert isinstance(mapped(many).execute(context())[0], str)


def test_a_plan_of_shards_that_would_have_one_output_is_refused_whatever_tasks_they_go_to(tmp_path):
    for name in ("a.tar", "a.parquet"):
        (tmp_path / name).write_bytes(b"x")
    with DAG("d"):
        plan = PlanShardsOperator(task_id="plan", source=str(tmp_path))
        ImageTaggingVLMOperator.partial(
            task_id="tag", source=str(tmp_path), destination="/elsewhere", vlm_conn_id="none"
        ).expand(shards=plan.output)
    with pytest.raises(
        AirflowFailException, match=r"'a\.parquet' and 'a\.tar' would be one file.*pattern='\*\.tar'"
    ):
        plan.execute(context())
    plan.pattern = "*.tar"
    assert plan.execute(context()) == [["a.tar"]]
