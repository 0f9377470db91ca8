"""Where an answer comes from: what is known already, a request that is in flight, or the engine.

Invariants:

- What is known is never asked for, and of identical requests that come at the same time one is sent.
- An answer that was paid for is in the journal of the shard that asked before anybody makes use of it.
- Every shard's journal gets every answer that the shard used, whoever paid for it.
"""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from airflow_vlm_provider.errors import NoVideoError, SampleError
from airflow_vlm_provider.ledger.records import answer_of, to_line
from airflow_vlm_provider.types import Answer, Request, Usage

if TYPE_CHECKING:
    from airflow_vlm_provider.bottleneck import Bottleneck
    from airflow_vlm_provider.engines.base import Engine
    from airflow_vlm_provider.ledger.answers import Answers
    from airflow_vlm_provider.ledger.journal import ShardJournal

Note = Callable[[Answer], Mapping[str, Any]]
# Far from the seeds that steps themselves use to ask again.
SEEDS_APART = 1000


@dataclass(frozen=True, slots=True)
class Given:
    """An answer, and whether it was paid for just now."""

    answer: Answer
    fresh: bool


class Answering:
    """Answers the requests of one task.

    :param engine: Who answers what is not known.
    :param answers: What is known.
    :param bottleneck: Counts what is with the engine.
    """

    def __init__(self, *, engine: Engine, answers: Answers, bottleneck: Bottleneck) -> None:
        self._engine = engine
        self._bottleneck = bottleneck
        self._answers = answers
        # Settled with the journal's line, the sample's own error, or None when whoever asked was stopped.
        self._in_flight: dict[str, asyncio.Future[bytes | SampleError | None]] = {}
        self._anew: dict[str, int] = {}
        self._renewed: set[str] = set()

    def ask_anew(self, rounds: Mapping[str, int]) -> None:
        """Don't take these keys' answers from what is known: a sample failed for them.

        Once is enough: what this task has asked anew for one shard, it does not ask anew for another.

        :param rounds: How often each was asked before; a request that draws its answer draws it with another seed.
        """
        self._anew.update((key, number) for key, number in rounds.items() if key not in self._renewed)

    def knows(self, key: str) -> bool:
        """Whether :meth:`answer` will most likely not ask. For any thread."""
        return key not in self._anew and self._answers.has(key)

    @property
    def takes_video(self) -> bool:
        """Whether the engine takes a video as such, as far as is known."""
        return self._engine.takes_video

    async def answer(
        self,
        key: str,
        find: Callable[[], Awaitable[Answer]],
        journal: ShardJournal,
        *,
        ask: bool = True,
        note: Note | None = None,
    ) -> Given | None:
        """Answer one question.

        :param key: Its key.
        :param find: Finds the answer that is not known: :meth:`ask`, or a look at a file.
        :param journal: The journal of the shard that wants the answer.
        :param note: Makes of an answer that was found what else is kept beside it.
        :param ask: False takes only what is known.
        :return: The answer; None when it is not known and must not be asked for.
        :raises SampleError: it can't be answered for its own sake.
        """
        while True:
            # A sample that may only take what is known takes the answer that its output was made of.
            known = not ask or key not in self._anew
            if known and (line := await self._answers.get(key)) is not None:
                journal.use(line)
                return Given(answer_of(line), fresh=False)
            if not ask:
                return None
            shared = self._in_flight.get(key)
            if shared is None:
                return await self._find(key, find, journal, note)
            # Not awaited itself: cancelled here, it would be cancelled for everybody.
            await asyncio.wait((shared,))
            settled = shared.result()
            if isinstance(settled, SampleError):
                error = copy.copy(settled)
                error.attempts = 0
                raise error
            if settled is not None:
                journal.use(settled)
                return Given(answer_of(settled), fresh=False)

    async def ask(self, key: str, ready: Callable[[], Awaitable[Request]]) -> Answer:
        """Ask the engine.

        :param key: The request's key.
        :param ready: Makes the request ready to be sent, its media loaded; called again when the engine turns out to
            take no videos.
        :raises SampleError: it can't be answered for its own sake.
        """
        rounds = self._anew.get(key, 0)
        request = _drawn_anew(await ready(), rounds)
        try:
            with self._bottleneck.asking():
                return await self._engine.ask(request)
        except NoVideoError as error:
            refused = Usage(requests=error.attempts)
        request = _drawn_anew(await ready(), rounds)
        with self._bottleneck.asking():
            answer = await self._engine.ask(request)
        return replace(answer, usage=refused + answer.usage)

    async def _find(
        self, key: str, find: Callable[[], Awaitable[Answer]], journal: ShardJournal, note: Note | None
    ) -> Given:
        settled: bytes | SampleError | None = None
        shared = self._in_flight[key] = asyncio.get_running_loop().create_future()
        try:
            answer = replace(await find(), key=key)
            line = to_line(
                key, answer, time=datetime.now(timezone.utc), note=None if note is None else note(answer)
            )
            try:
                await journal.append(line)
            finally:
                # Who asked may have been stopped, but the line is kept to be saved: nobody has to ask again.
                settled = self._know(key, line)
            return Given(answer, fresh=True)
        except SampleError as error:
            settled = error
            raise
        finally:
            del self._in_flight[key]
            shared.set_result(settled)

    def _know(self, key: str, line: bytes) -> bytes:
        self._answers.put([line])
        if self._anew.pop(key, None) is not None:
            self._renewed.add(key)
        return line


def _drawn_anew(request: Request, rounds: int) -> Request:
    """The same request with another seed; where nothing is drawn (temperature 0) it stays as it is."""
    if not rounds or request.sampling.get("temperature") == 0:
        return request
    seed = (request.sampling.get("seed") or 0) + SEEDS_APART * rounds
    return replace(request, sampling={**request.sampling, "seed": seed})
