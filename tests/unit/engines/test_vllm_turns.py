"""Who is asked beside whom, when a request may be what kills a server: two tasks, each with its part in it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal

import pytest

from airflow_vlm_provider.engines import vllm_turns
from airflow_vlm_provider.engines.vllm_folder import EngineFolder
from airflow_vlm_provider.engines.vllm_turns import Turns


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_turns, "POLL", 0.01)
    return EngineFolder(tmp_path / "engines").server("k")


class Asked:
    """What is asked at the moment, and what ever was beside each other."""

    def __init__(self):
        self.now = []
        self.together = set()

    async def ask(self, turn, name, until):
        async with turn:
            self.now.append(name)
            self.together |= {frozenset((name, each)) for each in self.now if each != name}
            await until.wait()
            self.now.remove(name)


@contextlib.asynccontextmanager
async def asking(asked, turn, name):
    """Have it asked in the background, as soon as its turn comes; gives what ends it."""
    end = asyncio.Event()
    task = asyncio.create_task(asked.ask(turn, name, end))
    await asyncio.sleep(0.05)
    yield end
    end.set()
    await task


async def until(check):
    deadline = asyncio.get_running_loop().time() + 20
    while not check():
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.005)


def test_a_suspect_waits_for_the_requests_in_flight_of_all_tasks_and_none_begins_meanwhile(server):
    async def run():
        mine, others, asked = Turns(server, patience=60), Turns(server, patience=60), Asked()
        async with (
            asking(asked, mine.beside_others(), "a") as a,
            asking(asked, others.beside_others(), "b") as b,
        ):
            assert asked.now == ["a", "b"]
            async with (
                asking(asked, mine.alone(), "suspect") as suspect,
                asking(asked, mine.beside_others(), "later a"),
                asking(asked, others.beside_others(), "later b"),
            ):
                assert asked.now == ["a", "b"]
                a.set()
                await asyncio.sleep(0.05)
                assert asked.now == ["b"]
                b.set()
                await until(lambda: asked.now == ["suspect"])
                await asyncio.sleep(0.05)
                suspect.set()
                await until(
                    lambda: asked.now == ["later a", "later b"] or asked.now == ["later b", "later a"]
                )
        return asked.together

    assert asyncio.run(run()) == {frozenset("ab"), frozenset(("later a", "later b"))}


def test_suspects_of_two_tasks_are_asked_one_after_the_other(server):
    async def run():
        mine, others, asked = Turns(server, patience=60), Turns(server, patience=60), Asked()
        async with asking(asked, mine.alone(), "a") as a, asking(asked, others.alone(), "b"):
            assert asked.now == ["a"]
            a.set()
            await until(lambda: asked.now == ["b"])

    asyncio.run(run())


def test_suspects_get_their_turn_though_others_never_cease_to_ask(server):
    async def run():
        mine, others = Turns(server, patience=60), Turns(server, patience=60)
        end, asked = asyncio.Event(), 0

        async def go_on():
            nonlocal asked
            while not end.is_set():
                async with others.beside_others():
                    asked += 1
                    await asyncio.sleep(0.02)

        tasks = [asyncio.create_task(go_on()) for _ in range(20)]
        await until(lambda: asked > 100)
        for _ in range(3):
            async with mine.alone():
                before = asked
                await asyncio.sleep(0.1)
                assert asked == before
        end.set()
        await asyncio.gather(*tasks)

    asyncio.run(run())


def test_who_is_cancelled_keeps_nobody_waiting(server):
    async def run():
        mine, others, asked = Turns(server, patience=60), Turns(server, patience=60), Asked()
        for turn in (mine.beside_others, mine.alone):
            async with mine.alone():
                waiting = asyncio.create_task(asked.ask(turn(), "x", asyncio.Event()))
                await asyncio.sleep(0.05)
                waiting.cancel()
            running = asyncio.create_task(asked.ask(turn(), "x", asyncio.Event()))
            await until(lambda: asked.now == ["x"])
            running.cancel()
            await asyncio.gather(waiting, running, return_exceptions=True)
            asked.now.clear()
            async with others.alone() as turn_of_others:
                assert turn_of_others.is_alone
            async with others.beside_others():
                pass

    asyncio.run(run())
    assert not server.has_suspect()
    assert server.try_asking(shared=False) is not None


def test_a_suspect_whose_time_is_up_is_asked_beside_the_others(server):
    async def run():
        mine, others, asked = Turns(server, patience=0.2), Turns(server, patience=0.2), Asked()
        async with mine.alone() as turn:
            # As long as it is not asked yet, since the server is being loaded, its time does not pass.
            async with asking(asked, others.beside_others(), "other"):
                await asyncio.sleep(0.5)
                assert (asked.now, turn.is_alone) == ([], True)
                turn.begin()
                await until(lambda: asked.now == ["other"])
                assert not turn.is_alone
            # It is in flight, and is not to be beside a suspect that believes itself alone.
            async with others.alone() as second, mine.alone() as third:
                assert not second.is_alone
                assert not third.is_alone
        async with others.alone() as turn:
            turn.begin()
            return turn.is_alone

    assert asyncio.run(run())


def test_what_a_dead_tasks_child_still_holds_does_not_keep_a_suspect_for_ever(server):
    held = server.try_asking(shared=True)

    async def run():
        async with Turns(server, patience=0.1).alone() as turn:
            # It may be a request as well: the suspect is not to be blamed, and others need not wait.
            assert not turn.is_alone
            async with Turns(server, patience=60).beside_others():
                return True

    assert held is not None
    assert asyncio.run(run())
    os.close(held)


def test_a_child_that_outlives_the_turn_keeps_nobody_waiting(server):
    children = []

    async def run():
        turns = Turns(server, patience=60)
        for turn in (turns.alone, turns.beside_others):
            async with turn():
                children.append(os.fork())
                if not children[-1]:
                    signal.pause()
                    os._exit(0)
        async with Turns(server, patience=0.1).alone() as turn:
            return turn.is_alone

    try:
        assert asyncio.run(asyncio.wait_for(run(), 20))
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


def test_a_folder_that_was_deleted_keeps_no_request_from_being_answered(server):
    shutil.rmtree(server.path)

    async def run():
        async with Turns(server, patience=60).beside_others():
            pass
        async with Turns(server, patience=60).alone() as turn:
            return turn.is_alone

    assert asyncio.run(run()) is False
