"""One shard through one step: read -> ask -> journal -> write -> commit.

Rows are read in order, worked on many at a time and written in order. What is held in memory is bounded: so many
samples are worked on at once, so many media are loaded at once, and so many finished rows wait for a slow one
before them. What a shard writes appears whole at its commit or not at all, and its manifest comes last.

Everything that blocks (reading, media, writing, committing) happens in threads; the event loop only waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import datetime, timezone
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

from airflow_vlm_provider.errors import ConfigError, SampleError, ShardError, VLMError
from airflow_vlm_provider.ledger.manifest import Manifest
from airflow_vlm_provider.loading import ShardMedia
from airflow_vlm_provider.progress import CountingReader
from airflow_vlm_provider.sample_run import Redrive, SampleRunner
from airflow_vlm_provider.shard_ledger import ShardLedger
from airflow_vlm_provider.shard_output import ShardOutput
from airflow_vlm_provider.shards.formats import RowWriter, ShardReader, shard_format
from airflow_vlm_provider.shards.stores import StoreError
from airflow_vlm_provider.types import Outcome, Sample

if TYPE_CHECKING:
    from airflow_vlm_provider.job import Job
    from airflow_vlm_provider.shards.stores import ObjectInfo

T = TypeVar("T")

READ_BATCH_ROWS = 64
READ_BATCH_BYTES = 1024 * 1024
WRITE_BATCH_ROWS = 256
# Finished rows that may wait for a slow one before them. Beyond either bound, no new rows are begun.
BACKLOG_ROWS = 4096
BACKLOG_BYTES = 64 * 1024 * 1024
# How long a stop waits for a thread that blocks. Airflow kills a task 5 seconds after it told it to stop.
STOP_SECONDS = 2.0


class ShardRun:
    """One shard on its way. Made anew for every shard, because all of its state is that shard's.

    :param before: The shard's last commit, if there was one.
    """

    def __init__(self, job: Job, shard: ObjectInfo, before: Manifest | None) -> None:
        self.job = job
        self.shard = shard
        self.ledger = ShardLedger(job, shard, before, in_thread=self._in_thread, on_failure=self._fail)
        self.input = ExitStack()
        self.output = ShardOutput(job, shard.name)
        self.tasks: asyncio.Queue[asyncio.Task[Outcome] | None] = asyncio.Queue(maxsize=BACKLOG_ROWS)
        self.backlog_bytes = 0
        self.drained = asyncio.Event()
        self.running: set[asyncio.Task[Outcome]] = set()
        self.failure: BaseException | None = None
        self.reading: asyncio.Task[None] | None = None
        self.writing: asyncio.Task[None] | None = None

    async def run(self, *, when_read: Callable[[], None]) -> Manifest:
        """Take the shard through the step and commit it; ``when_read`` is called once no more rows are to come."""
        started = datetime.now(timezone.utc)
        try:
            await self.ledger.open()
            reader = await self._in_thread(self._open_input)
            rows = await self._in_thread(lambda: self.output.open(reader))
            self.reading = asyncio.create_task(self._read(reader))
            self.reading.add_done_callback(lambda _: when_read())
            self.writing = asyncio.create_task(self._write(rows))
            # Shielded, so that a cancellation comes here first and stops the sending, and not to a write that blocks.
            await asyncio.shield(self.writing)
            await self.ledger.journal.flush()
            manifest = await self._in_thread(lambda: self.ledger.commit(self.output, started))
            await self.ledger.journal.close()
            self.job.progress.shards_done += 1
            return manifest
        except BaseException as error:
            # When one shard fails, or several at once, the others are cancelled, also those that are stopping already.
            await _to_its_end(self._stopped(self._halt()))
            if isinstance(error, asyncio.CancelledError) and self.failure is not None:
                error = self.failure
            self.output.drop(error)
            raise error from None
        finally:
            if self.reading is None:
                when_read()
            self.ledger.free()
            with suppress(Exception):
                self.input.close()

    def _open_input(self) -> ShardReader:
        job, form = self.job, shard_format(self.shard.name)
        try:
            stream = (
                job.source.open_seekable(self.shard.name)
                if form.seekable
                else job.source.open(self.shard.name)
            )
            counted = CountingReader(self.input.enter_context(stream), job.progress.read)
            reader = self.input.enter_context(form.open(counted, keys=job.row_keys))  # type: ignore[arg-type]
        except (ShardError, StoreError, FileNotFoundError, PermissionError) as error:
            raise self._unreadable(error) from error
        if reader.sidecar_of is not None:
            raise ConfigError(
                f"{job.source.uri}{self.shard.name} is no shard, but the sidecar of {reader.sidecar_of!r}: it holds "
                "what a step generated, and neither texts nor media. Take the source of that step for this one's, too; "
                "or run that step with output='full', and its destination can be a source."
            )
        return reader

    def _unreadable(self, error: Exception) -> ShardError:
        return ShardError(f"{self.job.source.uri}{self.shard.name} can't be read: {error}")

    async def _read(self, reader: ShardReader) -> None:
        """Begin the rows one after another, as fast as the bounds allow."""
        job, loop = self.job, asyncio.get_running_loop()
        redrive = Redrive(self.ledger.dead, job.kinds) if job.failed_only else None
        runner = SampleRunner(
            step=job.step,
            media=ShardMedia(
                shard=self.shard.name,
                loader=job.media,
                keys=job.keys,
                answering=job.answering,
                remembered=self.ledger.remembered,
                recorder=self.ledger.recorder,
            ),
            answering=job.answering,
            journal=self.ledger.journal,
            redrive=redrive,
            bottleneck=job.bottleneck,
            threads=job.threads,
            loaded=job.loaded,
            fail=self._fail,
        )
        try:
            samples = iter(reader)
            # When cancelled, the thread that reads is not waited for: a store that hangs would hold up the end.
            while batch := await loop.run_in_executor(job.threads, lambda: list(_batch(samples))):
                for sample in batch:
                    await self._begin(runner, sample)
            await self.tasks.put(None)
        except (ShardError, StoreError, FileNotFoundError, PermissionError) as error:
            self._fail(self._unreadable(error))
        except Exception as error:
            self._fail(error)

    async def _begin(self, runner: SampleRunner, sample: Sample) -> None:
        self.ledger.counts.rows_in += 1
        self.job.progress.begun()
        await self.job.active.acquire()
        while self.backlog_bytes > BACKLOG_BYTES:
            self.drained.clear()
            await self.drained.wait()
        self.backlog_bytes += sample.size
        task = asyncio.create_task(runner.run(sample))
        self.running.add(task)
        task.add_done_callback(self._ended)
        await self.tasks.put(task)

    def _ended(self, task: asyncio.Task[Outcome]) -> None:
        self.running.discard(task)
        self.job.active.release()
        # An error that stops the shard is raised once, by run(); here it only counts as seen.
        if not task.cancelled():
            task.exception()

    async def _write(self, rows: RowWriter) -> None:
        """Write finished rows in the order in which they were read."""
        ended = False
        while not ended:
            batch: list[Outcome] = []
            while len(batch) < WRITE_BATCH_ROWS:
                if batch and self.tasks.empty():
                    break
                task = await self.tasks.get()
                if task is None:
                    ended = True
                    break
                if batch and not task.done():
                    # Nothing waits for this one in the thread; write what there is meanwhile.
                    await self._write_batch(rows, batch)
                    batch = []
                # Not awaited itself: cancelled here, it would hand its place to a request that nobody wants any more.
                if not task.done():
                    await asyncio.wait((task,))
                batch.append(task.result())
            await self._write_batch(rows, batch)

    async def _write_batch(self, rows: RowWriter, batch: list[Outcome]) -> None:
        if not batch:
            return
        for outcome in await self._in_thread(lambda: self._write_rows(rows, batch)):
            self.job.progress.wrote(outcome)
            self.backlog_bytes -= outcome.sample.size
        self.drained.set()

    def _write_rows(self, rows: RowWriter, batch: Iterable[Outcome]) -> list[Outcome]:
        """Write rows and count them; returns how they ended."""
        all_ended = []
        for outcome in batch:
            ended, written = outcome, 0
            if outcome.status in ("ok", "cached"):
                try:
                    rows.write(outcome.sample, outcome.rows)
                    written = len(outcome.rows)
                except VLMError:
                    raise
                except (TypeError, ValueError) as error:
                    ended = _unwritable(outcome, error)
            sample = ended.sample
            if ended.status in ("skipped", "failed") and (
                sample.row is not None or sample.origin is not None
            ):
                rows.write_unchanged(sample)
                written = 1
            self.ledger.add(ended, rows_out=written)
            all_ended.append(ended)
        return all_ended

    def _fail(self, error: BaseException) -> None:
        """Stop the shard for an error that is not one sample's own."""
        if self.failure is None:
            self.failure = error
            self._halt()

    def _halt(self) -> list[asyncio.Task[Any]]:
        """Cancel everything at once, the sending before the writing: what blocks must not hold up what costs."""
        rest: list[asyncio.Task[Any]] = [
            *self.running,
            *(task for task in (self.reading, self.writing) if task is not None),
        ]
        for task in rest:
            task.cancel()
        return rest

    async def _stopped(self, rest: list[asyncio.Task[Any]]) -> None:
        """Save what was answered, and wait until all that was cancelled has ended: nothing is sent after this."""
        # Requests end at once, and only then is it known what was answered. A write may take long.
        await asyncio.gather(*self.running, return_exceptions=True)
        await asyncio.gather(self.ledger.journal.close(), *rest, return_exceptions=True)

    async def _in_thread(self, function: Callable[[], T]) -> T:
        """Run what blocks in a thread. When cancelled meanwhile, wait for it a little: half a write helps nobody."""
        future = asyncio.get_running_loop().run_in_executor(self.job.writers, function)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            # It may go on without anybody who looks at its end.
            future.add_done_callback(_seen)
            await asyncio.wait([future], timeout=STOP_SECONDS)
            raise


async def _to_its_end(work: Coroutine[Any, Any, None]) -> None:
    """Wait for what takes a few seconds at most and must not be cut short, though who waits is cancelled meanwhile."""
    task = asyncio.ensure_future(work)
    while not task.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait((task,))
    task.result()


def _seen(future: asyncio.Future[Any]) -> None:
    if not future.cancelled():
        future.exception()


def _batch(samples: Iterator[Sample]) -> Iterator[Sample]:
    """The next few rows: enough for one trip to a thread to be worth it."""
    size = 0
    for sample in islice(samples, READ_BATCH_ROWS):
        yield sample
        size += sample.size
        if size >= READ_BATCH_BYTES:
            return


def _unwritable(outcome: Outcome, error: Exception) -> Outcome:
    """The end of a sample whose shard's format can't hold what the step made of it."""
    message = f"What was made of the row can't be written into a shard of this format: {error}"
    return replace(outcome, status="failed", rows=(), error=SampleError("unwritable", message))
