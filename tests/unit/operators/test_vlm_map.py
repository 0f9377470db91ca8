"""The general operator: from rows to rows, with every guarantee that the others have."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
from airflow.sdk import DAG
from airflow.sdk.exceptions import AirflowFailException
from airflow.serialization.serialized_objects import DagSerialization
from PIL import Image
from pydantic import BaseModel

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.operators import runners
from airflow_vlm_provider.operators.redrive import RedriveOperator
from airflow_vlm_provider.operators.shards import PlanShardsOperator
from airflow_vlm_provider.operators.vlm_map import VLMMapOperator
from tests.support.fakes import ScriptedEngine
from tests.support.images import encode

ROWS = 6


class Seen(BaseModel):
    what: str
    sizes: list[int]
    note: str | None = None


def context() -> Any:
    ti = SimpleNamespace(
        dag_id="d", run_id="r", task_id="t", map_index=-1, try_number=1, xcom_push=lambda **given: None
    )
    return {"ti": ti, "outlet_events": {}}


class Place:
    """Rows with a picture each in JSONL and the same in Parquet, and an endpoint that says what a test wants."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.engine = ScriptedEngine(lambda about: "an answer")
        (root / "in").mkdir()
        rows = [{"id": number, "images": [f"{number}.png"], "text": f"t{number}"} for number in range(ROWS)]
        for number in range(ROWS):
            picture = encode(Image.new("RGB", (4, 4), (number, 0, 0)), "PNG")
            (root / "in" / f"{number}.png").write_bytes(picture)
        (root / "in" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        import pyarrow as pa

        (root / "in" / "p").mkdir()
        for number in range(ROWS):
            (root / "in" / "p" / f"{number}.png").write_bytes((root / "in" / f"{number}.png").read_bytes())
        pq.write_table(pa.Table.from_pylist(rows), root / "in" / "p" / "b.parquet")

    def answering(self, answer: Any) -> ScriptedEngine:
        self.engine = ScriptedEngine(answer)
        return self.engine

    def operator(self, **given: Any) -> VLMMapOperator:
        places = {"source": str(self.root / "in"), "destination": str(self.root / "out")}
        return VLMMapOperator(task_id="ask", **{**places, "prompt": "What is it?", **given})

    def run(self, **given: Any) -> dict[str, Any]:
        return self.operator(**given).execute(context())

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.root / "out" / "a.jsonl").read_text().splitlines()]

    def table(self) -> Any:
        return pq.read_table(self.root / "out" / "p" / "b.parquet")

    def letters(self, step: str = "vlm_map") -> list[tuple[int, str, str]]:
        path = self.root / "out" / "_vlm" / "a.jsonl" / step / "errors.jsonl"
        letters = [json.loads(line) for line in path.read_text().splitlines()]
        return [(each["row"], each["kind"], each["message"]) for each in letters]


@pytest.fixture
def place(tmp_path, monkeypatch):
    place = Place(tmp_path)
    monkeypatch.setattr(runners, "make_engine", lambda *args, **given: place.engine)
    monkeypatch.setenv("AIRFLOW_CONN_VLM_DEFAULT", json.dumps({"conn_type": "vlm", "host": "h"}))
    return place


def test_answers_stand_in_the_field_of_jsonl_and_parquet_shards(place):
    summary = place.run(field="said", prompt="{id}: {text}?")
    assert (summary["rows_in"], summary["ok"] + summary["cached"], summary["shards"]) == (
        2 * ROWS,
        2 * ROWS,
        2,
    )
    assert [row["said"] for row in place.rows()] == ["an answer"] * ROWS
    assert place.table().schema.field("said").type == "string"
    assert place.table().column("said").to_pylist() == ["an answer"] * ROWS
    # The same pictures, the same questions: paid for once.
    assert len(place.engine.asked) == ROWS


def test_what_stands_for_media_in_the_text_is_the_operators_to_say(place):
    (place.root / "in" / "c.jsonl").write_text('{"text": "<i>a dog<e>"}\n{"text": "<__dj__image>"}\n')
    place.run(
        prompt="{text}", shards="c.jsonl", images=False, image_special_token="<i>", eoc_special_token="<e>"
    )
    assert sorted(place.engine.asked) == ["<__dj__image>", "a dog"]


def test_a_models_values_stand_in_typed_columns(place):
    place.answering(lambda about: '{"what": "dot", "sizes": [1, 2]}')
    place.run(field="seen", output_type=Seen)
    values = {"what": "dot", "sizes": [1, 2], "note": None}
    assert [row["seen"] for row in place.rows()] == [values] * ROWS
    assert place.table().column("seen").to_pylist() == [values] * ROWS
    assert str(place.table().schema.field("seen").type) == (
        "struct<what: string, sizes: list<element: int64>, note: string>"
    )


def test_a_second_run_asks_nothing_and_another_field_neither(place):
    place.run()
    again = place.answering(lambda about: "another")
    assert place.run()["cached"] == 2 * ROWS
    assert place.run(field="copy", destination=str(place.root / "copy"), reuse_from=str(place.root / "out"))
    summary = place.run(field="copy")
    assert (summary["cached"], summary["shards_unchanged"]) == (2 * ROWS, 0)
    assert again.asked == []
    assert place.rows()[0]["copy"] == "an answer"


