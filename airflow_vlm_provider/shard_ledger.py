"""What one run of one shard reads from the ledger at its beginning, and writes to it until its commit.

The order of a commit is its safety. Whoever is stopped anywhere in it leaves a shard that counts as not done, and
whose next run finds all answers:

1. answers: all are in journal segments, and the key index names the one that holds them all
2. the output appears, whole
3. the dead letters and the record of media
4. the manifest: from here on the shard is done
5. the commit index, which planners read, and the end of segments that the one of step 1 replaces
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

import airflow_vlm_provider
from airflow_vlm_provider.errors import ANSWERED_KINDS, ShardError
from airflow_vlm_provider.ledger.commit_index import CommitEntry
from airflow_vlm_provider.ledger.dead_letters import DeadLetters, load_dead_letters
from airflow_vlm_provider.ledger.journal import ShardJournal
from airflow_vlm_provider.ledger.manifest import (
    Counts,
    Manifest,
    is_too_many,
    ledger_folder,
    save_manifest,
)
from airflow_vlm_provider.ledger.media_memory import MediaMemory, MediaRecorder
from airflow_vlm_provider.types import Outcome

if TYPE_CHECKING:
    from airflow_vlm_provider.job import Job
    from airflow_vlm_provider.shard_output import ShardOutput
    from airflow_vlm_provider.shards.stores import ObjectInfo


class ShardLedger:
    """The ledger of one shard during one run.

    :param before: The shard's last commit, if there was one.
    :param in_thread: Runs what blocks.
    :param on_failure: Called when answers can't be saved.
    """

    def __init__(
        self,
        job: Job,
        shard: ObjectInfo,
        before: Manifest | None,
        *,
        in_thread: Callable[[Callable[[], Any]], Awaitable[Any]],
        on_failure: Callable[[BaseException], None],
    ) -> None:
        self._job = job
        self._shard = shard
        self._before = before
        self._in_thread = in_thread
        self.counts = Counts()
        self.dead = DeadLetters()
        self.remembered = MediaMemory.empty()
        self.journal = ShardJournal(
            job.destination,
            shard=shard.name,
            step=job.step.name,
            window=job.window,
            written_by=job.written_by,
            in_thread=in_thread,
            on_failure=on_failure,
        )
        self.recorder = MediaRecorder(job.media.memory_parameters())

    async def open(self) -> None:
        """Read what earlier runs left of the shard: answers, dead letters, media."""
        await self.journal.load(self._job.answers.put)
        await self._in_thread(self._recall)

    def _recall(self) -> None:
        job, shard, step = self._job, self._shard.name, self._job.step.name
        letters = load_dead_letters(job.destination, shard, step)
        same = self._before is not None and self._before.input.get("identity") == self._shard.identity
        self.dead = DeadLetters(letters, in_place=same)
        if self._asks_anew():
            kinds = ANSWERED_KINDS if job.kinds is None else ANSWERED_KINDS & job.kinds
            answered = [letter for letter in letters if letter["kind"] in kinds]
            job.answering.ask_anew(
                {key: max(1, letter["attempts"]) for letter in answered for key in letter["keys"]}
            )
        if self._before is not None and self._before.media is not None:
            folder = ledger_folder(shard, step)
            self.remembered = MediaMemory.read(
                job.destination, f"{folder}/{self._before.media}", job.media.memory_parameters()
            )
            if job.trust_media:
                self.remembered.trust()
            else:
                self.remembered.verify(job.media.identities)

    def _asks_anew(self) -> bool:
        """Whether answers that a sample failed for are asked for once more: on demand, or since too many did."""
        if self._job.failed_only:
            return True
        before = self._before
        # When something else is made of the answers now, those that are there may do.
        if before is None or before.fingerprint != self._job.fingerprint:
            return False
        counts = before.counts
        return is_too_many(counts.failed, rows_in=counts.rows_in, max_error_rate=self._job.max_error_rate)

    def add(self, outcome: Outcome, *, rows_out: int) -> None:
        """Count one row's end, and keep its dead letter if it is one."""
        if outcome.status == "failed":
            self.dead.add(outcome, outcome.keys)
        self.counts.add(outcome, rows_out=rows_out)

    def commit(self, output: ShardOutput, started: datetime) -> Manifest:
        """Commit the shard; everything was answered and flushed. Blocks.

        :raises UnaccountedError: rows are missing.
        :raises ShardError: the shard was replaced meanwhile.
        :raises DroppedError: the run was stopped meanwhile.
        """
        job, shard, step = self._job, self._shard.name, self._job.step.name
        self.counts.check()
        self.counts.cost_usd = job.cost(self.counts.usage)
        if self._identity_now() != self._shard.identity:
            raise ShardError(
                f"{job.source.uri}{shard} was replaced or deleted while it was read. Nothing was committed for it; "
                "the task's retry reads what is there then."
            )
        segments = self.journal.consolidate()
        known = () if self._before is None else self._before.journal
        for segment in (each for each in segments if each not in known):
            name = f"{ledger_folder(shard, step)}/{segment}"
            job.answers.index.add(name, self.journal.consolidated_keys(segment))
        identity = output.publish()
        errors = self.dead.save(job.destination, shard, step)
        media = self.recorder.save(job.destination, shard, step)
        manifest = Manifest(
            counts=self.counts,
            model=job.model,
            fingerprint=job.fingerprint,
            input={"uri": job.source.uri + shard, "identity": self._shard.identity},
            output={"uri": job.destination.uri + output.name, "identity": identity},
            errors=None if errors is None else job.destination.uri + errors,
            started_at=started.isoformat(timespec="seconds"),
            finished_at=datetime.now(timezone.utc).isoformat(timespec="microseconds"),
            provider_version=airflow_vlm_provider.__version__,
            parameters=job.parameters,
            kinds=dict(self.dead.kinds),
            journal=segments,
            media=media,
            written_by=job.written_by,
        )
        save_manifest(job.destination, shard, step, manifest)
        job.commits.add([commit_entry(manifest, shard, output.name)])
        self.journal.retire()
        return manifest

    def _identity_now(self) -> str | None:
        try:
            return self._job.source.stat(self._shard.name).identity
        except FileNotFoundError:
            return None

    def free(self) -> None:
        """Free what is kept on disk meanwhile; the journal is closed by itself."""
        for each in (self.recorder, self.remembered, self.dead):
            with suppress(Exception):
                each.close()


def commit_entry(manifest: Manifest, shard: str, output_name: str) -> CommitEntry:
    """What planners have to know of a commit."""
    return CommitEntry(
        shard=shard,
        fingerprint=manifest.fingerprint,
        input=manifest.input["identity"],
        output_name=output_name,
        output=manifest.output["identity"],
        rows_in=manifest.counts.rows_in,
        rows_out=manifest.counts.rows_out,
        skipped=manifest.counts.skipped,
        failed=manifest.counts.failed,
        kinds=dict(manifest.kinds),
        media=manifest.media is not None,
        finished_at=manifest.finished_at,
    )
