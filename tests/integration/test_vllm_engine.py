"""The engine of a task on a worker's vLLM server, with a fake one: what becomes of its requests when that is lost."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from airflow_vlm_provider.engines import vllm_leases
from airflow_vlm_provider.errors import ConfigError, EngineError, NoVideoError, TransientError
from airflow_vlm_provider.types import Answer, Media, Request
from tests.support.vllm_workers import eventually, is_running, vllm_worker

pytestmark = pytest.mark.integration


@pytest.fixture
def worker(tmp_path, monkeypatch):
    with vllm_worker(tmp_path, monkeypatch) as made:
        yield made


def question(text):
    return Request(system=None, parts=(text,))


async def ask_all(engine, texts):
    """Ask all at once, and return what became of each: its answer's text, or the exception."""
    answers = await asyncio.gather(*(engine.ask(question(text)) for text in texts), return_exceptions=True)
    return [each.choices[0].text.partition(": ")[2] if isinstance(each, Answer) else each for each in answers]


async def until(check):
    """Wait until something is true, while others go on."""
    deadline = time.monotonic() + 40
    while not check():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


TEXTS = [f"question {number}" for number in range(30)]


@pytest.mark.parametrize(
    "whom", ["server", "engine process", "keeper", "keeper, told to stop", "session, halted"]
)
def test_requests_in_flight_are_answered_though_the_server_is_lost(worker, whom):
    worker.fake.control(answer_seconds=0.4)

    async def run():
        engine = worker.engine(settings={"health_timeout": 2} if "halted" in whom else None)
        async with engine:
            asking = asyncio.create_task(ask_all(engine, TEXTS))
            await asyncio.sleep(0.2)
            (start,) = worker.fake.starts()
            keeper = worker.state(engine.make_lease().spec).keeper_pid
            if whom == "server":
                os.kill(start["pid"], signal.SIGKILL)
            elif whom == "engine process":
                os.kill(start["engine"], signal.SIGKILL)
            elif whom == "session, halted":
                os.killpg(start["pid"], signal.SIGSTOP)
            else:
                os.kill(keeper, signal.SIGTERM if "told" in whom else signal.SIGKILL)
            assert await asking == TEXTS
            # And what comes later, too.
            assert await ask_all(engine, ["one more"]) == ["one more"]

    asyncio.run(run())
    assert len(worker.fake.starts()) == 2
    # What had been answered before is not asked again, nor is anything asked more often than need be.
    assert max(Counter(worker.fake.asked()).values()) <= 2


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


def test_a_keeper_that_fails_ends_the_tasks_that_use_its_server(worker, tmp_path, monkeypatch):
    failing = tmp_path / "fail"
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(
        "import os\n"
        "from airflow_vlm_provider.engines.vllm_health import Health\n"
        "look = Health.look\n"
        "def fails(*args, **kwargs):\n"
        f"    if os.path.exists({str(failing)!r}):\n"
        "        raise MemoryError('no thread can be started')\n"
        "    return look(*args, **kwargs)\n"
        "Health.look = fails\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'site'}:{Path(__file__).parents[2]}")
    worker.fake.control(answer_seconds=30)

    async def run():
        async with worker.engine() as engine, worker.engine() as other:
            asking = [asyncio.create_task(ask_all(each, TEXTS[:2])) for each in (engine, other)]
            await asyncio.sleep(0.3)
            follow, ended = other._follow, asyncio.Event()

            async def late():
                await ended.wait()
                await follow()

            # One looks as soon as may be, the other one when the keeper has ended.
            other._follow = late
            failing.touch()
            answers = await asking[0]
            await asyncio.to_thread(worker.wait_for_end, worker.spec())
            ended.set()
            return answers + await asking[1]

    answers = asyncio.run(run())
    assert {type(each) for each in answers} == {EngineError}
    assert all("keeper failed (MemoryError: no thread can be started)" in str(each) for each in answers)
    assert len(worker.fake.starts()) == 1
    failing.unlink()
    # Airflow's retry.
    worker.fake.control()

    async def again():
        async with worker.engine() as engine:
            return await ask_all(engine, ["q"])

    assert asyncio.run(again()) == ["q"]


