from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from datetime import datetime, timedelta, timezone
from typing import Any, BinaryIO

import pytest

from airflow_vlm_provider.ledger import answers as module
from airflow_vlm_provider.ledger.answers import Answers
from airflow_vlm_provider.ledger.key_index import KeyIndex
from airflow_vlm_provider.ledger.records import to_line
from airflow_vlm_provider.ledger.segments import SegmentWriter, segment_name
from airflow_vlm_provider.shards.local import LocalStore
from airflow_vlm_provider.types import Answer, Choice
from tests.support.memory_files import MemoryFile, MemoryFiles

STEP = "image_tagging"
START = datetime(2026, 1, 1, tzinfo=timezone.utc)


def key(number: int) -> str:
    return f"{number:032x}"


def line(number: int, text: str = "", *, second: int = 0) -> bytes:
    answer = Answer((Choice(text or f"answer {number}"),), model="m")
    return to_line(key(number), answer, time=START + timedelta(seconds=second))


def journal(files: MemoryFiles, shard: str, lines: Sequence[bytes], *, second: int = 0) -> str:
    """Write lines as a shard's journal, with their keys in the index; return the segment's name."""
    writer = SegmentWriter({})
    for each in lines:
        writer.add(each)
    own = segment_name(START + timedelta(seconds=second), "0123abcd", 1, consolidated=True)
    name = f"_vlm/{shard}/{STEP}/{own}"
    writer.save(files, name)
    writer.close()
    KeyIndex(files, step=STEP).add(name, [each[8:40].decode() for each in lines])
    return name


class CountedFiles(MemoryFiles):
    """Counts who is read how often, and how many segments at once."""

    def __init__(self) -> None:
        super().__init__()
        self.reads: Counter[str] = Counter()
        self.at_once = 0
        self.most_at_once = 0
        self._lock = threading.Lock()

    def read(self, name: str, *, max_bytes: int) -> bytes:
        with self._lock:
            self.reads[name] += 1
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            if "/journal/" in name:
                time.sleep(0.02)  # long enough for all others to come
            return super().read(name, max_bytes=max_bytes)
        finally:
            with self._lock:
                self.at_once -= 1

    @property
    def segment_reads(self) -> dict[str, int]:
        return {name: count for name, count in self.reads.items() if "/journal/" in name}


def in_thread(function: Callable[[], Any]) -> Awaitable[Any]:
    return asyncio.get_running_loop().run_in_executor(None, function)


@asynccontextmanager
async def opened(destination: Any, *reuse: Any) -> Any:
    answers = Answers(destination=destination, reuse=reuse, step=STEP, in_thread=in_thread)
    try:
        await answers.open()
        yield answers
    finally:
        await answers.close()


def test_what_was_put_is_known_without_any_read():
    async def main() -> None:
        files = CountedFiles()
        async with opened(files) as answers:
            assert not answers.has(key(1))
            answers.put([line(1), line(2)])
            assert answers.known() == 2
            assert answers.has(key(1))
            assert await answers.get(key(1)) == line(1)
            assert await answers.get(key(3)) is None
        assert not files.reads

    asyncio.run(main())


def test_another_shards_answers_are_found_and_each_segment_is_read_once_by_whoever_comes_first():
    async def main() -> None:
        files = CountedFiles()
        names = [
            journal(files, f"{shard}.jsonl", [line(shard * 100 + number) for number in range(50)])
            for shard in range(3)
        ]
        numbers = [shard * 100 + number for shard in range(2) for number in range(50)]
        async with opened(files) as answers:
            assert answers.has(key(149))
            found = await asyncio.gather(*(answers.get(key(number)) for number in numbers * 2))
            assert found == [line(number) for number in numbers * 2]
            assert answers.known() == 100
            assert await answers.get(key(99)) is None
        assert files.segment_reads == {names[0]: 1, names[1]: 1}

    asyncio.run(main())


def test_few_segments_are_in_memory_at_once(monkeypatch):
    monkeypatch.setattr(module, "READS", 2)

    async def main() -> None:
        files = CountedFiles()
        for shard in range(20):
            journal(files, f"{shard}.jsonl", [line(shard)])
        async with opened(files) as answers:
            files.most_at_once = 0
            found = await asyncio.gather(*(answers.get(key(number)) for number in range(20)))
            assert found == [line(number) for number in range(20)]
        assert files.most_at_once <= 2

    asyncio.run(main())


