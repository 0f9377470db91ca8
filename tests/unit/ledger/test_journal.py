"""What a run leaves behind in the journal, also where saving fails."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import Any, BinaryIO

import pytest

from airflow_vlm_provider.ledger import journal as journal_module
from airflow_vlm_provider.ledger import segments
from airflow_vlm_provider.ledger.journal import FlushPolicy
from airflow_vlm_provider.ledger.records import key_of
from airflow_vlm_provider.ledger.segments import read_segment
from tests.support.journals import (
    FOLDER,
    NOON,
    SHARD,
    STEP,
    commit,
    commit_manifest,
    journal,
    key,
    loaded,
    names,
    record,
    records,
    reuse,
    stored,
    written,
)
from tests.support.memory_files import MemoryFiles


def test_a_shard_that_was_never_done_has_no_answers():
    assert stored(MemoryFiles()) == []


def test_flushed_answers_are_there_for_the_next_attempt_and_say_where_they_are_from():
    files, lines = MemoryFiles(), records(5)
    written(files, lines, committed=False)
    assert stored(files) == sorted(lines)
    (name,) = names(files)
    header = segments._parse(next(segments._decompress(files.files[f"{FOLDER}/{name}"])).splitlines()[0])
    assert (header["shard"], header["step"], header["written_by"]) == (SHARD, STEP, {"dag_id": "d"})
    assert {"created", "provider_version"} <= set(header)


def test_a_commit_leaves_one_segment_with_everything():
    files, lines = MemoryFiles(), records(50)
    kept = written(files, lines, answers=8)
    assert names(files) == kept
    assert len(kept) == 1
    assert kept[0].endswith("-all.jsonl.zst")
    assert len(files.deleted) > 5
    assert stored(files) == sorted(lines)


def test_what_was_flushed_into_one_segment_is_not_written_again():
    files, lines = MemoryFiles(), records(5)
    kept = written(files, lines)
    assert names(files) == kept
    assert files.deleted == []
    assert not kept[0].endswith("-all.jsonl.zst")
    assert stored(files) == sorted(lines)


def test_a_run_that_needed_no_answers_writes_nothing_and_deletes_nothing():
    files = MemoryFiles()
    assert written(files, []) == []
    kept = written(files, records(2))
    before = dict(files.files)
    assert asyncio.run(reuse(files, [])) == []
    assert set(names(files)) == set(kept)
    assert {name: data for name, data in files.files.items() if "/journal/" in name} == {
        name: data for name, data in before.items() if "/journal/" in name
    }


@pytest.mark.parametrize("used", [1, 50])
def test_answers_that_one_segment_has_already_are_not_written_again(used):
    files, lines = MemoryFiles(), records(50)
    kept = written(files, lines, answers=8)
    assert asyncio.run(reuse(files, lines[:used] * 3)) == kept
    assert names(files) == kept
    assert stored(files) == sorted(lines)


def test_a_whole_segment_that_another_attempt_has_deleted_since_is_written_again():
    files, lines = MemoryFiles(), records(5)
    (old,) = written(files, lines)

    async def go() -> list[str]:
        made, _ = await loaded(files)
        for line in lines:
            made.use(line)
        files.delete(f"{FOLDER}/{old}")
        return await commit(made, files)

    kept = asyncio.run(go())
    assert kept != [old]
    assert names(files) == kept
    assert stored(files) == sorted(lines)


def test_used_and_new_answers_end_in_one_segment_and_the_old_one_goes():
    files, lines = MemoryFiles(), records(9)
    (old,) = written(files, lines[:6])
    kept = asyncio.run(reuse(files, lines[:6], lines[6:]))
    assert kept != [old]
    assert names(files) == kept
    assert stored(files) == sorted(lines)


def test_answers_from_elsewhere_are_kept_by_the_shard_that_used_them():
    files, lines = MemoryFiles(), records(3)
    kept = asyncio.run(reuse(files, lines))
    assert names(files) == kept
    assert stored(files) == sorted(lines)


def test_answers_that_this_run_had_no_use_for_stay():
    files, lines = MemoryFiles(), records(9)
    (old,) = written(files, lines[:6])
    kept = asyncio.run(reuse(files, lines[:5], lines[6:]))
    assert set(names(files)) == {old, *kept}
    assert stored(files) == sorted([*lines[:5], *lines])


def test_answers_that_were_asked_for_anew_replace_the_old_ones():
    files = MemoryFiles()
    written(files, records(9))
    anew = [record(number, tick=1, text="another cat") for number in range(9)]
    kept = asyncio.run(reuse(files, [], anew))
    assert names(files) == kept
    assert stored(files) == sorted(anew)


def test_a_segment_that_the_manifest_names_by_now_is_not_deleted():
    """Another attempt has committed meanwhile, with the segment that this one could do without."""
    files, lines = MemoryFiles(), records(3)
    (old,) = written(files, lines[:2])

    async def go() -> list[str]:
        made, _ = await loaded(files)
        for line in lines[:2]:
            made.use(line)
        await made.append(lines[2])
        await made.flush()
        kept = made.consolidate()
        commit_manifest(files, [old])
        made.retire()
        await made.close()
        return kept

    kept = asyncio.run(go())
    assert set(names(files)) >= {old, *kept}


def test_repeated_answers_are_not_repeated_in_the_segment():
    files, lines = MemoryFiles(), records(20)
    kept = asyncio.run(reuse(files, lines * 50, records(30)[20:] * 2))
    (data,) = [files.files[f"{FOLDER}/{name}"] for name in kept]
    assert sorted(read_segment(data)) == sorted(records(30))


def test_keys_of_what_was_consolidated_are_told():
    files = MemoryFiles()

    async def go() -> list[str]:
        made, _ = await loaded(files)
        made.use(record(1))
        await made.append(record(2))
        await made.flush()
        (name,) = made.consolidate()
        assert sorted(made.consolidated_keys(name)) == sorted(made.consolidated_keys())
        return sorted(made.consolidated_keys())

    assert asyncio.run(go()) == sorted([key(1), key(2)])


def test_what_is_too_much_for_one_segment_goes_into_several(monkeypatch):
    monkeypatch.setattr(segments, "FULL_BYTES", 1000)
    files, lines = MemoryFiles(), records(40)

    async def go() -> list[str]:
        made = journal(files, policy=FlushPolicy(answers=10))
        for line in lines:
            await made.append(line)
        kept = await commit(made, files)
        told = [set(made.consolidated_keys(name)) for name in kept]
        assert sum(map(len, told)) == len(set().union(*told)) == 40
        for name, keys in zip(kept, told, strict=True):
            assert {key_of(line) for line in read_segment(files.files[f"{FOLDER}/{name}"])} == keys
        return kept

    kept = asyncio.run(go())
    assert len(kept) > 3
    assert names(files) == kept
    assert stored(files) == sorted(lines)


def test_a_store_that_does_not_delete_is_told_and_no_error(caplog):
    class Kept(MemoryFiles):
        def delete(self, name: str) -> None:
            raise PermissionError("s3:DeleteObject is denied")

    files, lines = Kept(), records(50)
    kept = written(files, lines, answers=8)
    assert len(kept) == 1
    assert "s3:DeleteObject is denied" in caplog.text
    assert set(stored(files)) == set(lines)


def test_retiring_before_consolidating_is_a_defect():
    with pytest.raises(RuntimeError, match="after consolidate"):
        journal(MemoryFiles()).retire()


def test_what_is_no_line_is_neither_appended_nor_used():
    async def go() -> None:
        made = journal(MemoryFiles())
        with pytest.raises(ValueError, match="can't be a line"):
            await made.append(b"{}")
        with pytest.raises(ValueError, match="can't be a line"):
            made.use(b"{}")

    asyncio.run(go())


def test_attempts_never_share_a_name(monkeypatch):
    """Not even those that write at the same moment."""
    monkeypatch.setattr(journal_module, "datetime", Frozen)
    files, lines = MemoryFiles(), records(40)
    for line in lines:
        written(files, [line], committed=False)
    assert len(names(files)) == 40
    assert stored(files) == sorted(lines)


class Frozen(datetime):
    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return NOON


# Failures while answers are saved


def test_a_store_that_fails_stops_the_asking_and_closing_still_saves():
    class Flaky(MemoryFiles):
        away = True

        @contextmanager
        def create(self, name: str) -> Iterator[BinaryIO]:
            with super().create(name) as stream:
                yield stream
                if self.away:
                    raise ConnectionError("the bucket is out of reach")

    files, lines, failures = Flaky(), records(8), []

    async def go() -> None:
        made = journal(files, policy=FlushPolicy(answers=4), on_failure=failures.append)
        asked = [asyncio.create_task(made.append(line)) for line in lines]
        await asyncio.wait(asked)
        assert {str(task.exception()) for task in asked[4:]} == {"the bucket is out of reach"}
        assert [str(each) for each in failures] == ["the bucket is out of reach"]
        with pytest.raises(ConnectionError):
            await made.append(lines[-1])
        with pytest.raises(ConnectionError):
            await made.flush()
        files.away = False
        await made.close()

    asyncio.run(go())
    # All that came to append(), also what it refused.
    assert set(stored(files)) == set(lines)
    assert len(failures) == 1


def test_closing_says_what_it_could_not_save(caplog):
    class Away(MemoryFiles):
        def create(self, name: str) -> Any:
            raise ConnectionError("the bucket is out of reach")

    async def go() -> None:
        made = journal(Away())
        await made.append(record(1))
        await made.close()

    asyncio.run(go())
    assert "1 answers in" in caplog.text
    assert "the bucket is out of reach" in caplog.text


def test_what_is_buffered_when_a_run_is_cancelled_is_saved():
    files, lines = MemoryFiles(), records(3)

    async def task() -> None:
        made = journal(files, in_thread=asyncio.to_thread)
        try:
            for line in lines:
                await made.append(line)
            await asyncio.Event().wait()
        finally:
            await made.close()

    async def go() -> None:
        running = asyncio.create_task(task())
        await asyncio.sleep(0)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running

    asyncio.run(go())
    assert stored(files) == sorted(lines)


def test_closing_does_not_wait_for_a_store_that_hangs():
    hang = threading.Event()

    class Hanging(MemoryFiles):
        def create(self, name: str) -> Any:
            hang.wait(60)
            raise ConnectionError("at last")

    async def go() -> bool:
        made = journal(Hanging(), in_thread=asyncio.to_thread)
        await made.append(record(1))
        closing = asyncio.create_task(made.close(seconds=0.05))
        try:
            # Were it to wait for the store, it would be waited for here for ever.
            await asyncio.wait((closing,), timeout=30)
            return closing.done()
        finally:
            hang.set()

    assert asyncio.run(go())
