from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import pytest

from airflow_vlm_provider.steps import prompts
from airflow_vlm_provider.types import Answer, Media, Request
from demo.drawings import Drawing, draw
from tests.support.local_engines import (
    TAGS_SCHEMA,
    answers_of,
    ask_all,
    picture,
    request,
    texts,
    with_engine,
)

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]

DEMO_MODEL = Path(__file__).parents[2] / "demo" / "model"
WORDS_SCHEMA = {
    "type": "object",
    "properties": {
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 30}, "minItems": 5, "maxItems": 10}
    },
    "required": ["tags"],
    "additionalProperties": False,
}


def test_answers_in_a_batch_are_those_that_each_request_gets_alone(tiny, generate):
    requests = [
        dataclasses.replace(
            request(seed, "word " * (7 * seed % 11)), schema=TAGS_SCHEMA if seed % 3 else None
        )
        for seed in range(8)
    ]
    requests[4] = dataclasses.replace(
        requests[4], system=None, parts=(picture(40), "and", picture(41, side=40))
    )

    async def test(engine):
        return await ask_all(engine, requests), [await engine.ask(each) for each in requests]

    together, alone = with_engine(tiny, test, gpu_batch_size=8)
    assert generate.sizes == [8] + [1] * 8
    assert together == alone
    assert len({texts(answer)[0] for answer in alone}) == 8
    assert len({answer.usage.prompt_tokens for answer in alone}) > 4


def test_text_alone_needs_no_picture(tiny):
    answers = answers_of(
        tiny, [Request(system=None, parts=("Hello",), sampling={"max_tokens": 3}), request()]
    )
    assert [type(answer) for answer in answers] == [Answer, Answer]


def test_usage_counts_prompts_without_padding_and_every_generated_token(tiny):
    short, long = request(1, max_tokens=5), request(1, "word " * 40, max_tokens=5)
    wide = dataclasses.replace(short, n=3, sampling={"max_tokens": 5, "temperature": 1.0, "seed": 3})
    short_answer, long_answer, wide_answer = answers_of(tiny, [short, long, wide])
    assert short_answer.usage.requests == 1
    assert long_answer.usage.prompt_tokens - short_answer.usage.prompt_tokens >= 40
    assert wide_answer.usage.prompt_tokens == short_answer.usage.prompt_tokens
    assert short_answer.usage.completion_tokens == 5
    assert wide_answer.usage.completion_tokens == 15
    assert [choice.finish_reason for choice in wide_answer.choices] == ["length"] * 3


def test_an_answer_names_the_model_as_it_was_given(tiny):
    (answer,) = answers_of(tiny, [request()])
    assert answer.model == tiny


def test_the_demo_model_tags_and_captions_what_it_sees():
    drawings = [draw(random.Random(1000 + number)) for number in range(12)]

    def ask(drawing: Drawing, system: str, text: str, schema: Any = None) -> Request:
        media = Media(kind="image", mime="image/png", data=drawing.encode(), ref="drawing.png")
        return Request(system=system, parts=(media, text), schema=schema, sampling={"max_tokens": 64})

    requests = [
        *(ask(drawing, prompts.TAGGING_SYSTEM, prompts.TAGGING_INPUT) for drawing in drawings),
        *(ask(drawing, prompts.TAGGING_SYSTEM, prompts.TAGGING_INPUT, WORDS_SCHEMA) for drawing in drawings),
        *(ask(drawing, prompts.CAPTIONING_SYSTEM, prompts.CAPTIONING_INPUT) for drawing in drawings),
    ]
    said = [texts(answer)[0] for answer in answers_of(str(DEMO_MODEL), requests, dtype="auto")]
    tags = [json.loads(text)["tags"] for text in said[:24]]
    assert tags[:12] == [drawing.tags for drawing in drawings]
    assert tags[12:] == [drawing.tags for drawing in drawings]
    assert said[24:] == [drawing.caption for drawing in drawings]