def test_a_server_that_can_not_be_had_again_is_told_to_all_who_ask(worker):
    worker.fake.control(answer_seconds=30)

    async def run():
        async with worker.engine() as engine:
            asking = asyncio.create_task(ask_all(engine, TEXTS))
            await asyncio.sleep(0.3)
            worker.fake.control(exits=1, says=["RuntimeError: the GPU has fallen off the bus"])
            os.kill(worker.fake.starts()[0]["pid"], signal.SIGKILL)
            answers = await asking
            return answers + await ask_all(engine, ["later"])

    answers = asyncio.run(run())
    assert len(answers) == len(TEXTS) + 1
    assert {type(each) for each in answers} == {EngineError}
    assert all("the GPU has fallen off the bus" in str(each) for each in answers)
    # One of its own for each: what is raised again and again grows.
    assert len({id(each) for each in answers}) == len(answers)
    api_key = worker.fake.starts()[0]["api_key"]
    assert not any(api_key in str(each) + repr(each) for each in answers)


def test_a_fault_of_the_authors_is_one_for_the_engine_too(worker):
    async def run():
        async with worker.engine(engine_args={"no_such_thing": 1}):
            pass

    with pytest.raises(ConfigError, match="unrecognized arguments"):
        asyncio.run(run())


def test_what_can_not_be_watched_is_given_up(worker, monkeypatch):
    worker.fake.control(answer_seconds=30)

    async def run():
        async with worker.engine() as engine:
            asking = asyncio.create_task(ask_all(engine, TEXTS[:3]))
            await asyncio.sleep(0.3)

            def broken(*_):
                raise OSError("too many open files")

            monkeypatch.setattr(vllm_leases.Lease, "is_current", broken)
            return await asking

    answers = asyncio.run(run())
    assert {type(each) for each in answers} == {EngineError}
    assert "too many open files" in str(answers[0])


def test_a_request_that_nobody_waits_for_any_more_leaves_nothing_behind(worker):
    worker.fake.control(answer_seconds=0.5)

    async def run():
        async with worker.engine() as engine:
            asking = [asyncio.create_task(engine.ask(question(text))) for text in TEXTS]
            await asyncio.sleep(0.2)
            for each in asking[::2]:
                each.cancel()
            answers = await asyncio.gather(*asking, return_exceptions=True)
            assert [type(each) for each in answers[::2]] == [asyncio.CancelledError] * 15
            assert all(isinstance(each, Answer) for each in answers[1::2])
            # While the server is lost, too.
            os.kill(worker.fake.starts()[0]["pid"], signal.SIGKILL)
            await until(lambda: len(worker.fake.starts()) == 2)
            late = asyncio.create_task(engine.ask(question("late")))
            await asyncio.sleep(0.01)
            late.cancel()
            assert await ask_all(engine, ["after"]) == ["after"]
            assert engine._server is not None
            assert engine._server.result().asking == set()

    asyncio.run(run())


def test_closing_while_requests_are_in_flight_ends_them(worker):
    worker.fake.control(answer_seconds=30)

    async def run():
        async with worker.engine() as engine:
            asking = asyncio.create_task(ask_all(engine, TEXTS[:3]))
            await asyncio.sleep(0.3)
        return await asking

    assert {type(each) for each in asyncio.run(run())} == {EngineError}


def test_a_task_that_is_cancelled_while_it_waits_for_the_server_holds_no_lease(worker):
    worker.fake.control(load_seconds=3600)
    spec = worker.spec()

    async def run():
        entering = asyncio.create_task(worker.engine().__aenter__())
        await until(lambda: worker.fake.starts())
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering

    asyncio.run(run())

    def held():
        with worker.server(spec).gate():
            return worker.server(spec).leases()

    eventually(lambda: not held())


def test_that_a_model_takes_no_videos_is_known_after_a_restart_too(worker):
    worker.fake.control(no_video=True)
    video = Request(system=None, parts=(Media("video", "video/mp4", b"\0" * 100, "v.mp4"), "what is it?"))

    async def run():
        async with worker.engine() as engine:
            assert engine.takes_video
            with pytest.raises(NoVideoError):
                await engine.ask(video)
            assert not engine.takes_video
            os.kill(worker.fake.starts()[0]["pid"], signal.SIGKILL)
            await until(lambda: len(worker.fake.starts()) == 2)
            assert await ask_all(engine, ["q"]) == ["q"]
            assert not engine.takes_video

    asyncio.run(run())


