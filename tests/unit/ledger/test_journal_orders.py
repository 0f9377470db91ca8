from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from airflow_vlm_provider.ledger import segments
from airflow_vlm_provider.ledger.journal import FlushPolicy
from airflow_vlm_provider.ledger.records import answer_of, key_of, newer
from airflow_vlm_provider.ledger.segments import read_segment
from airflow_vlm_provider.shards.local import LocalStore
from tests.support.journals import (
    FOLDER,
    NOON,
    commit,
    commit_manifest,
    journal,
    key,
    loaded,
    record,
    records,
    stored,
)
from tests.support.memory_files import MemoryFiles

# Any order of events


class Attempt:
    """One attempt at the shard, as a run makes it; after a kill nothing of it happens any more."""

    def __init__(self, files: Any, policy: FlushPolicy) -> None:
        self.dead = False
        self.known: dict[str, bytes] = {}
        self.appended: list[bytes] = []
        self.kept: list[str] | None = None
        self.files = files
        self.journal = journal(files, policy=policy, in_thread=self.in_thread)

    async def in_thread(self, function: Callable[[], Any]) -> Any:
        await asyncio.sleep(0)
        if self.dead:
            await asyncio.Event().wait()
        return function()

    def take(self, lines: list[bytes]) -> None:
        for line in lines:
            self.learn(line)

    def learn(self, line: bytes) -> None:
        self.known[key_of(line)] = newer(line, self.known.get(key_of(line), line))


steps = st.lists(
    st.one_of(
        st.tuples(st.just("append"), st.integers(0, 1), st.integers(0, 7)),
        st.tuples(st.just("append"), st.integers(0, 1), st.integers(0, 7)),
        st.tuples(st.just("use"), st.integers(0, 1), st.integers(0, 7)),
        st.tuples(st.just("use all"), st.integers(0, 1), st.just(0)),
        st.tuples(
            st.sampled_from(
                ["flush", "consolidate", "manifest", "retire", "commit", "kill", "close", "yield"]
            ),
            st.integers(0, 1),
            st.just(0),
        ),
        st.tuples(st.just("tear"), st.integers(0, 20), st.integers(0, 10_000)),
        st.tuples(st.just("garbage"), st.just(0), st.integers(0, 3)),
    ),
    max_size=40,
)


class History:
    """Two attempts that are alive at the same time, one after the other replaced when it ends, and what they did."""

    def __init__(self, files: Any, policy: FlushPolicy) -> None:
        self.files = files
        self.policy = policy
        self.attempts: list[Attempt | None] = [None, None]
        self.ever: set[bytes] = set()
        self.durable: dict[str, bytes] = {}
        self.ticks = itertools.count()
        self.garbage = 0

    async def live(self, which: int) -> Attempt:
        attempt = self.attempts[which]
        if attempt is None:
            attempt = self.attempts[which] = Attempt(self.files, self.policy)
            await attempt.journal.load(attempt.take)
        return attempt

    def keep(self, attempt: Attempt) -> None:
        """What was appended is durable from here on."""
        for line in attempt.appended:
            self.durable[key_of(line)] = newer(line, self.durable.get(key_of(line), line))

    async def step(self, what: str, which: int, number: int) -> None:
        if what == "yield":
            await asyncio.sleep(0)
        elif what == "tear":
            self.tear(which, number)
        elif what == "garbage":
            self.garbage += 1
            name = segments.segment_name(NOON, f"{self.garbage:08x}", 1)
            with self.files.create(f"{FOLDER}/{name}") as stream:
                stream.write(b"(\xb5/\xfd"[:number])
        else:
            await self.act(await self.live(which), which, what, number)

    async def act(self, attempt: Attempt, which: int, what: str, number: int) -> None:
        made = attempt.journal
        if what == "append" and attempt.kept is None:
            line = record(number, next(self.ticks))
            self.ever.add(line)
            attempt.learn(line)
            attempt.appended.append(line)
            await made.append(line)
        elif what == "use" and attempt.kept is None and key(number) in attempt.known:
            made.use(attempt.known[key(number)])
        elif what == "use all" and attempt.kept is None:
            for line in attempt.known.values():
                made.use(line)
        elif what == "flush":
            await made.flush()
            self.keep(attempt)
        elif what == "consolidate":
            await made.flush()
            attempt.kept = made.consolidate()
            self.keep(attempt)
        elif what == "manifest" and attempt.kept is not None:
            commit_manifest(self.files, attempt.kept)
        elif what == "retire" and attempt.kept is not None:
            made.retire()
        elif what == "commit":
            kept = await commit(made, self.files)
            self.keep(attempt)
            self.attempts[which] = None
            there = {info.name for info in self.files.list(FOLDER)}
            assert {f"{FOLDER}/{name}" for name in kept} <= there
        elif what == "kill":
            attempt.dead = True
            self.attempts[which] = None
        elif what == "close":
            await made.close()
            self.keep(attempt)
            self.attempts[which] = None

    def tear(self, which: int, number: int) -> None:
        """Cut a segment's file off that no attempt counts on; what only it had is lost, and nothing else."""
        whole: dict[str, list[bytes]] = {}
        for info in self.files.list(f"{FOLDER}/journal"):
            with suppress(segments.TornSegmentError):
                whole[info.name] = read_segment(self.files.read(info.name, max_bytes=1 << 30))
        counted_on = {
            f"{FOLDER}/{name}" for each in self.attempts if each is not None for name in each.journal._held
        } | {f"{FOLDER}/{name}" for each in self.attempts if each is not None for name in each.kept or ()}
        candidates = sorted(whole.keys() - counted_on)
        if not candidates:
            return
        name = candidates[which % len(candidates)]
        data = self.files.read(name, max_bytes=1 << 30)
        with self.files.create(name) as stream:
            stream.write(data[: number % len(data)])
        gone = set(whole.pop(name)) - set(itertools.chain.from_iterable(whole.values()))
        left: dict[str, bytes] = {}
        for line in itertools.chain.from_iterable(whole.values()):
            left[key_of(line)] = newer(line, left.get(key_of(line), line))
        for each in [each for each, line in self.durable.items() if line in gone]:
            del self.durable[each]
            if each in left:
                self.durable[each] = left[each]
        for attempt in self.attempts:
            if attempt is not None:
                attempt.appended = [line for line in attempt.appended if line not in gone]

    async def assert_durable_is_there(self) -> None:
        final = Attempt(self.files, self.policy)
        lines: list[bytes] = []
        await final.journal.load(lambda some: (lines.extend(some), final.take(some))[0])
        assert set(lines) <= self.ever, "something that was never answered"
        for each, line in self.durable.items():
            assert each in final.known, "an answer that was durable is gone"
            assert newer(final.known[each], line) == final.known[each], "an older answer came back"
        for line in lines:
            assert answer_of(line).model == "m"
        await final.journal.close()


