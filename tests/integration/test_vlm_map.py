"""Answers in the form of a model, by a real model whose own words would be nonsense."""

from __future__ import annotations

import enum
import json
import random
from types import SimpleNamespace
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field

from airflow_vlm_provider.operators.vlm_map import VLMMapOperator
from demo.drawings import draw
from tests.support.tiny_models import tiny_qwen

pytestmark = pytest.mark.integration

ROWS = 6


class Colour(str, enum.Enum):
    RED = "red"
    BLUE = "blue"


class Thing(BaseModel):
    name: str = Field(min_length=1, max_length=8)
    count: int = Field(ge=0, le=99)


class Seen(BaseModel):
    title: str = Field(max_length=12, description="A few words.")
    colour: Colour
    second: Colour | None = None
    kind: Literal["photo", "drawing"]
    largest: Thing = Field(description="The largest thing.")
    things: list[Thing] = Field(min_length=1, max_length=2)
    outdoors: bool


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_qwen(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture
def ask(tmp_path, monkeypatch, model):
    (tmp_path / "in").mkdir()
    rows: list[dict[str, Any]] = []
    for number in range(ROWS):
        name = f"{number}.png"
        (tmp_path / "in" / name).write_bytes(draw(random.Random(number), side=56).encode("PNG"))
        # Some rows have no picture, and are asked about all the same.
        rows.append({"id": number, "images": [name] if number % 3 else None, "text": f"t{number}"})
    (tmp_path / "in" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("AIRFLOW_CONN_VLM_DEFAULT", json.dumps({"conn_type": "vlm"}))

    def run(**given: Any) -> tuple[dict[str, Any], list[Any]]:
        operator = VLMMapOperator(
            task_id="ask",
            source=str(tmp_path / "in"),
            destination=str(tmp_path / "out"),
            engine="transformers",
            api_or_hf_model=model,
            max_error_rate=1.0,
            **given,
        )
        ti = SimpleNamespace(dag_id="d", run_id="r", task_id="t", map_index=-1, try_number=1)
        summary = operator.execute({"ti": ti, "outlet_events": {}})  # type: ignore[typeddict-item]
        lines = (tmp_path / "out" / "a.jsonl").read_text().splitlines()
        return summary, [json.loads(line).get("answer") for line in lines]

    return run


def test_a_model_that_knows_nothing_answers_in_form(ask):
    summary, answers = ask(
        prompt=lambda sample: f"What is {sample['text']}?",
        output_type=Seen,
        sampling_params={"max_tokens": 400},
        try_num=1,
    )
    assert (summary["ok"], summary["failed"], summary["requests"]) == (ROWS, 0, ROWS)
    for answer in answers:
        assert Seen.model_validate(answer).model_dump(mode="json") == answer
    again, same = ask(
        prompt=lambda sample: "What is " + sample["text"] + "?",
        output_type=Seen,
        sampling_params={"max_tokens": 400},
        try_num=1,
    )
    assert (again["cached"], again["requests"], same) == (ROWS, 0, answers)


def test_several_answers_are_one_request(ask):
    summary, answers = ask(prompt="What is {text}?", output_type=Thing, n=3, try_num=1)
    assert (summary["ok"], summary["requests"]) == (ROWS, ROWS)
    assert [len(answer) for answer in answers] == [3] * ROWS
    assert len({json.dumps(each) for answer in answers for each in answer}) > ROWS
