"""One sample through one step: its requests answered, its media loaded when, and only when, they have to be."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any, TypeVar

from airflow_vlm_provider.errors import (
    LASTING_KINDS,
    ConfigError,
    SampleError,
    ShardError,
    TransientError,
    VLMError,
)
from airflow_vlm_provider.ledger.dead_letters import NotTriedAgainError
from airflow_vlm_provider.types import (
    Answer,
    Choice,
    Independent,
    Media,
    MediaRef,
    Outcome,
    Part,
    Probe,
    Request,
    Result,
    Sample,
    SourceMedia,
    Status,
    Usage,
)

if TYPE_CHECKING:
    from airflow_vlm_provider.answering import Answering
    from airflow_vlm_provider.ledger.dead_letters import DeadLetters
    from airflow_vlm_provider.ledger.journal import ShardJournal
    from airflow_vlm_provider.ledger.keys import RequestKeys
    from airflow_vlm_provider.ledger.media_memory import MediaMemory, MediaRecorder
    from airflow_vlm_provider.shards.media import MediaLoader
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

    :param shard: The shard's name.
    :param keys: Makes requests' keys.
    :param journal: The shard's journal.
    :param remembered: What is known of the media from the shard's last commit.
    :param recorder: Takes down what media there are now.
    :param redrive: None works on all samples.
    :param threads: Where everything runs that blocks.
    :param loaded: Bounds the requests whose media are in memory.
    :param fail: Stops the shard for an error that is not one sample's own.
    """

    shard: str
    step: Step
    media: MediaLoader
    keys: RequestKeys
    answering: Answering
    journal: ShardJournal
    remembered: MediaMemory
    recorder: MediaRecorder
    redrive: Redrive | None
    threads: Executor
    loaded: asyncio.Semaphore
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
            log.exception("Row %s of %s broke the step %s", sample.index, self.shard, self.step.name)
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
        loading = _Loading(self, sample, request, asked.videos)
        async with self.loaded:
            try:
                if not loading.recall():
                    await self._in_thread(loading.load)
                asked.requests.append((loading.key, request))

                async def ready() -> Request:
                    if not loading.is_ready:
                        await self._in_thread(loading.make_ready)
                    assert loading.ready is not None
                    return loading.ready

                async def find() -> Answer:
                    if isinstance(request, Probe):
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
                f"{self.shard}: row {sample.index} is no dead letter, but its answer is not in the journal, so the "
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
                        self.recorder.keep(part.ref, self.remembered)
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
    videos: _Videos = dataclasses.field(default_factory=lambda: _Videos())

    def keys_about(self, media: str | None) -> tuple[str, ...]:
        """The keys of the requests about one medium; of all, where it is about none in particular."""
        about = [
            key
            for key, request in self.requests
            if any(isinstance(part, MediaRef) and part.ref == media for part in request.parts)
        ]
        return tuple(dict.fromkeys(about or [key for key, _ in self.requests]))


