"""Which of many shards are done already, told from one index and one listing instead of a manifest for each.

It is the rule by which a runner leaves a shard alone (:meth:`~airflow_vlm_provider.runner.ShardRunner.committed`),
applied to what the commit index says of the manifests. What the index does not know counts as not done: the runner
then looks for itself.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from airflow_vlm_provider.ledger.commit_index import CommitEntry, CommitIndex
from airflow_vlm_provider.ledger.media_memory import FILE_NAME
from airflow_vlm_provider.runner import is_settled

if TYPE_CHECKING:
    from airflow_vlm_provider.runner import ShardRunner
    from airflow_vlm_provider.shards.stores import ObjectInfo

log = logging.getLogger(__name__)

# Each holds the record of one shard's media, of which up to 24 MiB are in memory.
MEDIA_THREADS = 16


def standing_commits(runner: ShardRunner) -> dict[str, CommitEntry]:
    """Return the commits by which a runner may have nothing left to do, by the names of their shards.

    Of these only the inputs are still to be looked at. The files of the commit index are merged by the way, if there
    are many. Blocks on the destination.
    """
    if runner.overwrite and not runner.failed_only:
        return {}
    entries = CommitIndex(runner.destination, step=runner.step.name).merge()
    if runner.failed_only:
        return {name: entry for name, entry in entries.items() if not _has_letters(runner, entry)}
    settled = [entry for entry in entries.values() if _is_settled(runner, entry)]
    outputs = dict(runner.destination.stat_many(sorted({entry.output_name for entry in settled})))
    return {
        entry.shard: entry
        for entry in settled
        if (output := outputs[entry.output_name]) is not None and output.identity == entry.output
    }


def finished(
    runner: ShardRunner, commits: Mapping[str, CommitEntry], shards: Iterable[ObjectInfo]
) -> dict[str, CommitEntry]:
    """Return those of the shards for which a runner has nothing left to do, by name. Blocks on the stores.

    :param commits: What :func:`standing_commits` returned.
    :param shards: Shards in the runner's source, as they are now.
    """
    known = [(shard, commits[shard.name]) for shard in shards if shard.name in commits]
    done = {
        entry.shard: entry for shard, entry in known if runner.failed_only or entry.input == shard.identity
    }
    if not runner.trust_media and not runner.failed_only:
        for name in _with_replaced_media(runner, [name for name, entry in done.items() if entry.media]):
            del done[name]
    return done


def _has_letters(runner: ShardRunner, entry: CommitEntry) -> bool:
    return entry.failed > 0 and (runner.kinds is None or not runner.kinds.isdisjoint(entry.kinds))


def _is_settled(runner: ShardRunner, entry: CommitEntry) -> bool:
    return entry.fingerprint == runner.fingerprint and is_settled(
        entry.kinds, failed=entry.failed, rows_in=entry.rows_in, max_error_rate=runner.max_error_rate
    )


def _with_replaced_media(runner: ShardRunner, names: Sequence[str]) -> set[str]:
    """Those of the shards that refer to something else now than what their commit saw."""
    with ThreadPoolExecutor(MEDIA_THREADS, thread_name_prefix="vlm-media") as threads:
        counts = threads.map(lambda name: runner.replaced_media(name, FILE_NAME), names)
        replaced = {name for name, count in zip(names, counts, strict=True) if count}
    if replaced:
        log.info("Media of %d shards were replaced since these were done", len(replaced))
    return replaced
