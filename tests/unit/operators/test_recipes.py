"""A recipe as a task group: what its tasks are, and what they do to files."""

from __future__ import annotations

import io
import json
import os
import random
import runpy
import subprocess
import sys
import tarfile
from pathlib import Path
from textwrap import dedent
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from airflow.dag_processing.dagbag import DagBag
from airflow.sdk import DAG
from airflow.serialization.serialized_objects import DagSerialization

from airflow_vlm_provider.operators import runners
from airflow_vlm_provider.operators.recipes import recipe_task_group
from airflow_vlm_provider.recipes.recipe import RecipeError
from demo.drawings import draw
from tests.support.fakes import ScriptedEngine
from tests.support.tars import tar

TAG, CAPTION = "image_tagging_vlm_mapper", "image_captioning_mapper"
TWO = {"dataset_path": "s3://b/in", "export_path": "s3://b/out", "process": [TAG, CAPTION]}
HEAVY = {"torch", "vllm", "transformers", "xgrammar", "pyarrow", "av", "boto3", "botocore", "openai", "PIL"}


@pytest.fixture
def write(tmp_path):
    def write(content: dict[str, Any], name: str = "recipe.yaml") -> Path:
        path = tmp_path / name
        path.write_text(yaml.safe_dump(content))
        return path

    return write


def group_of(path: Path, **given: Any) -> DAG:
    with DAG("d") as dag:
        recipe_task_group(path, **given)
    return dag


# --- what the tasks are ----------------------------------------------------------------------------------------


def test_one_plan_and_the_operators_one_after_another_for_each_of_its_groups(write):
    dag = group_of(write({**TWO, "suffixes": ["jsonl"]}, "tag.and caption.yaml"), max_tasks=7)
    assert dag.task_ids == [
        "tag_and_caption.plan",
        "tag_and_caption.shards.image_tagging",
        "tag_and_caption.shards.image_captioning",
    ]
    plan, tag, caption = dag.tasks
    assert (plan.source, plan.max_tasks, plan.pattern) == ("s3://b/in", 7, "*.jsonl")
    assert (tag.source, tag.destination) == ("s3://b/in", "s3://b/out/_steps/image_tagging")
    assert (caption.source, caption.destination) == ("s3://b/out/_steps/image_tagging/", "s3://b/out")
    assert caption.media_roots == ["s3://b/in"]
    assert tag.upstream_task_ids == {plan.task_id}
    assert caption.upstream_task_ids == {plan.task_id, tag.task_id}
    assert list(plan.iter_mapped_dependants()) == [
        dag.task_group.children["tag_and_caption"].children["tag_and_caption.shards"]
    ]


def test_the_dag_is_serialised_and_read_back(write):
    dag = group_of(write(TWO), queue="gpu", retries=4)
    text = json.dumps(DagSerialization.to_dict(dag))
    again = DagSerialization.from_dict(json.loads(text))
    assert again.task_ids == dag.task_ids
    tag = again.get_task("recipe.shards.image_tagging")
    assert (tag.queue, tag.retries) == ("gpu", 4)
    assert tag.get_closest_mapped_task_group().group_id == "recipe.shards"
    assert again.get_task("recipe.plan").queue == "default"


def test_what_is_given_comes_before_the_recipe(write):
    content = {
        "dataset_path": "s3://b/in",
        "export_path": "s3://b/out",
        "suffixes": ".tar",
        "text_keys": "recipes",
        "process": [{TAG: {"try_num": 2, "api_or_hf_model": "recipes"}}, {TAG: {"try_num": 3}}, TAG],
    }
    dag = group_of(
        write(content),
        group_id="mine",
        source="s3://b/other/",
        destination="s3://c/{{ ds }}",
        pattern="x*",
        vlm_conn_id="vlm_all",
        storage_conn_id="store",
        aws_conn_id=None,
        text_key="given",
        api_or_hf_model="given",
        operator_args={
            -1: {"try_num": 9},
            1: {"vlm_conn_id": "vlm_one", "try_num": 5},
            TAG: {"try_num": 4, "pool": "some"},
        },
    )
    plan, one, two, three = dag.tasks
    assert plan.task_id == "mine.plan"
    assert (plan.source, plan.pattern) == ("s3://b/other/", "x*")
    assert (one.destination.endswith("/_steps/image_tagging"), three.destination) == (True, "s3://c/{{ ds }}")
    assert [each.text_key for each in (one, two, three)] == ["given"] * 3
    assert [each.api_or_hf_model for each in (one, two, three)] == ["given"] * 3
    assert [each.try_num for each in (one, two, three)] == [4, 5, 9]
    assert [each.vlm_conn_id for each in (one, two, three)] == ["vlm_all", "vlm_one", "vlm_all"]
    assert {each.pool for each in (one, two, three)} == {"some"}
    assert {each.aws_conn_id for each in dag.tasks} == {None}
    assert {each.storage_conn_id for each in dag.tasks} == {"store"}


