"""One shard through one step: read -> ask -> write -> commit.

Rows are read in order, worked on many at a time and written in order. What is held in memory is bounded: so many
samples are worked on at once, so many media are loaded at once, and so many finished rows wait for a slow one
before them. What a shard writes appears whole at its commit or not at all, and its manifest comes last.

Everything that blocks (reading, media, writing, committing) happens in threads; the event loop only waits.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack, suppress
from datetime import datetime, timezone
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeVar

import airflow_vlm_provider
from airflow_vlm_provider.errors import SampleError, ShardError, VLMError
from airflow_vlm_provider.ledger.dead_letters import DeadLetters
from airflow_vlm_provider.ledger.manifest import Counts, Manifest, save_manifest
from airflow_vlm_provider.progress import CountingReader, Progress
from airflow_vlm_provider.shards.formats import RowKeys, RowWriter, shard_format
from airflow_vlm_provider.shards.stores import StoreError
from airflow_vlm_provider.types import Answer, MediaRef, Outcome, Request, Result, Sample, Usage

if TYPE_CHECKING:
    from airflow_vlm_provider.engines.base import Engine
    from airflow_vlm_provider.shards.media import MediaLoader
    from airflow_vlm_provider.shards.stores import ObjectInfo, Store
    from airflow_vlm_provider.steps.base import Step

log = logging.getLogger(__name__)

T = TypeVar("T")

READ_BATCH_ROWS = 64
READ_BATCH_BYTES = 1024 * 1024
WRITE_BATCH_ROWS = 256
# Finished rows that may wait for a slow one before them. Beyond either bound, no new rows are begun.
BACKLOG_ROWS = 4096
BACKLOG_BYTES = 64 * 1024 * 1024
# How long a stop waits for a thread that blocks. Airflow kills a task 5 seconds after it told it to stop.
STOP_SECONDS = 2.0


@dataclasses.dataclass(frozen=True)
class Job:
    """What all shards of a run have in common.

    :param fingerprint: Of step, engine and media, for the manifests.
    :param cost: US dollars for a usage; None when prices are not known.
    :param written_by: Who runs this, for the manifests.
    :param threads: Where everything runs that blocks.
    :param active: Bounds the samples that are worked on at once.
    :param loaded: Bounds the requests whose media are in memory.
    """

    step: Step
    engine: Engine
    source: Store
    destination: Store
    media: MediaLoader
    fingerprint: str
    cost: Callable[[Usage], float | None]
    written_by: Mapping[str, Any]
    progress: Progress
    threads: Executor
    active: asyncio.Semaphore
    loaded: asyncio.Semaphore


class ShardRun:
    """One shard on its way. Made anew for every shard, because all of its state is that shard's."""

    def __init__(self, job: Job, shard: ObjectInfo) -> None:
        self.job = job
        self.shard = shard
        self.counts = Counts()
        self.dead = DeadLetters()
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
        form = shard_format(self.shard.name)
        # An exit stack and not `with`, because leaving it is the commit: slow, and so done in a thread.
        output = ExitStack()
        try:
            stream = await self._in_thread(
                lambda: output.enter_context(self.job.destination.create(self.shard.name))
            )
            rows = output.enter_context(form.writer(stream))
            self.reading = asyncio.create_task(self._read())
            self.reading.add_done_callback(lambda _: when_read())
            self.writing = asyncio.create_task(self._write(rows))
            # Shielded, so that a cancellation comes here first and stops the sending, and not to a write that blocks.
            await asyncio.shield(self.writing)
            return await self._in_thread(lambda: self._commit(output, started))
        except BaseException as error:
            await self._stop()
            if isinstance(error, asyncio.CancelledError) and self.failure is not None:
                error = self.failure
            # The stores drop what was written when they see an exception, and that is quick.
            with suppress(BaseException):
                output.__exit__(type(error), error, error.__traceback__)
            raise error from None
        finally:
            if self.reading is None:
                when_read()
            self.dead.close()

    async def _read(self) -> None:
        """Begin the rows one after another, as fast as the bounds allow."""
        job, loop = self.job, asyncio.get_running_loop()
        try:
            # When cancelled, the thread that reads is not waited for: a store that hangs would hold up the end.
            stream = await loop.run_in_executor(self.job.threads, lambda: job.source.open(self.shard.name))
            counted = CountingReader(stream, job.progress.read)
            samples = shard_format(self.shard.name).read(counted)  # type: ignore[arg-type]
            while batch := await loop.run_in_executor(self.job.threads, lambda: list(_batch(samples))):
                for sample in batch:
                    await self._begin(sample)
            await self.tasks.put(None)
            stream.close()
        except (ShardError, StoreError, FileNotFoundError, PermissionError) as error:
            self._fail(ShardError(f"{job.source.uri}{self.shard.name} can't be read: {error}"))
        except Exception as error:
            self._fail(error)

    async def _begin(self, sample: Sample) -> None:
        self.counts.rows_in += 1
        self.job.progress.begun()
        await self.job.active.acquire()
        while self.backlog_bytes > BACKLOG_BYTES:
            self.drained.clear()
            await self.drained.wait()
        self.backlog_bytes += sample.size
        task = asyncio.create_task(self._one(sample))
        self.running.add(task)
        task.add_done_callback(self._ended)
        await self.tasks.put(task)

    def _ended(self, task: asyncio.Task[Outcome]) -> None:
        self.running.discard(task)
        self.job.active.release()
        # An error that stops the shard is raised once, by run(); here it only counts as seen.
        if not task.cancelled():
            task.exception()

    async def _one(self, sample: Sample) -> Outcome:
        """Work on one sample; only what stops the whole shard is raised."""
        try:
            if sample.row is None:
                raise SampleError("malformed_row", sample.error or "the row could not be read")
            return await self._drive(sample)
        except SampleError as error:
            return Outcome(sample, "failed", error=error)
        except (VLMError, MemoryError, OSError) as error:
            self._fail(error)
            raise
        except Exception as error:
            log.exception("Row %s of %s broke the step %s", sample.index, self.shard.name, self.job.step.name)
            message = f"{type(error).__name__} in the step itself; the task log has the traceback"
            return Outcome(sample, "failed", error=SampleError("internal", message))

    async def _drive(self, sample: Sample) -> Outcome:
        """Run the step's generator, answering what it asks."""
        usage = Usage()
        run = self.job.step.process(sample)
        try:
            requests = next(run)
            while True:
                settled = await self._settle_all(requests)
                answers = [answer for answer in settled if isinstance(answer, Answer)]
                errors = [error for error in settled if isinstance(error, SampleError)]
                usage = sum((answer.usage for answer in answers), usage)
                usage += Usage(requests=sum(error.attempts for error in errors))
                requests = run.throw(errors[0]) if errors else run.send(answers)
        except StopIteration as stop:
            result: Result = stop.value
        except SampleError as error:
            return Outcome(sample, "failed", error=error, usage=usage)
        finally:
            run.close()
        if result.skipped:
            return Outcome(sample, "skipped")
        return Outcome(sample, "ok", rows=result.rows, usage=usage)

    async def _settle_all(self, requests: Sequence[Request]) -> list[Answer | SampleError]:
        tasks = [asyncio.ensure_future(self._settle(request)) for request in requests]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def _settle(self, request: Request) -> Answer | SampleError:
        """Ask, and hand a sample's own error back as a value: the answers beside it are paid for and counted."""
        try:
            return await self._ask(request)
        except SampleError as error:
            return error

    async def _ask(self, request: Request) -> Answer:
        async with self.job.loaded:
            if any(isinstance(part, MediaRef) for part in request.parts):
                load = self.job.media.load
                parts = await asyncio.get_running_loop().run_in_executor(
                    self.job.threads,
                    lambda: tuple(
                        load(part, shard=self.shard.name) if isinstance(part, MediaRef) else part
                        for part in request.parts
                    ),
                )
                request = dataclasses.replace(request, parts=parts)
            return await self.job.engine.ask(request)

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
        await self._in_thread(lambda: self._write_rows(rows, batch))
        for outcome in batch:
            self.job.progress.wrote(outcome)
            self.backlog_bytes -= outcome.sample.size
        self.drained.set()

    def _write_rows(self, rows: RowWriter, batch: Iterable[Outcome]) -> None:
        for outcome in batch:
            written = 0
            if outcome.status in ("ok", "cached"):
                rows.write(outcome.sample, outcome.rows)
                written = len(outcome.rows)
            else:
                if outcome.status == "failed":
                    self.dead.add(outcome)
                if outcome.sample.row is not None:
                    rows.write_unchanged(outcome.sample)
                    written = 1
            self.counts.add(outcome, rows_out=written)

    def _commit(self, output: ExitStack, started: datetime) -> Manifest:
        """Make the output visible, then the dead letters, then the manifest. Runs in a thread."""
        job, shard, step = self.job, self.shard.name, self.job.step.name
        self.counts.check()
        self.counts.cost_usd = job.cost(self.counts.usage)
        if self._identity_now() != self.shard.identity:
            raise ShardError(
                f"{job.source.uri}{shard} was replaced or deleted while it was read. Nothing was committed for it; "
                "the task's retry reads what is there then."
            )
        output.close()
        errors = self.dead.save(job.destination, shard, step)
        manifest = Manifest(
            counts=self.counts,
            model=job.engine.model,
            fingerprint=job.fingerprint,
            input={"uri": job.source.uri + shard, "identity": self.shard.identity},
            output={
                "uri": job.destination.uri + shard,
                "identity": job.destination.stat(shard).identity,
            },
            errors=None if errors is None else job.destination.uri + errors,
            started_at=started.isoformat(timespec="seconds"),
            finished_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            provider_version=airflow_vlm_provider.__version__,
            written_by=job.written_by,
        )
        save_manifest(job.destination, shard, step, manifest)
        job.progress.shards_done += 1
        return manifest

    def _identity_now(self) -> str | None:
        try:
            return self.job.source.stat(self.shard.name).identity
        except FileNotFoundError:
            return None

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

    async def _stop(self) -> None:
        """Cancel what still runs and wait until it has ended, so that nothing is sent after this."""
        await asyncio.gather(*self._halt(), return_exceptions=True)

    async def _in_thread(self, function: Callable[[], T]) -> T:
        """Run what blocks in a thread. When cancelled meanwhile, wait for it a little: half a write helps nobody."""
        future = asyncio.get_running_loop().run_in_executor(self.job.threads, function)
        try:
            return await asyncio.shield(future)
        except asyncio.CancelledError:
            await asyncio.wait([future], timeout=STOP_SECONDS)
            raise


def _batch(samples: Iterator[Sample]) -> Iterator[Sample]:
    """The next few rows: enough for one trip to a thread to be worth it."""
    size = 0
    for sample in islice(samples, READ_BATCH_ROWS):
        yield sample
        size += sample.size
        if size >= READ_BATCH_BYTES:
            return
