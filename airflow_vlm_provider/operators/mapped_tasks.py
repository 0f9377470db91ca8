"""The tasks that an earlier plan of the same run was mapped to, and what Airflow makes of them when there is a new one.

When a run is cleared onto the newest version of its DAG, as ``airflow backfill create --reprocess-behavior`` does,
Airflow keeps as many mapped tasks as the plan had groups *before*, and marks the others as removed. It never takes that
back: a new plan with more groups would be done in part, or not at all, and the run end well. So

- a plan that has tasks already is never without a group, for a run whose last tasks are all removed counts as a success
  whatever became of the plan;
- a plan has no more groups than there are tasks left that can take one; and
- where none is left, a plan with groups fails and says so, and is known when the run is cleared once more.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, cast

from airflow.sdk import BaseOperator, TaskGroup
from airflow.sdk.definitions.mappedoperator import MappedOperator
from airflow.sdk.exceptions import AirflowFailException

if TYPE_CHECKING:
    from airflow.sdk import Context


def mapped_tasks(plan: BaseOperator, context: Context) -> Mapping[tuple[str, int], str | None]:
    """The tasks that are mapped over a plan already: their states, by task id and map index.

    :param plan: The task that makes the plan, and runs now.
    :param context: Of its run.
    """
    ti = context["ti"]
    if ti.try_number == 1 or plan.get_dag() is None or not (task_ids := _mapped_over(plan)):
        return {}
    states = ti.get_task_states(dag_id=ti.dag_id, task_ids=task_ids, run_ids=[ti.run_id]).get(ti.run_id, {})
    found = {}
    for name, state in states.items():
        task_id, _, number = name.rpartition("_")
        if task_id in task_ids and number.isdecimal():
            found[task_id, int(number)] = state
    return found


def usable_tasks(tasks: Mapping[tuple[str, int], str | None]) -> int | None:
    """How many groups there are tasks for; None when Airflow makes as many as are needed."""
    return min((number for (_, number), state in tasks.items() if state == "removed"), default=None)


def check_none_is_removed(
    tasks: Mapping[tuple[str, int], str | None], context: Context, returned: list[list[str]] | list[str]
) -> list[list[str]] | list[str]:
    """Fail if a plan has something for tasks that are removed.

    :param tasks: Those that are mapped over it already.
    :param context: Of the task that makes the plan.
    :param returned: What it is about to return, which is returned.
    :raises AirflowFailException: so it is.
    """
    removed = [
        f"{task_id}[{number}]"
        for (task_id, number), state in sorted(tasks.items())
        if state == "removed" and number < len(returned)
    ]
    if not removed:
        return returned
    from airflow.sdk.execution_time.xcom import XCom

    ti = context["ti"]
    # How many groups there are is what Airflow goes by when the run is cleared; a task that fails returns nothing.
    XCom.set(
        key=XCom.XCOM_RETURN_KEY,
        value=returned,
        dag_id=ti.dag_id,
        task_id=ti.task_id,
        run_id=ti.run_id,
        _mapped_length=len(returned),
    )
    more = f" and {len(removed) - 3} more" if len(removed) > 3 else ""
    raise AirflowFailException(
        f"Airflow has removed {', '.join(removed[:3])}{more} from this run and would leave out what the plan has for "
        "them: clearing a run onto the newest version of its DAG keeps as many mapped tasks as the plan had before. "
        "Clear the run once more, or repeat the backfill: now it is known how many there are to be."
    )


def _mapped_over(plan: BaseOperator) -> list[str]:
    """The ids of the tasks that Airflow makes one of for each of the plan's groups."""
    found: list[str] = []
    for dependant in plan.iter_mapped_dependants():
        if isinstance(dependant, MappedOperator):
            found.append(dependant.task_id)
        else:
            found += [task.task_id for task in cast("TaskGroup", dependant).iter_tasks()]
    return found
