"""Functions that authors hand to a step: what they are called with, and whether they are still the same ones.

A shard that was done by the same step is left alone, so a function that has changed must not pass for the same. It is
told by its source without decorators, and by that of the plain functions of its module that it names, together with
the values of variables around it, as far as they are JSON values. What is imported, or looked up while it runs, is not
seen: for that there is the parameter ``version``.
"""

from __future__ import annotations

import contextlib
import hashlib
import inspect
import json
import re
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import date
from types import CodeType, FunctionType
from typing import Any

from airflow_vlm_provider.errors import ConfigError

_HEX_DIGITS = 32
# Decorators stand before it; of an Airflow task they name connections and retries.
_BEGINNING = re.compile(r"^[ \t]*(?:def|async def|class)\b", re.MULTILINE)
_CONSTANTS = (str, bytes, int, float, bool, type(None))


def check_function(
    function: Callable[..., Any], arguments: Mapping[str, Any], *, version: str | None
) -> None:
    """Check that a function can be called with a sample and these arguments, and be told from others.

    :raises ConfigError: it can't.
    """
    name = getattr(function, "__name__", repr(function))
    if inspect.iscoroutinefunction(function) or inspect.isgeneratorfunction(function):
        raise ConfigError(
            f"The function {name!r} must be a plain one that returns its prompt: no async, no yield."
        )
    try:
        inspect.signature(function).bind({}, **arguments)
    except TypeError as error:
        raise ConfigError(
            f"The function {name!r} can't be called with a sample and the arguments {sorted(arguments)}: {error}."
        ) from None
    if version is None:
        source_of(function)


def source_of(code: Any) -> str:
    """The source of a function or class, without its decorators.

    :raises ConfigError: it is not to be had.
    """
    try:
        source = inspect.getsource(code)
    except (OSError, TypeError):
        name = getattr(code, "__qualname__", repr(code))
        raise ConfigError(
            f"The source of {name} can't be read, so nobody could tell when it changes. Give version='1', and another "
            "version whenever it makes other prompts or takes other answers."
        ) from None
    beginning = _BEGINNING.search(source)
    return textwrap.dedent(source[beginning.start() if beginning else 0 :])


def digest_of(*code: Any) -> str:
    """What tells these functions and classes from others: 32 hexadecimal digits.

    :raises ConfigError: the source of one of them is not to be had.
    """
    described = [_describe(each, seen=set()) for each in code]
    return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:_HEX_DIGITS]


def recorded(arguments: Mapping[str, Any]) -> Mapping[str, Any]:
    """A function's arguments as JSON values, dates as ISO 8601 has them.

    :raises ConfigError: one of them is none.
    """
    return {name: _as_json(name, value) for name, value in arguments.items()}


@contextlib.contextmanager
def authors_code() -> Iterator[None]:
    """What an author's code raises is about one sample, where the same from storage would be about the whole shard."""
    try:
        yield
    except OSError as error:
        raise RuntimeError(f"The author's code failed: {error}") from error


def _as_json(name: str, value: Any) -> Any:
    try:
        return json.loads(json.dumps(value, default=_spelled))
    except (TypeError, ValueError):
        raise ConfigError(
            f"The function's argument {name}={value!r} is no JSON value, so nobody could tell when it changes. Pass "
            "what the function needs of it: strings, numbers, lists, dicts."
        ) from None


def _spelled(value: Any) -> Any:
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, Sequence):  # what mapped tasks returned comes as one that reads as it goes
        return list(value)
    raise TypeError(f"{type(value).__name__} is no JSON value")


def _describe(code: Any, *, seen: set[int]) -> Mapping[str, Any]:
    described: dict[str, Any] = {"source": source_of(code)}
    function = inspect.unwrap(code)
    if isinstance(function, FunctionType):
        seen.add(id(function))
        if function.__name__ == "<lambda>":
            # Several may stand in one line, which is the source of them all.
            described["code"] = _shape(function.__code__)
        described["around"] = dict(_around(function, seen))
    return described


def _around(function: FunctionType, seen: set[int]) -> Iterator[tuple[str, Any]]:
    """The variables that a function names and does not make itself."""
    closure = inspect.getclosurevars(function).nonlocals
    names = {name for code in _all_code(function.__code__) for name in code.co_names}
    variables = {
        **{name: function.__globals__[name] for name in names & set(function.__globals__)},
        **closure,
    }
    for name, value in sorted(variables.items()):
        if isinstance(value, FunctionType) and value.__module__ == function.__module__:
            if id(value) not in seen:
                yield name, _describe(value, seen=seen)
        elif _is_json(value):
            yield name, value


def _all_code(code: CodeType) -> Iterator[CodeType]:
    """A function's code and that of what is defined in it: comprehensions, lambdas."""
    yield code
    for each in code.co_consts:
        if isinstance(each, CodeType):
            yield from _all_code(each)


def _shape(code: CodeType) -> list[Any]:
    return [
        [list(each.co_names), [repr(const) for const in each.co_consts if isinstance(const, _CONSTANTS)]]
        for each in _all_code(code)
    ]


def _is_json(value: Any) -> bool:
    try:
        json.dumps(value, sort_keys=True)
    except (TypeError, ValueError, RecursionError):
        return False
    return True
