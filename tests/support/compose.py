"""The compose file as compose reads it: variables put in, and ``.env`` files.

Only the forms that the file uses are known: ``$$``, ``${NAME:-default}``, ``${NAME:?message}``. A default or message
holds no braces: compose and people disagree on where such a one ends.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from cryptography.fernet import Fernet

REPOSITORY = Path(__file__).parents[2]
COMPOSE_FILE = REPOSITORY / "docker-compose.yaml"
EXAMPLE_ENV = REPOSITORY / ".env.example"

_VARIABLE = re.compile(
    r"\$(?:(?P<dollar>\$)|\{(?P<name>[A-Z0-9_]+):(?P<kind>[-?])(?P<text>[^{}$]*)\}|(?P<wrong>.?))"
)
_LINE = re.compile(r"(?P<name>[A-Z0-9_]+)=(?P<quote>'?)(?P<value>[^']*)(?P=quote)")


class VariableMissingError(Exception):
    """A variable is needed, and empty or not set."""


def compose_file(variables: Mapping[str, str] | None = None) -> dict[str, Any]:
    """The file with its anchors resolved; with variables put in, if some are given.

    :raises VariableMissingError: one of ``${NAME:?message}`` is empty or not set.
    """
    parsed: dict[str, Any] = yaml.safe_load(COMPOSE_FILE.read_text())
    return parsed if variables is None else _mapped(parsed, lambda text: interpolated(text, variables))


def interpolated(text: str, variables: Mapping[str, str]) -> str:
    """A text with variables put in.

    :raises VariableMissingError: one of ``${NAME:?message}`` is empty or not set.
    """

    def replacement(found: re.Match[str]) -> str:
        if found["dollar"]:
            return "$"
        if found["wrong"] is not None:
            raise ValueError(f"A form of variable that is not known here: {text[found.start() :]}")
        value = variables.get(found["name"], "")
        if not value and found["kind"] == "?":
            raise VariableMissingError(found["name"])
        return value or found["text"]

    return _VARIABLE.sub(replacement, text)


def variables_used() -> list[tuple[str, str, str]]:
    """Every variable of the file: its name, ``-`` or ``?``, and the default or the message."""
    texts = _texts(compose_file())
    found = [each for text in texts for each in _VARIABLE.finditer(text) if each["name"]]
    return [(each["name"], each["kind"], each["text"]) for each in found]


def example_env() -> dict[str, str]:
    """What ``.env.example`` says; it is empty where people have to say it."""
    lines = [line for line in EXAMPLE_ENV.read_text().splitlines() if line and not line.startswith("#")]
    found = {line: _LINE.fullmatch(line) for line in lines}
    assert all(found.values()), found
    return {each["name"]: each["value"] for each in found.values() if each}


def filled_env() -> dict[str, str]:
    """``.env.example`` with every empty value filled in, as its comments say."""
    filled = {name: value or secrets.token_hex(32) for name, value in example_env().items()}
    return {**filled, "AIRFLOW_FERNET_KEY": Fernet.generate_key().decode()}


def _mapped(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {key: _mapped(each, change) for key, each in value.items()}
    if isinstance(value, list):
        return [_mapped(each, change) for each in value]
    return change(value) if isinstance(value, str) else value


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _texts(each)
    elif isinstance(value, str):
        yield value


AS_IT_IS = compose_file()
"""The file's content, with variables as they are where nobody sets them."""
AIRFLOW = sorted(
    name
    for name, each in AS_IT_IS["services"].items()
    if "AIRFLOW__CORE__EXECUTOR" in each.get("environment", {})
)
"""The services that are Airflow."""
