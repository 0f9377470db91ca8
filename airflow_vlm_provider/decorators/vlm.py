"""The decorator ``@task.vlm``: a function from sample to prompt becomes a task that asks about every sample."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from airflow.sdk.bases.decorator import DecoratedOperator, _TaskDecorator
from airflow.sdk.definitions.context import KNOWN_CONTEXT_KEYS

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.operators.parameters import ParameterError, check_partial
from airflow_vlm_provider.operators.placement import place
from airflow_vlm_provider.operators.vlm_map import VLMMapOperator, step_parameters
from airflow_vlm_provider.steps.functions import check_function
from airflow_vlm_provider.steps.vlm_map import VLMMapStep

if TYPE_CHECKING:
    import jinja2
    from airflow.sdk import Context, XComArg
    from airflow.sdk.bases.decorator import TaskDecorator
    from airflow.sdk.definitions._internal.expandinput import ExpandInput
    from airflow.sdk.definitions.mappedoperator import MappedOperator

    from airflow_vlm_provider.steps.base import Step

# What of Airflow's context is a plain value: what a function gets is part of what tells its answers from others.
CONTEXT_VALUES = frozenset(
    {
        *("ds", "ds_nodash", "ts", "ts_nodash", "ts_nodash_with_tz", "run_id", "params"),
        *("logical_date", "data_interval_start", "data_interval_end", "partition_key", "partition_date"),
    }
)
MAPPED = "shards"

_KEYWORDS = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class VLMDecoratedOperator(DecoratedOperator, VLMMapOperator):
    """
    Ask about every sample what a decorated function makes of it; see :class:`VLMMapOperator` for the parameters.

    :param python_callable: What :func:`task_function` made of the function.
    :param op_args: Arguments of the task: the function's, after the sample (templated).
    :param op_kwargs: The same by name, and ``shards``, which are the operator's (templated).
    """

    template_fields: Sequence[str] = (*DecoratedOperator.template_fields, *VLMMapOperator.template_fields)
    custom_operator_name = "@task.vlm"

    def __init__(
        self,
        *,
        python_callable: Callable[..., Any],
        op_args: Collection[Any] | None = None,
        op_kwargs: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        op_kwargs = dict(op_kwargs or {})
        if MAPPED in op_kwargs:
            if kwargs.get(MAPPED) is not None:
                raise ParameterError(
                    "shards are given to @task.vlm and to the task; give them to one of both."
                )
            kwargs[MAPPED] = op_kwargs.pop(MAPPED)
        self._context: Mapping[str, Any] = {}
        super().__init__(
            python_callable=python_callable,
            op_args=op_args,
            op_kwargs=op_kwargs,
            prompt=python_callable.__wrapped__,  # type: ignore[attr-defined]
            **kwargs,
        )

    def make_step(self) -> Step:
        """The step with this operator's parameters.

        :raises ConfigError: one of them is wrong.
        """
        return VLMMapStep(**step_parameters(self), arguments=self._arguments())

    def _do_render_template_fields(
        self,
        parent: Any,
        template_fields: Iterable[str],
        context: Context,
        jinja_env: jinja2.Environment,
        seen_oids: set[int],
    ) -> None:
        # Not in execute(): a plan, too, has to know what the function will be called with.
        self._context = context
        super()._do_render_template_fields(parent, template_fields, context, jinja_env, seen_oids)

    def _arguments(self) -> dict[str, Any]:
        """What the function is called with besides the sample; None for what is not known before the task runs."""
        names = list(inspect.signature(self.python_callable).parameters)
        given = {**dict(zip(names, self.op_args, strict=False)), **self.op_kwargs}
        wanted = {name: self._context.get(name) for name in names if name in CONTEXT_VALUES}
        return {**wanted, **given}


class _VLMTask(_TaskDecorator[..., Any, VLMDecoratedOperator]):
    """What ``@task.vlm`` makes of a function."""

    def _expand(self, expand_input: ExpandInput, *, strict: bool) -> XComArg:
        # The operator itself is only made when a task runs, and Airflow asks nobody else where that is to be.
        result = super()._expand(expand_input, strict=strict)
        for mapped, _ in result.iter_references():
            place(cast("MappedOperator", mapped), self.kwargs)
        return result


def vlm_task(python_callable: Callable[..., Any] | None = None, **kwargs: Any) -> TaskDecorator:
    """
    Make a task of a function that gets a sample and returns what to ask about it.

    The function's first parameter is the sample (a dict, its own copy). Others are arguments of the task, as with
    ``@task``: templates, other tasks' results, values of the context (``params``, ``ds``, ...) by their names. It is
    called once for every sample, and never when the DAG is parsed. The task is mapped with ``expand(shards=...)``.

    :param python_callable: The function.
    :param kwargs: Parameters of :class:`VLMMapOperator`, other than ``prompt``.
    :raises ParameterError: a parameter is wrong, or the function is none that can be called like that.
    """
    if python_callable is None:
        return functools.partial(vlm_task, **kwargs)  # type: ignore[return-value]
    task = _VLMTask(
        function=task_function(python_callable, kwargs),
        multiple_outputs=False,
        operator_class=VLMDecoratedOperator,
        kwargs=kwargs,
    )
    return cast("TaskDecorator", task)


def task_function(function: Callable[..., Any], kwargs: Mapping[str, Any]) -> Callable[..., Any]:
    """
    The function with the signature that its task has: without the sample, and with the shards.

    :param kwargs: What the decorator was given.
    :raises ParameterError: it can't be made a task.
    """
    if "prompt" in kwargs:
        raise ParameterError(
            "The prompt of @task.vlm is what the function returns; leave the parameter prompt out."
        )
    check_partial(VLMMapOperator, {**kwargs, "prompt": "what the function returns"})
    signature = inspect.signature(function)
    rest = list(signature.parameters.values())[1:]
    for each in rest:
        _check_parameter(each)
    try:
        check_function(
            function,
            {each.name: None for each in rest if each.kind in _KEYWORDS},
            version=kwargs.get("version"),
        )
    except ConfigError as error:
        raise ParameterError(str(error)) from None

    @functools.wraps(function)
    def called(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    shards = inspect.Parameter(MAPPED, inspect.Parameter.KEYWORD_ONLY, default=None)
    keywords = [each for each in rest if each.kind is not inspect.Parameter.VAR_KEYWORD]
    others = [each for each in rest if each.kind is inspect.Parameter.VAR_KEYWORD]
    called.__signature__ = signature.replace(parameters=[*keywords, shards, *others])  # type: ignore[attr-defined]
    return called


def _check_parameter(parameter: inspect.Parameter) -> None:
    name = parameter.name
    if name == MAPPED:
        raise ParameterError(
            "The function's parameter 'shards' has the name of the operator's, which says what the task works on. Give it "
            "another name."
        )
    if parameter.kind in (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.VAR_POSITIONAL):
        raise ParameterError(
            f"The function's parameter {name!r} can't be given by its name; after the sample, take only such as can."
        )
    if name in KNOWN_CONTEXT_KEYS - CONTEXT_VALUES:
        raise ParameterError(
            f"The function's parameter {name!r} is an object of Airflow's, so nobody could tell when it changes what is "
            "asked. Pass what you need of it as an argument of the task, such as a template."
        )
