"""Operators with a real vLLM server and the demo model: the pictures' own tags, constrained by a schema, and captions."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from airflow_vlm_provider.engines.openai import OpenAIEngine
from airflow_vlm_provider.engines.vllm_metrics import Metrics, read_metrics
from airflow_vlm_provider.hooks.vlm import VLMHook
from airflow_vlm_provider.operators.image_captioning import ImageCaptioningOperator
from airflow_vlm_provider.operators.image_tagging import ImageTaggingVLMOperator
from airflow_vlm_provider.types import Request
from demo.drawings import draw
from tests.support.vllm_server import count, metrics, require_vllm, start_vllm

pytestmark = pytest.mark.integration

MODEL = Path(__file__).parents[2] / "demo" / "model"
KEY = "sk-vllm-integration"
PICTURES = 40


@pytest.fixture(scope="module")
def base_url(tmp_path_factory):
    require_vllm()
    with start_vllm(MODEL, tmp_path_factory.mktemp("vllm") / "log", api_key=KEY) as url:
        yield url


@pytest.fixture
def connect(base_url, monkeypatch):
    def make(**fields: Any) -> None:
        extra = {"model": "demo", "max_concurrency": 8, **fields.pop("extra", {})}
        value = {"conn_type": "vlm", "host": base_url, "password": KEY, "extra": extra, **fields}
        monkeypatch.setenv("AIRFLOW_CONN_VLM_DEFAULT", json.dumps(value))

    make()
    return make


def execute(operator: Any = ImageTaggingVLMOperator, **parameters: Any) -> dict[str, Any]:
    ti = SimpleNamespace(dag_id="d", run_id="r", task_id="tag", map_index=-1, try_number=1)
    return operator(task_id="tag", **parameters).execute({"ti": ti})


@pytest.fixture
def dataset(tmp_path):
    rng = random.Random(77)
    drawings = [draw(rng) for _ in range(PICTURES)]
    source = tmp_path / "in"
    source.mkdir()
    rows = []
    for number, drawing in enumerate(drawings):
        form = ("PNG", "JPEG")[number % 2]
        (source / f"{number}.{form.lower()}").write_bytes(drawing.encode(form))
        rows.append(json.dumps({"images": [f"{number}.{form.lower()}"], "text": ""}))
    (source / "a.jsonl").write_text("\n".join(rows))
    return source, drawings


def test_drawings_get_their_own_tags_from_vllm(connect, dataset, tmp_path):
    source, drawings = dataset
    result = execute(source=str(source), destination=str(tmp_path / "out"))
    rows = [json.loads(line) for line in (tmp_path / "out" / "a.jsonl").read_text().splitlines()]
    right = [
        row["__dj__meta__"]["image_tags"] == [drawing.tags]
        for row, drawing in zip(rows, drawings, strict=True)
    ]
    assert sum(right) >= 0.95 * PICTURES
    assert (result["rows_in"], result["ok"], result["requests"]) == (PICTURES, PICTURES, PICTURES)
    assert result["prompt_tokens"] > 100 * PICTURES
    assert result["completion_tokens"] > 10 * PICTURES


def test_the_schema_holds_where_the_model_would_ramble(connect, dataset, tmp_path):
    source, _ = dataset
    # Hot sampling makes this model write nonsense; the grammar still makes it tags, or the answer is cut and asked again.
    result = execute(
        source=str(source),
        destination=str(tmp_path / "out"),
        sampling_params={"temperature": 1.8, "seed": 5},
        max_error_rate=1.0,
    )
    assert result["ok"] + result["failed"] == PICTURES
    assert result["ok"] >= 0.8 * PICTURES
    for line in (tmp_path / "out" / "a.jsonl").read_text().splitlines():
        for tags in json.loads(line).get("__dj__meta__", {}).get("image_tags", []):
            assert 1 <= len(tags) <= 10
            assert all(0 < len(tag) <= 30 and tag == tag.lower() for tag in tags)


def test_drawings_get_their_own_captions_from_vllm(connect, dataset, tmp_path):
    source, drawings = dataset
    result = execute(
        ImageCaptioningOperator,
        source=str(source),
        destination=str(tmp_path / "out"),
        keep_original_sample=False,
    )
    rows = [json.loads(line) for line in (tmp_path / "out" / "a.jsonl").read_text().splitlines()]
    right = [
        row["text"] == f"<__dj__image> {drawing.caption} <|__dj__eoc|>"
        for row, drawing in zip(rows, drawings, strict=True)
    ]
    assert sum(right) >= 0.95 * PICTURES
    assert (result["rows_in"], result["ok"], result["requests"]) == (PICTURES, PICTURES, PICTURES)


def test_four_captions_of_a_drawing_are_one_request(connect, base_url, dataset, tmp_path):
    source, drawings = dataset
    before = count(base_url, "http_requests_total", handler="/v1/chat/completions")
    result = execute(
        ImageCaptioningOperator,
        source=str(source),
        destination=str(tmp_path / "out"),
        caption_num=4,
        keep_candidate_mode="all",
        sampling_params={"temperature": 0.3, "seed": 3},
    )
    sent = count(base_url, "http_requests_total", handler="/v1/chat/completions") - before
    rows = [json.loads(line) for line in (tmp_path / "out" / "a.jsonl").read_text().splitlines()]
    assert (result["ok"], result["requests"], sent) == (PICTURES, PICTURES, PICTURES)
    # The original and its four captions, picture by picture.
    assert len(rows) == result["rows_out"] == 5 * PICTURES
    assert [row["images"] for row in rows[::5]] == [row["images"] for row in rows[4::5]]
    captions = [row["text"] for number, row in enumerate(rows) if number % 5]
    truth = [drawing.caption for drawing in drawings for _ in range(4)]
    assert sum(word in text for word, text in zip(truth, captions, strict=True)) >= 0.9 * len(truth)


def test_requests_with_a_schema_that_wait_for_room_are_told_of_as_such(base_url):
    words = {"type": "string", "minLength": 20, "maxLength": 24}
    schema = {"type": "array", "items": words, "minItems": 30, "maxItems": 30}

    async def look() -> Metrics:
        """What the server tells when its 16 places are taken and others wait. On a busy machine it seldom answers then."""
        while True:
            found = read_metrics(await asyncio.to_thread(metrics, base_url))
            if found is not None and found.running >= 8 and found.waiting >= 8:
                return found
            await asyncio.sleep(0.1)

    async def look_while_asking() -> Metrics:
        engine = OpenAIEngine(base_url=base_url, api_key=KEY, model="demo", concurrency=32, timeout=300)

        async def ask_on(number: int) -> Metrics:
            while True:
                sampling = {"max_tokens": 900, "temperature": 1.0, "seed": number}
                await engine.ask(Request(None, (f"{number}?",), schema=schema, sampling=sampling))

        async with engine:
            doing = [asyncio.create_task(each) for each in (look(), *map(ask_on, range(32)))]
            try:
                return await next(asyncio.as_completed(doing, timeout=300))
            finally:
                for each in doing:
                    each.cancel()
                await asyncio.gather(*doing, return_exceptions=True)

    full = asyncio.run(look_while_asking())
    # vLLM calls such requests deferred until they run, though there is nothing but room that they lack.
    assert full.deferred >= 8
    assert not full.tells_nothing


def test_the_connection_test_knows_the_served_model(connect):
    assert VLMHook().test_connection()[0]
    connect(extra={"model": "another"})
    good, sentence = VLMHook().test_connection()
    assert not good
    assert "'another'" in sentence
    assert "'demo'" in sentence
    connect(password="sk-no")
    good, sentence = VLMHook().test_connection()
    assert not good
    assert "refuses the API key" in sentence
