"""Dead letters are asked for again, and nothing else, from what the manifests alone say."""

from __future__ import annotations

import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk import DAG
from airflow.sdk.exceptions import AirflowException, AirflowFailException

from airflow_vlm_provider.errors import SampleError
from airflow_vlm_provider.ledger.failed_shards import failed_groups
from airflow_vlm_provider.operators import runners
from airflow_vlm_provider.operators.base import ShardOperator
from airflow_vlm_provider.operators.image_captioning import ImageCaptioningOperator
from airflow_vlm_provider.operators.image_captioning_gpt4v import ImageCaptioningFromGPT4VOperator
from airflow_vlm_provider.operators.image_tagging import ImageTaggingVLMOperator
from airflow_vlm_provider.operators.redrive import RedriveOperator
from airflow_vlm_provider.operators.vlm_map import VLMMapOperator
from airflow_vlm_provider.shards.opening import open_store
from demo.drawings import draw
from tests.support.fakes import ScriptedEngine

TAGS = json.dumps({"tags": ["one", "two", "three", "four", "five"]})
PICTURES = 6


def context() -> Any:
    ti = SimpleNamespace(
        dag_id="d", run_id="r", task_id="t", map_index=-1, try_number=1, xcom_push=lambda **given: None
    )
    return {"ti": ti, "outlet_events": {}}


