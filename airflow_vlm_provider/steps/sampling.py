"""Sampling parameters: Data-Juicer's spellings read as OpenAI's, and a change of luck for asking again."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

from airflow_vlm_provider.errors import ConfigError

RETRY_TEMPERATURE = 0.7
"""Temperature of asking again where the first ask was greedy, and would be answered by the same once more."""


def read_sampling(params: Mapping[str, Any] | None, *, defaults: Mapping[str, Any]) -> dict[str, Any]:
    """A user's sampling parameters over the defaults, by their OpenAI names.

    ``max_new_tokens`` is read as ``max_tokens``, ``do_sample=False`` as temperature 0, ``do_sample=True`` as
    temperature 1 unless one is given; ``max_completion_tokens`` takes the place of a default ``max_tokens``. A
    value of None removes a default, for endpoints that refuse a parameter. Other names are passed on as they are.

    :raises ConfigError: not a mapping of JSON values, ``n`` among them, or a value that no endpoint takes.
    """
    if params is None:
        params = {}
    if not isinstance(params, Mapping) or not all(isinstance(name, str) for name in params):
        raise ConfigError(
            f"sampling_params is {params!r}; give a mapping like {{'temperature': 0.2}}, or None."
        )
    given = dict(params)
    if "n" in given:
        raise ConfigError(
            f"sampling_params holds n={given['n']!r}; remove it: the step itself decides how many answers it needs."
        )
    if "max_new_tokens" in given:
        if "max_tokens" in given:
            raise ConfigError(
                "sampling_params holds max_tokens and max_new_tokens, which are the same; keep one."
            )
        given["max_tokens"] = given.pop("max_new_tokens")
    if "max_completion_tokens" in given:
        given.setdefault("max_tokens", None)
    if (do_sample := given.pop("do_sample", None)) is not None:
        given["temperature"] = given.get("temperature", 1.0) if do_sample else 0
    sampling = {name: value for name, value in {**defaults, **given}.items() if value is not None}
    _check(sampling)
    return copy.deepcopy(sampling)


def asked_again(sampling: Mapping[str, Any], retry: int) -> dict[str, Any]:
    """The sampling parameters of the ``retry``-th time of asking again; 0 is the first ask, which keeps them.

    Another seed each time, so that the answer can differ, and so that it is a request of its own in a journal.
    """
    if retry == 0:
        return dict(sampling)
    again = {**sampling, "seed": sampling.get("seed", 0) + retry}
    if sampling.get("temperature") == 0:
        again["temperature"] = RETRY_TEMPERATURE
    return again


def _check(sampling: Mapping[str, Any]) -> None:
    for name, kind, least, example in (
        ("temperature", (int, float), 0, "a number from 0 on, such as 0.2"),
        ("max_tokens", int, 1, "a whole number from 1 on, such as 256"),
        ("max_completion_tokens", int, 1, "a whole number from 1 on, such as 256"),
        ("seed", int, 0, "a whole number from 0 on"),
    ):
        value = sampling.get(name, least)
        if isinstance(value, bool) or not isinstance(value, kind) or not value >= least:
            raise ConfigError(f"sampling_params holds {name}={value!r}; give {example}, or leave it out.")
    for name, value in sampling.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            raise ConfigError(f"sampling_params holds {name}={value!r}, which is no JSON value.") from None