def test_another_prompt_asks_again_and_a_function_that_says_the_same_does_not(place):
    place.run(prompt="Describe {text}")
    engine = place.answering(lambda about: "another")
    assert place.run(prompt=lambda sample: f"Describe {sample['text']}")["cached"] == 2 * ROWS
    assert engine.asked == []
    place.run(prompt=lambda sample: f"Name {sample['text']}")
    assert len(engine.asked) == ROWS


def test_a_defect_of_an_authors_function_is_one_rows_dead_letter(place, caplog):
    def careful(sample: dict[str, Any]) -> str | None:
        if sample["id"] == 1:
            return None
        if sample["id"] == 2:
            return str(1 / 0)
        return sample["title"] if sample["id"] == 3 else "What is it?"

    summary = place.run(prompt=careful, max_error_rate=1.0, shards="a.jsonl")
    assert (summary["ok"], summary["skipped"], summary["failed"]) == (ROWS - 3, 1, 2)
    assert [(row, kind) for row, kind, _ in place.letters()] == [(2, "internal"), (3, "internal")]
    assert ["ZeroDivisionError" in place.letters()[0][2], "KeyError" in place.letters()[1][2]] == [True, True]
    assert "careful" in caplog.text  # the traceback leads to the author's line
    assert "answer" not in place.rows()[2]


def test_a_field_that_a_row_lacks_is_its_dead_letter(place):
    place.run(prompt="{title}", max_error_rate=1.0, shards="a.jsonl")
    assert {(kind, "'title'" in message) for _, kind, message in place.letters()} == {("malformed_row", True)}
    assert place.engine.asked == []


def test_dead_letters_alone_are_asked_again(place):
    bad = (place.root / "in" / "3.png").read_bytes()
    place.answering(lambda about: "red" if about == bad else '{"what": "dot", "sizes": []}')
    given = {"output_type": Seen, "shards": "a.jsonl", "max_error_rate": 1.0, "step_name": "seen"}
    assert place.run(**given)["failed"] == 1
    ((row, kind, message),) = place.letters("seen")
    assert (row, kind) == (3, "unparsable")
    assert "holds no JSON object" in message
    assert "It said: 'red'" in message
    engine = place.answering(lambda about: '{"what": "late", "sizes": [3]}')
    # A model can't be made again from what is recorded; the operator that made it asks.
    with pytest.raises(AirflowFailException, match="failed_only=True"):
        RedriveOperator(task_id="r", destination=str(place.root / "out")).execute(context())
    summary = place.run(**given, failed_only=True)
    assert (summary["failed"], engine.asked) == (0, [bad])
    assert [row["answer"]["what"] for row in place.rows()] == [*["dot"] * 3, "late", "dot", "dot"]


def test_a_template_is_asked_again_from_what_is_recorded(place):
    place.answering(lambda about: "")
    place.run(prompt="{text}?", shards="a.jsonl", max_error_rate=1.0)
    engine = place.answering(lambda about: "late")
    summary = RedriveOperator(task_id="r", destination=str(place.root / "out")).execute(context())
    assert (summary["recovered"], len(engine.asked)) == (ROWS, ROWS)
    assert [row["answer"] for row in place.rows()] == ["late"] * ROWS


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": lambda: "x"}, "can't be called with a sample"),
        ({"output_type": dict}, "output_type"),
        ({"n": 0}, "n is 0"),
        ({"step_name": "a b"}, "step_name"),
        ({"transport": "x"}, "transport"),
        ({"max_error_rate": 7}, "max_error_rate"),
        ({"prompt": eval("lambda s: s")}, "version='1'"),
    ],
)
def test_wrong_parameters_fail_when_the_dag_is_parsed(given, word):
    places = {"task_id": "t", "source": "s3://b/in", "destination": "s3://b/out"}
    with pytest.raises(ConfigError, match=word):
        VLMMapOperator(**{**places, "prompt": "x", **given})
    with pytest.raises(ConfigError, match=word):
        VLMMapOperator.partial(**{**places, "prompt": "x", **given})


def test_functions_and_models_do_not_keep_a_dag_from_being_serialised():
    def ask(sample: dict[str, Any]) -> str:
        raise AssertionError("called while the DAG was parsed")

    def spelled() -> str:
        with DAG("d") as dag:
            plan = PlanShardsOperator(task_id="plan", source="s3://b/in")
            given = {"source": "s3://b/in", "prompt": ask, "output_type": Seen}
            VLMMapOperator(task_id="one", destination="s3://b/one", **given)
            VLMMapOperator.partial(task_id="many", destination="s3://b/many", **given).expand(
                shards=plan.output
            )
        return json.dumps(DagSerialization.to_dict(dag), sort_keys=True)

    # Another spelling at every parse would be another version of the DAG at every parse.
    assert spelled() == spelled()
    back = DagSerialization.from_dict(json.loads(spelled()))
    assert [back.get_task(name).task_type for name in ("one", "many")] == ["VLMMapOperator"] * 2
    assert back.get_task("many").upstream_task_ids == {"plan"}