def test_a_model_or_engine_that_is_given_takes_the_place_of_the_recipes(write):
    process = [
        {CAPTION: {"hf_img2seq": "recipes"}},
        {"video_captioning_from_vlm_mapper": {"hf_model": "recipes", "enable_vllm": True}},
        {TAG: {"is_api_model": True}},
    ]
    path = write({**TWO, "process": process})
    assert [each.api_or_hf_model for each in group_of(path).tasks[1:]] == ["recipes", "recipes", None]
    assert [each.engine for each in group_of(path).tasks[1:]] == [None, "vllm", None]
    given = group_of(path, api_or_hf_model="given", engine="transformers").tasks[1:]
    assert [each.api_or_hf_model for each in given] == ["given"] * 3
    assert [each.engine for each in given] == ["transformers"] * 3


def test_other_groups_come_before_and_after_it(write):
    path = write(TWO)
    with DAG("d") as dag:
        one = recipe_task_group(path, group_id="one")
        two = recipe_task_group(path, group_id="two", destination="s3://b/two")
        one >> two
    assert dag.get_task("two.plan").upstream_task_ids == {"one.shards.image_captioning"}


def test_a_recipe_is_looked_for_beside_the_dags_file(write, tmp_path, monkeypatch):
    write({**TWO, "dataset_path": "data"})
    (tmp_path / "dags").mkdir()
    monkeypatch.chdir(os.sep)
    for body in (
        """
        with DAG("d") as made:
            recipe_task_group("../recipe.yaml")
        """,
        """
        @dag("d")
        def d():
            recipe_task_group("../recipe.yaml")
        made = d()
        """,
    ):
        file = tmp_path / "dags" / "dag.py"
        head = "from airflow.sdk import DAG, dag\nfrom airflow_vlm_provider.operators.recipes import recipe_task_group\n"
        file.write_text(head + dedent(body))
        made = runpy.run_path(str(file))["made"]
        assert made.get_task("recipe.plan").source == f"{tmp_path}/data"


def test_the_documents_example_parses(write, tmp_path):
    text = (Path(__file__).parents[3] / "docs" / "recipes.md").read_text()
    file = tmp_path / "dag.py"
    file.write_text(text.partition("```python\n")[2].partition("```")[0])
    write({"process": [TAG, CAPTION]})
    (dag,) = DagBag(dag_folder=str(file), bundle_path=tmp_path).dags.values()
    names = [line.split()[0] for line in text.splitlines() if line.strip().startswith("recipe.")]
    groups = {"recipe.shards"}
    assert [name for name in names if name not in groups] == dag.task_ids
    caption = dag.get_task("recipe.shards.image_captioning")
    assert (caption.engine, caption.queue) == ("transformers", "gpu")