def test_the_newest_answer_counts_in_whichever_order_they_come():
    async def main() -> None:
        old, new = line(1, "old", second=1), line(1, "new", second=2)
        for lines in ([old, new], [new, old]):
            async with opened(MemoryFiles()) as answers:
                answers.put(lines[:1])
                answers.put(lines[1:])
                assert await answers.get(key(1)) == new
                answers.put(lines)
                assert await answers.get(key(1)) == new
                assert answers.known() == 1

    asyncio.run(main())


def test_of_two_segments_the_newer_one_is_read_and_the_older_one_is_not():
    async def main() -> None:
        files = CountedFiles()
        new = journal(files, "b.jsonl", [line(1, "new", second=2)], second=2)
        journal(files, "a.jsonl", [line(1, "old", second=1)], second=1)
        async with opened(files) as answers:
            assert await answers.get(key(1)) == line(1, "new", second=2)
        assert files.segment_reads == {new: 1}

    asyncio.run(main())


def test_a_segment_that_is_gone_is_looked_for_once_and_the_next_one_answers(caplog):
    async def main() -> None:
        files = CountedFiles()
        here = journal(files, "a.jsonl", [line(1), line(2)], second=1)
        gone = journal(files, "b.jsonl", [line(1), line(2), line(3)], second=2)
        files.delete(gone)
        async with opened(files) as answers:
            assert answers.has(key(3))
            assert await asyncio.gather(*map(answers.get, (key(1), key(2)))) == [line(1), line(2)]
            assert await answers.get(key(3)) is None
            assert not answers.has(key(3))
        assert files.segment_reads == {gone: 1, here: 1}
        assert [gone in record.getMessage() for record in caplog.records if "gone" in record.msg] == [True]

    with caplog.at_level(logging.INFO):
        asyncio.run(main())


@pytest.mark.parametrize("large", [False, True])
@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"", lambda data: data + data])
def test_a_torn_segment_is_reported_once_and_the_next_one_answers(damage, large, caplog, monkeypatch):
    monkeypatch.setattr(module, "LARGE_BYTES", 0 if large else 10**6)

    async def main() -> None:
        files = CountedFiles()
        here = journal(files, "a.jsonl", [line(1)], second=1)
        torn = journal(files, "b.jsonl", [line(1), line(2)], second=2)
        files.files[torn] = damage(files.files[torn])
        async with opened(files) as answers:
            assert await answers.get(key(1)) == line(1)
            assert await answers.get(key(2)) is None
            assert answers.known() == 1
        assert files.segment_reads == {torn: 1, here: 1}
        assert [torn in record.getMessage() for record in caplog.records] == [True]

    with caplog.at_level(logging.WARNING):
        asyncio.run(main())


def test_a_segment_that_cannot_be_reached_is_an_error_for_all_who_wait_and_tried_again_by_the_next():
    async def main() -> None:
        files = CountedFiles()
        name = journal(files, "a.jsonl", [line(1), line(2)])
        async with opened(files) as answers:
            files.broken.add(name)
            errors = await asyncio.gather(*map(answers.get, (key(1), key(2))), return_exceptions=True)
            assert [type(error) for error in errors] == [ConnectionError, ConnectionError]
            assert files.segment_reads == {name: 1}
            files.broken.clear()
            assert await answers.get(key(2)) == line(2)
        assert files.segment_reads == {name: 2}

    asyncio.run(main())


def test_who_is_cancelled_does_not_take_the_read_from_those_who_wait_for_it_too():
    async def main() -> None:
        files = CountedFiles()
        name = journal(files, "a.jsonl", [line(1), line(2)])
        async with opened(files) as answers:
            first = asyncio.create_task(answers.get(key(1)))
            second = asyncio.create_task(answers.get(key(2)))
            await asyncio.sleep(0)
            first.cancel()
            assert await second == line(2)
            assert first.cancelled()
            assert await answers.get(key(1)) == line(1)
        assert files.segment_reads == {name: 1}

    asyncio.run(main())


