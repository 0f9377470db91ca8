"""Checks of what a DAG's author wrote, as early as it can be told: when the DAG is parsed, or else when a task starts."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from itertools import permutations
from types import SimpleNamespace
from typing import Any

from airflow.sdk.exceptions import AirflowFailException

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.operators.destination import check_destination

SPECIAL_TOKENS = ("image", "video", "audio", "eoc")
ENGINES = ("openai", "vllm", "transformers")
# Stands for what a mapped operator does not know yet.
UNKNOWN = "{{ mapped }}"


class ParameterError(ConfigError, AirflowFailException):
    """A parameter is wrong, which no retry will mend.

    A mapped operator is only made when its task runs, outside of ``execute()``: there, Airflow has to know it for
    what it is.
    """


def is_known(value: Any) -> bool:
    """Whether a value is final, and not a template or another task's result."""
    if isinstance(value, str):
        return "{{" not in value and "{%" not in value
    return not hasattr(value, "resolve") and not hasattr(value, "iter_references")


def check_parameters(given: Any) -> None:
    """Check the parameters that all shard operators share, and the step's own, as far as they are known.

    :param given: The operator, or anything with its attributes.
    :raises ParameterError: the sentence names the parameter, its value and the remedy.
    """
    try:
        _check_engine(given)
        _check_values(given)
        _check_lists(given)
        given.make_step()
        if is_known(given.source) and is_known(given.destination):
            check_destination(given.source, given.destination)
    except ParameterError:
        raise
    except ConfigError as error:
        raise ParameterError(str(error)) from None


def refuse_key(given: Mapping[str, Any]) -> None:
    """Refuse an API key among an operator's arguments, before anything repeats it.

    :raises ParameterError: there is one.
    """
    if "api_key" in given:
        raise ParameterError(
            "api_key is no argument of this operator: an API key belongs into the password of the connection that "
            "vlm_conn_id names, where it is encrypted and masked in logs. Remove it from the DAG."
        )


def check_partial(operator: type, kwargs: Mapping[str, Any]) -> None:
    """Check what ``partial()`` was given, with the defaults for what is still to be mapped.

    :raises ParameterError: as :func:`check_parameters`.
    """
    refuse_key(kwargs)
    values: dict[str, Any] = {}
    for base in reversed(operator.__mro__):
        if "__init__" in vars(base) and getattr(base, "make_step", None):
            for name, parameter in inspect.signature(vars(base)["__init__"]).parameters.items():
                if parameter.kind is parameter.KEYWORD_ONLY:
                    values[name] = UNKNOWN if parameter.default is parameter.empty else parameter.default
    given = SimpleNamespace(**{**values, **kwargs})
    given.output_form = given.output
    given.make_step = lambda: operator.make_step(given)  # type: ignore[attr-defined]
    check_parameters(given)


def _check_engine(given: Any) -> None:
    if given.engine not in (None, *ENGINES):
        raise ParameterError(
            f"engine={given.engine!r} is not known. Use 'openai' (any OpenAI-compatible endpoint), 'vllm' or "
            "'transformers', or leave it out to take the connection's."
        )
    if given.is_api_model and given.engine not in (None, "openai"):
        raise ParameterError(f"is_api_model=True contradicts engine={given.engine!r}. Leave one of them out.")
    for name in ("api_endpoint", "response_path", "api_or_hf_model"):
        value = getattr(given, name)
        if value is not None and not isinstance(value, str) and is_known(value):
            raise ParameterError(f"{name}={value!r} must be a string, or None.")
    if given.model_params is not None:
        if not isinstance(given.model_params, Mapping):
            raise ParameterError(f"model_params={given.model_params!r} must be a dict, or None.")
        try:
            json.dumps(given.model_params)
        except (TypeError, ValueError) as error:
            raise ParameterError(f"model_params holds a value that is not a JSON value: {error}.") from None


def _check_values(given: Any) -> None:
    rate = given.max_error_rate
    if not isinstance(rate, int | float) or isinstance(rate, bool) or not 0 <= rate <= 1:
        raise ParameterError(f"max_error_rate={rate!r} must be a share from 0 to 1, such as 0.1 for a tenth.")
    for name in ("max_pixels", "concurrency"):
        value = getattr(given, name)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
            raise ParameterError(f"{name}={value!r} must be a whole number of at least 1, or None.")
    if given.output_form not in (None, "full", "sidecar"):
        raise ParameterError(
            f"output={given.output_form!r} must be 'full', 'sidecar' or None, for what suits the shard."
        )
    for name in ("text_key", "image_key", "video_key", "meta_key"):
        value = getattr(given, name)
        if not isinstance(value, str) or not value:
            raise ParameterError(f"{name}={value!r} must be a field's name.")
    tokens = dict(zip(SPECIAL_TOKENS, special_tokens(given), strict=True))
    for name, value in tokens.items():
        if not isinstance(value, str) or not value:
            raise ParameterError(f"{name}_special_token={value!r} must be a string that is not empty.")
    for name, other in permutations(tokens, 2):
        if tokens[name] in tokens[other]:
            raise ParameterError(
                f"{name}_special_token={tokens[name]!r} is part of {other}_special_token={tokens[other]!r}; choose tokens "
                "that can be told apart."
            )


def special_tokens(given: Any) -> tuple[str, ...]:
    """What stands in a text for an image, a video and a sound, and what ends a chunk.

    :param given: The operator, or anything with its attributes.
    """
    return tuple(getattr(given, f"{name}_special_token") for name in SPECIAL_TOKENS)


def _check_lists(given: Any) -> None:
    roots, shards, reuse = given.media_roots, given.shards, given.reuse_from
    if isinstance(roots, str) and is_known(roots):
        raise ParameterError(f"media_roots={roots!r} must be a list: [{roots!r}].")
    for name, value in (("media_roots", roots), ("shards", shards), ("reuse_from", reuse)):
        if value is None or isinstance(value, str) or not is_known(value):
            continue
        if not isinstance(value, Sequence) or not all(
            isinstance(each, str) or not is_known(each) for each in value
        ):
            raise ParameterError(f"{name}={value!r} must be a list of strings, or None.")
