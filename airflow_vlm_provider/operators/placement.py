"""Where tasks run whose engine needs the worker's GPU: queue and pool of Airflow's configuration, section ``[vlm]``.

What a DAG's author says comes first: the task's own ``queue`` and ``pool``, and those in ``default_args`` of the task,
of its task group or of its DAG. All of this is decided when the DAG is parsed, because a scheduler looks at nothing
else; so the engine has to be told by then, too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from airflow.sdk import BaseOperator, conf

if TYPE_CHECKING:
    from airflow.sdk import DAG, TaskGroup
    from airflow.sdk.definitions.mappedoperator import MappedOperator, OperatorPartial

LOCAL_ENGINES = ("vllm", "transformers")


class PlacedOperator(BaseOperator):
    """
    Base of operators that go to the GPU workers when their engine runs there.

    :param engine: The operator's own engine; with None the connection decides, which is not known when the DAG is
        parsed: then it is the author who says where the task goes.
    """

    def __init__(self, *, engine: str | None = None, **kwargs: Any) -> None:
        # Airflow has merged the default_args of task, group and DAG.
        told = {**kwargs.get("default_args", {}), **kwargs}
        super().__init__(**{**kwargs, **local_placement(engine, told)})
        self.engine = engine

    @classmethod
    def partial(cls, **kwargs: Any) -> OperatorPartial:
        """Begin a mapped operator, which goes where an unmapped one would."""
        partial = super().partial(**kwargs)
        told = _told(kwargs, dag=partial.kwargs["dag"], task_group=partial.kwargs["task_group"])
        partial.kwargs.update(local_placement(cls.local_engine(told), told))
        return partial

    @classmethod
    def local_engine(cls, told: Mapping[str, Any]) -> str | None:
        """The engine that an operator with these arguments has by its own word."""
        return told.get("engine")


def place(mapped: MappedOperator, kwargs: Mapping[str, Any]) -> None:
    """Have a mapped operator go where an unmapped one would, if it was not made by :meth:`PlacedOperator.partial`.

    :param kwargs: What it was given, other than what it is mapped over.
    """
    told = _told(kwargs, dag=mapped.dag, task_group=mapped.task_group)
    operator = cast("type[PlacedOperator]", mapped.operator_class)
    mapped.partial_kwargs.update(local_placement(operator.local_engine(told), told))


def _told(kwargs: Mapping[str, Any], *, dag: DAG | None, task_group: TaskGroup | None) -> dict[str, Any]:
    """An operator's arguments, and what ``default_args`` say about those that it was not given."""
    defaults = [each.default_args for each in (dag, task_group) if each]
    told: dict[str, Any] = {}
    for each in (*defaults, kwargs.get("default_args"), kwargs):
        told.update(each or {})
    return told


def local_placement(engine: str | None, told: Mapping[str, Any]) -> dict[str, str]:
    """``queue`` and ``pool`` of an operator whose engine runs on the worker, as far as its author left them open.

    :param engine: The operator's own engine.
    :param told: The operator's arguments, and what ``default_args`` say of others.
    """
    if engine not in LOCAL_ENGINES:
        return {}
    configured = {name: conf.get("vlm", f"gpu_{name}", fallback=None) for name in ("queue", "pool")}
    return {name: value for name, value in configured.items() if value and told.get(name) is None}
