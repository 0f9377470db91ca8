from __future__ import annotations

import copy
import json

import pytest
from jsonschema import Draft202012Validator

from airflow_vlm_provider.errors import ConfigError, SampleError, TransientError
from airflow_vlm_provider.steps.prompts import TAGGING_INPUT, TAGGING_SYSTEM
from airflow_vlm_provider.steps.tagging import DEFAULT_SAMPLING, TAGS_SCHEMA, TaggingStep
from airflow_vlm_provider.types import Answer, Choice, MediaRef, Request, Sample, Usage

FIVE = ["red", "circle", "large", "white-background", "geometric-shape"]
SIX = [*FIVE, "flat-color"]


def sample(row):
    return Sample(index=0, line=1, row=row, raw=b"")


def says(tags_or_text, finish_reason="stop"):
    text = tags_or_text if isinstance(tags_or_text, str) else json.dumps({"tags": tags_or_text})
    return Answer(choices=(Choice(text, finish_reason),), model="m", usage=Usage(1, 10, 5))


NOTHING = says("I cannot help with that image")
DECLINED = says("red, circle, large, round, flat", "refusal")


def drive(step, row, *rounds):
    """Run the step on a row, answering its rounds of requests in turn; the rounds asked, and the result."""
    run = step.process(sample(row))
    asked: list[list[Request]] = []
    answers = None
    try:
        while True:
            asked.append(list(run.send(answers)))
            answers = rounds[len(asked) - 1]
    except StopIteration as end:
        assert len(asked) == len(rounds), "not every answer was asked for"
        return asked, end.value


def tags_of(result, meta_key="__dj__meta__", field="image_tags"):
    (row,) = result.rows
    return row[meta_key][field]


def images_in(requests):
    return [request.parts[0].ref for request in requests]


# What is asked


def test_the_request():
    asked, _ = drive(TaggingStep(), {"images": ["a.jpg"], "text": "A circle"}, [says(FIVE)])
    assert asked == [
        [
            Request(
                system=TAGGING_SYSTEM,
                parts=(MediaRef("image", "a.jpg"), TAGGING_INPUT),
                schema=TAGS_SCHEMA,
                sampling=DEFAULT_SAMPLING,
                n=1,
            )
        ]
    ]


def test_own_prompts():
    step = TaggingStep(system_prompt="Be brief.", input_template="What is it?")
    ((request,),), _ = drive(step, {"images": ["a.jpg"]}, [says(FIVE)])
    assert request.system == "Be brief."
    assert request.parts[1:] == ("What is it?",)


def test_empty_prompts_are_not_sent():
    step = TaggingStep(system_prompt="", input_template="{text}")
    ((request,),), _ = drive(step, {"images": ["a.jpg"], "text": "<__dj__image>"}, [says(FIVE)])
    assert request.system is None
    assert request.parts == (MediaRef("image", "a.jpg"),)


@pytest.mark.parametrize(
    ("template", "text", "message"),
    [
        ("Caption: {text}", "A circle", "Caption: A circle"),
        ("{text} / {text}", "A circle", "A circle / A circle"),
        ('{"tags": [..]} {0} {} {{text}} {te', "A circle", '{"tags": [..]} {0} {} {A circle} {te'),
        ("Caption: {text}", "Set {text} in {braces}", "Caption: Set {text} in {braces}"),
        ("Caption: {text}!", " <__dj__image>\nA circle <|__dj__eoc|> ", "Caption: A circle!"),
        ("Caption: {text}!", "<__dj__video><__dj__audio>", "Caption: !"),
        ("Caption: {text}!", None, "Caption: !"),
        ("Caption: {text}!", r"a\1b\g<0>", r"Caption: a\1b\g<0>!"),
    ],
)
def test_input_template(template, text, message):
    step = TaggingStep(input_template=template)
    ((request,),), _ = drive(step, {"images": ["a.jpg"], "text": text}, [says(FIVE)])
    assert request.parts[1] == message


def test_own_special_tokens_and_text_key():
    step = TaggingStep(input_template="{text}", special_tokens=["<img>"], text_key="caption")
    ((request,),), _ = drive(step, {"images": ["a"], "caption": "<img> <__dj__image>"}, [says(FIVE)])
    assert request.parts[1] == "<__dj__image>"


def test_the_text_is_not_looked_at_when_the_template_does_not_want_it():
    _, result = drive(TaggingStep(), {"images": ["a.jpg"], "text": 7}, [says(FIVE)])
    assert tags_of(result) == [FIVE]


def test_all_images_are_asked_about_at_once_and_in_order():
    (asked,), result = drive(
        TaggingStep(), {"images": ["b.jpg", "a.jpg", "c.jpg"]}, [says(SIX), says(FIVE), says(FIVE[::-1])]
    )
    assert images_in(asked) == ["b.jpg", "a.jpg", "c.jpg"]
    assert tags_of(result) == [SIX, FIVE, FIVE[::-1]]


