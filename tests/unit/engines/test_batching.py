from __future__ import annotations

import asyncio
import logging
import threading
import weakref
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

import pytest

from airflow_vlm_provider.engines.batching import Batcher, BatchTooLargeError, Ticket
from airflow_vlm_provider.errors import EngineError, SampleError

LONG = 30.0


class Ballast:
    """Stands for the tensors of a batch."""


class FakeModel:
    """Upper-cases what it is asked, and keeps the batches that it was given."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.loaded: list[str] = []
        self.groups: dict[str, str] = {}
        self._load_done = threading.Condition()
        self.capacity = 10**6
        self.poison: set[str] = set()
        self.on_run: Callable[[list[str]], None] = lambda batch: None
        self.on_collate: Callable[[list[str]], None] = lambda batch: None

    def load(self, item: str) -> str:
        with self._load_done:
            self.loaded.append(item)
            self._load_done.notify_all()
        if item.startswith("unreadable"):
            raise SampleError("media_corrupt", item)
        return item

    async def until_loaded(self, count: int) -> None:
        def wait() -> bool:
            with self._load_done:
                return self._load_done.wait_for(lambda: len(self.loaded) >= count, LONG)

        assert await asyncio.to_thread(wait)

    def collate(self, items: Sequence[str]) -> list[str]:
        self.on_collate(list(items))
        return list(items)

    def run(self, tickets: Sequence[Ticket[str, str]], batch: list[str]) -> list[str]:
        assert [ticket.loaded for ticket in tickets] == batch
        self.batches.append(list(batch))
        self.on_run(list(batch))
        if sum(ticket.weight for ticket in tickets) > self.capacity:
            raise BatchTooLargeError("no memory")
        if self.poison & set(batch):
            raise ValueError("poisoned")
        return [item.upper() for item in batch]

    def batcher(self, *, size: int = 4, in_flight: int = 100) -> Batcher[str, str, list[str], str]:
        return Batcher(
            load=self.load,
            group=lambda item: self.groups.get(item),
            collate=self.collate,
            run=self.run,
            blame=lambda error: SampleError("rejected", str(error)),
            size=size,
            in_flight=in_flight,
            linger=0.01,
        )


class Held:
    """Holds the model in its batch until it is let go; proves on the way that the event loop goes on."""

    def __init__(self, model: FakeModel) -> None:
        self.started = threading.Event()
        self.go = threading.Event()
        model.on_run = self._hold

    def _hold(self, batch: list[str]) -> None:
        self.started.set()
        assert self.go.wait(LONG)

    async def until_started(self) -> None:
        assert await asyncio.to_thread(self.started.wait, LONG)


@pytest.fixture
def model() -> FakeModel:
    return FakeModel()


def run_with(
    batcher_of: Callable[[], Batcher[str, str, list[str], str]],
    test: Callable[[Batcher[str, str, list[str], str]], Coroutine[Any, Any, Any]],
) -> Any:
    async def main() -> Any:
        batcher = batcher_of()
        try:
            return await asyncio.wait_for(test(batcher), LONG)
        finally:
            await batcher.stop()
            batcher.end_threads()

    return asyncio.run(main())


async def ask_all(
    batcher: Batcher[str, str, list[str], str], items: Sequence[str], **kwargs: Any
) -> list[Any]:
    return await asyncio.gather(*(batcher.submit(item, **kwargs) for item in items), return_exceptions=True)


def names(count: int) -> list[str]:
    return [f"item-{number}" for number in range(count)]


def test_everybody_gets_their_own_answer_in_batches_of_the_given_size(model):
    answers = run_with(lambda: model.batcher(size=4), lambda b: ask_all(b, names(10)))
    assert answers == [name.upper() for name in names(10)]
    assert model.batches == [names(10)[0:4], names(10)[4:8], names(10)[8:10]]


def test_a_batch_holds_one_group_and_the_oldest_request_decides_which(model):
    async def test(batcher):
        held = Held(model)
        first = asyncio.create_task(batcher.submit("first"))
        await held.until_started()
        rest = ["a1", "b1", "a2", "b2", "a3", "a4", "a5"]
        model.groups = {name: name[0] for name in rest}
        tasks = [asyncio.create_task(batcher.submit(name)) for name in rest]
        await model.until_loaded(8)
        held.go.set()
        await asyncio.gather(first, *tasks)

    run_with(lambda: model.batcher(size=3), test)
    assert model.batches == [["first"], ["a1", "a2", "a3"], ["b1", "b2"], ["a4", "a5"]]


def test_weights_count_as_places(model):
    answers = run_with(lambda: model.batcher(size=8), lambda b: ask_all(b, names(5), weight=3))
    assert answers == [name.upper() for name in names(5)]
    assert [len(batch) for batch in model.batches] == [2, 2, 1]


def test_a_request_that_is_larger_than_a_batch_goes_alone(model):
    run_with(lambda: model.batcher(size=2), lambda b: ask_all(b, names(3), weight=5))
    assert [len(batch) for batch in model.batches] == [1, 1, 1]


def test_requests_that_come_while_the_model_is_busy_share_the_next_batch(model):
    async def test(batcher):
        held = Held(model)
        first = asyncio.create_task(batcher.submit("first"))
        await held.until_started()
        early = asyncio.create_task(ask_all(batcher, ["early-1", "early-2"]))
        # Long enough for an idle model to be given what there is.
        await asyncio.sleep(0.1)
        late = asyncio.create_task(ask_all(batcher, ["late-1", "late-2"]))
        await model.until_loaded(5)
        held.go.set()
        await asyncio.gather(first, early, late)

    run_with(lambda: model.batcher(size=8), test)
    assert model.batches == [["first"], ["early-1", "early-2", "late-1", "late-2"]]


def test_the_next_batch_is_put_together_while_one_runs(model):
    second_collated = threading.Event()
    overlapped: list[bool] = []
    model.on_collate = lambda batch: second_collated.set() if "item-4" in batch else None
    model.on_run = lambda batch: overlapped.append(second_collated.wait(LONG)) if "item-0" in batch else None
    run_with(lambda: model.batcher(size=4), lambda b: ask_all(b, names(8)))
    assert overlapped == [True]


def test_a_batch_too_large_for_the_memory_is_halved_and_later_ones_stay_small(model, caplog):
    model.capacity = 3

    async def test(batcher):
        first = await ask_all(batcher, names(8))
        tried = list(model.batches)
        model.batches.clear()
        return first, tried, await ask_all(batcher, names(8)), batcher.size

    with caplog.at_level(logging.WARNING):
        first, tried, second, size = run_with(lambda: model.batcher(size=8), test)
    assert first == second == [name.upper() for name in names(8)]
    assert [len(batch) for batch in tried] == [8, 4, 2, 2, 2, 2]
    assert [len(batch) for batch in model.batches] == [2, 2, 2, 2]
    assert size == 2
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
    assert "at most 2" in caplog.text


def test_a_batch_that_was_ready_before_the_memory_proved_too_small_is_split_untried(model):
    model.capacity = 2
    run_with(lambda: model.batcher(size=4), lambda b: ask_all(b, names(8)))
    assert [len(batch) for batch in model.batches] == [4, 2, 2, 2, 2]


def test_what_a_failed_batch_took_is_free_before_its_halves_are_tried(model):
    taken: list[weakref.ref[Ballast]] = []
    alive: list[int] = []

    def run(tickets, batch):
        alive.append(sum(ref() is not None for ref in taken))
        ballast = Ballast()
        taken.append(weakref.ref(ballast))
        return FakeModel.run(model, tickets, batch)

    model.capacity = 1
    model.run = run
    run_with(lambda: model.batcher(size=4), lambda b: ask_all(b, names(4)))
    assert len(taken) == 1 + 2 + 4 - 1
    assert not any(alive)


def test_a_request_too_large_even_alone_fails_alone(model):
    def refuse(batch: list[str]) -> None:
        if "item-5" in batch:
            raise BatchTooLargeError("no memory")

    model.on_run = refuse
    answers = run_with(lambda: model.batcher(size=8), lambda b: ask_all(b, names(8)))
    assert [answer for answer in answers if isinstance(answer, Exception)] == [answers[5]]
    assert isinstance(answers[5], SampleError)


@pytest.mark.parametrize("bad", [{"item-0"}, {"item-5"}, {"item-2", "item-7"}])
def test_a_request_that_breaks_the_model_fails_alone(model, bad):
    model.poison = bad
    answers = run_with(lambda: model.batcher(size=8), lambda b: ask_all(b, names(8)))
    for name, answer in zip(names(8), answers, strict=True):
        if name in bad:
            assert isinstance(answer, SampleError)
            assert answer.kind == "rejected"
        else:
            assert answer == name.upper()


def test_a_request_that_no_batch_can_be_made_of_fails_alone(model):
    def refuse(batch: list[str]) -> None:
        if "item-3" in batch:
            raise ValueError("too long")

    model.on_collate = refuse
    answers = run_with(lambda: model.batcher(size=8), lambda b: ask_all(b, names(8)))
    assert isinstance(answers.pop(3), SampleError)
    assert answers == [name.upper() for name in names(8) if name != "item-3"]


def test_a_request_that_can_not_be_loaded_costs_no_batch(model):
    answers = run_with(lambda: model.batcher(size=4), lambda b: ask_all(b, ["unreadable", *names(4)]))
    assert isinstance(answers[0], SampleError)
    assert answers[0].kind == "media_corrupt"
    assert answers[1:] == [name.upper() for name in names(4)]
    assert model.batches == [names(4)]


def test_a_cancelled_request_is_never_run(model):
    async def test(batcher):
        held = Held(model)
        first = asyncio.create_task(batcher.submit("first"))
        await held.until_started()
        tasks = [asyncio.create_task(batcher.submit(name)) for name in names(3)]
        await model.until_loaded(4)
        tasks[1].cancel()
        held.go.set()
        return await asyncio.gather(first, *tasks, return_exceptions=True)

    answers = run_with(lambda: model.batcher(size=4), test)
    assert isinstance(answers[2], asyncio.CancelledError)
    assert [answers[0], answers[1], answers[3]] == ["FIRST", "ITEM-0", "ITEM-2"]
    assert model.batches == [["first"], ["item-0", "item-2"]]


def test_no_more_requests_are_loaded_than_may_be_in_flight(model):
    async def test(batcher):
        held = Held(model)
        asking = asyncio.create_task(ask_all(batcher, names(20)))
        await held.until_started()
        await asyncio.sleep(0.05)
        loaded = len(model.loaded), batcher.in_flight
        held.go.set()
        return loaded, await asking, batcher.in_flight

    loaded, answers, left = run_with(lambda: model.batcher(size=2, in_flight=6), test)
    assert loaded == (6, 6)
    assert left == 0
    assert answers == [name.upper() for name in names(20)]


def test_stopping_ends_a_running_batch_and_fails_what_waits(model):
    async def test(batcher):
        seen = threading.Event()
        finished: list[bool] = []

        def generate(tickets, batch):
            seen.set()
            while not all(ticket.abandoned for ticket in tickets):
                pass
            finished.append(True)
            return [""] * len(tickets)

        batcher._run = generate
        asking = asyncio.create_task(ask_all(batcher, names(6)))
        await asyncio.to_thread(seen.wait, LONG)
        await batcher.stop()
        assert finished == [True]
        return await asking, (await ask_all(batcher, ["late"]))[0]

    answers, late = run_with(lambda: model.batcher(size=2), test)
    assert [type(answer) for answer in [*answers, late]] == [EngineError] * 7


def test_both_threads_end(model):
    before = set(threading.enumerate())
    run_with(lambda: model.batcher(), lambda b: ask_all(b, names(4)))
    for thread in set(threading.enumerate()) - before:
        thread.join(LONG)
        assert not thread.is_alive()


def test_a_lost_engine_fails_everything_now_and_later(model):
    def break_down(batch: list[str]) -> None:
        raise EngineError("device lost")

    async def test(batcher):
        model.on_run = break_down
        first = await ask_all(batcher, names(6))
        model.on_run = lambda batch: None
        return [*first, *await ask_all(batcher, ["later"])]

    answers = run_with(lambda: model.batcher(size=2), test)
    assert [(type(answer), str(answer)) for answer in answers] == [(EngineError, "device lost")] * 7
    assert len(model.batches) == 1


def test_a_model_that_hands_back_too_few_answers_fails_nobody_silently(model):
    async def test(batcher):
        batcher._run = lambda tickets, batch: []
        return await ask_all(batcher, names(2))

    answers = run_with(lambda: model.batcher(size=2), test)
    assert [type(answer) for answer in answers] == [SampleError, SampleError]
