"""The operator that plans: which shards there are and what is left to do of them, dealt out to tasks."""

from __future__ import annotations

import fnmatch
import heapq
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

from airflow.sdk import BaseOperator, conf
from airflow.sdk.exceptions import AirflowFailException

from airflow_vlm_provider.errors import ConfigError, VLMError
from airflow_vlm_provider.ledger.plans import PlanReference, label, save_plan
from airflow_vlm_provider.operators.dependants import UntoldError, shard_dependants
from airflow_vlm_provider.operators.mapped_tasks import check_none_is_removed, mapped_tasks, usable_tasks
from airflow_vlm_provider.operators.runners import make_runner, storage_of
from airflow_vlm_provider.operators.storage import Storage, find_shards

if TYPE_CHECKING:
    from airflow.sdk import Context

    from airflow_vlm_provider.ledger.commit_index import CommitEntry
    from airflow_vlm_provider.operators.base import ShardOperator
    from airflow_vlm_provider.runner import ShardRunner
    from airflow_vlm_provider.shards.stores import ObjectInfo, Store

# What opening, committing and scheduling a shard costs, in bytes of rows that could be done meanwhile: without it
# a thousand empty shards would be dealt to one task as if they were nothing.
SHARD_OVERHEAD_BYTES = 64 * 1024
# Up to here, a plan is what it returns; XCom lies in Airflow's database, and each mapped task reads all of it.
MAX_LISTED_SHARDS = 1000
MAX_LISTED_BYTES = 48 * 1024


class _Looked(NamedTuple):
    """What an operator's ledger says, before its shards are known."""

    operator: ShardOperator
    storage: Storage
    runner: ShardRunner
    standing: dict[str, CommitEntry]