def test_a_repeated_image_is_asked_about_once_and_tagged_everywhere():
    (asked,), result = drive(TaggingStep(), {"images": ["a", "b", "a", "a"]}, [says(FIVE), says(SIX)])
    assert images_in(asked) == ["a", "b"]
    tags = tags_of(result)
    assert tags == [FIVE, SIX, FIVE, FIVE]
    assert tags[0] is not tags[2]


def test_a_single_reference_is_a_list_of_one():
    (asked,), result = drive(TaggingStep(image_key="image"), {"image": "a.jpg"}, [says(FIVE)])
    assert images_in(asked) == ["a.jpg"]
    assert tags_of(result) == [FIVE]


# What is written


def test_fields_keep_their_order_and_the_row_is_not_changed():
    row = {
        "id": 7,
        "__dj__meta__": {"source": "web"},
        "images": ["a.jpg"],
        "text": "A circle",
        "x": [1, {"y": None}],
    }
    before = copy.deepcopy(row)
    _, result = drive(TaggingStep(), row, [says(FIVE)])
    (written,) = result.rows
    assert json.dumps(row) == json.dumps(before)
    assert list(written) == ["id", "__dj__meta__", "images", "text", "x"]
    assert written == {**before, "__dj__meta__": {"source": "web", "image_tags": [FIVE]}}
    assert not result.skipped


def test_own_field_names():
    step = TaggingStep(tag_field_name="labels", image_key="pictures", meta_key="meta")
    _, result = drive(step, {"pictures": ["a"], "meta": {"image_tags": [["old"]]}}, [says(FIVE)])
    assert result.rows == ({"pictures": ["a"], "meta": {"image_tags": [["old"]], "labels": [FIVE]}},)


@pytest.mark.parametrize("row", [{}, {"images": None}, {"images": []}])
def test_without_images_the_tags_are_empty_and_nothing_is_asked(row):
    asked, result = drive(TaggingStep(), row)
    assert asked == []
    assert result.rows == ({**row, "__dj__meta__": {"image_tags": [[]]}},)


@pytest.mark.parametrize("tags", [[["red"]], [[]], []])
def test_a_tagged_sample_is_skipped(tags):
    asked, result = drive(TaggingStep(), {"images": ["a"], "__dj__meta__": {"image_tags": tags}})
    assert (asked, result.rows, result.skipped) == ([], (), True)


@pytest.mark.parametrize("meta", [None, {}, {"image_tags": None}, {"other": 1}])
def test_meta_data_without_tags_gets_them(meta):
    _, result = drive(TaggingStep(), {"__dj__meta__": meta, "images": ["a"]}, [says(FIVE)])
    assert result.rows[0]["__dj__meta__"] == {**(meta or {}), "image_tags": [FIVE]}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"images": ["a"], "__dj__meta__": "{}"}, ["'__dj__meta__'", "'{}'", "object"]),
        ({"images": ["a"], "__dj__meta__": []}, ["'__dj__meta__'", "[]"]),
        ({"images": 7}, ["'images'", "7", "list"]),
        ({"images": {"path": "a"}}, ["'images'", "'path'"]),
        ({"images": ["a", None]}, ["'images'", "None", "strings"]),
        ({"images": ["a", {"bytes": "x" * 9999}]}, ["'images'", "'bytes'", "…"]),
        ({"images": [""]}, ["'images'", "not empty"]),
        ({"images": ""}, ["'images'", "not empty"]),
        ({"images": ["a"], "text": ["b"]}, ["'text'", "['b']"]),
    ],
)
def test_rows_of_another_shape_are_malformed(row, words):
    with pytest.raises(SampleError) as raised:
        drive(TaggingStep(input_template="{text}"), row)
    assert (raised.value.kind, raised.value.attempts) == ("malformed_row", 0)
    assert all(word in str(raised.value) for word in words)
    assert len(str(raised.value)) < 300


def test_a_row_that_was_not_read_is_malformed():
    with pytest.raises(SampleError, match="no JSON") as raised:
        next(TaggingStep().process(Sample(index=3, line=4, row=None, raw=b"{", error="no JSON")))
    assert raised.value.kind == "malformed_row"


# Asking again


