"""Pydantic models: what is asked of an engine, what is read from answers, what formats with types are told."""

from __future__ import annotations

import enum
import json
import uuid
from collections.abc import Callable
from datetime import datetime
from typing import Any, Literal

import jsonschema
import pytest
from pydantic import BaseModel, ConfigDict, Field, RootModel, create_model, field_validator

from airflow_vlm_provider.errors import ConfigError, SampleError
from airflow_vlm_provider.shards.arrow_types import arrow_type
from airflow_vlm_provider.steps.functions import digest_of
from airflow_vlm_provider.steps.structured import StructuredOutput


class Colour(str, enum.Enum):
    RED = "red"
    BLUE = "blue"


class Part(BaseModel):
    name: str = Field(min_length=1, max_length=20)
    size: int | None = None


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class Dog(BaseModel):
    kind: Literal["dog"]
    says: str = "woof"


class Picture(BaseModel):
    model_config = ConfigDict(extra="allow")

    title: str = Field(description="What it is called.", examples=["A dog"])
    default: float = Field(0.5, ge=0, le=1)
    colour: Colour = Field(description="The main one.")
    second: Colour | None = None
    part: Part = Field(description="The largest.")
    parts: list[Part] = Field(min_length=1, max_length=3)
    pet: Cat | Dog = Field(discriminator="kind")


class Node(BaseModel):
    name: str
    inner: list[Node] = []


class Aliased(BaseModel):
    model_config = ConfigDict(serialize_by_alias=True)

    what: str = Field(alias="What")


PICTURE = {
    "title": "T",
    "default": 0.25,
    "colour": "red",
    "second": None,
    "part": {"name": "p", "size": 12345678901234567},
    "parts": [{"name": "q", "size": None}],
    "pet": {"kind": "dog", "says": "miaow"},
}


def objects_in(schema: Any) -> list[dict[str, Any]]:
    found = []
    if isinstance(schema, dict):
        if isinstance(schema.get("properties"), dict):
            found.append(schema)
        schema = list(schema.values())
    if isinstance(schema, list):
        for each in schema:
            found += objects_in(each)
    return found


def keywords_in(schema: Any) -> set[str]:
    found: set[str] = set()
    if isinstance(schema, dict):
        found = set(schema)
        schema = [
            list(each.values()) if name in ("properties", "$defs") else each for name, each in schema.items()
        ]
    if isinstance(schema, list):
        found |= {name for each in schema for name in keywords_in(each)}
    return found


@pytest.mark.parametrize("model", [Picture, Node, Part])
def test_what_is_asked_is_strict_everywhere(model):
    asked = StructuredOutput(model).asked
    jsonschema.Draft202012Validator.check_schema(asked)
    assert asked["type"] == "object"
    assert objects_in(asked)
    for each in objects_in(asked):
        assert each["additionalProperties"] is False
        assert each["required"] == list(each["properties"])
    # As a field's name each of them may stay; as a keyword, strict mode refuses it.
    refused = {"oneOf", "discriminator", "examples", "default", "title", "maxLength", "minLength"}
    assert not refused & keywords_in(asked)


def test_only_values_of_the_model_satisfy_what_is_asked():
    valid = jsonschema.Draft202012Validator(StructuredOutput(Picture).asked)
    assert valid.is_valid(PICTURE)
    for change in (
        {"title": 5},
        {"default": 2},
        {"colour": "green"},
        {"part": {"name": "p"}},
        {"part": {"name": "p" * 21, "size": 1}},
        {"parts": []},
        {"pet": {"kind": "dog", "says": "w", "lives": 9}},
        {"more": 1},
    ):
        assert not valid.is_valid({**PICTURE, **change}), change
    nodes = jsonschema.Draft202012Validator(StructuredOutput(Node).asked)
    assert nodes.is_valid({"name": "a", "inner": [{"name": "b", "inner": []}]})
    assert not nodes.is_valid({"name": "a", "inner": [{"name": "b"}]})


def test_descriptions_reach_the_model_and_references_stand_alone():
    asked = StructuredOutput(Picture).asked
    assert asked["properties"]["colour"]["description"] == "The main one."
    assert asked["properties"]["part"]["description"] == "The largest."

    def walk(schema: Any) -> None:
        if isinstance(schema, dict):
            if "$ref" in schema:
                assert list(schema) == ["$ref"]
            schema = list(schema.values())
        if isinstance(schema, list):
            for each in schema:
                walk(each)

    walk(asked)
    # What was put in its place is not carried along besides.
    assert sorted(asked["$defs"]) == ["Cat", "Colour", "Dog", "Part"]


@pytest.mark.parametrize("model", [Picture, Node, Part, Aliased])
def test_xgrammar_makes_a_grammar_of_what_is_asked(model):
    import xgrammar
    import xgrammar.testing

    grammar = xgrammar.Grammar.from_json_schema(
        json.dumps(StructuredOutput(model).asked), any_whitespace=False
    )
    accepts = xgrammar.testing._is_grammar_accept_string
    assert not accepts(grammar, "a picture")
    if model is Picture:
        assert accepts(grammar, json.dumps(PICTURE))
        assert not accepts(grammar, json.dumps({**PICTURE, "colour": "green"}))
        assert not accepts(grammar, json.dumps({**PICTURE, "part": {"name": "p" * 21, "size": 1}}))


@pytest.mark.parametrize("model", [str, dict, Part(name="x"), "Part", RootModel[list[int]]])
def test_what_is_no_model_of_an_object_is_refused(model):
    with pytest.raises(ConfigError, match="output_type"):
        StructuredOutput(model)


