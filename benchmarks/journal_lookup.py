"""What it takes to find stored answers: ``python benchmarks/journal_lookup.py``.

A million answers lie in a thousand journals on a local disk. A task in a fresh process opens what is known and looks
up a shard's worth of keys. Measured are the seconds and the memory that this takes beyond the interpreter's and the
provider's imports.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

from dataset import BENCH, ROOT

sys.path.insert(0, str(ROOT))

STEP = "image_tagging"
GOAL_S, GOAL_MB = 10, 500
VERSION = 1  # raise it when the journals' bytes change, so that nobody measures with old ones
START = datetime(2026, 1, 1, tzinfo=timezone.utc)
IN_FLIGHT = 96  # lookups at once, as many samples as a task works on at once
CASES = {
    "index": "one file of index from each journal, to be merged; nothing looked up",
    "none": "keys that no journal has",
    "few": "keys of as few journals as hold so many",
    "all": "keys spread over all journals",
}


def key(number: int) -> str:
    return hashlib.sha256(b"%d" % number).hexdigest()[:32]


def lines(first: int, count: int) -> Iterator[bytes]:
    """Answers as a tagging model gives them: about 400 bytes each."""
    from airflow_vlm_provider.ledger.records import to_line
    from airflow_vlm_provider.types import Answer, Choice, Usage

    dice = random.Random(first)
    words = ["".join(dice.choices("abcdefghilmnoprstu", k=dice.randint(4, 12))) for _ in range(2000)]
    for number in range(first, first + count):
        tags = json.dumps({"tags": dice.sample(words, 15)}, separators=(",", ":"))
        answer = Answer((Choice(tags),), "Qwen/Qwen2.5-VL-7B-Instruct", Usage(1, dice.randint(300, 900), 60))
        yield to_line(key(number), answer, time=START + timedelta(microseconds=number))


def segment(journal: int) -> str:
    from airflow_vlm_provider.ledger.manifest import ledger_folder
    from airflow_vlm_provider.ledger.segments import segment_name

    name = segment_name(START + timedelta(seconds=journal), f"{journal:08x}", 1, consolidated=True)
    return f"{ledger_folder(f'part-{journal:05d}.jsonl', STEP)}/{name}"


def stored(answers: int, journals: int) -> Path:
    """A destination with so many answers in so many journals, made if missing; it has no key index yet."""
    from airflow_vlm_provider.ledger.segments import SegmentWriter
    from airflow_vlm_provider.shards.local import LocalStore

    folder = BENCH / "data" / f"answers-v{VERSION}-{answers}-in-{journals}"
    if folder.exists():
        return folder
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    store, each = LocalStore(root=str(part)), answers // journals
    for journal in range(journals):
        writer = SegmentWriter({})
        for line in lines(journal * each, each):
            writer.add(line)
        writer.save(store, segment(journal))
        writer.close()
    part.rename(folder)
    return folder


def make_index(folder: Path, answers: int, journals: int) -> None:
    """Index every journal by a file of its own, as commits by so many tasks do."""
    from airflow_vlm_provider.ledger.key_index import KeyIndex
    from airflow_vlm_provider.shards.local import LocalStore

    shutil.rmtree(folder / "_vlm" / "_index", ignore_errors=True)
    store, each = LocalStore(root=str(folder)), answers // journals
    for journal in range(journals):
        keys = (key(number) for number in range(journal * each, (journal + 1) * each))
        KeyIndex(store, step=STEP).add(segment(journal), keys)


def wanted(case: str, answers: int, lookups: int) -> list[str]:
    if case == "index":
        return []
    if case == "none":
        return [key(number) for number in range(answers, answers + lookups)]
    numbers = range(lookups) if case == "few" else range(0, answers, max(1, answers // lookups))
    return [key(number) for number in numbers]


def memory_mb(field: str) -> float:
    # Not ru_maxrss, which begins with what the process had that started this one.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition(f"{field}:")[2].split(maxsplit=1)[0]) / 1024


async def look_up(folder: Path, keys: list[str]) -> dict[str, Any]:
    from airflow_vlm_provider.ledger.answers import Answers
    from airflow_vlm_provider.shards.local import LocalStore

    reads = 0

    class CountedStore(LocalStore):
        def read(self, name: str, *, max_bytes: int) -> bytes:
            nonlocal reads
            reads += 1
            return super().read(name, max_bytes=max_bytes)

    def in_thread(function: Callable[[], Any]) -> Awaitable[Any]:
        return asyncio.get_running_loop().run_in_executor(None, function)

    before, cpu, started = memory_mb("VmHWM"), time.process_time(), time.perf_counter()
    answers = Answers(destination=CountedStore(root=str(folder)), step=STEP, in_thread=in_thread)
    await answers.open()
    opened = time.perf_counter()
    rest, found = iter(keys), 0

    async def work() -> None:
        nonlocal found
        for each in rest:
            line = await answers.get(each)
            found += line is not None and line[8:40].decode() == each

    await asyncio.gather(*(work() for _ in range(IN_FLIGHT)))
    done = time.perf_counter()
    figures = {
        "open_s": opened - started,
        "total_s": done - started,
        "cpu_s": time.process_time() - cpu,
        "mb": memory_mb("VmHWM") - before,
        "reads": reads,
        "found": found,
        "known": answers.known(),
    }
    await answers.close()
    return figures


def measure(case: str, folder: Path, answers: int, lookups: int) -> None:
    """One case, in a process of its own."""
    import sqlite3  # noqa: F401 - what follows is not to count these imports

    import zstandard  # noqa: F401

    import airflow_vlm_provider.runner  # noqa: F401

    print(json.dumps(asyncio.run(look_up(folder, wanted(case, answers, lookups)))))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--answers", type=int, default=1_000_000, help="stored (default: 1,000,000)")
    parser.add_argument("--journals", type=int, default=1000, help="that they lie in (default: 1000)")
    parser.add_argument("--lookups", type=int, default=10_000, help="keys of a shard (default: 10,000)")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    folder = stored(options.answers, options.journals)
    if options.case is not None:
        measure(options.case, folder, options.answers, options.lookups)
        return 0

    from harness import machine

    make_index(folder, options.answers, options.journals)
    print(machine())
    print(f"{options.answers:,} answers in {options.journals:,} journals, {options.lookups:,} lookups\n")
    print("| case | files read | found | open s | open and look up s | CPU s | MB |")
    print("|---|--:|--:|--:|--:|--:|--:|")
    met = True
    for case, words in CASES.items():
        command = [sys.executable, __file__, f"--case={case}"]
        command += [f"--{name}={getattr(options, name)}" for name in ("answers", "journals", "lookups")]
        run = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
        expected = len(wanted(case, options.answers, options.lookups)) if case in ("few", "all") else 0
        if run["found"] != expected:
            print(f"{case}: {run['found']} of {expected} answers were found", file=sys.stderr)
            return 1
        print(
            f"| {words} | {run['reads']} | {run['found']} | {run['open_s']:.2f} | {run['total_s']:.2f} "
            f"| {run['cpu_s']:.2f} | {run['mb']:.0f} |"
        )
        met = met and run["total_s"] <= GOAL_S and run["mb"] <= GOAL_MB
    print(f"\ngoal: at most {GOAL_S} s and {GOAL_MB} MB: {'met' if met else 'missed'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
