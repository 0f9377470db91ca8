"""Many shards through one step: which are done already, and the rest, the next begun while the last ends."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from airflow_vlm_provider.ahead import Ahead
from airflow_vlm_provider.answering import Answering
from airflow_vlm_provider.bottleneck import Bottleneck
from airflow_vlm_provider.errors import ANSWERED_KINDS, LASTING_KINDS, ConfigError, ShardError
from airflow_vlm_provider.job import Job
from airflow_vlm_provider.ledger.answers import READS, Answers
from airflow_vlm_provider.ledger.changes import changes, say_changes
from airflow_vlm_provider.ledger.commit_index import CommitIndex
from airflow_vlm_provider.ledger.journal import READERS
from airflow_vlm_provider.ledger.keys import RequestKeys
from airflow_vlm_provider.ledger.manifest import (
    Manifest,
    fingerprint,
    is_too_many,
    ledger_folder,
    load_manifest,
)
from airflow_vlm_provider.ledger.media_memory import MediaMemory
from airflow_vlm_provider.ledger.write_behind import FlushPolicy, Window
from airflow_vlm_provider.progress import Progress
from airflow_vlm_provider.shard_run import ShardRun
from airflow_vlm_provider.shards.formats import RowKeys
from airflow_vlm_provider.shards.output_names import check_output_names, one_output, output_name, rivals
from airflow_vlm_provider.types import Usage

if TYPE_CHECKING:
    from airflow_vlm_provider.engines.base import Engine
    from airflow_vlm_provider.shards.media import MediaLoader
    from airflow_vlm_provider.shards.stores import ObjectInfo, Store
    from airflow_vlm_provider.steps.base import Step

log = logging.getLogger(__name__)

T = TypeVar("T")

# Shards open at once: while the last rows of one are answered, the next are begun, so that the engine never waits.
OPEN_SHARDS = 4
# How many shards are looked up at once.
LOOKUP_THREADS = 16


def is_settled(kinds: Mapping[str, int], *, failed: int, rows_in: int, max_error_rate: float) -> bool:
    """Whether a shard's dead letters are no reason to take it up again.

    :param kinds: How many rows failed by kind: what was merely out of luck is tried again by every run.
    :param failed: How many rows failed.
    :param rows_in: Of how many.
    :param max_error_rate: Share of failed rows that the author accepts.
    """
    return set(kinds) <= LASTING_KINDS | ANSWERED_KINDS and not is_too_many(
        failed, rows_in=rows_in, max_error_rate=max_error_rate
    )


class ShardRunner:
    """Takes shards through one step with one engine.

    :param step: What to ask and what to make of it.
    :param engine: Who answers. It is entered by the caller, and only needed when :meth:`run_all` is.
    :param source: Where the shards are.
    :param destination: Where outputs and the ledger go.
    :param media: Loads what the samples refer to.
    :param reuse: Further destinations whose answers count, too.
    :param flush: When answers are written to the journal.
    :param row_keys: What the fields are called that a format makes.
    :param output: ``full`` writes the shard again with the new fields, ``sidecar`` only these, beside its stem; None
        does what suits the shard: a sidecar where media are embedded.
    :param trust_media: Take media that were loaded before for unchanged, for stores where nothing is ever replaced.
    :param failed_only: Ask for nothing but the dead letters of shards that are committed.
    :param kinds: The kinds of dead letters that ``failed_only`` tries again; None for all.
    :param max_error_rate: Share of failed rows that the author accepts; a shard with more of them is not done.
    :param prices: US dollars per million prompt and completion tokens; None when unknown.
    :param written_by: Who runs this, for the manifest: DAG, run, task, map index, try.
    :param overwrite: Do shards again that are done already.
    """

    def __init__(
        self,
        *,
        step: Step,
        engine: Engine,
        source: Store,
        destination: Store,
        media: MediaLoader,
        reuse: Sequence[Store] = (),
        flush: FlushPolicy | None = None,
        row_keys: RowKeys | None = None,
        output: str | None = None,
        trust_media: bool = False,
        failed_only: bool = False,
        kinds: Sequence[str] | None = None,
        max_error_rate: float = 1.0,
        prices: tuple[float, float] | None = None,
        written_by: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.step = step
        self.engine = engine
        self.source = source
        self.destination = destination
        self.media = media
        self.reuse = tuple(reuse)
        self.flush = flush or FlushPolicy()
        self.row_keys = row_keys or RowKeys()
        self.output = output
        self.trust_media = trust_media
        self.failed_only = failed_only
        self.kinds = None if kinds is None else frozenset(kinds)
        self.max_error_rate = max_error_rate
        self.prices = prices
        self.written_by = dict(written_by or {})
        self.overwrite = overwrite
        self.parameters: Mapping[str, Any] = {
            "step": {"name": step.name, **step.parameters()},
            "engine": dict(engine.parameters()),
            "media": dict(media.parameters()),
            "output": {"output": output},
        }
        self.fingerprint = fingerprint(**self.parameters)
        # A little more than the engine keeps in flight, so that the next requests stand ready, media loaded.
        self._ahead = engine.concurrency + max(8, engine.concurrency // 2)
        self._before: dict[str, Manifest] = {}
        self._stopped = False
        self.progress = Progress(shards=0, total_bytes=0)
        self.bottleneck = Bottleneck(lambda: engine.window, lambda: engine.in_flight, lambda: engine.pressure)

    def committed(self, shard: ObjectInfo) -> Manifest | None:
        """The shard's manifest, if nothing is left to do for it. Blocks on the store.

        :raises ConfigError: only dead letters are to be asked for, and that can't be done.
        """
        manifest = load_manifest(self.destination, shard.name, self.step.name)
        if manifest is not None:
            self._before[shard.name] = manifest
        if self.failed_only:
            return self._nothing_to_redrive(shard, manifest)
        if self.overwrite or manifest is None or not self._is_of(manifest, shard):
            return None
        counts = manifest.counts
        if not is_settled(
            manifest.kinds, failed=counts.failed, rows_in=counts.rows_in, max_error_rate=self.max_error_rate
        ):
            return None
        return manifest if self._media_unchanged(manifest, shard) else None

    def all_committed(self, shards: Sequence[ObjectInfo]) -> list[Manifest | None]:
        """:meth:`committed` for many shards, in their order."""
        with ThreadPoolExecutor(LOOKUP_THREADS, thread_name_prefix="vlm-lookup") as threads:
            return list(threads.map(lambda shard: None if self._stopped else self.committed(shard), shards))

    async def look_up(self, shards: Sequence[ObjectInfo]) -> list[Manifest | None]:
        """:meth:`all_committed` in a thread; cancelled, it waits for no storage, and no more shards are looked up."""
        # Not a thread of the loop's own, which waits for these when it ends.
        thread = ThreadPoolExecutor(1, thread_name_prefix="vlm-look-up")
        try:
            return await _in_thread(thread, partial(self.all_committed, shards))
        except asyncio.CancelledError:
            self._stopped = True
            raise
        finally:
            thread.shutdown(wait=False, cancel_futures=True)

    def changes_since_commit(self) -> list[str]:
        """What changed since shards were committed that :meth:`committed` found not to be done, a sentence each."""
        stale = [each for each in self._before.values() if each.fingerprint != self.fingerprint]
        return say_changes(stale, self.parameters, asking=self.step.asking)

    def _is_of(self, manifest: Manifest, shard: ObjectInfo) -> bool:
        """Whether a manifest is about this very shard and this very question, and its output is still there."""
        if manifest.fingerprint != self.fingerprint or manifest.input.get("identity") != shard.identity:
            return False
        uri = manifest.output.get("uri", "")
        if not uri.startswith(self.destination.uri):
            # The ledger was moved or copied here. Its answers count, but which output is whose is not known.
            return False
        try:
            name = uri.removeprefix(self.destination.uri)
            return manifest.output.get("identity") == self.destination.stat(name).identity
        except FileNotFoundError:
            return False

    def replaced_media(self, shard: str, record: str) -> int:
        """How many of a shard's references may mean something else now than when it was committed. Blocks.

        :param shard: The shard's name.
        :param record: Name of the record of its media, below its ledger folder.
        """
        name = f"{ledger_folder(shard, self.step.name)}/{record}"
        memory = MediaMemory.read(self.destination, name, self.media.memory_parameters())
        try:
            return memory.verify(self.media.identities)
        finally:
            memory.close()

    def _media_unchanged(self, manifest: Manifest, shard: ObjectInfo) -> bool:
        if self.trust_media or manifest.media is None:
            return True
        changed = self.replaced_media(shard.name, manifest.media)
        if changed:
            log.info("%s: %d of the media that it refers to were replaced", shard.name, changed)
        return not changed

    def _nothing_to_redrive(self, shard: ObjectInfo, manifest: Manifest | None) -> Manifest | None:
        if manifest is None:
            raise ConfigError(
                f"{shard.name} was never committed below {self.destination.uri}, so there are no dead letters to ask "
                "for. Run the operator without failed_only."
            )
        if manifest.fingerprint != self.fingerprint:
            changed = changes(manifest.parameters, self.parameters, asking=self.step.asking)
            names = ", ".join((*changed.asking, *changed.other)) or "parameters"
            raise ConfigError(
                f"{shard.name} was committed with other parameters ({names} differ), so its other rows would not fit. "
                "Give the same parameters, or run the operator without failed_only."
            )
        some = self.kinds is None or self.kinds & set(manifest.kinds)
        return None if manifest.counts.failed and some else manifest

    async def run_all(self, shards: Sequence[ObjectInfo]) -> list[Manifest]:
        """Take shards through the step, each committed by itself, and return their manifests in order.

        :raises ShardError: some shards can't be read; all others are committed.
        :raises EngineError: the engine is gone; shards that were committed before stay committed.
        :raises ConfigError: key, model or a parameter is wrong, or two outputs would have the same name.
        """
        self.progress = Progress(shards=len(shards), total_bytes=sum(shard.size for shard in shards))
        threads = ThreadPoolExecutor(self._thread_count(), thread_name_prefix="vlm-io")
        # A shard writes rows and answers at once, and the one that is being opened reads its journal besides.
        writers = ThreadPoolExecutor(2 * OPEN_SHARDS + READERS, thread_name_prefix="vlm-ledger")
        # Not the writers: what was paid for must not wait behind other journals that are slow to come.
        readers = ThreadPoolExecutor(READS, thread_name_prefix="vlm-answers")
        answers = Answers(
            destination=self.destination,
            reuse=self.reuse,
            step=self.step.name,
            in_thread=partial(_in_thread, readers),
        )
        ahead = Ahead(
            window=lambda: self.engine.window,
            in_preparation=lambda: self.bottleneck.in_preparation,
            most=self._ahead,
        )
        job = self._job(answers, threads, writers, ahead)
        watching: list[asyncio.Task[None]] = []
        try:
            await _in_thread(writers, lambda: self._check_output_names([shard.name for shard in shards]))
            await answers.open()
            watching = [asyncio.create_task(each) for each in (self.bottleneck.watch(), ahead.watch())]
            return await self._run_all(job, shards)
        finally:
            for task in watching:
                task.cancel()
            await answers.close()
            for each in (threads, writers, readers):
                each.shutdown(wait=False, cancel_futures=True)

    def _check_output_names(self, shards: Sequence[str]) -> None:
        """Refuse shards whose outputs would overwrite each other's, or that of another shard that is done.

        :raises ConfigError: there are such shards.
        """
        check_output_names(shards, output=self.output)
        others = {rival: name for name in shards for rival in rivals(name, self.output)}
        for rival, found in self.source.stat_many(sorted(others)):
            # What merely lies beside a shard, as the tables beside img2dataset's tars, is nobody's business.
            done = None if found is None else load_manifest(self.destination, rival, self.step.name)
            mine = self.destination.uri + output_name(others[rival], self.output)
            if done is not None and done.output.get("uri") == mine:
                raise one_output(others[rival], rival, self.output)

    def _job(self, answers: Answers, threads: Executor, writers: Executor, ahead: Ahead) -> Job:
        return Job(
            step=self.step,
            source=self.source,
            destination=self.destination,
            media=self.media,
            model=self.engine.model,
            fingerprint=self.fingerprint,
            parameters=self.parameters,
            cost=self.cost,
            written_by=self.written_by,
            answers=answers,
            commits=CommitIndex(self.destination, step=self.step.name),
            answering=Answering(engine=self.engine, answers=answers, bottleneck=self.bottleneck),
            keys=RequestKeys(
                engine=self.engine.parameters(),
                media=self.media.answering_parameters(),
                video=self.media.video_parameters(),
            ),
            window=Window(self.flush),
            row_keys=self.row_keys,
            output=self.output,
            trust_media=self.trust_media,
            failed_only=self.failed_only,
            kinds=self.kinds,
            max_error_rate=self.max_error_rate,
            progress=self.progress,
            bottleneck=self.bottleneck,
            threads=threads,
            writers=writers,
            active=asyncio.Semaphore(self._ahead),
            loaded=ahead.places,
        )

    async def _run_all(self, job: Job, shards: Sequence[ObjectInfo]) -> list[Manifest]:
        reading, opened = asyncio.Semaphore(1), asyncio.Semaphore(OPEN_SHARDS)
        failed = asyncio.Event()
        tasks: list[asyncio.Task[Manifest | None]] = []
        unreadable: list[str] = []

        def is_read(shard: ObjectInfo) -> None:
            reading.release()
            self.bottleneck.source_has_ended = shard is shards[-1]

        async def run_one(shard: ObjectInfo) -> Manifest | None:
            try:
                before = self._before.get(shard.name)
                return await ShardRun(job, shard, before).run(when_read=partial(is_read, shard))
            except ShardError as error:
                log.error("%s", error)
                unreadable.append(str(error))
                return None
            except BaseException:
                failed.set()
                raise
            finally:
                opened.release()

        try:
            for shard in shards:
                await _first(opened.acquire(), failed.wait())
                await _first(reading.acquire(), failed.wait())
                if failed.is_set():
                    break
                tasks.append(asyncio.create_task(run_one(shard), name=shard.name))
            manifests = [manifest for manifest in await asyncio.gather(*tasks) if manifest is not None]
            if unreadable:
                raise ShardError(
                    f"{len(unreadable)} of {len(shards)} shards could not be done; the others are committed. "
                    + " ".join(unreadable[:5])
                )
            return manifests
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _thread_count(self) -> int:
        # Local files cost processor time, remote ones waiting time.
        if self.source.uri.startswith("file:") and not self.media.remote:
            return min(8, (os.cpu_count() or 1) + 2)
        return min(64, self._ahead)

    def cost(self, usage: Usage) -> float | None:
        """US dollars for a usage, by the prices."""
        if self.prices is None:
            return None
        dollars = usage.prompt_tokens * self.prices[0] + usage.completion_tokens * self.prices[1]
        return round(dollars / 1_000_000, 9)


async def _in_thread(threads: Executor, function: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(threads, function)


async def _first(*awaitables: Coroutine[Any, Any, object]) -> None:
    """Wait for the first of these, and drop the others."""
    tasks = [asyncio.ensure_future(each) for each in awaitables]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