def test_parsing_brings_nothing_heavy(write, tmp_path):
    code = f"""
import sys
from airflow.sdk import DAG
from airflow.dag_processing.dagbag import DagBag
before = set(sys.modules)
from airflow_vlm_provider.operators.recipes import recipe_task_group
with DAG("d"):
    recipe_task_group({str(write(TWO))!r})
print(sorted({{name.partition(".")[0] for name in set(sys.modules) - before}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not HEAVY & set(json.loads(done.stdout.splitlines()[-1].replace("'", '"')))


# --- what is wrong ---------------------------------------------------------------------------------------------


def problems(path: Path, **given: Any) -> dict[str, str]:
    with pytest.raises(RecipeError) as caught:
        group_of(path, **given)
    return {problem.place: problem.sentence for problem in caught.value.problems}


def test_what_is_wrong_with_recipe_operators_and_arguments_is_said_at_once(write):
    content = {"nq": 3, "process": [{TAG: {"try_num": 0}}, {CAPTION: {"caption_num": 0, "x": 1}}]}
    found = problems(write(content), operator_args={TAG: {"source": "x"}, 7: {}, "no_mapper": {}})
    assert "recipe_task_group() a source" in found["dataset_path"]
    assert "recipe_task_group() a destination" in found["export_path"]
    assert "no such setting" in found["nq"]
    assert "try_num is 0" in found[f"process[0].{TAG}"]
    assert "caption_num" in found[f"process[1].{CAPTION}"]
    assert "no such parameter" in found[f"process[1].{CAPTION}.x"]
    assert "source: recipe_task_group() decides this" in found[f"operator_args['{TAG}']"]
    assert "it has 0 (image_tagging_vlm_mapper), 1" in found["operator_args[7]"]
    assert "no such operator" in found["operator_args['no_mapper']"]
    assert len(found) == 9


def test_airflow_shows_all_of_it_as_the_dag_files_error(write, tmp_path, monkeypatch):
    monkeypatch.setenv("AIRFLOW__CORE__LOAD_EXAMPLES", "False")
    write({**TWO, "nq": 3, "process": [{TAG: {"api_key": "sk-not-to-be-seen"}}, "image_blur_mapper"]})
    file = tmp_path / "dag.py"
    file.write_text(
        "from airflow.sdk import DAG\n"
        "from airflow_vlm_provider.operators.recipes import recipe_task_group\n"
        "with DAG('d'):\n    recipe_task_group('recipe.yaml')\n"
    )
    (said,) = DagBag(dag_folder=str(file), bundle_path=tmp_path).import_errors.values()
    for words in (
        "can't be run for 4 things",
        "- nq: ",
        f"- process[0].{TAG}.api_key: ",
        "- process[1].image_blur_mapper: ",
    ):
        assert words in said
    assert "sk-not-to-be-seen" not in said


def test_a_destination_inside_the_source_is_refused(write):
    found = problems(write({**TWO, "export_path": "s3://b/in/out"}))
    assert "lies inside source" in found[f"process[0].{TAG}"]


# --- what they do ----------------------------------------------------------------------------------------------

TAGS = json.dumps({"tags": ["one", "two", "three", "four", "five"]})
TWICE = [TAG, {TAG: {"tag_field_name": "again", "system_prompt": "Tag once more."}}]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Two shards, one in a folder, their pictures beside them; and an engine that counts."""
    source = tmp_path / "in"
    for number, folder in enumerate(("", "deep/er/")):
        (source / folder / "pics").mkdir(parents=True)
        rows = []
        for row in range(3):
            picture = draw(random.Random(10 * number + row), side=64).encode()
            (source / folder / "pics" / f"{row}.png").write_bytes(picture)
            rows.append(json.dumps({"id": row, "images": [f"pics/{row}.png"]}) + "\n")
        (source / folder / "part.jsonl").write_text("".join(rows))
    monkeypatch.setenv("AIRFLOW_CONN_VLM_DEFAULT", json.dumps({"conn_type": "vlm", "host": "h"}))
    asked: list[Any] = []

    def answer(about: Any) -> str:
        asked.append(about)
        return TAGS

    monkeypatch.setattr(runners, "make_engine", lambda *_, **__: ScriptedEngine(answer))
    return SimpleNamespace(root=tmp_path, source=source, out=tmp_path / "out", asked=asked)


def context() -> Any:
    ti = SimpleNamespace(dag_id="d", run_id="r", task_id="t", map_index=-1, try_number=1)
    ti.xcom_push = lambda key, value: None
    return {"ti": ti, "outlet_events": {}, "params": {}}


def run(dag: DAG, *, steps: int | None = None) -> list[list[str]]:
    """Run a plan and, for each of its groups, the operators (or the first of them); returns the plan."""
    plan, *operators = dag.tasks
    groups = plan.execute(context())
    for group in groups:
        for operator in operators[:steps]:
            task = operator.prepare_for_execution()
            task.shards = group
            task.execute(context())
    return groups


