"""Whether a function passes for the same one: what decides its prompts does not go unnoticed."""

from __future__ import annotations

import functools
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.steps.functions import check_function, digest_of, recorded, source_of

MODULE = """
import functools
import math
WORDS = ["red", "blue"]
STYLE = "plain"
UNUSED = 1

def passed_on(*args, **kwargs):
    return lambda function: function

def helper(text):
    return text + STYLE

@passed_on(1, retries=2)
def prompt(sample):
    return helper(sample["text"]) + str([word for word in sample["text"] if word in WORDS]) + str(math.pi)

def made(style):
    def inner(sample):
        return style + sample["text"]
    return inner

class Thing:
    pass

inner = made("a")
one, other = (lambda s: "one"), (lambda s: "other")
"""


class Modules:
    """Modules from source, as a DAG file's would be."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.count = 0

    def __call__(self, source: str) -> ModuleType:
        self.count += 1
        path = self.folder / f"made_{self.count}.py"
        path.write_text(source)
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module


@pytest.fixture
def module(tmp_path):
    made = Modules(tmp_path)
    yield made
    for number in range(1, made.count + 1):
        del sys.modules[f"made_{number}"]


@pytest.mark.parametrize(
    ("was", "now"),
    [
        ('@passed_on(1, retries=2)', '@passed_on(2)'),  # it says how the task runs, not what is asked
        ("UNUSED = 1", "UNUSED = 2"),
        ("class Thing:\n    pass", ""),
        ("import math", "import math, json"),
    ],
)  # fmt: skip
def test_what_does_not_concern_a_function_leaves_it_the_same(module, was, now):
    assert digest_of(module(MODULE).prompt) == digest_of(module(MODULE.replace(was, now)).prompt)


@pytest.mark.parametrize(
    ("was", "now"),
    [
        ('helper(sample["text"]) +', 'helper(sample["title"]) +'),
        ("return text + STYLE", "return STYLE + text"),
        ('STYLE = "plain"', 'STYLE = "long"'),  # named by a helper
        ('["red", "blue"]', '["red", "green"]'),  # named in a comprehension
    ],
)
def test_what_a_function_says_and_names_makes_it_another(module, was, now):
    assert digest_of(module(MODULE).prompt) != digest_of(module(MODULE.replace(was, now)).prompt)


def test_a_function_is_another_with_other_variables_around_it(module):
    made = module(MODULE)
    assert digest_of(made.inner) == digest_of(made.made("a"))
    assert digest_of(made.inner) != digest_of(made.made("b"))
    assert digest_of(made.one) != digest_of(made.other)


def test_functions_that_name_each_other_are_told_apart_and_end(module):
    source = "def a(s):\n    return b(s)\ndef b(s):\n    return a(s) or 1\n"
    assert digest_of(module(source).a) != digest_of(module(source.replace("1", "2")).a)


def test_the_source_of_an_indented_function_is_as_if_it_stood_alone(module):
    inner = module(MODULE).inner
    assert source_of(inner) == 'def inner(sample):\n    return style + sample["text"]\n'


@pytest.mark.parametrize("code", [functools.partial(print), len, eval("lambda s: s")])
def test_a_function_without_source_needs_a_version(code):
    with pytest.raises(ConfigError, match="version='1'"):
        source_of(code)


async def waits(sample):
    return "x"


def yields(sample):
    yield "x"


@pytest.mark.parametrize(
    ("function", "arguments", "word"),
    [
        (waits, {}, "no async"),
        (yields, {}, "no yield"),
        (lambda: "x", {}, "can't be called with a sample"),
        (lambda sample, style: "x", {}, "style"),
        (lambda sample: "x", {"style": "x"}, "style"),
        (eval("lambda s: s"), {}, "version"),
    ],
)
def test_a_function_that_cannot_be_called_with_a_sample_is_refused(function, arguments, word):
    with pytest.raises(ConfigError, match=word):
        check_function(function, arguments, version=None)


def test_a_version_stands_for_the_source():
    unseen = eval("lambda s: s")
    with pytest.raises(ConfigError, match="version"):
        check_function(unseen, {}, version=None)
    assert check_function(unseen, {}, version="1") is None


def test_arguments_are_recorded_as_json_values():
    from collections import UserDict, UserList
    from datetime import datetime, timezone

    when = datetime(2026, 1, 2, tzinfo=timezone.utc)
    given = {"a": (1, "x"), "when": when, "params": UserDict({"b": None}), "many": UserList([1])}
    assert recorded(given) == {
        "a": [1, "x"],
        "when": "2026-01-02T00:00:00+00:00",
        "params": {"b": None},
        "many": [1],
    }
    with pytest.raises(ConfigError, match="argument ti="):
        recorded({"ti": object()})