class Place:
    """A source of two shards with a picture a row, the same pictures in neither; a destination; and an endpoint."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.engine = ScriptedEngine(lambda about: TAGS)
        self.made: list[dict[str, Any]] = []
        self.pictures: dict[str, bytes] = {}
        self.add_source("in", "ab")

    def add_source(self, folder: str, shards: str) -> None:
        (self.root / folder).mkdir()
        for shard in shards:
            names = [f"{shard}{number}.png" for number in range(PICTURES)]
            for name in names:
                self.pictures[name] = draw(random.Random(name), side=32).encode()
                (self.root / folder / name).write_bytes(self.pictures[name])
            rows = [{"id": name, "images": [name]} for name in names]
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            (self.root / folder / f"{shard}.jsonl").write_text(lines)

    def make_engine(self, hook: Any, **given: Any) -> ScriptedEngine:
        self.made.append(given)
        return self.engine

    def failing(self, *refused: str, transient: str | None = None) -> None:
        """From now on these pictures get no answer."""
        bad = {self.pictures[name]: "refused" for name in refused}
        if transient is not None:
            bad[self.pictures[transient]] = "transient"

        def answer(about: bytes) -> str:
            if about in bad:
                raise SampleError(bad[about], "no", attempts=1)
            return TAGS

        self.engine = ScriptedEngine(answer)

    def tag(self, source: str = "in", **given: Any) -> Any:
        given = {"source": str(self.root / source), "destination": str(self.root / "out"), **given}
        return ImageTaggingVLMOperator(task_id="tag", **given).execute(context())

    def redrive(self, **given: Any) -> dict[str, Any]:
        given = {"destination": str(self.root / "out"), **given}
        return RedriveOperator(task_id="redrive", **given).execute(context())

    def tagged(self, shard: str) -> list[bool]:
        rows = map(json.loads, (self.root / "out" / f"{shard}.jsonl").read_text().splitlines())
        return ["image_tags" in row.get("__dj__meta__", {}) for row in rows]

    def letters(self, shard: str) -> list[tuple[int, str]]:
        path = self.root / "out" / "_vlm" / f"{shard}.jsonl" / "image_tagging" / "errors.jsonl"
        return [(each["row"], each["kind"]) for each in map(json.loads, path.read_text().splitlines())]

    def asked(self) -> list[str]:
        """The names of the pictures that were asked about since the engine was last changed."""
        return [name for about in self.engine.asked for name in self.pictures if self.pictures[name] == about]


@pytest.fixture
def place(tmp_path, monkeypatch):
    place = Place(tmp_path)
    monkeypatch.setattr(runners, "make_engine", place.make_engine)
    monkeypatch.setenv("AIRFLOW_CONN_VLM_DEFAULT", json.dumps({"conn_type": "vlm", "host": "h"}))
    return place


def only(summary: dict[str, Any]) -> dict[str, int]:
    return {name: summary[name] for name in ("requests", "redriven", "recovered", "still_failed", "shards")}


def test_just_the_dead_letters_are_asked_for_and_merged(place):
    place.failing("a1.png", "a4.png")
    place.tag(max_error_rate=1)
    assert place.letters("a") == [(1, "refused"), (4, "refused")]
    place.failing("a4.png")

    summary = place.redrive(max_error_rate=1)

    assert sorted(place.asked()) == ["a1.png", "a4.png"]
    assert place.tagged("a") == [True, True, True, True, False, True]
    assert place.letters("a") == [(4, "refused")]
    assert only(summary) == {"requests": 2, "redriven": 2, "recovered": 1, "still_failed": 1, "shards": 1}
    assert (summary["rows_in"], summary["failed"], summary["cached"]) == (6, 1, 4)


def test_where_nothing_failed_nothing_is_asked_and_nobody_connected(place):
    place.tag()
    place.made.clear()

    summary = place.redrive()

    assert only(summary) == {"requests": 0, "redriven": 0, "recovered": 0, "still_failed": 0, "shards": 0}
    assert place.made == []


def test_only_the_kinds_the_shards_and_the_step_that_were_named(place):
    place.failing("a1.png", "b1.png", transient="b2.png")
    place.tag(max_error_rate=1)
    place.failing()

    assert place.redrive(kinds=["unparsable"])["redriven"] == 0
    assert place.redrive(step="image_tagging", shards="nowhere.jsonl")["redriven"] == 0
    assert only(place.redrive(shards=["a.jsonl"]))["recovered"] == 1
    assert place.asked() == ["a1.png"]
    assert only(place.redrive(kinds=["refused"], max_error_rate=1)) == {
        **{"requests": 1, "redriven": 1, "recovered": 1, "still_failed": 0, "shards": 1}
    }
    assert place.asked() == ["a1.png", "b1.png"]
    assert place.letters("b") == [(2, "transient")]


def test_the_step_is_made_again_from_the_manifest_with_all_its_parameters(place):
    place.failing("a1.png")
    sampling = {"temperature": 0.5, "max_tokens": None}
    place.tag(
        api_or_hf_model="scripted",
        tag_field_name="image_tags",
        system_prompt="Be brief.",
        input_template="Tags for {text}?",
        sampling_params=sampling,
        try_num=1,
        max_pixels=5000,
        media_roots=[str(place.root / "in")],
        output="full",
        max_error_rate=1,
    )
    path = place.root / "out" / "_vlm" / "a.jsonl" / "image_tagging" / "manifest.json"
    before = json.loads(path.read_text())
    place.failing()
    place.made.clear()

    assert place.redrive()["recovered"] == 1

    after = json.loads(path.read_text())
    assert after["parameters"] == before["parameters"]
    assert after["fingerprint"] == before["fingerprint"]
    assert place.made[-1]["model"] == "scripted"


def test_manifests_that_differ_are_done_each_by_itself(place):
    place.add_source("more", "c")
    place.failing("a1.png", "b1.png", "c1.png", "c2.png")
    place.tag(shards="a.jsonl", max_error_rate=1)
    place.tag(shards="b.jsonl", system_prompt="Other words.", max_error_rate=1)
    place.tag("more", max_error_rate=1)
    groups = failed_groups(open_store(str(place.root / "out")))
    assert [list(group.shards) for group in groups] == [["a.jsonl"], ["b.jsonl"], ["c.jsonl"]]
    place.failing()

    summary = place.redrive()

    assert only(summary) == {"requests": 4, "redriven": 4, "recovered": 4, "still_failed": 0, "shards": 3}
    assert summary["rows_in"] == 18
    assert all(place.tagged("a") + place.tagged("b") + place.tagged("c"))
    assert failed_groups(open_store(str(place.root / "out"))) == []


def test_what_keeps_one_group_from_being_done_does_not_keep_the_others(place):
    place.add_source("more", "c")
    place.failing("a1.png", "c1.png")
    place.tag("more", system_prompt="Other words.", max_error_rate=1)
    place.tag(max_error_rate=1)
    (place.root / "in" / "a.jsonl").unlink()
    place.failing()

    with pytest.raises(AirflowFailException, match=r"a\.jsonl"):
        place.redrive()

    assert all(place.tagged("c"))


def test_a_row_whose_answer_is_lost_is_not_asked_for_but_said(place):
    place.failing("a1.png")
    place.tag(max_error_rate=1)
    for segment in (place.root / "out" / "_vlm").rglob("journal/*"):
        segment.unlink()
    place.failing()

    with pytest.raises(Exception, match="not in the journal"):
        place.redrive()

    assert place.asked() in ([], ["a1.png"])
    assert place.tagged("a") == [True, False, True, True, True, True]


def test_corrupt_media_are_tried_again_only_when_they_have_changed(place):
    (place.root / "in" / "a1.png").write_bytes(b"no picture")
    place.tag(max_error_rate=1)
    assert place.letters("a") == [(1, "media_corrupt")]
    place.failing()

    assert only(place.redrive(max_error_rate=1))["still_failed"] == 1
    assert place.asked() == []

    (place.root / "in" / "a1.png").write_bytes(place.pictures["a1.png"])
    assert only(place.redrive())["recovered"] == 1
    assert place.asked() == ["a1.png"]


def test_too_many_that_fail_still_fail_the_task_which_commits_all_the_same(place):
    place.failing("a1.png", "a2.png")
    place.tag(max_error_rate=1)
    place.failing("a2.png")

    with pytest.raises(AirflowException, match="1 of 6 rows failed"):
        place.redrive()

    assert place.letters("a") == [(2, "refused")]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"kinds": "refused"}, "must be a list"),
        ({"kinds": []}, "kinds is empty"),
        ({"step": "captioning"}, "failed_only=True"),
    ],
)
def test_wrong_parameters_are_told_when_the_dag_is_parsed(given, words):
    with pytest.raises(AirflowFailException, match=words):
        RedriveOperator(task_id="redrive", destination="out", **given)


def test_a_step_that_can_not_be_made_again_is_told_with_the_remedy(place):
    place.failing("a1.png")
    place.tag(max_error_rate=1)
    folder = place.root / "out" / "_vlm" / "a.jsonl"
    (folder / "image_tagging").rename(folder / "captioning")
    with pytest.raises(AirflowFailException, match=r"'captioning'.*failed_only=True"):
        place.redrive()
    (folder / "captioning").rename(folder / "image_tagging")
    path = folder / "image_tagging" / "manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, "parameters": {}}))
    with pytest.raises(AirflowFailException, match="without its parameters"):
        place.redrive()


def test_it_can_be_mapped(place):
    with DAG("d"):
        mapped = RedriveOperator.partial(task_id="redrive", kinds=["refused"]).expand(destination=["a", "b"])
    assert mapped.unmap({"destination": "a"}).destination == "a"


# --- every step ------------------------------------------------------------------------------------------------

EVERY_STEP: dict[str, tuple[type[ShardOperator], dict[str, Any]]] = {
    "image_captioning": (
        ImageCaptioningOperator,
        {
            "prompt": "What is it?",
            "sampling_params": {"top_p": 0.5},
            "seed": 3,
            "eoc_special_token": "<|end|>",
        },
    ),
    "image_captioning_gpt4v": (ImageCaptioningFromGPT4VOperator, {"mode": "reasoning", "detail": "low"}),
    "vlm_map": (VLMMapOperator, {"prompt": "What is {id}?", "field": "said"}),
}


@pytest.mark.parametrize("step", sorted(EVERY_STEP))
def test_every_step_is_made_again_from_its_manifests(place, step, monkeypatch):
    def parameters(engine: ScriptedEngine) -> dict[str, Any]:
        detail = place.made[-1]["options"].detail
        return {"model": engine.model, "response_path": "x", "model_params": {}, "detail": detail}

    # As an endpoint's engine has them.
    monkeypatch.setattr(ScriptedEngine, "parameters", parameters)
    operator, given = EVERY_STEP[step]
    place.failing("a1.png", "b2.png")
    given = {
        "source": str(place.root / "in"),
        "destination": str(place.root / "out"),
        "max_error_rate": 1,
        **given,
    }
    assert operator(task_id="t", **given).execute(context())["failed"] == 2
    place.engine = ScriptedEngine(lambda about: "a drawing")
    summary = place.redrive(step=step)
    assert sorted(place.asked()) == ["a1.png", "b2.png"]
    assert (summary["redriven"], summary["recovered"], summary["failed"]) == (2, 2, 0)
    assert place.made[-1]["options"].detail == given.get("detail")
    # Nothing has changed for the operator itself.
    again = operator(task_id="t", **given).execute(context())
    assert (again["shards_unchanged"], again["requests"]) == (2, 0)
