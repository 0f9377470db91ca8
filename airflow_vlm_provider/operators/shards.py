"""The operator that plans: which shards there are, dealt out to tasks."""

from __future__ import annotations

import fnmatch
import heapq
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseOperator, conf
from airflow.sdk.exceptions import AirflowFailException

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.operators.storage import find_shards, s3_client_factory

if TYPE_CHECKING:
    from airflow.sdk import Context

    from airflow_vlm_provider.shards.stores import ObjectInfo

# What opening, committing and scheduling a shard costs, in bytes of rows that could be done meanwhile: without it
# a thousand empty shards would be dealt to one task as if they were nothing.
SHARD_OVERHEAD_BYTES = 64 * 1024


class PlanShardsOperator(BaseOperator):
    """
    List the shards of a dataset and deal them out to tasks, evenly by size.

    Returns a list of lists of shard names to map over, so that any number of shards fits Airflow's limit on
    mapped tasks::

        plan = PlanShardsOperator(task_id="plan", source="s3://bucket/raw/")
        ImageTaggingVLMOperator.partial(task_id="tag", source="s3://bucket/raw/", ...).expand(shards=plan.output)

    :param source: Where the shards are: ``s3://bucket/prefix``, ``file:///path`` or a local path (templated).
        Objects with a part of their name beginning with ``_`` or ``.`` are no data and left out.
    :param pattern: Only shards whose name relative to the source matches (as :mod:`fnmatch` does: ``*`` matches
        ``/`` too); None takes all of a supported format (templated).
    :param max_tasks: Most groups to make; at most Airflow's ``[core] max_map_length``, which is 1024 unless
        configured (templated).
    :param aws_conn_id: Connection for S3; None uses boto3's own search for credentials.
    """

    template_fields: Sequence[str] = ("source", "pattern", "max_tasks", "aws_conn_id")

    def __init__(
        self,
        *,
        source: str,
        pattern: str | None = None,
        max_tasks: int | str = 1000,
        aws_conn_id: str | None = "aws_default",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.source = source
        self.pattern = pattern
        self.max_tasks = max_tasks
        self.aws_conn_id = aws_conn_id
        if not (isinstance(max_tasks, str) and "{{" in max_tasks):
            _whole(max_tasks)

    def execute(self, context: Context) -> list[list[str]]:  # noqa: ARG002
        """List and deal out.

        :raises AirflowFailException: there are no shards, or more groups were asked for than can be mapped.
        """
        try:
            max_tasks, limit = _whole(self.max_tasks), conf.getint("core", "max_map_length", fallback=1024)
            if max_tasks > limit:
                raise ConfigError(
                    f"max_tasks={max_tasks} is more than Airflow maps over at most ({limit}). Lower max_tasks, or "
                    "raise [core] max_map_length."
                )
            store, found = find_shards(self.source, s3_client=s3_client_factory(self.aws_conn_id))
        except (ConfigError, PermissionError) as error:
            raise AirflowFailException(str(error)) from error
        pattern = self.pattern
        chosen = [shard for shard in found if pattern is None or fnmatch.fnmatchcase(shard.name, pattern)]
        if not chosen:
            raise AirflowFailException(
                f"None of the {len(found)} shards below {self.source!r} match pattern={pattern!r}. Names are relative "
                "to the source; correct pattern, or leave it out to take all of them."
            )
        groups = deal(chosen, max_tasks)
        self.log.info("%d shards below %s in %d groups", len(chosen), store.uri, len(groups))
        return groups


def _whole(max_tasks: int | str) -> int:
    text = str(max_tasks)
    if isinstance(max_tasks, bool) or not text.isdecimal() or int(text) < 1:
        raise ConfigError(f"max_tasks={max_tasks!r} must be a whole number of at least 1.")
    return int(text)


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
