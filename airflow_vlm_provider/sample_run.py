"""One sample through one step: its requests answered, its media loaded when, and only when, they have to be."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING, TypeVar

from airflow_vlm_provider.errors import (
    SampleError,
    ShardError,
    VLMError,
)
from airflow_vlm_provider.ledger.dead_letters import NotTriedAgainError
from airflow_vlm_provider.loading import Loading, ShardMedia, VideoFiles
from airflow_vlm_provider.types import (
    Answer,
    Independent,
    MediaRef,
    Outcome,
    Probe,
    Request,
    Result,
    Sample,
    Status,
    Usage,
)

if TYPE_CHECKING:
    from airflow_vlm_provider.answering import Answering
    from airflow_vlm_provider.bottleneck import Bottleneck
    from airflow_vlm_provider.engines.window import Window
    from airflow_vlm_provider.ledger.dead_letters import DeadLetters
    from airflow_vlm_provider.ledger.journal import ShardJournal
    from airflow_vlm_provider.steps.base import Step

log = logging.getLogger(__name__)

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Redrive:
    """What a run does that asks again for dead letters only.

    :param dead: Knows the dead letters of the shard's last commit.
    :param kinds: The kinds that are tried again; None tries all.
    """

    dead: DeadLetters
    kinds: frozenset[str] | None

    def check(self, sample: Sample) -> bool:
        """Whether the model may be asked about the sample.

        :raises NotTriedAgainError: it failed for a reason that is not tried again.
        """
        letter = self.dead.earlier(sample)
        if letter is not None and self.kinds is not None and letter["kind"] not in self.kinds:
            raise NotTriedAgainError(letter)
        return letter is not None


@dataclasses.dataclass(frozen=True)
class SampleRunner:
    """Takes samples of one shard through the step.

    :param media: Loads what the samples refer to.
    :param journal: The shard's journal.
    :param redrive: None works on all samples.
    :param bottleneck: Counts what is waited for.
    :param threads: Where everything runs that blocks.
    :param loaded: Bounds the requests whose media are in memory.
    :param fail: Stops the shard for an error that is not one sample's own.
    """

    step: Step
    media: ShardMedia
    answering: Answering
    journal: ShardJournal
    redrive: Redrive | None
    bottleneck: Bottleneck
    threads: Executor
    loaded: Window
    fail: Callable[[BaseException], None]

    async def run(self, sample: Sample) -> Outcome:
        """Work on one sample; only what stops the whole shard is raised."""
        try:
            if sample.row is None:
                raise SampleError("malformed_row", sample.error or "the row could not be read")
            ask = self.redrive is None or self.redrive.check(sample)
            return await self._drive(sample, _Asked(ask=ask))
        except NotTriedAgainError as error:
            self._keep_record(sample)
            return Outcome(sample, "failed", error=error)
        except SampleError as error:
            return Outcome(sample, "failed", error=error)
        except (VLMError, MemoryError, OSError) as error:
            self.fail(error)
            raise

    async def _drive(self, sample: Sample, asked: _Asked) -> Outcome:
        """Run the step's generator, answering what it asks."""
        run = self.step.process(sample)
        try:
            requests = next(run)
            while True:
                settled = await self._settle_all(sample, requests, asked)
                if isinstance(requests, Independent):
                    settled = [_as_answer(each) for each in settled]
                errors = [each for each in settled if isinstance(each, SampleError)]
                answers = [each for each in settled if isinstance(each, Answer)]
                requests = run.throw(errors[0]) if errors else run.send(answers)
        except StopIteration as stop:
            result: Result = stop.value
        except SampleError as error:
            keys = error.keys or asked.keys_about(error.media)
            return Outcome(sample, "failed", error=error, usage=asked.usage, keys=keys)
        except (VLMError, MemoryError, OSError):
            raise
        except Exception as error:
            log.exception("Row %s of %s broke the step %s", sample.index, self.media.shard, self.step.name)
            message = f"{type(error).__name__} in the step itself; the task log has the traceback"
            failure = SampleError("internal", message)
            return Outcome(sample, "failed", error=failure, usage=asked.usage, keys=asked.keys_about(None))
        finally:
            run.close()
        if result.skipped:
            return Outcome(sample, "skipped", usage=asked.usage)
        status: Status = "cached" if asked.requests and not asked.fresh else "ok"
        return Outcome(sample, status, rows=result.rows, usage=asked.usage)

    async def _settle_all(
        self, sample: Sample, requests: Sequence[Request | Probe], asked: _Asked
    ) -> list[Answer | SampleError]:
        if len(requests) == 1:  # most samples have one picture, and a task has its price
            return [await self._settle(sample, requests[0], asked)]
        tasks = [asyncio.ensure_future(self._settle(sample, request, asked)) for request in requests]
        try:
            return list(await asyncio.gather(*tasks))
        finally:
            for task in tasks:
                task.cancel()

    async def _settle(self, sample: Sample, request: Request | Probe, asked: _Asked) -> Answer | SampleError:
        """Ask, and hand a sample's own error back as a value: the answers beside it are paid for and counted."""
        try:
            return await self._answer(sample, request, asked)
        except SampleError as error:
            asked.fresh = asked.fresh or error.attempts > 0
            asked.usage += Usage(requests=error.attempts)
            return error

    async def _answer(self, sample: Sample, request: Request | Probe, asked: _Asked) -> Answer:
        loading = Loading(self.media, sample, request, asked.videos)
        async with self.loaded:
            try:
                if not loading.recall():
                    with self.bottleneck.preparing():
                        await self._in_thread(loading.load)
                asked.requests.append((loading.key, request))

                async def ready() -> Request:
                    if not loading.is_ready:
                        with self.bottleneck.preparing():
                            await self._in_thread(loading.make_ready)
                    assert loading.ready is not None
                    return loading.ready

                async def find() -> Answer:
                    if isinstance(request, Probe):
                        with self.bottleneck.preparing():
                            return await self._in_thread(loading.probe)
                    return await self.answering.ask(loading.key, ready)

                given = await self.answering.answer(
                    loading.key,
                    find,
                    self.journal,
                    ask=asked.ask,
                    note=request.note if isinstance(request, Request) else None,
                )
            except SampleError as error:
                # What is asked again for it is this, and not all that was asked about the medium.
                error.keys = error.keys or ((loading.key,) if loading.key else ())
                raise
            finally:
                loading.record()
        if given is None:
            raise ShardError(
                f"{self.media.shard}: row {sample.index} is no dead letter, but its answer is not in the journal, so the "
                "output can't be made again without asking for more than the dead letters. Run the operator without "
                "failed_only."
            )
        if given.fresh and isinstance(request, Request):
            asked.fresh = True
            asked.usage += given.answer.usage
        return given.answer

    def _keep_record(self, sample: Sample) -> None:
        """Take down once more what the last commit saw of a sample's media, as changed as they may be since.

        The sample is left alone, but the next run has to notice when its media are others than when it failed.
        """
        run = self.step.process(sample)
        # What it asks first names its media. A step that fails before has seen none.
        with contextlib.suppress(Exception):
            for request in next(run):
                for part in request.parts:
                    if isinstance(part, MediaRef) and part.ref not in sample.embedded:
                        self.media.recorder.keep(part.ref, self.media.remembered)
        run.close()

    async def _in_thread(self, function: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self.threads, function)


def _as_answer(settled: Answer | SampleError) -> Answer:
    return Answer((), model="", error=settled) if isinstance(settled, SampleError) else settled


@dataclasses.dataclass
class _Asked:
    """What a sample may ask, and has asked so far.

    :param ask: Whether the engine may be asked, or only what is known.
    :param fresh: Whether something was sent just now.
    :param videos: The files of its videos, each fetched once, however many requests are about it.
    """

    ask: bool
    requests: list[tuple[str, Request | Probe]] = dataclasses.field(default_factory=list)
    usage: Usage = dataclasses.field(default_factory=Usage)
    fresh: bool = False
    videos: VideoFiles = dataclasses.field(default_factory=VideoFiles)

    def keys_about(self, media: str | None) -> tuple[str, ...]:
        """The keys of the requests about one medium; of all, where it is about none in particular."""
        about = [
            key
            for key, request in self.requests
            if any(isinstance(part, MediaRef) and part.ref == media for part in request.parts)
        ]
        return tuple(dict.fromkeys(about or [key for key, _ in self.requests]))