def test_a_model_without_json_schema_is_refused():
    with pytest.raises(ConfigError, match="Odd has no JSON schema"):
        StructuredOutput(create_model("Odd", what=(Callable[[int], int], ...)))


@pytest.mark.parametrize(
    "said",
    [
        json.dumps(PICTURE),
        f"Here it is:\n```json\n{json.dumps(PICTURE, indent=2)}\n```\nAnything else?",
        f"<think>Maybe {{'title': 'x'}}?</think>{json.dumps(PICTURE)}",
        json.dumps({**PICTURE, "unheard": 1}),
    ],
)
def test_an_answer_is_read_as_it_stands(said):
    found = StructuredOutput(Picture).read(said, complete=True)
    assert {**found, "unheard": None} == {**PICTURE, "unheard": None}
    # No float: it would have lost its last digits.
    assert found["part"]["size"] == 12345678901234567


@pytest.mark.parametrize(
    "said",
    [
        "{'name': 'p', 'size': 3,}",
        "{name: 'p', size: 3, also: 'w",
        'A draft: {"name": "draft", "size": 1}. Rather: {"name": "p", "size": 3}',
        'The form is {"name": ..., "size": ...}; {"name": "p", "size": 3.0}',
    ],
)
def test_an_answer_that_is_no_json_is_read_as_it_was_meant(said):
    assert StructuredOutput(Part).read(said, complete=True) == {"name": "p", "size": 3}


def test_what_could_not_be_read_is_not_made_up_from_a_default():
    for said in ("{'name': 'p', size: 3", "{'name': 'p'}"):
        with pytest.raises(SampleError, match="not all of it"):
            StructuredOutput(Part).read(said, complete=True)

    class Whole(BaseModel):
        parts: dict[str, list[Part]]

    with pytest.raises(SampleError, match="not all of it"):
        StructuredOutput(Whole).read("{'parts': {'a': [{'name': 'p'}]}}", complete=True)
    # One that is JSON says what it says.
    assert StructuredOutput(Part).read('{"name": "p"}', complete=True) == {"name": "p", "size": None}


@pytest.mark.parametrize("said", ['{"name": "p", "siz', '{"name": "p", "size": 3, "w', '[{"name": "p"'])
def test_an_answer_that_was_cut_is_not_completed(said):
    with pytest.raises(SampleError):
        StructuredOutput(Part).read(said, complete=False)
    assert StructuredOutput(Part).read('{"name": "p", "size": 3}', complete=False)["size"] == 3


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ("a dog", "it holds no JSON object"),
        ("[1, 2]", "should be an object"),
        ('{"name": "p", "size": "big"}', "size: Input should be a valid integer"),
        ('{"size": 1}', "name: Field required"),
        ('{"name": ""}', "name: String should have at least 1 character"),
        ("{}" * 50_000, "name: Field required"),
        ("{" * 200_000, "name: Field required"),
    ],
)
def test_why_an_answer_does_not_fit_is_said_in_short(said, words):
    with pytest.raises(SampleError) as caught:
        StructuredOutput(Part).read(said, complete=True)
    assert caught.value.kind == "unparsable"
    assert words in caught.value.message
    assert len(caught.value.message) < 400


def test_an_authors_own_check_decides():
    class Even(BaseModel):
        number: int

        @field_validator("number")
        @classmethod
        def is_even(cls, number: int) -> int:
            if number % 2:
                raise ValueError("is odd")
            return number

    output = StructuredOutput(Even)
    assert output.read('{"number": 4}', complete=True) == {"number": 4}
    with pytest.raises(SampleError, match="number: Value error, is odd"):
        output.read('{"number": 5}', complete=True)


def test_values_are_written_as_json_under_the_names_of_the_fields():
    class Dated(BaseModel):
        when: datetime
        id: uuid.UUID
        kinds: set[Colour]

    given = {"when": "2026-01-02T03:04:05Z", "id": str(uuid.UUID(int=1)), "kinds": ["red", "red"]}
    output = StructuredOutput(Dated)
    assert output.read(json.dumps(given), complete=True) == {**given, "kinds": ["red"]}
    assert str(arrow_type(output.written)) == "struct<when: string, id: string, kinds: list<item: string>>"
    aliased = StructuredOutput(Aliased)
    assert list(aliased.asked["properties"]) == ["What"]
    assert aliased.read('{"What": "x"}', complete=True) == {"what": "x"}
    assert list(aliased.written["properties"]) == ["what"]


def test_formats_with_types_are_told_the_types():
    class Described(BaseModel):
        title: str
        colour: Colour | None
        parts: list[Part]
        first: Part

    part = "struct<name: string, size: int64>"
    assert str(arrow_type(StructuredOutput(Described).written)) == (
        f"struct<title: string, colour: string, parts: list<item: {part}>, first: {part}>"
    )
    for model in (Node, Picture):  # a tree, and one of two kinds
        with pytest.raises(ConfigError, match="has no column type"):
            arrow_type(StructuredOutput(model).written)


def test_the_code_of_all_models_counts():
    assert set(StructuredOutput(Picture).classes()) == {Picture, Part, Cat, Dog}
    assert StructuredOutput(Node).classes() == [Node]

    class Base(BaseModel):
        part: dict[str, list[Part | None]]

    class Derived(Base):
        pass

    assert set(StructuredOutput(Derived).classes()) == {Derived, Base, Part}
    assert digest_of(Derived, Base) != digest_of(Derived)
