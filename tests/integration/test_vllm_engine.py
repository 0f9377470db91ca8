"""The engine of a task on a worker's vLLM server, with a fake one: what becomes of its requests when that is lost."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections import Counter
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from airflow_vlm_provider.engines import vllm_leases
from airflow_vlm_provider.errors import ConfigError, EngineError, NoVideoError
from airflow_vlm_provider.types import Answer, Media, Request
from tests.support.vllm_engines import TEXTS, ask_all, question, until
from tests.support.vllm_workers import eventually, is_running

pytestmark = pytest.mark.integration


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
