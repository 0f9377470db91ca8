from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime, timedelta, timezone
from functools import reduce
from itertools import permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_vlm_provider.ledger.records import answer_of, is_record, key_of, newer, to_line
from airflow_vlm_provider.types import Answer, Choice, Usage

KEY = "0123456789abcdef" * 2
NOON = datetime(2026, 1, 1, 12, tzinfo=timezone.utc)
ANSWER = Answer((Choice("a cat\n", "length"), Choice("")), "m", Usage(2, 30, 4))

keys = st.text("0123456789abcdef", min_size=32, max_size=32)
# Everything but both halves of a surrogate pair beside each other, which are one character to JSON.
texts = (
    st.lists(st.text(max_size=5) | st.characters(categories=["Cs"]), max_size=5)
    .map("".join)
    .filter(lambda text: text == text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass"))
)
answers = st.builds(
    Answer,
    choices=st.lists(
        st.builds(Choice, texts, st.sampled_from(["stop", "length", "refusal", "other"])), max_size=3
    ).map(tuple),
    model=texts,
    usage=st.builds(Usage, *[st.integers(0, 2**53)] * 3),
)
times = st.datetimes(
    min_value=datetime(1990, 1, 1),
    max_value=datetime(2200, 1, 1),
    timezones=st.sampled_from([timezone.utc, timezone(timedelta(hours=-9, minutes=-30))]),
)


@given(keys, answers, times)
def test_an_answer_survives_the_line_whatever_its_text(key, answer, time):
    line = to_line(key, answer, time=time)
    assert b"\n" not in line
    assert line.startswith(b'{"key":"' + key.encode() + b'",')
    assert line[8:40].decode() == key == key_of(line)
    assert datetime.fromisoformat(json.loads(line)["time"]) == time
    assert answer_of(line) == replace(answer, key=key)
    assert is_record(line)


def test_what_a_step_keeps_beside_an_answer_stands_in_its_line():
    line = to_line(KEY, ANSWER, time=NOON, note={"distances": [3, 0]})
    assert json.loads(line)["note"] == {"distances": [3, 0]}
    assert answer_of(line) == replace(ANSWER, key=KEY)


def test_a_line_is_plain_json_with_the_agreed_fields():
    line = to_line(KEY, ANSWER, time=NOON)
    assert json.loads(line) == {
        "key": KEY,
        "time": "2026-01-01T12:00:00.000000+00:00",
        "model": "m",
        "usage": {"requests": 2, "prompt_tokens": 30, "completion_tokens": 4},
        "choices": [
            {"text": "a cat\n", "finish_reason": "length"},
            {"text": "", "finish_reason": "stop"},
        ],
    }


def test_text_that_utf_8_can_hold_is_readable_in_the_line():
    assert "größe 猫".encode() in to_line(KEY, Answer((Choice("größe 猫"),), "m"), time=NOON)


@given(st.permutations([0, 1, 2, 3, 4]), st.lists(st.sampled_from("ab"), min_size=5, max_size=5))
def test_which_line_counts_does_not_depend_on_the_order(order, seen):
    moments = [NOON + timedelta(microseconds=micros) for micros in (0, 1, 1, 1_000_000, 1_000_000)]
    lines = [
        to_line(KEY, Answer((Choice(text),), "m"), time=time)
        for text, time in zip(seen, moments, strict=True)
    ]
    counts = reduce(newer, (lines[index] for index in order))
    assert counts == reduce(newer, lines)
    assert json.loads(counts)["time"] == max(json.loads(line)["time"] for line in lines)


def test_of_two_lines_the_later_counts_whatever_else_is_in_it():
    early = to_line(KEY, Answer((Choice("z" * 100),), "z"), time=NOON)
    # Later, though its own clock's face shows an earlier hour.
    late = to_line(KEY, ANSWER, time=(NOON + timedelta(seconds=1)).astimezone(timezone(timedelta(hours=-5))))
    assert all(newer(*pair) == late for pair in permutations([early, late]))


def test_a_line_cut_off_anywhere_is_none():
    line = to_line(KEY, ANSWER, time=NOON)
    for end in range(len(line)):
        with pytest.raises(ValueError, match="not a line of the journal"):
            answer_of(line[:end])


WHOLE = to_line(KEY, ANSWER, time=NOON)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"model":"m"', b'"model":1'),
        (b'"model":"m"', b'"model":null'),
        (b'"model":"m",', b""),
        (b'"requests":2', b'"requests":"2"'),
        (b'"requests":2', b'"requests":true'),
        (b'"requests":2,', b""),
        (b'"a cat\\n"', b"null"),
        (b'"a cat\\n"', b'"\xff"'),
        (b'"length"', b'"because"'),
        (b'"length"', b"[]"),
        (b'"choices":[', b'"choices":"x","more":['),
        (b'"choices":[', b'"choices":{},"more":['),
        (b'"choices":[', b'"choices":' + b"[" * 100_000),
        (b"}]}", b"}]}}"),
    ],
)
def test_a_line_that_was_altered_is_none(old, new):
    assert WHOLE.count(old) == 1
    with pytest.raises(ValueError):
        answer_of(WHOLE.replace(old, new))


@pytest.mark.parametrize(
    "line",
    [
        b"",
        b"{}",
        b"\xff",
        WHOLE.replace(b'{"key"', b'{ "key"'),
        WHOLE.replace(KEY.encode(), KEY.encode()[:-1]),
        WHOLE.replace(KEY.encode(), KEY.upper().encode()),
        WHOLE.replace(b"+00:00", b"+01:00"),
        WHOLE.replace(b".000000", b""),
        b" " + WHOLE,
    ],
)
def test_what_does_not_begin_like_a_line_is_none(line):
    assert not is_record(line)
    for function in (key_of, answer_of, lambda each: newer(each, WHOLE)):
        with pytest.raises(ValueError):
            function(line)


@pytest.mark.parametrize("key", ["", KEY[:-1], KEY + "0", KEY.upper(), "x" * 32, KEY[:-1] + "\n"])
def test_what_is_no_key_gets_no_line(key):
    with pytest.raises(ValueError):
        to_line(key, ANSWER, time=NOON)


def test_a_time_needs_its_zone():
    with pytest.raises(ValueError, match="time zone"):
        to_line(KEY, ANSWER, time=datetime(2026, 1, 1))
