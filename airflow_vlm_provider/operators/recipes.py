"""A Data-Juicer recipe as a task group: one plan, and the recipe's operators one after another over its groups."""

from __future__ import annotations

import importlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from airflow.sdk import TaskGroup, task_group

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.operators.parameters import UNKNOWN
from airflow_vlm_provider.operators.shards import PlanShardsOperator
from airflow_vlm_provider.recipes.chain import chain
from airflow_vlm_provider.recipes.reading import parse_recipe
from airflow_vlm_provider.recipes.recipe import Problem, Recipe, RecipeError, RecipeStep

if TYPE_CHECKING:
    from airflow_vlm_provider.operators.base import ShardOperator

# What is the same for all of a group's operators, or follows from their order.
_DECIDED = frozenset(
    {
        *("dag", "task_group", "task_id", "shards", "source", "destination"),
        *("media_roots", "output", "reuse_from"),
    }
)


def recipe_task_group(
    recipe: str | os.PathLike[str],
    *,
    group_id: str | None = None,
    source: str | None = None,
    destination: str | None = None,
    pattern: str | None = None,
    max_tasks: int | str = 1000,
    vlm_conn_id: str = "vlm_default",
    aws_conn_id: str | None = "aws_default",
    storage_conn_id: str | None = None,
    media_roots: Sequence[str] | None = None,
    reuse_from: str | Sequence[str] | None = None,
    output: str | None = None,
    operator_args: Mapping[str | int, Mapping[str, Any]] | None = None,
    **kwargs: Any,
) -> TaskGroup:
    """
    Make a Data-Juicer recipe's operators into tasks: one plan, and the operators one after another over its groups.

    To be called where a DAG is made::

        with DAG("nightly", schedule="@daily"):
            recipe_task_group("recipe.yaml", source="s3://bucket/raw/", destination="s3://bucket/captioned/")

    Each group of shards goes through all of the recipe's operators by itself. What is given here comes before what
    the recipe says, and ``operator_args`` before everything else. Steps before the last write below
    ``<destination>/_steps/``; the result stands in the destination itself.

    The recipe is read when the DAG is parsed. Whatever is wrong with it is said there, all at once.

    :param recipe: The recipe's file; a relative path is looked for beside the file that the DAG is made in.
    :param group_id: The group's id; None names it after the recipe's file.
    :param source: Where the shards are (templated); None takes the recipe's ``dataset_path``, of which a relative one
        is relative to the recipe. A name that ends like a shard's is that of one shard; end a folder's with a slash.
    :param destination: Where outputs and the ledger go (templated); None takes the recipe's ``export_path``, without
        the suffix, of which a relative one is relative to the recipe.
    :param pattern: As :class:`PlanShardsOperator` has it (templated); None takes the recipe's ``suffixes``.
    :param max_tasks: Most groups to make of the shards, which are most tasks of each operator (templated).
    :param vlm_conn_id: Connection of type ``vlm`` (templated).
    :param aws_conn_id: Connection for S3; None uses boto3's own search for credentials (templated).
    :param storage_conn_id: Connection for other object stores than S3 (templated).
    :param media_roots: Where media may be, for all steps; None allows only what lies where the source's shards are.
    :param reuse_from: Further destinations of such groups whose answers count as known (templated).
    :param output: How the last step writes: ``full``, ``sidecar``, or None for what suits the shard. Those before it
        write in full.
    :param operator_args: Arguments for some of the operators alone: by Data-Juicer's name
        (``{"image_captioning_mapper": {"engine": "transformers"}}``), or by their place in the recipe, from 0 or, from
        its end, from -1.
    :param kwargs: Arguments for all operators, their own or every task's: ``queue``, ``pool``, ``retries``,
        ``engine``, ``concurrency``, ``max_error_rate``, ...
    :return: The group, for what comes before and after it. Its tasks are ``plan`` and, in a group ``shards``, one for
        each operator: ``image_tagging``, ``image_captioning``, ``image_captioning_2``, ...
    :raises ConfigError: the recipe can't be run; the message says everything that is wrong.
    """
    name = group_id if group_id is not None else re.sub(r"[^A-Za-z0-9_-]", "_", Path(recipe).stem)
    with TaskGroup(name, tooltip=f"Recipe {Path(recipe).name}") as group:
        # Where Airflow looks for a template's file, too; the working directory is anywhere.
        read, problems = parse_recipe(Path(group.dag.folder) / recipe)
        overrides = _overrides(read, operator_args or {}, problems)
        source, destination = source or read.source, destination or read.destination
        for what, value, setting in (
            ("source", source, "dataset_path"),
            ("destination", destination, "export_path"),
        ):
            if not value:
                problems.append(
                    Problem(setting, f"it is missing. Add it, or give recipe_task_group() a {what}.")
                )
        plan = PlanShardsOperator(
            task_id="plan",
            source=source or UNKNOWN,
            pattern=pattern if pattern is not None else read.pattern,
            max_tasks=max_tasks,
            aws_conn_id=aws_conn_id,
            storage_conn_id=storage_conn_id,
        )
        shared = {
            "vlm_conn_id": vlm_conn_id,
            "aws_conn_id": aws_conn_id,
            "storage_conn_id": storage_conn_id,
            **kwargs,
        }

        # A mapped group, and not operators that are mapped one by one: these would all wait for the last group of
        # shards, while so each goes on to the next step when it is through with one, whatever becomes of the others.
        # The plan knows both, and leaves out a shard when every step has done it.
        @task_group(group_id="shards")
        def each_group(shards: Any) -> None:
            operators = make_operators(
                read,
                problems,
                source=source,
                destination=destination,
                media_roots=media_roots,
                reuse_from=[reuse_from] if isinstance(reuse_from, str) else reuse_from or (),
                output=output,
                given=lambda step: {**shared, **overrides.get(step.position, {}), "shards": shards},
            )
            for before, after in pairwise(operators):
                before >> after

        each_group.expand(shards=plan.output)
    if problems:
        raise RecipeError(read.path, problems)
    return group


