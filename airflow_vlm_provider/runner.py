"""Many shards through one step: which are done already, and the rest, the next begun while the last ends."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Coroutine, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from airflow_vlm_provider.errors import ShardError
from airflow_vlm_provider.ledger.manifest import Manifest, fingerprint, load_manifest
from airflow_vlm_provider.progress import Progress
from airflow_vlm_provider.shard_run import Job, ShardRun
from airflow_vlm_provider.types import Usage

if TYPE_CHECKING:
    from airflow_vlm_provider.engines.base import Engine
    from airflow_vlm_provider.shards.media import MediaLoader
    from airflow_vlm_provider.shards.stores import ObjectInfo, Store
    from airflow_vlm_provider.steps.base import Step

log = logging.getLogger(__name__)

# Shards open at once: while the last rows of one are answered, the next are begun, so that the engine never waits.
OPEN_SHARDS = 4


class ShardRunner:
    """Takes shards through one step with one engine.

    :param step: What to ask and what to make of it.
    :param engine: Who answers. It is entered by the caller, and only needed when :meth:`run_all` is.
    :param source: Where the shards are.
    :param destination: Where outputs and the ledger go.
    :param media: Loads what the samples refer to.
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
        prices: tuple[float, float] | None = None,
        written_by: Mapping[str, Any] | None = None,
        overwrite: bool = False,
    ) -> None:
        self.step = step
        self.engine = engine
        self.source = source
        self.destination = destination
        self.media = media
        self.prices = prices
        self.written_by = dict(written_by or {})
        self.overwrite = overwrite
        self.fingerprint = fingerprint(
            step={"name": step.name, **step.parameters()},
            engine=dict(engine.parameters()),
            media=dict(media.parameters()),
        )
        # A little more than the engine keeps in flight, so that the next requests stand ready, media loaded.
        self._ahead = engine.concurrency + max(8, engine.concurrency // 2)
        self.progress = Progress(shards=0, total_bytes=0)

    def committed(self, shard: ObjectInfo) -> Manifest | None:
        """The shard's manifest, if it says that nothing is left to do. Blocks on the store."""
        if self.overwrite:
            return None
        manifest = load_manifest(self.destination, shard.name, self.step.name)
        if manifest is None or manifest.counts.failed or manifest.fingerprint != self.fingerprint:
            return None
        if manifest.input.get("identity") != shard.identity:
            return None
        try:
            output = self.destination.stat(shard.name)
        except FileNotFoundError:
            return None
        return manifest if manifest.output.get("identity") == output.identity else None

    async def run_all(self, shards: Sequence[ObjectInfo]) -> list[Manifest]:
        """Take shards through the step, each committed by itself, and return their manifests in order.

        :raises ShardError: some shards can't be read; all others are committed.
        :raises EngineError: the engine is gone; shards that were committed before stay committed.
        :raises ConfigError: key, model or a parameter is wrong.
        """
        self.progress = Progress(shards=len(shards), total_bytes=sum(shard.size for shard in shards))
        reading, opened = asyncio.Semaphore(1), asyncio.Semaphore(OPEN_SHARDS)
        failed = asyncio.Event()
        threads = ThreadPoolExecutor(self._thread_count(), thread_name_prefix="vlm-io")
        job = Job(
            step=self.step,
            engine=self.engine,
            source=self.source,
            destination=self.destination,
            media=self.media,
            fingerprint=self.fingerprint,
            cost=self.cost,
            written_by=self.written_by,
            progress=self.progress,
            threads=threads,
            active=asyncio.Semaphore(self._ahead),
            loaded=asyncio.Semaphore(self._ahead),
        )
        tasks: list[asyncio.Task[Manifest | None]] = []
        unreadable: list[str] = []

        async def run_one(shard: ObjectInfo) -> Manifest | None:
            try:
                return await ShardRun(job, shard).run(when_read=reading.release)
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
            threads.shutdown(wait=False, cancel_futures=True)

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


async def _first(*awaitables: Coroutine[Any, Any, object]) -> None:
    """Wait for the first of these, and drop the others."""
    tasks = [asyncio.ensure_future(each) for each in awaitables]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
