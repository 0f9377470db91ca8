"""``@task.vlm``, as DAG files use it: parsed, serialised, mapped, planned, unmapped and run as Airflow does."""

from __future__ import annotations

import json
import logging
from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.dag_processing.dagbag import DagBag
from airflow.sdk import DAG, BaseOperator, task, task_group
from airflow.sdk.definitions.mappedoperator import MappedOperator
from airflow.sdk.exceptions import AirflowFailException
from airflow.serialization.serialized_objects import DagSerialization
from pydantic import BaseModel

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.operators import runners
from airflow_vlm_provider.operators.shards import PlanShardsOperator
from tests.support.fakes import ScriptedEngine

NAMES = ["a.jsonl", "b.jsonl", "c.jsonl"]
S3 = {"source": "s3://b/in", "destination": "s3://b/out"}


class Seen(BaseModel):
    what: str


@pytest.fixture
def place(tmp_path, monkeypatch):
    (tmp_path / "in").mkdir()
    for name in NAMES:
        rows = [{"id": f"{name[0]}{number}", "text": f"{name[0]} {number}"} for number in range(3)]
        (tmp_path / "in" / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    engine = ScriptedEngine()
    monkeypatch.setattr(runners, "make_engine", lambda *args, **given: engine)
    monkeypatch.setenv("AIRFLOW_CONN_VLM_DEFAULT", json.dumps({"conn_type": "vlm", "host": "h"}))
    return SimpleNamespace(
        root=tmp_path,
        engine=engine,
        places={"source": str(tmp_path / "in"), "destination": str(tmp_path / "out")},
    )


def answers(place: Any, name: str) -> list[Any]:
    lines = (place.root / "out" / name).read_text().splitlines()
    return [json.loads(line)["answer"] for line in lines]


def context(**more: Any) -> Any:
    ti = SimpleNamespace(dag_id="d", run_id="r", task_id="t", map_index=-1, try_number=1)
    ti.xcom_push = lambda **given: None
    return {"ti": ti, "outlet_events": {}, "params": {}, **more}


def execute(operator: BaseOperator | MappedOperator, shards: Any = None, **more: Any) -> Any:
    """Unmap, render and run a task as Airflow's runner does, its shards given in place of the plan's XCom."""
    if isinstance(operator, MappedOperator):
        operator = operator.unmap({"op_kwargs": {"shards": shards, **more.pop("op_kwargs", {})}})
    own = operator.prepare_for_execution()
    given = context(task=own, **more)
    own.render_template_fields(given)
    return own.execute(given)


DAG_FILE = '''
from __future__ import annotations

from airflow.sdk import DAG, task
from pydantic import BaseModel

from airflow_vlm_provider.operators.shards import PlanShardsOperator


class Seen(BaseModel):
    what: str


with DAG("users", schedule=None):
    plan = PlanShardsOperator(task_id="plan", source="s3://b/in")

    @task.vlm(source="s3://b/in", destination="s3://b/out", field="seen", output_type=Seen, retries=3)
    def look(sample: dict, style="brief", ds=None) -> str | None:
        """Look at it."""
        raise AssertionError("called while the DAG was parsed")

    look.partial(style="{{ params.style }}").expand(shards=plan.output)
    look.override(task_id="alone")()
    look.override(task_id="after")(shards=plan.output, style=plan.output)
'''


def test_a_dag_file_with_the_decorator_is_parsed_and_serialised_and_the_function_is_not_called(tmp_path):
    (tmp_path / "users.py").write_text(DAG_FILE)
    bag = DagBag(tmp_path)
    assert bag.import_errors == {}
    spelled = json.dumps(DagSerialization.to_dict(bag.dags["users"]), sort_keys=True)
    again = DagBag(tmp_path).dags["users"]
    assert json.dumps(DagSerialization.to_dict(again), sort_keys=True) == spelled
    back = DagSerialization.from_dict(json.loads(spelled))
    assert {each.task_id: each.is_mapped for each in back.tasks} == {
        "plan": False,
        "look": True,
        "alone": False,
        "after": False,
    }
    for name, upstream in {"look": {"plan"}, "alone": set(), "after": {"plan"}}.items():
        made = back.get_task(name)
        # What the UI calls it.
        assert made.operator_name == "@task.vlm"
        assert made.upstream_task_ids == upstream
        assert made.retries == 3
    assert back.get_task("alone").doc_md == "Look at it."


def test_the_decorated_function_says_what_is_asked(place):
    with DAG("d"):

        @task.vlm(**place.places)
        def ask(sample: dict[str, Any]) -> str:
            return f"What of {sample['text']}?"

        made = ask().operator
    summary = execute(made)
    assert (summary["ok"], summary["shards"]) == (9, 3)
    assert answers(place, "b.jsonl") == [f"about What of b {number}?" for number in range(3)]
    # It stays a function that can be tested by itself.
    assert ask.function({"text": "x"}) == "What of x?"


def test_it_is_mapped_over_shards_and_its_other_arguments_are_the_tasks(place):
    with DAG("d"):

        @task.vlm(**place.places)
        def ask(
            sample: dict[str, Any], style: str, *, end: str = ".", ds: Any = None, params: Any = None
        ) -> str:
            return f"{style} {sample['text']} {ds} {params['p']}{end}"

        mapped = ask.partial(style="{{ params.p }}").expand(shards=[["a.jsonl"], ["b.jsonl"]])
        other = (
            ask.override(task_id="other")
            .partial(end="!")
            .expand_kwargs([{"shards": "c.jsonl", "style": "x"}])
        )
    given = {"ds": "2026-01-01", "params": {"p": "P"}}
    for name in ("a.jsonl", "b.jsonl"):
        execute(mapped.operator, [name], **given)
    assert answers(place, "a.jsonl")[0] == "about P a 0 2026-01-01 P."
    assert answers(place, "b.jsonl")[2] == "about P b 2 2026-01-01 P."
    execute(other.operator, "c.jsonl", op_kwargs={"style": "x"}, **given)
    assert answers(place, "c.jsonl")[0] == "about x c 0 2026-01-01 P!"


def test_what_it_is_called_with_tells_its_answers_from_others(place):
    def asked(style: str, **more: Any) -> int:
        before = len(place.engine.asked)
        with DAG("d"):

            @task.vlm(**place.places)
            def ask(sample: dict[str, Any], style: str, run_id: Any = None) -> str:
                return f"{style} {sample['text']}"

            execute(ask(style).operator, **more)
        return len(place.engine.asked) - before

    assert asked("a", run_id="1") == 9
    assert asked("a", run_id="1") == 0
    assert asked("b", run_id="1") == 9
    assert answers(place, "a.jsonl")[0] == "about b a 0"


def test_a_second_run_asks_nothing_and_changed_words_of_the_decorator_change_nothing(place):
    with DAG("d"):

        @task.vlm(**place.places)
        def ask(sample: dict[str, Any]) -> str:
            return sample["text"]

        first = ask().operator

        @task.vlm(retries=2, vlm_conn_id="vlm_default", **place.places)
        def ask(sample: dict[str, Any]) -> str:
            return sample["text"]

        second = ask().operator
    assert execute(first)["requests"] == 9
    again = execute(second)
    assert (again["requests"], again["shards_unchanged"], len(place.engine.asked)) == (0, 3, 9)


def test_a_plan_leaves_out_what_the_function_mapped_over_it_has_done(place):
    with DAG("d"):
        plan = PlanShardsOperator(task_id="plan", source=place.places["source"])

        @task.vlm(**place.places)
        def ask(sample: dict[str, Any], ds: Any = None) -> str:
            return f"{sample['text']} {ds}"

        mapped = ask.expand(shards=plan.output).operator

    def planned(day: str) -> list[list[str]]:
        given = context(ds=day, dag_run=SimpleNamespace(conf={}))
        return plan.prepare_for_execution().execute(given)

    assert planned("2026-01-01") == [["a.jsonl"], ["b.jsonl"], ["c.jsonl"]]
    execute(mapped, ["b.jsonl"], ds="2026-01-01")
    assert planned("2026-01-01") == [["a.jsonl"], ["c.jsonl"]]
    # The function gets the day, so another day's answers are others.
    assert planned("2026-01-02") == [["a.jsonl"], ["b.jsonl"], ["c.jsonl"]]


def test_it_works_in_a_task_group_mapped_over_a_plan(place):
    with DAG("d") as dag:
        plan = PlanShardsOperator(task_id="plan", source=place.places["source"])

        @task.vlm(**place.places)
        def ask(sample: dict[str, Any]) -> str:
            return sample["text"]

        @task_group
        def work(shards: Any) -> None:
            ask(shards=shards)

        work.expand(shards=plan.output)
    inner = dag.get_task("work.ask")
    assert inner.op_kwargs == {}
    DagSerialization.to_dict(dag)
    own = inner.prepare_for_execution()
    own.shards = ["a.jsonl"]
    assert own.execute(context())["rows_in"] == 3
    given = context(dag_run=SimpleNamespace(conf={}))
    assert plan.prepare_for_execution().execute(given) == [["b.jsonl"], ["c.jsonl"]]


def test_an_error_of_the_function_is_one_rows_dead_letter_with_its_traceback_in_the_log(place, caplog):
    with DAG("d"):

        @task.vlm(max_error_rate=1.0, **place.places)
        def fragile(sample: dict[str, Any]) -> str:
            return {"a0": "x"}[sample["id"]]

        made = fragile().operator
    with caplog.at_level(logging.ERROR):
        assert execute(made)["failed"] == 8
    letters = (place.root / "out" / "_vlm" / "a.jsonl" / "vlm_map" / "errors.jsonl").read_text().splitlines()
    assert [json.loads(line)["kind"] for line in letters] == ["internal", "internal"]
    assert "in fragile" in caplog.text


def parsed(function: Any, **given: Any) -> None:
    task.vlm(**{**S3, **given})(function)


@pytest.mark.parametrize(
    ("function", "given", "words"),
    [
        (lambda: "x", {}, "can't be called with a sample"),
        (lambda sample, shards: "x", {}, "'shards'"),
        (lambda sample, *rest: "x", {}, "'rest' can't be given by its name"),
        (lambda sample, style, /: "x", {}, "'style' can't be given by its name"),
        (lambda sample, ti: "x", {}, "'ti' is an object of Airflow's"),
        (lambda sample, var=None: "x", {}, "'var' is an object of Airflow's"),
        (eval("lambda s: s"), {}, "version='1'"),
        (lambda sample: "x", {"prompt": "y"}, "leave the parameter prompt out"),
        (lambda sample: "x", {"engine": "ollama"}, "engine='ollama'"),
        (lambda sample: "x", {"output_type": dict}, "output_type"),
        (lambda sample: "x", {"try_num": 0}, "try_num"),
        (lambda sample: "x", {"destination": "s3://b/in/x"}, "lies inside source"),
    ],
)
def test_what_is_wrong_is_said_when_the_dag_is_parsed_be_it_mapped_or_not(function, given, words):
    with pytest.raises(ConfigError, match=words):
        parsed(function, **given)


def test_arguments_that_the_function_does_not_take_are_refused():
    with DAG("d"):

        @task.vlm(**S3)
        def ask(sample: dict[str, Any], style: str) -> str:
            return style

        for call in (
            lambda: ask(),
            lambda: ask("x", "y"),
            lambda: ask.partial(colour="x"),
            lambda: ask.expand(colour=["x"]),
        ):
            with pytest.raises(TypeError):
                call()
        with pytest.raises(ConfigError, match="give them to one of both"):
            ask.override(shards="a.jsonl", task_id="two")("x", shards="b.jsonl")
        ask.override(shards="a.jsonl", task_id="three")("x")


def test_an_argument_that_is_no_json_value_fails_without_retries(place):
    with DAG("d"):

        @task.vlm(**place.places)
        def ask(sample: dict[str, Any], style: Any) -> str:
            return "x"

        made = ask(style=object()).operator
    with pytest.raises(AirflowFailException, match="argument style="):
        execute(made)


def test_a_bare_decorator_takes_its_parameters_from_the_dag(place):
    with DAG("d", default_args={**place.places, "field": "said"}):

        @task.vlm
        def ask(sample: dict[str, Any], logical_date: Any = None) -> str:
            return f"{sample['text']} {logical_date:%Y}"

        made = ask().operator
    assert execute(made, logical_date=datetime(2026, 1, 1, tzinfo=timezone.utc))["ok"] == 9
    (line, *_) = (place.root / "out" / "a.jsonl").read_text().splitlines()
    assert json.loads(line)["said"] == "about a 0 2026"


def test_the_dag_in_the_documentation_is_one(tmp_path):
    page = (Path(__file__).parents[3] / "docs" / "map.md").read_text()
    code, template = (block.partition("```")[0] for block in page.split("```python\n")[1:])
    indented = "".join(f"    {line}\n" for line in template.splitlines() if not line.startswith("from "))
    imports = "".join(f"{line}\n" for line in template.splitlines() if line.startswith("from "))
    (tmp_path / "products.py").write_text(imports + code + indented)
    bag = DagBag(tmp_path)
    assert bag.import_errors == {}
    assert bag.dags["products"].task_ids == ["plan", "describe", "translate"]
