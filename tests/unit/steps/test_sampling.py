from __future__ import annotations

import pytest

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.steps.sampling import RETRY_TEMPERATURE, asked_again, read_sampling

DEFAULTS = {"temperature": 0, "max_tokens": 256}


@pytest.mark.parametrize(
    ("params", "sampling"),
    [
        (None, DEFAULTS),
        ({}, DEFAULTS),
        ({"temperature": 0.3}, {"temperature": 0.3, "max_tokens": 256}),
        ({"top_p": 0.9, "stop": ["\n"]}, {**DEFAULTS, "top_p": 0.9, "stop": ["\n"]}),
        ({"max_new_tokens": 64}, {"temperature": 0, "max_tokens": 64}),
        ({"max_completion_tokens": 2000}, {"temperature": 0, "max_completion_tokens": 2000}),
        ({"do_sample": False, "temperature": 0.9}, DEFAULTS),
        ({"do_sample": True}, {"temperature": 1.0, "max_tokens": 256}),
        ({"do_sample": True, "temperature": 0.4}, {"temperature": 0.4, "max_tokens": 256}),
        ({"temperature": None, "max_tokens": None}, {}),
        ({"no_such_parameter": {"a": 1}}, {**DEFAULTS, "no_such_parameter": {"a": 1}}),
    ],
)
def test_reading(params, sampling):
    assert read_sampling(params, defaults=DEFAULTS) == sampling


def test_neither_the_given_mapping_nor_the_defaults_are_changed():
    params = {"max_new_tokens": 8, "do_sample": False}
    read_sampling(params, defaults=DEFAULTS)
    assert params == {"max_new_tokens": 8, "do_sample": False}
    assert DEFAULTS == {"temperature": 0, "max_tokens": 256}


@pytest.mark.parametrize(
    ("params", "words"),
    [
        ("temperature=0", ["sampling_params is 'temperature=0'", "mapping"]),
        ([("temperature", 0)], ["mapping"]),
        ({1: 2}, ["mapping"]),
        ({"n": 4}, ["n=4", "remove it"]),
        ({"max_tokens": 8, "max_new_tokens": 8}, ["max_tokens and max_new_tokens", "keep one"]),
        ({"temperature": "0"}, ["temperature='0'", "number"]),
        ({"temperature": -1}, ["temperature=-1"]),
        ({"temperature": float("nan")}, ["temperature=nan"]),
        ({"temperature": True}, ["temperature=True"]),
        ({"max_new_tokens": 0}, ["max_tokens=0", "from 1 on"]),
        ({"max_tokens": 1.5}, ["max_tokens=1.5"]),
        ({"seed": "x"}, ["seed='x'"]),
        ({"seed": -1}, ["seed=-1"]),
        ({"logit_bias": {1, 2}}, ["logit_bias={1, 2}", "no JSON value"]),
        ({"top_p": float("inf")}, ["top_p=inf", "no JSON value"]),
    ],
)
def test_what_no_endpoint_takes_is_refused_by_name(params, words):
    with pytest.raises(ConfigError) as raised:
        read_sampling(params, defaults=DEFAULTS)
    assert all(word in str(raised.value) for word in words)


@pytest.mark.parametrize(
    ("sampling", "retry", "again"),
    [
        ({"temperature": 0}, 0, {"temperature": 0}),
        ({"temperature": 0}, 1, {"temperature": RETRY_TEMPERATURE, "seed": 1}),
        ({"temperature": 0.0, "seed": 40}, 2, {"temperature": RETRY_TEMPERATURE, "seed": 42}),
        ({"temperature": 0.2, "top_p": 0.5}, 1, {"temperature": 0.2, "top_p": 0.5, "seed": 1}),
        ({}, 1, {"seed": 1}),
    ],
)
def test_asking_again(sampling, retry, again):
    given = dict(sampling)
    assert asked_again(sampling, retry) == again
    assert sampling == given
