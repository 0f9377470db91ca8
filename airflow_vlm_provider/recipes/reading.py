"""Reading a Data-Juicer recipe: YAML in, what it says in this package's words out.

All that is wrong with a recipe is said at once, each with its place. Nothing is passed over in silence: what has no
meaning here is listed with the reason, and a name that is not known is an error. What may be a secret is never quoted.

Only the recipe's file is read, so that a DAG that is made of one parses as fast as any.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import yaml

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.recipes.operators import (
    FIELDS,
    IGNORED_PARAMETERS,
    REFUSED_PARAMETERS,
    SUPPORTED,
    Supported,
)
from airflow_vlm_provider.recipes.places import destination_of, source_of
from airflow_vlm_provider.recipes.recipe import Ignored, Problem, Recipe, RecipeError, RecipeStep, place_of
from airflow_vlm_provider.recipes.secrets import is_misplaced, misplaced
from airflow_vlm_provider.recipes.settings import IGNORED, KNOWN, REFUSED, SHARED, setting_of

# Data-Juicer's own file of all operators with all their parameters has a fifth of it.
MAX_RECIPE_BYTES = 1024 * 1024

_IN_CONNECTION = (
    "it belongs in the Airflow connection of type 'vlm' that vlm_conn_id names: an API key in its password, an address "
    "in its host, headers in its extra. Remove it here."
)


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """Read a recipe.

    :param path: The recipe's file. Relative paths in it are relative to its folder.
    :raises RecipeError: something in it is wrong, or has no counterpart here.
    :raises ConfigError: there is no such file, or it is no YAML.
    """
    recipe, problems = parse_recipe(path)
    if problems:
        raise RecipeError(recipe.path, problems)
    return recipe


def parse_recipe(path: str | os.PathLike[str]) -> tuple[Recipe, list[Problem]]:
    """Read a recipe for someone who has more to check: what of it is right, and all that is wrong.

    :raises ConfigError: there is no such file, or it is no YAML.
    """
    # Without looking at links: "beside the recipe" is where it is seen.
    file = Path(os.path.abspath(path))  # noqa: PTH100  Path.absolute() keeps ".."
    reading = _Reading(file, _load(file))
    return reading.recipe(), reading.problems


def _load(path: Path) -> Mapping[Any, Any]:
    try:
        with path.open("rb") as stream:
            data = stream.read(MAX_RECIPE_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"The recipe {path} can't be read: {error.strerror}. In a DAG, a relative path is looked for beside the "
            "DAG's file."
        ) from error
    if len(data) > MAX_RECIPE_BYTES:
        raise ConfigError(f"{path} has more than {MAX_RECIPE_BYTES:,} bytes: that is no recipe.")
    try:
        content = yaml.safe_load(data)
    except yaml.YAMLError as error:
        # Its own words quote the line, and there may be a key in it.
        mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
        where = f", line {mark.line + 1}, column {mark.column + 1}" if mark is not None else ""
        raise ConfigError(f"The recipe {path} is no YAML{where}: {problem or 'it is not text'}.") from None
    except RecursionError:
        raise ConfigError(f"The recipe {path} is nested too deeply.") from None
    if not isinstance(content, Mapping):
        raise ConfigError(
            f"{path} is no recipe: it must be a mapping of settings, with the list 'process' among them."
        )
    return content


class _Reading:
    """One recipe being read."""

    def __init__(self, path: Path, content: Mapping[Any, Any]) -> None:
        self.path = path
        self.content = content
        self.problems: list[Problem] = []
        self.ignored: list[Ignored] = []
        self.unsupported = False

    def recipe(self) -> Recipe:
        """What it says, as far as that is right."""
        settings = self._settings()
        shared = {**self._text_key(settings), **self._shared(settings)}
        source = source_of(settings, self.path.parent, report=self._report, ignore=self.ignored.append)
        destination = destination_of(
            settings, self.path.parent, report=self._report, ignore=self.ignored.append
        )
        pattern = self._pattern(settings)
        steps = self._steps(settings.get("process"), shared)
        return Recipe(self.path, source, destination, pattern, tuple(steps), tuple(self.ignored))

    def _report(self, place: str, sentence: str) -> None:
        self.problems.append(Problem(place, sentence))

    # --- settings ----------------------------------------------------------------------------------------------

    def _settings(self) -> dict[str, Any]:
        """The settings that are read, once all others are told."""
        read: dict[str, Any] = {}
        for given, value in self.content.items():
            name = setting_of(str(given))
            if name not in KNOWN:
                self._unknown(str(given), name)
            elif name in REFUSED:
                if value:
                    self._report(name, REFUSED[name])
            elif name in IGNORED:
                self.ignored.append(Ignored(str(given), IGNORED[name]))
            else:
                read[name] = value
        return read

    def _unknown(self, place: str, name: str) -> None:
        if name.endswith(("_mapper", "_filter", "_deduplicator", "_selector", "_grouper", "_aggregator")):
            self._report(place, "operators stand in the list 'process'; move it there.")
        elif is_misplaced(name):
            self._report(place, _IN_CONNECTION)
        else:
            self._report(place, f"Data-Juicer knows no such setting{_nearest(name, KNOWN)}")

    def _text_key(self, settings: Mapping[str, Any]) -> dict[str, str]:
        value = settings.get("text_keys")
        if isinstance(value, list):
            if len(value) != 1:
                self._report(
                    "text_keys",
                    f"there are {len(value)} fields, and a step reads one text. Keep one; where an operator is to "
                    "read another, give that one its own text_key.",
                )
                return {}
            value = value[0]
        return self._field("text_keys", "text_key", value)

    def _shared(self, settings: Mapping[str, Any]) -> dict[str, str]:
        shared: dict[str, str] = {}
        for setting, parameter in SHARED.items():
            value = settings.get(setting)
            if parameter.endswith("_key"):
                shared |= self._field(setting, parameter, value)
            elif value is not None:
                if isinstance(value, str) and value:
                    shared[parameter] = value
                else:
                    self._report(setting, "it must be a string that is not empty.")
        return shared

    def _field(self, place: str, parameter: str, value: Any) -> dict[str, str]:
        if value is None:
            return {}
        if not isinstance(value, str) or not value:
            self._report(place, "it must be a field's name.")
        elif "." in value:
            self._report(
                place,
                f"{value!r} names a field inside another, which can't be read. Move it to a field of its own.",
            )
        else:
            return {parameter: value}
        return {}

    def _pattern(self, settings: Mapping[str, Any]) -> str | None:
        from airflow_vlm_provider.shards.formats import FORMATS

        value = settings.get("suffixes")
        suffixes = [value] if isinstance(value, str) else value or []
        if not isinstance(suffixes, list) or not all(isinstance(each, str) and each for each in suffixes):
            self._report("suffixes", "it must be a suffix, or a list of them.")
            return None
        supported = [suffix for each in FORMATS for suffix in each.suffixes]
        for each in suffixes:
            if f".{each.lstrip('.')}" not in supported:
                self._report("suffixes", f"{each!r} is no shard's; supported are {', '.join(supported)}.")
                return None
        if len(suffixes) > 1:
            self._report(
                "suffixes",
                "only one can be chosen. Leave them out to take all shards, or give recipe_task_group() a pattern.",
            )
            return None
        return f"*.{suffixes[0].lstrip('.')}" if suffixes else None

    # --- operators ---------------------------------------------------------------------------------------------

    def _steps(self, process: Any, shared: Mapping[str, Any]) -> list[RecipeStep]:
        if not isinstance(process, list) or not process:
            self._report("process", f"it must be a list of operators. Supported are {', '.join(SUPPORTED)}.")
            return []
        steps: list[RecipeStep] = []
        names: dict[str, int] = {}
        for position, item in enumerate(process):
            found = self._operator(position, item)
            if found is None:
                continue
            operator, given = found
            place, supported = place_of(position, operator), SUPPORTED[operator]
            names[supported.step] = number = names.get(supported.step, 0) + 1
            parameters = {**shared, **self._parameters(place, supported, given)}
            steps.append(
                RecipeStep(
                    position,
                    operator,
                    name=supported.step if number == 1 else f"{supported.step}_{number}",
                    parameters=parameters,
                )
            )
        if self.unsupported:
            self._report(
                "process",
                f"the operators that are supported are {', '.join(SUPPORTED)}. Run the others with Data-Juicer, before "
                "or after, by a recipe of their own.",
            )
        return steps

    def _operator(self, position: int, item: Any) -> tuple[str, Mapping[Any, Any]] | None:
        """An item's operator, if there is one for it here, and what it is given."""
        place = f"process[{position}]"
        if isinstance(item, str):
            item = {item: None}
        if not isinstance(item, Mapping) or not item:
            self._report(place, "it must be an operator's name, with its parameters indented below it.")
            return None
        if len(item) > 1:
            self._report(
                place,
                f"it has {len(item)} names where one operator's is expected ({', '.join(map(str, item))}). Indent an "
                "operator's parameters further than its name, and begin each operator with '-'.",
            )
            return None
        ((operator, given),) = item.items()
        if operator not in SUPPORTED:
            # Nearly all names of operators are alike.
            nearest = _nearest(str(operator), SUPPORTED, cutoff=0.85)
            self._report(place_of(position, str(operator)), f"this operator is not supported{nearest}")
            self.unsupported = True
            return None
        if given is None:
            given = {}
        if not isinstance(given, Mapping):
            self._report(place_of(position, operator), "its parameters must be a mapping of names to values.")
            return None
        return operator, given

    def _parameters(self, place: str, supported: Supported, given: Mapping[Any, Any]) -> dict[str, Any]:
        parameters: dict[str, Any] = {}
        for each, value in given.items():
            name, own_place = str(each), f"{place}.{each}"
            if name in supported.secrets or (name not in supported.known and is_misplaced(name)):
                if value:
                    self._report(own_place, _IN_CONNECTION)
            elif name in FIELDS:
                parameters |= self._field(own_place, name, value)
            elif name in supported.known:
                if self._is_json(own_place, value):
                    parameters[name] = value
            elif name in REFUSED_PARAMETERS:
                if value is not None:
                    self._report(own_place, REFUSED_PARAMETERS[name])
            elif name in IGNORED_PARAMETERS:
                self.ignored.append(Ignored(own_place, IGNORED_PARAMETERS[name]))
            else:
                known = (*supported.known, *FIELDS)
                self._report(
                    own_place,
                    f"there is no such parameter{_nearest(name, known)} Supported are {', '.join(known)}.",
                )
        return parameters

    def _is_json(self, place: str, value: Any) -> bool:
        """Whether a value can be kept in a manifest, and holds no secret; says so when not."""
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError, RecursionError):
            self._report(place, "it holds a value that JSON does not know, such as a date. Put it in quotes.")
            return False
        secrets = list(misplaced(value, place))
        for each in secrets:
            self._report(each, _IN_CONNECTION)
        return not secrets


def _nearest(name: str, known: Collection[str], *, cutoff: float = 0.6) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=cutoff)
    return f"; did you mean {close[0]}?" if close else "."
