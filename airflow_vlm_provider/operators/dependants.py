"""Which shard operators map over a plan, each with its parameters as its tasks will have them.

Only what is written in the DAG is looked at, nothing is asked of Airflow. What can't be told is said, not guessed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

from airflow.sdk import BaseOperator, TaskGroup
from airflow.sdk.bases.decorator import DecoratedMappedOperator
from airflow.sdk.definitions.mappedoperator import MappedOperator
from airflow.sdk.definitions.param import process_params
from airflow.sdk.definitions.xcom_arg import PlainXComArg

from airflow_vlm_provider.errors import VLMError
from airflow_vlm_provider.operators.base import ShardOperator
from airflow_vlm_provider.operators.parameters import check_parameters

if TYPE_CHECKING:
    from airflow.sdk import Context


class UntoldError(VLMError):
    """What maps over a plan can't be told before it runs. The message completes "because"."""


def shard_dependants(plan: BaseOperator, context: Context) -> Iterator[ShardOperator]:
    """Yield the operators that map over a plan's groups and nothing else, rendered, without their shards.

    :param plan: The task that returns the groups.
    :param context: Of the plan's run.
    :raises UntoldError: something else maps over the plan, or in another way, or parameters can't be rendered yet.
    """
    found = list(plan.iter_mapped_dependants()) if plan.get_dag() is not None else []
    if not found:
        raise UntoldError("nothing in the DAG maps over the plan")
    for dependant in found:
        operators: list[BaseOperator]
        if isinstance(dependant, MappedOperator):
            operators = [_unmapped(dependant, plan)]
        else:
            operators = _in_group(cast("TaskGroup", dependant), plan)
        for operator in operators:
            yield _rendered(operator, context)


def _unmapped(mapped: MappedOperator, plan: BaseOperator) -> BaseOperator:
    """The operator that a mapped one's tasks are, as Airflow itself makes it for each of them."""
    _check_is_for_shards(mapped.task_id, mapped.operator_class)
    if _mapped_names(mapped._get_specified_expand_input(), plan) != {"shards"}:
        raise UntoldError(f"{mapped.task_id!r} maps over more than the plan's groups as they are")
    # Of a decorated function it is the arguments of the call that are mapped.
    decorated = isinstance(mapped, DecoratedMappedOperator)
    try:
        return mapped.unmap({"op_kwargs": {"shards": None}} if decorated else {"shards": None})
    except Exception as error:
        raise UntoldError(f"{mapped.task_id!r} can't be made: {error}") from error


def _in_group(group: TaskGroup, plan: BaseOperator) -> list[BaseOperator]:
    """The operators of a mapped task group, all of which must take shards."""
    expand_input = group._expand_input  # type: ignore[attr-defined]
    names = _mapped_names(expand_input, plan)
    operators = []
    for task in group.iter_tasks():
        _check_is_for_shards(task.task_id, type(task))
        shards = cast("ShardOperator", task).shards
        if getattr(shards, "_input", None) is not expand_input or {getattr(shards, "_key", None)} != names:
            raise UntoldError(f"{task.task_id!r} maps over more than the plan's groups as they are")
        # Locked, so that what is set on it does not reach the DAG.
        copied = cast("BaseOperator", task).prepare_for_execution()
        cast("ShardOperator", copied).shards = None
        operators.append(copied)
    return operators


def _check_is_for_shards(task_id: str, operator: type) -> None:
    if not issubclass(operator, ShardOperator):
        raise UntoldError(f"{task_id!r} maps over the plan too, and what it has done already is not known")


def _mapped_names(expand_input: Any, plan: BaseOperator) -> set[str]:
    """The arguments that are mapped over the plan's groups; empty when there are others, or other values."""
    values = expand_input.value
    if not isinstance(values, Mapping):
        return set()
    plain = all(
        isinstance(value, PlainXComArg) and value.operator.task_id == plan.task_id
        for value in values.values()
    )
    return set(values) if plain else set()


def _rendered(operator: BaseOperator, context: Context) -> ShardOperator:
    own = dict(context)
    own["task"] = operator
    try:
        if (dag := operator.get_dag()) is not None and (dag_run := context.get("dag_run")) is not None:
            own["params"] = process_params(dag, operator, dag_run.conf, suppress_exception=False)
        operator.render_template_fields(cast("Context", own))
        check_parameters(operator)
    except Exception as error:
        raise UntoldError(f"the parameters of {operator.task_id!r} can't be told yet: {error}") from error
    return cast("ShardOperator", operator)
