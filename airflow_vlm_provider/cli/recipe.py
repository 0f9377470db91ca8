"""``airflow vlm recipe``: what a Data-Juicer recipe would run.

Values are printed as they are: reading a recipe refuses those that belong in a connection.
"""

from __future__ import annotations

import inspect
import json
from argparse import Namespace
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from airflow.utils.cli import suppress_logs_and_warning

from airflow_vlm_provider.cli.report import shortened
from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.recipes.reading import parse_recipe
from airflow_vlm_provider.recipes.recipe import RecipeError

if TYPE_CHECKING:
    from airflow_vlm_provider.operators.base import ShardOperator
    from airflow_vlm_provider.recipes.recipe import Problem, Recipe

_TO_BE_GIVEN = "(to be given to recipe_task_group())"
# Where a step stands among the others; told beside its parameters.
_PLACES = ("source", "destination", "media_roots", "output")


@suppress_logs_and_warning
def check(args: Namespace) -> None:
    """Print what a recipe would run, or all that is wrong with it."""
    try:
        found = _checked(*parse_recipe(args.recipe))
    except ConfigError as error:
        if args.output == "json":
            problems = error.problems if isinstance(error, RecipeError) else [("", str(error))]
            print(json.dumps({"errors": [{"place": place, "message": told} for place, told in problems]}))
            raise SystemExit(1) from error
        raise SystemExit(str(error)) from error
    if args.output == "json":
        print(json.dumps(found))
        return
    for line in _lines(found, verbose=args.verbose):
        print(line)


def _checked(recipe: Recipe, problems: list[Problem]) -> dict[str, Any]:
    """What a recipe would run, as JSON values.

    :param problems: What is wrong with it so far.
    :raises RecipeError: anything is wrong, or an operator does not take its parameters.
    """
    from airflow_vlm_provider.operators.recipes import make_operators

    operators = make_operators(recipe, problems, source=recipe.source, destination=recipe.destination)
    if problems:
        raise RecipeError(recipe.path, problems)
    places = {"source": recipe.source, "destination": recipe.destination}
    return {
        "recipe": str(recipe.path),
        **places,
        "pattern": recipe.pattern,
        "steps": [
            {
                "place": step.place,
                "operator": type(operator).__name__,
                "task": step.name,
                **{name: _place(operator, name, places) for name in _PLACES},
                "parameters": _parameters(operator, step.parameters),
            }
            for step, operator in zip(recipe.steps, operators, strict=True)
        ],
        "ignored": [each._asdict() for each in recipe.ignored],
    }


def _place(operator: ShardOperator, name: str, places: Mapping[str, str | None]) -> Any:
    """Where an operator reads or writes; None where that hangs on what the recipe does not say."""
    from airflow_vlm_provider.operators.parameters import UNKNOWN

    value = getattr(operator, "output_form" if name == "output" else name)
    told = value if isinstance(value, list) else [value]
    unknown = None in places.values() and any(UNKNOWN in str(each) for each in told)
    return None if unknown else value


def _parameters(operator: ShardOperator, given: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters that are the operator's own, as it has them, and of the others what the recipe gives."""
    own = [
        name
        for name, parameter in inspect.signature(type(operator).__init__).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    ]
    return {name: getattr(operator, name) for name in dict.fromkeys((*own, *given))}


def _lines(found: Mapping[str, Any], *, verbose: bool) -> Iterator[str]:
    """The same in words."""
    steps = found["steps"]
    yield f"{found['recipe']}: {len(steps)} {'operator' if len(steps) == 1 else 'operators'}"
    yield f"  source       {found['source'] or _TO_BE_GIVEN}"
    yield f"  destination  {found['destination'] or _TO_BE_GIVEN}"
    if found["pattern"]:
        yield f"  pattern      {found['pattern']}"
    for step in steps:
        yield ""
        yield f"{step['place']}: {step['operator']}, task {step['task']}"
        for name in _PLACES:
            if step[name] is not None:
                yield f"  {name} = {json.dumps(step[name], ensure_ascii=False)}"
        for name, value in step["parameters"].items():
            text = json.dumps(value, ensure_ascii=False, default=str)
            yield f"    {name} = {text if verbose else shortened(text)}"
    if found["ignored"]:
        yield ""
        yield "Ignored:"
        for each in found["ignored"]:
            yield f"  {each['place']}: {each['reason']}"