class PlanShardsOperator(BaseOperator):
    """
    List the shards of a dataset and deal out to tasks, evenly by size, what is left to do of them.

    Returns groups of shards to map over, so that any number of shards fits Airflow's limit on mapped tasks::

        plan = PlanShardsOperator(task_id="plan", source="s3://bucket/raw/")
        ImageTaggingVLMOperator.partial(task_id="tag", source="s3://bucket/raw/", ...).expand(shards=plan.output)

    Each group is a list of shard names. A plan of more than 1,000 shards, or 48 KiB of names, is kept in the
    destination of the operator that maps over it, below ``_vlm/_plans/``, and each group is a string that tells
    where: ``s3://bucket/tagged/_vlm/_plans/<hash>.jsonl.zst#12 part-00012.jsonl and 99 more``. Shard operators take
    the one and the other.

    Shards that are done already for every operator that maps over the plan are left out of it. So a run with nothing
    left to do returns no groups, and Airflow skips what maps over them, and what comes after by default: give that
    ``trigger_rule="none_failed"`` if it is to run all the same. (A run that is cleared has its tasks already; one of
    them then gets an empty group, and has nothing to do.) To know what is done, the plan looks at these
    operators in its own DAG, their templates rendered for its own run, and at their ledgers. Where that can't be
    told (the operators take more than the groups from other tasks, a connection is missing, ...) the log says why,
    and nothing is left out; the tasks then find out for themselves. The XCom ``done`` holds what each operator would
    have returned for what is left out, by task id: ``{"tag": {"shards": 12, "rows_in": 3456, "failed": 7, ...}}``.

    :param source: Where the shards are: ``s3://bucket/prefix``, ``file:///path`` or a local path (templated).
        Objects with a part of their name beginning with ``_`` or ``.`` are no data and left out.
    :param pattern: Only shards whose name relative to the source matches (as :mod:`fnmatch` does: ``*`` matches
        ``/`` too); None takes all of a supported format (templated).
    :param max_tasks: Most groups to make; at most Airflow's ``[core] max_map_length``, which is 1024 unless
        configured (templated).
    :param aws_conn_id: Connection for S3; None uses boto3's own search for credentials (templated).
    :param storage_conn_id: Connection for other object stores than S3 (``gs://``, ``abfs://``, ...); None takes the
        one in the URI, or the default one of the scheme (templated).
    :param skip_done: Leave out what is done already; False plans all shards.
    """

    template_fields: Sequence[str] = ("source", "pattern", "max_tasks", "aws_conn_id", "storage_conn_id")

    def __init__(
        self,
        *,
        source: str,
        pattern: str | None = None,
        max_tasks: int | str = 1000,
        aws_conn_id: str | None = "aws_default",
        storage_conn_id: str | None = None,
        skip_done: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.source = source
        self.pattern = pattern
        self.max_tasks = max_tasks
        self.aws_conn_id = aws_conn_id
        self.storage_conn_id = storage_conn_id
        self.skip_done = skip_done
        if not (isinstance(max_tasks, str) and "{{" in max_tasks):
            _whole(max_tasks)

    def execute(self, context: Context) -> list[list[str]] | list[str]:
        """List, leave out, and deal out.

        :raises AirflowFailException: there are no shards, more groups were asked for than can be mapped, or Airflow
            would leave some out.
        """
        from airflow_vlm_provider.shards.output_names import check_output_names

        try:
            max_tasks, limit = _whole(self.max_tasks), conf.getint("core", "max_map_length", fallback=1024)
            if max_tasks > limit:
                raise ConfigError(
                    f"max_tasks={max_tasks} is more than Airflow maps over at most ({limit}). Lower max_tasks, or "
                    "raise [core] max_map_length."
                )
            operators, untold = self._dependants(context)
            with ThreadPoolExecutor(1, thread_name_prefix="vlm-plan") as threads:
                # While the source is listed: each takes as long as the other when everything is done.
                looking = threads.submit(copy_context().run, self._look, operators, untold)
                store, shards = self._find()
            for operator in operators:
                check_output_names((shard.name for shard in shards), output=operator.output_form)
            done, summaries = self._done(looking, store, shards)
            if done:
                context["ti"].xcom_push(key="done", value=summaries)
            tasks = mapped_tasks(self, context)
            left = [shard for shard in shards if shard.name not in done]
            groups = deal(left, min(max_tasks, usable_tasks(tasks) or max_tasks))
            self.log.info(
                "%d shards below %s, %d of them done already, the rest in %d groups",
                len(shards),
                store.uri,
                len(done),
                len(groups),
            )
            if tasks and not groups:
                groups = [[]]
            return check_none_is_removed(tasks, context, self._returned(groups, operators))
        except (ConfigError, PermissionError) as error:
            raise AirflowFailException(str(error)) from error

    def _find(self) -> tuple[Store, list[ObjectInfo]]:
        storage = Storage(aws_conn_id=self.aws_conn_id, storage_conn_id=self.storage_conn_id)
        store, found = find_shards(self.source, storage=storage)
        pattern = self.pattern
        chosen = [shard for shard in found if pattern is None or fnmatch.fnmatchcase(shard.name, pattern)]
        if not chosen:
            raise ConfigError(
                f"None of the {len(found)} shards below {self.source!r} match pattern={pattern!r}. Names are relative "
                "to the source; correct pattern, or leave it out to take all of them."
            )
        return store, chosen

    def _dependants(self, context: Context) -> tuple[list[ShardOperator], str | None]:
        """The shard operators that map over this plan, and why there may be others."""
        operators: list[ShardOperator] = []
        try:
            for operator in shard_dependants(self, context):
                operators.append(operator)
        except UntoldError as error:
            return operators, str(error)
        return operators, None

    def _look(self, operators: Sequence[ShardOperator], untold: str | None) -> list[_Looked]:
        """What each operator's ledger says.

        :raises UntoldError: there may be other operators.
        """
        from airflow_vlm_provider.finished import standing_commits

        looked: list[_Looked] = []
        if not self.skip_done:
            return looked
        if untold is not None:
            raise UntoldError(untold)
        for operator in operators:
            storage = storage_of(operator)
            source, _ = storage.locate(operator.source)
            runner, _ = make_runner(operator, source=source, storage=storage, written_by={})
            looked.append(_Looked(operator, storage, runner, standing_commits(runner)))
        return looked

    def _done(
        self, looking: Future[list[_Looked]], store: Store, shards: list[ObjectInfo]
    ) -> tuple[set[str], dict[str, dict[str, Any]]]:
        """The names of the shards for which no operator has anything left to do, and their sums by task id."""
        from airflow_vlm_provider.finished import finished

        done = {shard.name for shard in shards}
        commits: dict[str, dict[str, CommitEntry]] = {}
        try:
            for operator, storage, runner, standing in (looked := looking.result()):
                own = shards
                if runner.source.uri != store.uri:
                    # One step's output is the next one's source.
                    _, own = find_shards(operator.source, storage=storage)
                found = finished(runner, standing, (shard for shard in own if shard.name in done))
                done = set(found)
                commits[operator.task_id] = found
        except Exception as error:
            self.log.info("Nothing is left out of the plan for being done already, because %s", error)
            return set(), {}
        if not commits:
            return set(), {}
        if len(done) < len(shards):
            self._merge_keys(each.runner for each in looked)
        return done, {task_id: _summary(found[name] for name in done) for task_id, found in commits.items()}

    def _merge_keys(self, runners: Iterable[ShardRunner]) -> None:
        """Merge the files of the key indexes, if there are many, before many tasks read them."""
        from airflow_vlm_provider.ledger.key_index import KeyIndex

        for runner in runners:
            try:
                KeyIndex(runner.destination, step=runner.step.name).merge()
            except (VLMError, OSError) as error:
                self.log.warning("The key index of %s could not be merged: %s", runner.destination.uri, error)

    def _returned(
        self, groups: list[list[str]], operators: Sequence[ShardOperator]
    ) -> list[list[str]] | list[str]:
        """The groups themselves, or where they are kept if there are too many names for XCom."""
        if (
            sum(map(len, groups)) <= MAX_LISTED_SHARDS
            and len(json.dumps(groups).encode()) <= MAX_LISTED_BYTES
        ):
            return groups
        if not operators:
            self.log.warning(
                "The names of all shards go to XCom: no shard operator was found to map over this plan, in whose "
                "destination it could be kept"
            )
            return groups
        place = storage_of(operators[0]).open_store(operators[0].destination)
        name = save_plan(place, groups)
        self.log.info("The plan is in %s%s", place.uri, name)
        return [
            str(PlanReference(place.uri, name, number, label(group))) for number, group in enumerate(groups)
        ]


def _whole(max_tasks: int | str) -> int:
    text = str(max_tasks)
    if isinstance(max_tasks, bool) or not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"max_tasks={max_tasks!r} must be a whole number of at least 1.")
    return int(text)


