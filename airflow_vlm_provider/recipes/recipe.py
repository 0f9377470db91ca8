"""A recipe that was understood, and the error that says why one was not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.recipes.operators import SUPPORTED, Supported


class Problem(NamedTuple):
    """What is wrong with a recipe.

    :param place: Where: ``process[2].image_captioning_mapper.caption_num``, ``text_keys``, ...
    :param sentence: What, and what to do about it; never a value that may be a secret.
    """

    place: str
    sentence: str

    def __str__(self) -> str:
        return f"{self.place}: {self.sentence}" if self.place else self.sentence


class RecipeError(ConfigError):
    """A recipe can't be run. The message has all that is wrong with it, a line each."""

    def __init__(self, path: Path, problems: Sequence[Problem]) -> None:
        unique = tuple(dict.fromkeys(problems))
        things = "1 thing" if len(unique) == 1 else f"{len(unique)} things"
        lines = "\n".join(f"- {problem}" for problem in unique)
        super().__init__(f"The recipe {path} can't be run for {things}:\n{lines}")
        self.path = path
        self.problems = unique

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self.problems)


class Ignored(NamedTuple):
    """A setting or parameter that is understood and has no meaning here."""

    place: str
    reason: str


@dataclass(frozen=True)
class RecipeStep:
    """One of a recipe's operators.

    :param position: Its place in ``process``, from 0.
    :param operator: Data-Juicer's name for it.
    :param name: Names the step's task and folder; no two steps of a recipe have the same.
    :param parameters: What the recipe gives for the operator that runs it, the recipe's own settings included.
    """

    position: int
    operator: str
    name: str
    parameters: Mapping[str, Any]

    @property
    def place(self) -> str:
        """Where the recipe has it."""
        return place_of(self.position, self.operator)

    @property
    def supported(self) -> Supported:
        """Which operator runs it."""
        return SUPPORTED[self.operator]


@dataclass(frozen=True)
class Recipe:
    """What a recipe says, in this package's words.

    :param path: The recipe's file.
    :param source: Where the shards are: a URI or an absolute path; None when the recipe does not say.
    :param destination: Where outputs go; None when the recipe does not say.
    :param pattern: Only shards whose name matches; None for all.
    :param steps: What is run, in this order.
    :param ignored: What is understood and has no meaning here.
    """

    path: Path
    source: str | None
    destination: str | None
    pattern: str | None
    steps: Sequence[RecipeStep]
    ignored: Sequence[Ignored] = field(default_factory=tuple)


def place_of(position: int, operator: str) -> str:
    """How a place in ``process`` is written."""
    return f"process[{position}].{operator}"