def make_operators(
    recipe: Recipe,
    problems: list[Problem],
    *,
    source: str | None = None,
    destination: str | None = None,
    media_roots: Sequence[str] | None = None,
    reuse_from: Sequence[str] = (),
    output: str | None = None,
    given: Callable[[RecipeStep], Mapping[str, Any]] = lambda _: {},
) -> list[ShardOperator]:
    """Make the operators of a recipe's steps, in order, each reading what the one before it writes.

    :param problems: Takes what is wrong with parameters; such a step has no operator in the list.
    :param source: Where the shards are; None is not known yet, and neither is ``destination`` with None.
    :param given: What an operator is given that comes before what the recipe says.
    """
    operators: list[ShardOperator] = []
    for step, parameters in chain(
        recipe.steps,
        source=source or UNKNOWN,
        destination=destination or UNKNOWN,
        media_roots=media_roots,
        reuse_from=reuse_from,
        output=output,
    ):
        more = given(step)
        own = {
            name: value
            for name, value in step.parameters.items()
            if step.supported.yielding.get(name) not in more
        }
        try:
            operators.append(operator_class(step)(task_id=step.name, **{**own, **more, **parameters}))
        except ConfigError as error:
            problems.append(Problem(step.place, str(error)))
    return operators


def operator_class(step: RecipeStep) -> type[ShardOperator]:
    """The operator that runs a step."""
    found: type[ShardOperator] = getattr(
        importlib.import_module(step.supported.module), step.supported.operator
    )
    return found


def _overrides(
    recipe: Recipe, operator_args: Mapping[str | int, Mapping[str, Any]], problems: list[Problem]
) -> dict[int, dict[str, Any]]:
    """What single steps are given, by their positions."""
    found: dict[int, dict[str, Any]] = {}
    # By name first: a place says more.
    for which, arguments in sorted(operator_args.items(), key=lambda item: isinstance(item[0], int)):
        place = f"operator_args[{which!r}]"
        chosen = [
            step
            for step in recipe.steps
            if which in (step.operator, step.position, step.position - len(recipe.steps))
        ]
        if not chosen:
            names = ", ".join(f"{step.position} ({step.operator})" for step in recipe.steps)
            problems.append(Problem(place, f"the recipe has no such operator; it has {names}."))
        if decided := sorted(_DECIDED & set(arguments)):
            problems.append(
                Problem(place, f"{', '.join(decided)}: recipe_task_group() decides this for all operators.")
            )
        for step in chosen:
            found.setdefault(step.position, {}).update(arguments)
    return found