def test_only_what_has_no_tags_is_asked_again_each_time_differently():
    asked, result = drive(
        TaggingStep(),
        {"images": ["a", "b", "c"]},
        [NOTHING, says(FIVE), DECLINED],
        [says('{"tags": ["re', "length"), says(SIX)],
        [says(FIVE)],
    )
    assert [images_in(requests) for requests in asked] == [["a", "b", "c"], ["a", "c"], ["a"]]
    assert tags_of(result) == [FIVE, FIVE, SIX]
    assert [dict(requests[0].sampling) for requests in asked] == [
        {"temperature": 0, "max_tokens": 256},
        {"temperature": 0.7, "max_tokens": 256, "seed": 1},
        {"temperature": 0.7, "max_tokens": 256, "seed": 2},
    ]
    first, second, third = (requests[0] for requests in asked)
    assert (first.system, first.parts, first.schema) == (second.system, second.parts, second.schema)
    assert second.parts == third.parts


def test_own_seed_and_temperature_are_kept_when_asking_again():
    step = TaggingStep(sampling_params={"seed": 100, "temperature": 0.3})
    asked, _ = drive(step, {"images": ["a"]}, [NOTHING], [says(FIVE)])
    assert [(round_[0].sampling["seed"], round_[0].sampling["temperature"]) for round_ in asked] == [
        (100, 0.3),
        (101, 0.3),
    ]


def test_too_few_tags_are_asked_again():
    asked, result = drive(TaggingStep(), {"images": ["a"]}, [says(FIVE[:4])], [says(FIVE)])
    assert len(asked) == 2
    assert tags_of(result) == [FIVE]


def test_of_answers_with_too_few_tags_the_fullest_is_kept():
    _, result = drive(
        TaggingStep(),
        {"images": ["a"]},
        [says(["red"])],
        [says(["one", "two", "three"])],
        [says(["a-b", "c-d", "e-f"])],
    )
    assert tags_of(result) == [["one", "two", "three"]]


def test_fewer_tags_are_better_than_a_failed_sample():
    _, result = drive(TaggingStep(try_num=2), {"images": ["a"]}, [says(["red"])], [NOTHING])
    assert tags_of(result) == [["red"]]


def test_fewer_tags_are_kept_when_asking_again_fails():
    run = TaggingStep().process(sample({"images": ["a", "b"]}))
    next(run)
    run.send([says(["red"]), says(FIVE)])
    with pytest.raises(StopIteration) as end:
        run.throw(TransientError("The endpoint is gone.", attempts=5))
    assert tags_of(end.value.value) == [["red"], FIVE]


def test_a_failed_request_fails_the_sample_when_there_are_no_tags_to_keep():
    run = TaggingStep().process(sample({"images": ["a", "b"]}))
    next(run)
    run.send([NOTHING, says(["red"])])
    error = SampleError("rejected", "Too long.", media="a")
    with pytest.raises(SampleError) as raised:
        run.throw(error)
    assert raised.value is error


def test_repeated_tags_count_once():
    asked, _ = drive(
        TaggingStep(), {"images": ["a"]}, [says(["red", "Red", "RED", "red.", "#red"])], [says(FIVE)]
    )
    assert len(asked) == 2


@pytest.mark.parametrize(
    ("answer", "kind", "words"),
    [
        (NOTHING, "unparsable", ["No tags", "'a.jpg'", "3 tries", "'I cannot help with that image'"]),
        (DECLINED, "refused", ["declined", "'a.jpg'", "3 tries"]),
        (says("", "length"), "unparsable", ["''", "raise max_tokens"]),
        (says("word " * 500), "unparsable", ["word word", "…"]),
        (says("tricky\n\ud83d \x00 lines"), "unparsable", ["tricky", "\\ud83d"]),
        (Answer(choices=(), model="m"), "unparsable", ["''"]),
    ],
)
def test_an_image_without_any_tags_fails_the_sample(answer, kind, words):
    with pytest.raises(SampleError) as raised:
        drive(TaggingStep(), {"images": ["a.jpg"]}, [answer], [answer], [answer])
    error = raised.value
    assert (error.kind, error.media, error.attempts) == (kind, "a.jpg", 3)
    assert all(word in error.message for word in words)
    assert len(error.message) < 400
    assert "\n" not in error.message
    error.message.encode()


def test_one_image_without_tags_fails_the_whole_sample():
    row = {"images": ["a", "b", "c"]}
    with pytest.raises(SampleError) as raised:
        drive(TaggingStep(try_num=1), row, [says(FIVE), NOTHING, says(FIVE)])
    assert (raised.value.media, raised.value.attempts) == ("b", 1)
    assert "1 try." in raised.value.message
    assert row == {"images": ["a", "b", "c"]}


def test_a_missing_answer_is_noticed():
    with pytest.raises(ValueError, match="shorter"):
        drive(TaggingStep(), {"images": ["a", "b"]}, [says(FIVE)])


