"""The operators that caption images, against an endpoint over HTTP: what is sent, what is paid for, what is told apart."""

from __future__ import annotations

import json
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from airflow_vlm_provider.operators.image_captioning import ImageCaptioningOperator
from airflow_vlm_provider.operators.image_captioning_gpt4v import ImageCaptioningFromGPT4VOperator
from tests.support.captioning import EOC, IMAGE
from tests.support.images import encode
from tests.support.stub_endpoint import start_stub, tag_of

pytestmark = pytest.mark.integration

PICTURES = 12
SECRET = "sk-never-to-be-seen"


@pytest.fixture
def place(tmp_path):
    source = tmp_path / "in"
    source.mkdir()
    rows = []
    for number in range(PICTURES):
        (source / f"{number}.png").write_bytes(encode(Image.new("RGB", (8, 8), (number, 0, 0)), "PNG"))
        rows.append({"text": f"{IMAGE} old {EOC}", "images": [f"{number}.png"]})
    (source / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path


def run(operator: type, place: Any, stub: Any, monkeypatch: Any, **given: Any) -> dict[str, Any]:
    connection = {
        "conn_type": "vlm",
        "host": stub.base_url,
        "password": SECRET,
        "extra": {"model": "theirs"},
    }
    monkeypatch.setenv("AIRFLOW_CONN_VLM_DEFAULT", json.dumps(connection))
    task = operator(
        task_id="caption", source=str(place / "in"), destination=str(place / "out"), max_error_rate=1, **given
    )
    ti = SimpleNamespace(dag_id="d", run_id="r", task_id="caption", map_index=-1, try_number=1)
    return task.execute({"ti": ti, "outlet_events": {}})


def output(place: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (place / "out" / "a.jsonl").read_text().splitlines()]


def letters(place: Any) -> list[dict[str, Any]]:
    (path,) = (place / "out" / "_vlm" / "a.jsonl").glob("*/errors.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_four_candidates_are_one_request_and_one_prefill_a_picture(place, monkeypatch):
    with start_stub() as stub:
        one = run(ImageCaptioningOperator, place, stub, monkeypatch, overwrite=True)
        assert (one["requests"], stub.stats()["requests"]) == (PICTURES, PICTURES)
        four = run(
            ImageCaptioningOperator, place, stub, monkeypatch, caption_num=4, keep_candidate_mode="all"
        )
        assert (four["requests"], stub.stats()["requests"]) == (PICTURES, 2 * PICTURES)
    assert four["prompt_tokens"] == one["prompt_tokens"] > 0
    assert four["completion_tokens"] > one["completion_tokens"]
    assert four["rows_out"] == len(output(place)) == 5 * PICTURES
    for number, row in enumerate(output(place)):
        if number % 5:
            picture = (place / "in" / row["images"][0]).read_bytes()
            assert row["text"].startswith(f"{IMAGE} A picture of {tag_of(picture)}")


def test_refusals_and_length_stops_are_told_apart_and_the_key_is_nowhere(place, monkeypatch, caplog):
    faults = {"refusal": 0.3, "length": 0.3, "empty": 0.2}
    with start_stub(faults=faults, seed=1) as stub:
        summary = run(
            ImageCaptioningFromGPT4VOperator, place, stub, monkeypatch, mode="conversation", detail="low"
        )
        assert stub.stats()["requests"] == PICTURES
    found = Counter(letter["kind"] for letter in letters(place))
    assert set(found) == {"refused", "cut_short", "empty_answer"}
    assert summary["failed"] == sum(found.values()) < PICTURES
    assert summary["model"] == "theirs"
    assert all("max_token" in letter["message"] for letter in letters(place) if letter["kind"] == "cut_short")
    written = [path.read_bytes() for path in (place / "out").rglob("*") if path.is_file()]
    assert written
    assert not any(SECRET.encode() in each for each in written)
    assert SECRET not in caplog.text