class _Videos:
    """The files of one sample's videos: large, and often asked about several times. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fetching: dict[str, threading.Lock] = {}
        self._files: dict[str, SourceMedia] = {}

    def fetch(self, ref: str, fetch: Callable[[], SourceMedia]) -> SourceMedia:
        """The file of a reference, fetched unless it was before.

        :raises SampleError: it can't be.
        """
        with self._lock:
            fetching = self._fetching.setdefault(ref, threading.Lock())
        with fetching:
            if ref not in self._files:
                self._files[ref] = fetch()
            return self._files[ref]


class _Loading:
    """The media of one request on their way, and the key that they make with it."""

    def __init__(
        self, runner: SampleRunner, sample: Sample, request: Request | Probe, videos: _Videos
    ) -> None:
        self._runner = runner
        self._sample = sample
        self._request = request
        self._videos = videos
        self._refs = [part for part in request.parts if isinstance(part, MediaRef)]
        self._recalled: dict[MediaRef, Any] = {}
        self._sources: dict[MediaRef, SourceMedia] = {}
        self._failed: tuple[MediaRef, SampleError] | None = None
        self.key = ""
        self.ready: Request | None = None

    def recall(self) -> bool:
        """Make the key from what is remembered of the media; False when some have to be fetched for it.

        :raises SampleError: it is remembered that one of them can't be loaded.
        """
        for ref in self._refs:
            if not isinstance(ref.ref, str) or ref.ref in self._sample.embedded:
                return False
            found = self._runner.remembered.recall(ref.ref)
            if found is None:
                return False
            self._recalled[ref] = found
            if found.error is not None:
                raise SampleError(found.error["kind"], found.error["message"], media=ref.ref)
        self._make_key()
        return True

    def load(self) -> None:
        """Fetch what is not remembered, make the key and, if it will be asked for, the request. Blocks.

        :raises SampleError: one of the media can't be loaded.
        """
        for ref in self._refs:
            if not isinstance(ref.ref, str) or ref not in self._recalled:
                self._fetch(ref)
        self._make_key()
        if isinstance(self._request, Request) and not self._runner.answering.knows(self.key):
            self.make_ready()

    @property
    def is_ready(self) -> bool:
        """Whether the request can be sent as it was made ready."""
        if self.ready is None:
            return False
        sends_video = any(isinstance(part, Media) and part.kind == "video" for part in self.ready.parts)
        return not sends_video or self._runner.answering.takes_video

    def make_ready(self) -> None:
        """Make the request as it is sent, fetching what was only remembered so far. Blocks.

        :raises SampleError: one of the media can't be loaded.
        :raises ConfigError: a video has to be sent as such, and the engine takes none.
        """
        assert isinstance(self._request, Request)
        self._fetch_all()
        parts: list[Part] = []
        for part in self._request.parts:
            parts += self._prepare(part) if isinstance(part, MediaRef) else (part,)
        self.ready = dataclasses.replace(self._request, parts=tuple(parts))

    def probe(self) -> Answer:
        """Look at the file itself. Blocks.

        :raises SampleError: it can't be loaded.
        """
        self._fetch_all()
        (ref,) = self._refs
        with self._blamed(ref):
            facts = self._runner.media.probe(self._sources[ref])
        return Answer((Choice(json.dumps(facts, sort_keys=True)),), model="")

    def record(self) -> None:
        """Note for the next run what media there were."""
        for ref in self._refs:
            if not isinstance(ref.ref, str) or ref.ref in self._sample.embedded:
                continue
            if self._failed is not None and self._failed[0] == ref:
                error = self._failed[1]
                if error.kind in LASTING_KINDS:
                    looked = self._sources[ref].looked if ref in self._sources else error.looked
                    said = {"kind": error.kind, "message": error.message}
                    self._runner.recorder.add(ref.ref, looked, error=said)
            elif ref in self._sources:
                source = self._sources[ref]
                self._runner.recorder.add(ref.ref, source.looked, digest=source.digest)
            elif ref in self._recalled:
                found = self._recalled[ref]
                self._runner.recorder.add(ref.ref, found.looked, digest=found.digest, error=found.error)

    def _make_key(self) -> None:
        digests = [
            self._sources[ref].digest if ref in self._sources else self._recalled[ref].digest
            for ref in self._refs
        ]
        if isinstance(self._request, Probe):
            self.key = self._runner.keys.of_probe(*digests)
        else:
            self.key = self._runner.keys.of(self._request, digests)

    def _fetch_all(self) -> None:
        for ref in self._refs:
            if ref not in self._sources:
                self._fetch(ref)

    def _fetch(self, ref: MediaRef) -> None:
        def fetch() -> SourceMedia:
            return self._runner.media.fetch(ref, shard=self._runner.shard, embedded=self._sample.embedded)

        with self._blamed(ref):
            source = self._videos.fetch(ref.ref, fetch) if ref.kind == "video" else fetch()
        found = self._recalled.pop(ref, None)
        self._sources[ref] = source
        if found is not None and found.digest != source.digest:
            # Replaced since it was listed: an answer about it must not be filed under the old one's key.
            raise TransientError(f"{ref.ref} was replaced while the shard was worked on.", media=ref.ref)

    def _prepare(self, ref: MediaRef) -> Sequence[Part]:
        transport = None if ref.frames is None else ref.frames.transport
        takes_video = self._runner.answering.takes_video
        if transport == "video" and not takes_video:
            raise ConfigError(
                "The model takes no videos. Set transport='frames' to send their frames as images, or 'auto'."
            )
        with self._blamed(ref):
            return self._runner.media.prepare(
                self._sources[ref], frames=ref.frames, as_video=takes_video and transport != "frames"
            )

    @contextlib.contextmanager
    def _blamed(self, ref: MediaRef) -> Iterator[None]:
        """Note which medium it was that failed."""
        try:
            yield
        except SampleError as error:
            self._failed = (ref, error)
            raise