def test_a_plain_text_answer_is_read():
    _, result = drive(
        TaggingStep(), {"images": ["a"]}, [says("- Red\n- Circle\n- Large\n- Round shape\n- Flat")]
    )
    assert tags_of(result) == [["red", "circle", "large", "round-shape", "flat"]]


# The schema


@pytest.mark.parametrize(
    ("tags", "valid"),
    [
        (FIVE, True),
        (["café", "children's", "红色", "a b", "x"], True),
        (["a" * 40] * 10, True),
        (["a" * 41] * 5, False),
        (FIVE[:4], False),
        (["a"] * 11, False),
        (["", "a", "b", "c", "d"], False),
        (["a, b", "a", "b", "c", "d"], False),
        (["a\nb", "a", "b", "c", "d"], False),
        ([1, 2, 3, 4, 5], False),
    ],
)
def test_the_schema_and_its_grammar(tags, valid):
    import xgrammar

    Draft202012Validator.check_schema(TAGS_SCHEMA)
    assert Draft202012Validator(TAGS_SCHEMA).is_valid({"tags": tags}) == valid

    end = 256
    tokens = xgrammar.TokenizerInfo([bytes([byte]) for byte in range(256)] + [b"<end>"], stop_token_ids=[end])
    grammar = xgrammar.GrammarCompiler(tokens).compile_json_schema(
        json.dumps(TAGS_SCHEMA), any_whitespace=False
    )
    matcher = xgrammar.GrammarMatcher(grammar)
    accepted = matcher.accept_string(json.dumps({"tags": tags}, ensure_ascii=False)) and matcher.accept_token(
        end
    )
    assert accepted == valid


def test_the_schema_keeps_to_what_strict_endpoints_take():
    def keywords(schema):
        yield from schema
        for inner in [*schema.get("properties", {}).values(), *filter(None, [schema.get("items")])]:
            yield from keywords(inner)

    assert set(keywords(TAGS_SCHEMA)) == {
        "type", "properties", "required", "additionalProperties", "items", "pattern", "minItems", "maxItems"
    }  # fmt: skip


def test_a_tag_that_the_grammar_cut_keeps_its_whole_words():
    room = "very-long-tag-with-a-lot-of-words-in-it-and-more"[:40]
    _, result = drive(TaggingStep(), {"images": ["a"]}, [says([room, *FIVE])])
    assert tags_of(result)[0][0] == "very-long-tag-with-a-lot-of"


# Parameters


def test_parameters_are_json_and_say_all_that_matters():
    def fingerprint(**given):
        return json.dumps(TaggingStep(**given).parameters(), sort_keys=True)

    variants = [
        {},
        {"tag_field_name": "labels"},
        {"system_prompt": "x"},
        {"input_template": "x"},
        {"sampling_params": {"temperature": 0.1}},
        {"try_num": 2},
        {"text_key": "x"},
        {"image_key": "x"},
        {"meta_key": "x"},
        {"special_tokens": ["x"]},
    ]
    assert len({fingerprint(**given) for given in variants}) == len(variants)
    assert fingerprint() == fingerprint(sampling_params={"max_new_tokens": 256, "do_sample": False})
    assert {"schema", "parser_version", "retry_temperature"} <= set(TaggingStep().parameters())


def test_later_changes_to_what_was_given_change_nothing():
    params, tokens = {"stop": ["a"]}, ["<img>"]
    step = TaggingStep(sampling_params=params, special_tokens=tokens)
    before = json.dumps(step.parameters())
    params["temperature"] = 1
    params["stop"].append("b")
    tokens.append("x")
    assert json.dumps(step.parameters()) == before


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"try_num": 0}, ["try_num is 0", "from 1 on"]),
        ({"try_num": True}, ["try_num is True"]),
        ({"try_num": "3"}, ["try_num is '3'"]),
        ({"tag_field_name": ""}, ["tag_field_name is ''", "name of a field"]),
        ({"image_key": None}, ["image_key is None"]),
        ({"meta_key": 1}, ["meta_key is 1"]),
        ({"text_key": ""}, ["text_key is ''"]),
        ({"input_template": 5}, ["input_template is 5", "string"]),
        ({"system_prompt": ["x"]}, ["system_prompt is ['x']", "string"]),
        ({"sampling_params": "hot"}, ["sampling_params is 'hot'", "mapping"]),
        ({"sampling_params": {"n": 2}}, ["n=2", "remove it"]),
        ({"special_tokens": "<img>"}, ["special_tokens is '<img>'", "list"]),
        ({"special_tokens": [""]}, ["special_tokens is ['']"]),
        ({"special_tokens": 5}, ["special_tokens is 5"]),
    ],
)
def test_wrong_parameters_are_refused_by_name(given, words):
    with pytest.raises(ConfigError) as raised:
        TaggingStep(**given)
    assert all(word in str(raised.value) for word in words)
