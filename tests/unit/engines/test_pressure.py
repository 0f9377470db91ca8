"""The law by which the window follows what an endpoint can take, on servers in virtual time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

import pytest

from airflow_vlm_provider.engines.pressure import FIRST_SIZE, Pressure, Sent, ServerLaw, first_size
from airflow_vlm_provider.engines.vllm_metrics import Metrics
from tests.support.simulated_server import Server, Task, answered_in
from tests.support.virtual_time import run_in_virtual_time

T = TypeVar("T")
MOST = 128


def always(seconds: float) -> Callable[[random.Random, int], float]:
    return lambda draw, running: seconds


def around(seconds: float) -> Callable[[random.Random, int], float]:
    """Answers of all lengths: a tenth take more than twice the mean."""
    return lambda draw, running: draw.expovariate(1 / seconds)


def run(server: Server, tasks: list[Task], use: Callable[[], Awaitable[T]]) -> T:
    """Start the tasks, use them, and stop them."""

    async def main() -> T:
        for task in tasks:
            task.start()
        try:
            return await use()
        finally:
            for task in tasks:
                await task.stop()

    return run_in_virtual_time(main())


def alone(
    make: Callable[[], Server], *, settle: float, seconds: float, **options: object
) -> tuple[int, float, Task]:
    """What one task gets answered once it has settled, how many wait in the server on average, and the task."""
    server = make()
    task = Task(server, **{"most": MOST, **options})

    async def use() -> tuple[int, float, Task]:
        await asyncio.sleep(settle)
        before, waiting = task.answered, []
        for _ in range(100):
            await asyncio.sleep(seconds / 100)
            waiting.append(len(server.queue))
        return task.answered - before, sum(waiting) / len(waiting), task

    return run(server, [task], use)


def best_fixed(make: Callable[[], Server], **options: float) -> int:
    """What the best of some windows gets answered that stay as they are."""
    return max(alone(make, most=size, fixed=True, **options)[0] for size in (8, 64, MOST))


SERVERS = {
    "fast": lambda: Server(64, always(0.25)),
    "slow": lambda: Server(4, around(3.0)),
    "one at a time": lambda: Server(1, around(1.0)),
    "many": lambda: Server(100, around(8.0)),
    "long answers": lambda: Server(64, around(60.0)),
    "slower with more": lambda: Server(
        256, lambda draw, running: (2 + running / 50) * draw.uniform(0.5, 1.5)
    ),
    "cache": lambda: Server(256, around(6.0), cache=1000, pieces=lambda draw: draw.randint(5, 25)),
    "preprocessing": lambda: Server(48, around(2.0), on_the_way=1.0),
}


@pytest.mark.parametrize("name", SERVERS)
def test_a_task_alone_gets_what_the_best_fixed_window_gets_and_few_of_its_requests_wait(name):
    seconds = (
        {"settle": 400.0, "seconds": 1200.0} if name == "long answers" else {"settle": 40.0, "seconds": 60.0}
    )
    answered, waiting, _ = alone(SERVERS[name], **seconds)
    assert answered >= 0.95 * best_fixed(SERVERS[name], **seconds)
    assert waiting <= max(5, SERVERS[name]().slots / 8 + 1)


def test_the_window_is_as_large_as_the_server_can_take_within_seconds():
    _, _, task = alone(lambda: Server(500, around(20.0)), settle=2.0, seconds=1.0)
    assert task.sizes[0] <= 2 * FIRST_SIZE
    assert task.sizes[1] == MOST


@pytest.mark.parametrize(
    ("slots", "seconds", "tasks", "apart"),
    [(128, 3.0, 2, 20.0), (64, 5.0, 3, 30.0), (128, 3.0, 8, 5.0), (64, 30.0, 2, 60.0)],
)
def test_tasks_that_came_at_different_times_share_a_server_fairly(slots, seconds, tasks, apart):
    server = Server(slots, around(seconds))
    there = [Task(server, most=MOST) for _ in range(tasks)]

    async def main() -> tuple[list[int], list[int], int]:
        for task in there:
            task.start()
            await asyncio.sleep(apart)
        await asyncio.sleep(10 * seconds)
        sizes = [task.window.size for task in there]
        waiting = len(server.queue)
        answered = await answered_in(there, 100 * seconds)
        for task in there:
            await task.stop()
        return sizes, answered, waiting

    sizes, answered, waiting = run_in_virtual_time(main())
    assert max(sizes) <= 1.2 * min(sizes), sizes
    assert max(answered) <= 1.2 * min(answered), answered
    assert sum(answered) >= 0.95 * slots * 100
    assert waiting <= slots / 2


def test_who_has_little_to_ask_is_served_and_the_others_share_the_rest():
    server = Server(64, around(3.0))
    little, *much = tasks = [Task(server, samples=samples) for samples in (4, 400, 400)]

    async def use() -> list[int]:
        await asyncio.sleep(60)
        return await answered_in(tasks, 300)

    asked, *others = run(server, tasks, use)
    # Four at a time, each of them 3 seconds and the wait behind some of the others'.
    assert asked >= 0.7 * 4 * 300 / 3
    assert max(others) <= 1.2 * min(others)
    assert little.window.size <= FIRST_SIZE
    assert sum(task.window.size for task in much) >= 60


def test_when_other_tasks_end_the_last_one_soon_has_the_server_to_itself():
    server = Server(128, around(3.0))
    last, *others = tasks = [Task(server) for _ in range(8)]

    async def use() -> tuple[int, int]:
        await asyncio.sleep(60)
        before = last.window.size
        for task in others:
            await task.stop()
        await asyncio.sleep(8)
        return before, last.window.size

    before, after = run(server, tasks, use)
    assert before <= 30
    assert after == MOST


def test_a_server_that_suddenly_works_on_fewer_gets_fewer_and_on_more_again_more():
    server = Server(64, around(2.0))
    task = Task(server)

    async def use() -> list[tuple[int, int]]:
        seen = []
        for slots in (64, 8, 64):
            server.slots = slots
            await asyncio.sleep(40)
            answered = (await answered_in([task], 20))[0]
            seen.append((answered, len(server.queue)))
        return seen

    for (answered, waiting), slots in zip(run(server, [task], use), (64, 8, 64), strict=True):
        assert answered >= 0.85 * slots * 10
        assert waiting <= max(5, slots / 8 + 1)


def test_a_server_that_suddenly_becomes_slower_keeps_its_window():
    times = [1.0]
    server = Server(32, lambda draw, running: draw.expovariate(1 / times[0]))
    task = Task(server)

    async def use() -> tuple[int, int]:
        await asyncio.sleep(30)
        before = task.window.size
        times[0] = 10.0
        await asyncio.sleep(100)
        return before, task.window.size

    before, after = run(server, [task], use)
    assert before == after
    assert 32 < after <= 32 + 5


def test_a_full_cache_is_no_room_though_nobody_waits():
    law = ServerLaw(32, MOST)
    law.look(Metrics(32, 0, 0.96, 0), in_flight=32, full=True)
    assert law.size == 32
    # Half of it is in use: there is room for nearly as many again, and no more.
    law.look(Metrics(32, 0, 0.6, 0), in_flight=32, full=True)
    assert 48 <= law.size <= 32 / 0.6
    # Few wait where vLLM would have to drop what it has computed.
    law = ServerLaw(128, MOST)
    for _ in range(20):
        law.look(Metrics(100, int(law.size) - 100, 1.0, 0), in_flight=int(law.size), full=True)
    assert law.size <= 105


def test_behind_one_address_there_may_be_many_servers():
    law, sizes = ServerLaw(32, MOST), []
    for _ in range(15):
        law.look(Metrics(int(law.size / 8), 0, 0.2, 0), in_flight=int(law.size), full=True)
        sizes.append(law.size)
    # It grows, but not blindly.
    assert sizes[0] <= 40
    assert sizes[-1] == MOST


def test_a_window_that_is_not_full_does_not_grow():
    law = ServerLaw(32, MOST)
    for _ in range(10):
        law.look(Metrics(20, 0, 0.2, 0), in_flight=20, full=False)
    assert law.size == 32


# Servers that tell nothing of themselves

SILENT: dict[str, Callable[[], Server]] = {
    name: SERVERS[name] for name in ("many", "slower with more", "cache", "preprocessing")
} | {
    "no bounds, answers of all lengths": lambda: Server(
        10_000, lambda draw, running: 2 * draw.lognormvariate(-0.72, 1.2)
    )
}


@pytest.mark.parametrize("name", SILENT)
def test_without_metrics_too_a_task_gets_about_what_the_best_fixed_window_gets(name):
    seconds = {"settle": 300.0, "seconds": 300.0, "looks": False}
    answered, _, _ = alone(SILENT[name], **seconds)
    assert answered >= 0.9 * alone(SILENT[name], fixed=True, **seconds)[0]


@pytest.mark.parametrize("slots", [4, 16, 40])
@pytest.mark.parametrize("seconds", [always(1.0), around(1.0)], ids=["regular", "irregular"])
def test_without_metrics_a_window_that_is_far_too_large_becomes_smaller(slots, seconds):
    answered, waiting, _ = alone(
        lambda: Server(slots, seconds), settle=900, seconds=100, looks=False, most=MOST
    )
    assert answered >= 0.9 * slots * 100
    assert waiting <= max(FIRST_SIZE / 2, 1.2 * slots)


def test_answers_of_all_lengths_are_no_reason_to_become_smaller():
    _, _, task = alone(SILENT["no bounds, answers of all lengths"], settle=10, seconds=600, looks=False)
    sizes = task.sizes[20:]
    assert sum(size < MOST for size in sizes) <= 0.02 * len(sizes)


def test_without_metrics_the_window_reaches_its_maximum_with_the_first_answers():
    _, _, task = alone(lambda: Server(64, always(0.2)), settle=2.0, seconds=1.0, looks=False, most=64)
    assert task.sizes[0] == 64
    # One round of answers at the first size, and from then on all.
    assert task.answered >= 64 / 0.2 * 3 - 32 - 64


def test_without_metrics_too_a_window_that_is_not_full_does_not_grow():
    _, _, task = alone(lambda: Server(64, always(0.2)), settle=10, seconds=1, looks=False, samples=20)
    assert task.answered > 10 * FIRST_SIZE
    assert task.window.size == FIRST_SIZE


def test_when_a_server_tells_nothing_any_more_its_answers_count():
    pressure = Pressure(MOST)
    pressure.look(Metrics(32, 0, 0.1, 0))
    for _ in range(100):
        pressure.send(0.0)
    pressure.look(Metrics(10, 20, 0.1, 0))
    pressure.look(Metrics(10, 20, 0.1, 0))
    size = pressure.size
    pressure.look(None)
    assert pressure.size == size


# Servers that turn requests away


@pytest.mark.parametrize(("most_taken", "retry_after"), [(5, 0.0), (32, 0.0), (32, 1.0), (50, 1.0)])
def test_a_server_that_turns_requests_away_gets_as_many_as_it_takes(most_taken, retry_after):
    def make() -> Server:
        return Server(200, around(1.0), refuses_from=most_taken, retry_after=retry_after)

    answered, _, task = alone(make, settle=60, seconds=120, looks=False)
    # A fixed window of just that size is never turned away.
    assert answered >= 0.95 * alone(make, settle=60, seconds=120, most=most_taken, fixed=True)[0]
    assert task.server.refused <= 0.02 * task.answered


def test_a_burst_of_refusals_halves_the_window_at_most_and_it_comes_back():
    pressure = Pressure(64)
    for _ in range(20):  # to its full size
        sent = [pressure.send(0.0) for _ in range(pressure.size)]
        for each in sent:
            pressure.end(each, 1.0, "answered")
    assert pressure.size == 64
    sent = [pressure.send(2.0) for _ in range(64)]
    for each in sent:
        pressure.end(each, 2.0, "refused")
    assert pressure.size == 32
    assert pressure.is_limited
    rounds = 0
    while pressure.size < 64:
        rounds += 1
        sent = [pressure.send(3.0) for _ in range(pressure.size)]
        for each in sent:
            pressure.end(each, 4.0, "answered")
    assert 10 < rounds < 60
    assert not pressure.is_limited


def test_with_metrics_too_refusals_count():
    _, _, task = alone(lambda: Server(200, around(1.0), refuses_from=20), settle=60, seconds=60)
    assert 18 <= task.window.size <= 20
    assert task.server.refused <= 0.05 * task.answered


# Many tasks that begin at once


def _all_of(tasks: int, each: int, make: Callable[[], Server], *, first: int) -> tuple[float, int]:
    """Have tasks that begin within seconds ask all that they have; how long that takes, and how many time out."""
    server = make()
    there = [Task(server, first=first, total=each, timeout=300.0) for _ in range(tasks)]

    async def use() -> tuple[float, int]:
        await asyncio.gather(*(task.done.wait() for task in there))
        return asyncio.get_running_loop().time(), sum(task.timeouts for task in there)

    return run(server, there, use)


def test_many_tasks_that_begin_on_a_slow_server_together_ask_nothing_twice():
    def slow() -> Server:
        return Server(8, lambda draw, running: 8 * draw.uniform(0.5, 1.5))

    _, timeouts = _all_of(16, 32, slow, first=first_size(16))
    assert timeouts == 0
    assert _all_of(16, 32, slow, first=FIRST_SIZE)[1] > 100


@pytest.mark.parametrize(("slots", "seconds", "each"), [(256, 4.0, 300), (1024, 4.0, 300), (64, 0.5, 300)])
def test_on_a_fast_server_many_tasks_that_know_of_each_other_lose_next_to_nothing(slots, seconds, each):
    def fast() -> Server:
        return Server(slots, lambda draw, running: seconds * draw.uniform(0.5, 1.5))

    took, usual = (_all_of(16, each, fast, first=first)[0] for first in (first_size(16), FIRST_SIZE))
    assert took <= usual + 2.0


def test_the_first_window_is_smaller_the_more_tasks_there_are():
    assert [first_size(tasks) for tasks in (0, 1, 4, 5, 8, 16, 32, 1000)] == [32, 32, 32, 25, 16, 8, 4, 4]
    assert Pressure(MOST, first=8).size == 8


# Requests with a schema, which are deferred until they run


def test_requests_whose_grammars_are_still_compiled_are_no_sign_that_there_is_no_room():
    pressure = Pressure(MOST)
    for _ in range(FIRST_SIZE):
        pressure.send(0.0)
    for _ in range(5):
        pressure.look(Metrics(0, FIRST_SIZE, 0.0, 0, deferred=FIRST_SIZE))
    # Nor one that there is more.
    assert (pressure.size, pressure.is_limited, pressure.sentence()) == (FIRST_SIZE, False, None)


def test_on_a_full_server_they_wait_for_room_like_any_other():
    pressure = Pressure(MOST)
    for _ in range(20):
        while pressure.in_flight < pressure.size:
            pressure.send(0.0)
        waiting = pressure.in_flight - 16
        pressure.look(Metrics(16, waiting, 0.3, 0, deferred=waiting))
        while pressure.in_flight > pressure.size:
            pressure.end(Sent(0, 0.0), 0.0, "answered")
    assert 16 < pressure.size <= 24
    assert pressure.is_limited
    assert "A faster GPU or model" in str(pressure.sentence())


def test_that_more_requests_at_once_brought_nothing_is_said_of_a_silent_endpoint():
    _, _, task = alone(lambda: Server(16, always(1.0)), settle=900, seconds=100, looks=False)
    assert "More requests at once brought no more answers. A faster endpoint" in str(task.pressure.sentence())


def test_a_small_maximum_is_the_window():
    assert Pressure(1).size == 1
    assert Pressure(20).size == 20
