from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_vlm_provider.steps.parsing import parse_tags
from airflow_vlm_provider.steps.tags import MAX_TAG_LENGTH, MAX_TAGS, normalize_tags
from tests.support.messy_answers import JSON_LIKE, PLAIN


def cases(table):
    return [pytest.param(answer, tags, id=name) for name, answer, tags in table]


@pytest.mark.parametrize(("answer", "tags"), cases(JSON_LIKE))
def test_data(answer, tags):
    assert parse_tags(answer) == tags


@pytest.mark.parametrize(("answer", "tags"), cases(PLAIN))
def test_plain_text(answer, tags):
    assert parse_tags(answer) == tags


@pytest.mark.parametrize(
    ("answer", "tags"),
    [
        ("red, circle, large, whi", ["red", "circle", "large"]),
        ("- red\n- circle\n- lar", ["red", "circle"]),
        ("#red #circle #la", ["red", "circle"]),
        ('{"tags": ["red", "circle", "la', ["red", "circle"]),
        ('{"tags": ["red", "circle"]}', ["red", "circle"]),
    ],
)
def test_the_entry_that_was_cut_is_left_out(answer, tags):
    assert parse_tags(answer, cut=True) == tags


# Brackets that close would end a string that the cut left open.
raw_tags = st.lists(
    st.text("ab Zé红😀_-#.,;'\"\\’“”[{:\n\t0/`", max_size=12) | st.text("abc ", max_size=40), max_size=12
)


@given(raw_tags, st.booleans(), st.sampled_from([None, 0, 2]), st.booleans(), st.data())
def test_json_cut_anywhere_gives_the_first_tags(tags, ascii_only, indent, with_key, data):
    document = {"tags": tags} if with_key else tags
    encoded = json.dumps(document, ensure_ascii=ascii_only, indent=indent).encode()
    whole = parse_tags(encoded.decode())
    part = encoded[: data.draw(st.integers(0, len(encoded)))].decode(errors="replace")
    found = parse_tags(part, cut=data.draw(st.booleans()))
    assert found == whole[: len(found)]


def test_json_cut_at_every_byte_keeps_every_whole_tag():
    tags = ["red", "children's", "white-background", "红色", "café"]
    for ascii_only in (True, False):
        encoded = json.dumps({"tags": tags}, ensure_ascii=ascii_only).encode()
        quoted = [json.dumps(tag, ensure_ascii=ascii_only).encode() for tag in tags]
        for length in range(len(encoded) + 1):
            whole = sum(encoded.find(tag) + len(tag) <= length for tag in quoted)
            assert parse_tags(encoded[:length].decode(errors="ignore")) == tags[:whole]


@given(
    st.text()
    | st.text("[]{}\"'“”:,，\\# \n-*1.<>/abtags`|", max_size=80)
    | st.lists(
        st.sampled_from(
            ["{", "}", "[", "]", '"tags"', ":", ",", '"red"', "'blue'", "null", "\\", "```json", "<think>",
             "</think>", "\n- ", "\n1. ", "#green", "Tags: ", "I cannot", "small dog", "…", "。", "、"]
        ),
        max_size=30,
    ).map("".join)
)  # fmt: skip
def test_any_answer_gives_tags_or_none(answer):
    for cut in (False, True):
        tags = parse_tags(answer, cut=cut)
        assert normalize_tags(tags) == tags
        assert len(tags) <= MAX_TAGS
        assert all(tag == tag.lower() and 0 < len(tag) <= MAX_TAG_LENGTH for tag in tags)


@given(
    st.lists(st.from_regex(r"[a-z]{2,8}(-[a-z]{2,8})?", fullmatch=True), min_size=5, max_size=10, unique=True)
)
def test_clean_tags_survive_every_dress(tags):
    tags = normalize_tags(tags)
    quoted = json.dumps(tags)
    for answer in (
        quoted,
        f'{{"tags": {quoted}}}',
        f"Sure!\n```json\n{quoted}\n```\nEnjoy!",
        repr(tags),
        f"{{'labels': {tags}}}",
    ):
        assert parse_tags(answer) == tags


def test_what_comes_after_a_hundred_thousand_characters_is_not_read():
    assert parse_tags(" " * 99_000 + '["red", "circle"]') == ["red", "circle"]
    assert parse_tags(" " * 100_000 + '["red", "circle"]') == []


@pytest.mark.timeout(60)
@pytest.mark.parametrize(
    "unit",
    [
        "[",
        '"',
        "<think>",
        "</think>",
        "#",
        "#a",
        "- ",
        "1. ",
        "a, ",
        " ",
        "\n",
        "**",
        "a:",
        " - ",
        '{\\"',
        "x. 1. ",
    ],
)
def test_a_megabyte_of_anything_is_dealt_with(unit):
    assert len(parse_tags((unit * 1_000_000)[:1_000_000])) <= MAX_TAGS
