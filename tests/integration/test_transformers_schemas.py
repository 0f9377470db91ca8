from __future__ import annotations

import json

import jsonschema
import pytest

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.types import Answer
from tests.support.local_engines import (
    TAGS_SCHEMA,
    answers_of,
    request,
    texts,
)

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]

SCHEMAS = {
    "bounded strings": TAGS_SCHEMA,
    "pattern": {
        "type": "object",
        "properties": {"tag": {"type": "string", "pattern": "^[a-z]{1,9}(-[a-z]{1,9}){0,2}$"}},
        "required": ["tag"],
        "additionalProperties": False,
    },
    "mixed": {
        "type": "object",
        "properties": {
            "kind": {"enum": ["photo", "line\ndrawing", "3d"]},
            "people": {"type": "integer", "minimum": 0, "maximum": 99},
            "outdoors": {"type": "boolean"},
            "place": {
                "type": "object",
                "properties": {"name": {"type": "string", "maxLength": 5}},
                "required": ["name"],
                "additionalProperties": False,
            },
        },
        "required": ["kind", "people", "outdoors", "place"],
        "additionalProperties": False,
    },
}


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_a_model_without_any_sense_says_satisfies_the_schema(tiny, name):
    schema = SCHEMAS[name]
    requests = [
        request(seed, n=4, schema=schema, temperature=1.5, seed=seed, max_tokens=160) for seed in range(6)
    ] + [request(seed, schema=schema, max_tokens=160) for seed in range(6)]
    answers = answers_of(tiny, requests, gpu_batch_size=24)
    said = [choice for answer in answers for choice in answer.choices]
    assert len(said) == 30
    assert {choice.finish_reason for choice in said} == {"stop"}
    for choice in said:
        jsonschema.validate(json.loads(choice.text), schema)
    assert len({choice.text for choice in said}) > 10


def test_schema_and_no_schema_mix_in_a_batch(tiny, generate):
    names = list(SCHEMAS)
    requests = [
        request(seed, schema=None if seed % 4 == 3 else SCHEMAS[names[seed % 4]], max_tokens=160)
        for seed in range(8)
    ]
    answers = answers_of(tiny, requests, gpu_batch_size=8)
    assert generate.sizes == [8]
    for seed, answer in enumerate(answers):
        if seed % 4 == 3:
            with pytest.raises(json.JSONDecodeError):
                json.loads(texts(answer)[0])
        else:
            jsonschema.validate(json.loads(texts(answer)[0]), SCHEMAS[names[seed % 4]])


def test_an_answer_cut_by_max_tokens_says_so(tiny):
    (answer,) = answers_of(tiny, [request(schema=TAGS_SCHEMA, max_tokens=12)])
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].text.startswith('{"tags": [')


def test_a_schema_that_makes_no_grammar_is_the_authors_fault(tiny):
    bad, good = answers_of(tiny, [request(schema={"type": "nonsense"}), request()])
    assert isinstance(bad, ConfigError)
    assert isinstance(good, Answer)