def names(folder: Path) -> list[str]:
    return sorted(
        str(path.relative_to(folder))
        for path in folder.rglob("*")
        if path.is_file() and not any(part.startswith("_") for part in path.relative_to(folder).parts)
    )


def test_the_result_stands_in_the_destination_and_nothing_is_asked_twice(place, write):
    path = write({"dataset_path": "in", "export_path": "out.jsonl", "process": TWICE})
    dag = group_of(path)
    assert sorted(run(dag)) == [["deep/er/part.jsonl"], ["part.jsonl"]]
    # The pictures of all shards, also those in folders, are found by every step: a row that was not has no tags.
    assert names(place.out) == ["deep/er/part.jsonl", "part.jsonl"]
    for name in names(place.out):
        for row in map(json.loads, (place.out / name).read_text().splitlines()):
            assert set(row["__dj__meta__"]) == {"image_tags", "again"}
    assert len(place.asked) == 12
    assert run(dag) == []
    assert len(place.asked) == 12


def test_a_shard_is_done_when_every_step_has_done_it(place, write):
    dag = group_of(write({"dataset_path": "in", "export_path": "out", "process": TWICE}))
    assert len(run(dag, steps=1)) == 2
    assert names(place.out / "_steps" / "image_tagging") == ["deep/er/part.jsonl", "part.jsonl"]
    assert len(place.asked) == 6
    assert len(run(dag)) == 2
    assert len(place.asked) == 12
    (place.source / "part.jsonl").write_text('{"id": 3, "images": []}\n')
    assert run(dag) == [["part.jsonl"]]
    assert json.loads((place.out / "part.jsonl").read_text())["__dj__meta__"] == {
        "image_tags": [[]],
        "again": [[]],
    }


def test_what_is_deleted_between_the_steps_is_made_again_without_asking(place, write):
    dag = group_of(write({"dataset_path": "in", "export_path": "out", "process": TWICE}))
    run(dag)
    between = place.out / "_steps" / "image_tagging" / "part.jsonl"
    between.unlink()
    assert run(dag) == [["part.jsonl"]]
    assert between.exists()
    assert len(place.asked) == 12


def test_a_step_that_is_added_or_removed_costs_nothing_of_the_others(place, write):
    content = {"dataset_path": "in", "export_path": "out", "process": TWICE[:1]}
    run(group_of(write(content)))
    assert len(place.asked) == 6
    run(group_of(write({**content, "process": TWICE})))
    assert len(place.asked) == 12
    run(group_of(write(content)))
    assert len(place.asked) == 12


def test_answers_of_yesterdays_destination_count(place, write):
    path = write({"dataset_path": "in", "export_path": "out", "process": TWICE})
    run(group_of(path))
    run(group_of(path, destination=str(place.root / "today"), reuse_from=str(place.out)))
    assert len(place.asked) == 12
    assert names(place.root / "today") == ["deep/er/part.jsonl", "part.jsonl"]


def test_a_dataset_of_one_shard(place, write):
    path = write({"dataset_path": "in/deep/er/part.jsonl", "export_path": "out", "process": TWICE})
    assert run(group_of(path)) == [["part.jsonl"]]
    assert names(place.out) == ["part.jsonl"]
    assert all("again" in json.loads(row)["__dj__meta__"] for row in (place.out / "part.jsonl").open())


def test_pictures_that_shards_embed_go_from_step_to_step(place, write):
    (place.root / "tars").mkdir()
    pictures = [draw(random.Random(number), side=64).encode() for number in range(2)]
    shard = tar(*((f"{number}.png", picture) for number, picture in enumerate(pictures)))
    (place.root / "tars" / "a.tar").write_bytes(shard)
    path = write({"dataset_path": "tars", "export_path": "out", "process": TWICE})
    run(group_of(path, output="full"))
    assert len(place.asked) == 4
    with tarfile.open(fileobj=io.BytesIO((place.out / "a.tar").read_bytes())) as archive:
        members = {each.name: archive.extractfile(each).read() for each in archive.getmembers()}
    assert [members["0.png"], members["1.png"]] == pictures
    assert set(json.loads(members["0.json"])["__dj__meta__"]) == {"image_tags", "again"}
    run(group_of(path, destination=str(place.root / "beside")))
    assert names(place.root / "beside") == ["a.parquet"]