async def assert_reads_back(files: Any, policy: FlushPolicy, order: list[tuple[str, int, int]]) -> None:
    history = History(files, policy)
    for each in order:
        await history.step(*each)
    await history.assert_durable_is_there()
    for attempt in history.attempts:
        if attempt is not None:
            await attempt.journal.close()
    for task in asyncio.all_tasks() - {asyncio.current_task()}:
        task.cancel()


policies = st.builds(FlushPolicy, answers=st.integers(1, 6))


@given(policies, steps)
@settings(max_examples=300, deadline=None)
def test_any_order_of_events_reads_back_as_what_is_durable(policy, order):
    logging.getLogger("airflow_vlm_provider.ledger.journal").setLevel(logging.ERROR)
    try:
        asyncio.run(assert_reads_back(MemoryFiles(), policy, order))
    finally:
        logging.getLogger("airflow_vlm_provider.ledger.journal").setLevel(logging.NOTSET)


@given(policies, steps)
@settings(max_examples=25, deadline=None)
def test_any_order_of_events_on_a_disk_reads_back_as_what_is_durable(tmp_path_factory, policy, order):
    logging.getLogger("airflow_vlm_provider.ledger.journal").setLevel(logging.ERROR)
    try:
        asyncio.run(assert_reads_back(LocalStore(root=str(tmp_path_factory.mktemp("store"))), policy, order))
    finally:
        logging.getLogger("airflow_vlm_provider.ledger.journal").setLevel(logging.NOTSET)


# Real threads, real disks, real kills


def test_attempts_in_threads_of_their_own_leave_every_answer(tmp_path):
    """Two attempts append and commit at the same time, over and over, and a third looks on."""
    root = str(tmp_path)
    rounds, per_round = 6, 60

    def attempt(which: int) -> None:
        async def go() -> None:
            for turn in range(rounds):
                made, found = await loaded(
                    LocalStore(root=root), policy=FlushPolicy(answers=16), in_thread=asyncio.to_thread
                )
                for line in found:
                    made.use(line)
                first = (2 * turn + which) * per_round
                for number in range(first, first + per_round):
                    await made.append(record(number))
                await made.flush()
                kept = await asyncio.to_thread(made.consolidate)
                commit_manifest(LocalStore(root=root), kept)
                await asyncio.to_thread(made.retire)
                await made.close()

        asyncio.run(go())

    threads = [threading.Thread(target=attempt, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = stored(LocalStore(root=root))
    assert set(found) == set(records(2 * rounds * per_round))


KILLED = """
import asyncio, itertools, sys
from airflow_vlm_provider.ledger.journal import FlushPolicy
from airflow_vlm_provider.shards.local import LocalStore
from tests.support.journals import loaded, record

async def go(root, first):
    made, _ = await loaded(
        LocalStore(root=root), policy=FlushPolicy(answers=8, seconds=0.01), in_thread=asyncio.to_thread
    )
    for number in itertools.count(first):
        print("asked", number, flush=True)
        await made.append(record(number))
        if number % 13 == 0:
            await made.flush()
            print("flushed", number, flush=True)

asyncio.run(go(sys.argv[1], int(sys.argv[2])))
"""


def test_a_process_that_is_killed_loses_no_more_than_the_policy_allows(tmp_path):
    root, repository = str(tmp_path / "store"), Path(__file__).parents[3]
    asked, flushed = 0, set()
    for kill in range(3):
        first = asked
        with subprocess.Popen(
            [sys.executable, "-c", KILLED, root, str(first)],
            stdout=subprocess.PIPE,
            cwd=repository,
            env={**os.environ, "PYTHONPATH": str(repository)},
            text=True,
        ) as process:
            assert process.stdout is not None
            for seen, printed in enumerate(process.stdout):
                if not printed.endswith("\n"):  # killed while it printed
                    break
                what, number = printed.split()
                if what == "flushed":
                    flushed |= {key(each) for each in range(first, int(number) + 1)}
                else:
                    asked = int(number) + 1
                if seen == 40 + 5 * kill:
                    os.kill(process.pid, signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        found = {key_of(line) for line in stored(LocalStore(root=root))}
        asked_now = {key(number) for number in range(first, asked)}
        assert flushed <= found <= {key(number) for number in range(asked)}
        # What waited for the store, and the one that was being handed over.
        assert len(asked_now - found) <= 8 + 1
    assert flushed