def test_nothing_is_left_open_and_no_thread_runs_on(worker):
    def opened():
        return len(list(Path("/proc/self/fd").iterdir()))

    async def run():
        async with worker.engine() as engine:
            assert await ask_all(engine, TEXTS[:3]) == TEXTS[:3]
            os.kill(worker.fake.starts()[-1]["pid"], signal.SIGKILL)
            assert await ask_all(engine, TEXTS[:3]) == TEXTS[:3]

    # What is imported and made once.
    asyncio.run(run())
    before, threads = opened(), threading.active_count()
    for _ in range(3):
        asyncio.run(run())
    eventually(lambda: threading.active_count() <= threads)
    assert opened() <= before


def test_nothing_that_may_wait_is_done_by_the_event_loop(worker, monkeypatch):
    called = Counter()

    def watched(name):
        original = getattr(vllm_leases.Lease, name)

        def wrapper(self, *args, **kwargs):
            called[name, threading.current_thread() is threading.main_thread()] += 1
            return original(self, *args, **kwargs)

        monkeypatch.setattr(vllm_leases.Lease, name, wrapper)

    for name in ("__init__", "attach", "is_current", "release"):
        watched(name)

    async def run():
        async with worker.engine() as engine:
            assert await ask_all(engine, ["q"]) == ["q"]
            os.kill(worker.fake.starts()[0]["pid"], signal.SIGKILL)
            await until(lambda: len(worker.fake.starts()) == 2)
            assert await ask_all(engine, ["r"]) == ["r"]
            # Now and then it looks, and all of this may have taken less.
            await until(lambda: called["is_current", False] or called["is_current", True])

    asyncio.run(run())
    eventually(lambda: called["release", False])
    assert {name for name, in_loop in called if not in_loop} == {
        "__init__",
        "attach",
        "is_current",
        "release",
    }
    assert not any(in_loop for _, in_loop in called)


def test_a_model_in_a_folder_that_is_named_from_here_is_found_by_the_server(worker, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)

    async def run():
        async with worker.engine("model") as engine:
            assert await ask_all(engine, ["q"]) == ["q"]
            return engine.model

    assert asyncio.run(run()) == "model"
    assert worker.fake.starts()[0]["argv"][2] == str(tmp_path / "model")


def test_an_engine_can_be_opened_again(worker):
    engine = worker.engine()

    async def run():
        async with engine:
            assert await ask_all(engine, ["q"]) == ["q"]

    asyncio.run(run())
    asyncio.run(run())
    with pytest.raises(EngineError, match="not open"):
        asyncio.run(engine.ask(question("q")))
    assert len(worker.fake.starts()) == 1
    assert is_running(worker.fake.starts()[0]["pid"])


def test_the_more_tasks_use_a_server_the_fewer_requests_each_begins_with(worker):
    async def run():
        async with AsyncExitStack() as tasks:
            engines = [await tasks.enter_async_context(worker.engine(concurrency=128)) for _ in range(8)]
            windows = [engine.window for engine in engines]
            await engines[0].__aexit__(None, None, None)
            eventually(lambda: len(list(worker.server(worker.spec()).path.glob("leases/*"))) == 7)
            later = await tasks.enter_async_context(worker.engine(concurrency=6))
            return windows, later.window

    assert asyncio.run(run()) == ([32, 32, 32, 32, 25, 21, 18, 16], 6)


def test_how_many_requests_are_under_way_is_known(worker):
    worker.fake.control(answer_seconds=0.5)

    async def run():
        engine = worker.engine(concurrency=3)
        assert engine.in_flight == 0
        async with engine:
            asking = asyncio.create_task(ask_all(engine, TEXTS[:5]))
            await until(lambda: engine.in_flight)
            assert engine.in_flight <= 3
            await asking
            assert engine.in_flight == 0

    asyncio.run(run())
