from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_vlm_provider.steps.loose_json import MAX_DEPTH, Bare, Pairs, read_values


def marked(value):
    """A value with its objects, lists and unquoted strings told apart, which compare equal otherwise."""
    if isinstance(value, dict):
        return {"object": [[key, marked(item)] for key, item in value.items()]}
    if isinstance(value, Pairs):
        return {"object": [[key, marked(item)] for key, item in value]}
    if isinstance(value, list):
        return {"list": [marked(item) for item in value]}
    if isinstance(value, bool) or value is None:
        return {"constant": value}
    return {"bare": value} if isinstance(value, Bare) else value


def read(text):
    return [marked(value) for value in read_values(text)]


strings = st.text(max_size=8) | st.text("a'\"\\,:[]{} ”\n/", max_size=8)
scalars = (
    strings
    | st.none()
    | st.booleans()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.integers(-9, 9)
)
documents = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(strings, inner, max_size=4),
    max_leaves=12,
).filter(lambda value: isinstance(value, list | dict))


@given(documents, st.booleans(), st.sampled_from([None, 0, 2]))
def test_valid_json_is_read_as_json(document, ascii_only, indent):
    assert read(json.dumps(document, ensure_ascii=ascii_only, indent=indent)) == [marked(document)]


@given(st.lists(documents, max_size=3))
def test_text_around_values_is_passed_over(values):
    text = 'It\'s "so":\n' + " and it's ".join(json.dumps(value) for value in values) + ". I'm done!"
    assert read(text) == [marked(value) for value in values]


@given(st.lists(st.text("abc'\" ,", max_size=8)))
def test_python_lists_are_read_as_python_does(items):
    assert read(repr(items)) == [marked(items)]


@given(documents, st.data())
def test_any_part_of_a_document_can_be_read(document, data):
    text = json.dumps(document)
    for value in read_values(text[: data.draw(st.integers(0, len(text)))]):
        assert isinstance(value, list | Pairs)
        assert json.loads(json.dumps(value)) is not None


@given(st.text("[]{}\"'“”‘’«»:,，\\u/ abn1\n", max_size=60))
def test_nothing_raises(text):
    for value in read_values(text):
        json.dumps(value)


@pytest.mark.timeout(40)
@pytest.mark.parametrize(
    "text",
    [
        "[" * 200_000,
        "{" * 200_000,
        '{"a":' * 40_000,
        '["a' * 60_000,
        "['a" * 60_000,
        '["a]' * 50_000,
        "['a]" * 50_000,
        '["a]' * 50_000 + '"]',
        '["a" ' * 40_000,
        '["   ' * 40_000,
        '["\\' * 60_000 + '"]',
        "[" + "'" * 200_000 + "x",
        "[" + "'\"" * 100_000 + "x",
        "[“" * 100_000,
        "[a," * 60_000,
        "{a:]" * 50_000,
        "[" + "1" * 200_000 + "x]",
        "[//" * 60_000,
        "[" + " " * 200_000 + "x]",
    ],
    ids=lambda text: repr(text[:5]),
)
def test_long_adversarial_texts_take_linear_time(text):
    """Were the time quadratic, most of these would not end before the time limit."""
    assert sum(1 for _ in read_values(text)) > 0


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("", []),
        ("no brackets", []),
        ("[] {}", [[], {}]),
        ('["a"] ["b"', [["a"], ["b"]]),
        ('{"a": ["b"} ["c"]', [{"a": ["b"]}, ["c"]]),
        ('{"a": ["b"}} ["c"]', [{"a": ["b"]}, ["c"]]),
        ('["a"} ["b"]', [["a"], ["b"]]),
        ('[{"a": "b"], "c"', [[{"a": "b"}]]),
        ('{"a": ["b", "c": "d"}', [{"a": ["b"], "c": "d"}]),
        ('{"a" "b"}', [["a", "b"]]),
        ('{"a": "b" "c": "d"}', [{"a": "b", "c": "d"}]),
        ('{"a": {"b": [1, -2.5e3, true, null', [{"a": {"b": [1.0, -2500.0, True]}}]),
        ('["a": 1, "b": 2]', [["a", 1.0, "b", 2.0]]),
        ('["a" // "x"\n, "b"]', [["a", "b"]]),
        ("['it's', 'a']", [["it's", "a"]]),
    ],
)
def test_slips(text, values):
    assert read(text) == [marked(value) for value in values]


def test_repeated_keys_are_kept():
    assert list(read_values('{"a": "b", "a": "c"}')) == [[("a", "b"), ("a", "c")]]


def test_strings_without_quotes_are_told_apart():
    assert read("[a b, 'c', 1]") == [{"list": [{"bare": "a b"}, "c", 1.0]}]


def test_deep_nesting_is_cut_into_values():
    depths = []
    for value in read_values("[" * 1000 + "]" * 1000):
        depth = 0
        while isinstance(value, list):
            depth, value = depth + 1, value[0] if value else None
        depths.append(depth)
    assert max(depths) == MAX_DEPTH
