"""Requests that kill a worker's vLLM server, a fake one: they are found, and cost no other request its answer."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from airflow_vlm_provider.errors import TransientError
from tests.support.vllm_engines import TEXTS, ask_all, until

pytestmark = pytest.mark.integration


def test_a_request_that_kills_the_server_is_given_up_and_the_others_are_answered(worker):
    worker.fake.control(poison="deadly", answer_seconds=0.1)

    async def run():
        async with worker.engine() as engine:
            return await ask_all(engine, [*TEXTS[:10], "a deadly one", *TEXTS[10:]])

    answers = asyncio.run(run())
    (poison,) = [each for each in answers if isinstance(each, Exception)]
    assert isinstance(poison, TransientError)
    assert answers.index(poison) == 10
    assert "lost 3 times while it worked on this request" in str(poison)
    assert [each for each in answers if isinstance(each, str)] == TEXTS
    # The first start, and one after each time that it was asked.
    assert 3 <= len(worker.fake.starts()) <= 4


def test_a_request_is_not_asked_of_the_next_server_before_the_loss_of_the_first_is_counted(worker):
    worker.fake.control(poison="deadly")

    async def run():
        async with worker.engine() as engine:
            follow, noticed = engine._follow, asyncio.Event()

            async def late():
                await noticed.wait()
                await follow()

            engine._follow = late
            asking = asyncio.create_task(ask_all(engine, ["a deadly one"]))
            await until(lambda: (state := worker.state(worker.spec())).loads == 2 and state.phase == "ready")
            # Without an answer, it has long been tried again.
            await asyncio.sleep(4)
            starts = len(worker.fake.starts())
            noticed.set()
            return starts, *await asking

    starts, poison = asyncio.run(run())
    assert starts == 2
    assert "lost 3 times while it worked on this request" in str(poison)
    assert 3 <= len(worker.fake.starts()) <= 4


def test_two_requests_that_kill_the_server_one_after_the_other_cost_no_third_its_answer(worker):
    worker.fake.control(poison="deadly", answer_seconds=0.3)
    texts = ["deadly 1", "a", "b", "c", "deadly 2", *TEXTS[:10]]

    async def run():
        window = asyncio.Semaphore(4)

        async def one(engine, text):
            async with window:
                return (await ask_all(engine, [text]))[0]

        async with worker.engine() as engine:
            return await asyncio.gather(*(one(engine, text) for text in texts))

    found = dict(zip(texts, asyncio.run(run()), strict=True))
    assert [text for text in texts if found[text] != text] == ["deadly 1", "deadly 2"]
    assert isinstance(found["deadly 1"], TransientError)
    assert isinstance(found["deadly 2"], TransientError)
    # No more than a keeper starts one again.
    assert len(worker.fake.starts()) <= 6


def test_a_request_of_one_task_that_kills_the_server_costs_no_other_task_an_answer(worker):
    worker.fake.control(poison="deadly", answer_seconds=0.1)
    spec = worker.spec()
    with worker.processes(asking=True) as tasks:
        bad = tasks.ask(spec, ["a deadly one", *TEXTS[:5]])
        good = [tasks.ask(spec, [f"{name} {text}" for text in TEXTS[:10]]) for name in ("b", "c")]
        answers = [task.wait_for("answers") for task in (bad, *good)]
    assert answers[0][0].startswith("TransientError")
    assert [text.partition(": ")[2] for text in answers[0][1:]] == TEXTS[:5]
    for name, texts in zip(("b", "c"), answers[1:], strict=True):
        assert [text.partition(": ")[2] for text in texts] == [f"{name} {text}" for text in TEXTS[:10]]


def test_a_suspect_is_not_asked_where_another_tasks_suspect_has_killed_the_server(worker):
    worker.fake.control(poison="deadly", answer_seconds=0.3)

    async def run():
        async with worker.engine() as bad, worker.engine() as good:
            for each in (bad, good):
                each._suspect_after = 0
            server, follow, noticed = worker.server(worker.spec()), good._follow, asyncio.Event()

            async def late():
                await noticed.wait()
                await follow()

            good._follow = late
            dying = asyncio.create_task(ask_all(bad, ["a deadly one"]))
            await until(server.has_suspect)
            asking = asyncio.create_task(ask_all(good, ["innocent"]))
            (poison,) = await dying
            # Its turn has come, but the server that its task knows is the one that is dead.
            await until(server.has_suspect)
            await asyncio.sleep(0.5)
            noticed.set()
            return poison, *await asking

    poison, innocent = asyncio.run(run())
    assert "lost 1 times" in str(poison)
    assert "no other request beside it" in str(poison)
    assert innocent == "innocent"
    assert worker.fake.asked() == ["innocent"]


def test_who_has_its_turn_when_the_server_is_lost_keeps_no_suspect_waiting_through_the_load(worker):
    async def run():
        async with worker.engine() as engine:
            server = worker.server(worker.spec())
            suspect = server.try_suspect()
            asking = asyncio.create_task(ask_all(engine, ["q"]))
            await asyncio.sleep(0.3)
            worker.fake.control(load_seconds=3600)
            os.kill(worker.fake.starts()[0]["pid"], signal.SIGKILL)
            await until(lambda: not engine._server.done())
            os.close(suspect)
            await asyncio.sleep(0.5)
            suspect = server.try_asking(shared=False)
            asking.cancel()
            return suspect

    suspect = asyncio.run(run())
    assert suspect is not None
    os.close(suspect)


def test_a_suspect_that_was_never_alone_is_given_up_at_last(worker):
    worker.fake.control(poison="deadly")

    async def run():
        async with worker.engine(timeout=1) as engine:
            engine._suspect_after = 0
            # As a child of a task that has ended may.
            held = worker.server(worker.spec()).try_asking(shared=True)
            answers = await ask_all(engine, ["a deadly one"])
            os.close(held)
            # No harm is done to those that come later.
            return answers + await ask_all(engine, ["later"])

    poison, later = asyncio.run(run())
    assert isinstance(poison, TransientError)
    assert "lost 5 times while it worked on this request." in str(poison)
    assert later == "later"