def _summary(commits: Iterable[CommitEntry]) -> dict[str, Any]:
    """What an operator would return for shards that are all done, as far as it is counts."""
    from airflow_vlm_provider.ledger.manifest import Counts

    total, shards = Counts(cost_usd=0), 0
    for commit in commits:
        cached = commit.rows_in - commit.skipped - commit.failed
        total += Counts(
            commit.rows_in, commit.rows_out, cached=cached, skipped=commit.skipped, failed=commit.failed
        )
        shards += 1
    return {**asdict(total), "shards": shards, "shards_unchanged": shards}


def deal(shards: Iterable[ObjectInfo], max_tasks: int) -> list[list[str]]:
    """Deal shards out to at most ``max_tasks`` groups of about the same size, names sorted within each.

    The largest remaining shard always goes to the lightest group (Graham's LPT rule, at most 4/3 of the best).
    """
    by_size = sorted(shards, key=lambda shard: (-shard.size, shard.name))
    groups: list[list[str]] = [[] for _ in range(min(max_tasks, len(by_size)))]
    heap = [(0, index) for index in range(len(groups))]
    for shard in by_size:
        weight, index = heap[0]
        groups[index].append(shard.name)
        heapq.heapreplace(heap, (weight + shard.size + SHARD_OVERHEAD_BYTES, index))
    return sorted(sorted(group) for group in groups)