def test_a_read_that_nobody_waits_for_any_more_fails_quietly(caplog):
    async def main() -> None:
        files = CountedFiles()
        name = journal(files, "a.jsonl", [line(1)])
        async with opened(files) as answers:
            files.broken.add(name)
            waiting = asyncio.create_task(answers.get(key(1)))
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.wait(list(answers._reading.values()))
            gc.collect()
            files.broken.clear()
            assert await answers.get(key(1)) == line(1)
        assert files.segment_reads == {name: 2}

    asyncio.run(main())
    gc.collect()
    assert caplog.records == []


def test_it_closes_while_segments_are_being_read():
    async def main() -> None:
        files = CountedFiles()
        journal(files, "a.jsonl", [line(1)])
        async with opened(files) as answers:
            waiting = asyncio.create_task(answers.get(key(1)))
            await asyncio.sleep(0)
        with pytest.raises(asyncio.CancelledError):
            await waiting

    asyncio.run(main())


def test_other_destinations_count_after_the_own_one_and_are_never_written_to():
    async def main() -> None:
        own, yesterday, before = CountedFiles(), CountedFiles(), CountedFiles()
        journal(own, "a.jsonl", [line(1, "own")])
        journal(yesterday, "a.jsonl", [line(1, "yesterday"), line(2, "yesterday")], second=9)
        for shard in range(20):
            journal(before, f"{shard}.jsonl", [line(2, "before"), line(3 + shard, "before")])
        stored = [dict(yesterday.files), dict(before.files)]
        async with opened(own, yesterday, before) as answers:
            assert await answers.get(key(1)) == line(1, "own")
            assert await answers.get(key(2)) == line(2, "yesterday")
            assert await answers.get(key(3)) == line(3, "before")
            assert answers.has(key(4))
            assert await answers.get(key(99)) is None
        assert [yesterday.files, before.files] == stored

    asyncio.run(main())


def test_a_destination_that_does_not_exist_is_empty(tmp_path):
    async def main() -> None:
        own = CountedFiles()
        journal(own, "a.jsonl", [line(1)])
        missing = LocalStore(root=str(tmp_path / "missing"))
        async with opened(missing, missing, own) as answers:
            assert await answers.get(key(1)) == line(1)
            assert await answers.get(key(2)) is None

    asyncio.run(main())


@pytest.mark.parametrize("error", [PermissionError, ConnectionError])
@pytest.mark.parametrize("own", [True, False])
def test_a_destination_that_cannot_be_read_is_an_error(error, own):
    class Refusing(MemoryFiles):
        def list(self, folder: str = "") -> Iterator[MemoryFile]:
            raise error("no")

    async def main() -> None:
        with pytest.raises(error):
            async with opened(*((Refusing(),) if own else (MemoryFiles(), Refusing()))):
                pass

    asyncio.run(main())


def test_the_own_index_is_merged_when_it_has_many_files():
    async def main() -> None:
        files = MemoryFiles()
        for shard in range(20):
            journal(files, f"{shard}.jsonl", [line(shard)])
        async with opened(files) as answers:
            assert [await answers.get(key(number)) for number in range(20)] == [line(n) for n in range(20)]
        assert sum("/_index/" in name for name in files.files) == 1

    asyncio.run(main())


def test_an_index_that_cannot_be_merged_serves_all_the_same(caplog):
    class ReadOnly(MemoryFiles):
        closed = False

        @contextmanager
        def create(self, name: str) -> Iterator[BinaryIO]:
            if self.closed:
                raise PermissionError(name)
            with super().create(name) as stream:
                yield stream

    async def main() -> None:
        files = ReadOnly()
        for shard in range(20):
            journal(files, f"{shard}.jsonl", [line(shard)])
        files.closed = True
        async with opened(files) as answers:
            assert [await answers.get(key(number)) for number in range(20)] == [line(n) for n in range(20)]
        assert "could not be merged" in caplog.text

    asyncio.run(main())


def test_what_a_commit_adds_to_its_index_is_found_by_the_next_task():
    async def main() -> None:
        files = MemoryFiles()
        name = journal(files, "a.jsonl", [line(1)])
        for index in [name for name in files.files if "/_index/" in name]:
            files.delete(index)
        async with opened(files) as answers:
            assert await answers.get(key(1)) is None
            answers.index.add(name, [key(1)])
        async with opened(files) as answers:
            assert await answers.get(key(1)) == line(1)

    asyncio.run(main())
