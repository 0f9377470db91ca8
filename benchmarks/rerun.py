"""What a run costs of which all is done, or nearly all: ``python benchmarks/rerun.py``.

A shard of 10,000 rows, a small picture each, is tagged by an endpoint that answers at once; the task is killed when
nine tenths of the requests were sent. Then it is run again and again, each time in a fresh process and after
something else has changed. What was asked is counted by the endpoint.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from client import measured
from client_ours import CONNECTION, connection, tag, tagged_rows
from dataset import BENCH, ROOT, dataset, picture
from harness import CAPACITY, ClientError, machine, wait

sys.path.insert(0, str(ROOT))
from tests.support.stub_endpoint import StubServer, start_stub

GOAL = 2.0  # seconds that a run may take whose shard is done
KILLED_AT = 0.9  # of the rows
POLL = 0.2  # seconds
SHARD, STEP = "part-00000.jsonl", "image_tagging"
PICTURE = 64  # pixels


@dataclass(frozen=True)
class Place:
    """Where one round happens, and with how many rows."""

    folder: Path
    rows: int

    @property
    def data(self) -> Path:
        return self.folder / "data"

    @property
    def destination(self) -> Path:
        return self.folder / "tagged"

    @property
    def result(self) -> Path:
        return self.folder / "result.json"

    def new_picture(self, number: int) -> bytes:
        """A picture that the dataset does not have."""
        return picture(self.rows + number, PICTURE, PICTURE // 2)


def nothing(place: Place) -> None:
    """Change nothing."""


def forget_commit(place: Place) -> None:
    (place.destination / "_vlm" / SHARD / STEP / "manifest.json").unlink()
    (place.destination / SHARD).unlink()


def change_rows(place: Place) -> None:
    shard = place.data / SHARD
    rows = [json.loads(line) for line in shard.read_text(encoding="utf-8").splitlines()]
    for number, row in enumerate(rows[::100]):
        row["images"] = [f"images/new-{number:06d}.jpg"]
        (place.data / row["images"][0]).write_bytes(place.new_picture(number))
    shard.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def replace_picture(place: Place) -> None:
    row = place.rows // 2 + 1  # neither a changed one, nor one of the two rows of the warm-up
    (place.data / "images" / f"{row:06d}.jpg").write_bytes(place.new_picture(row))


@dataclass(frozen=True)
class Case:
    """One run.

    :param label: Its name in the table.
    :param change: What happens before it.
    :param asks: The share of the rows that it asks about; less than one row is one.
    :param done: Whether there is nothing left to do.
    :param trust_media: As for the operator.
    :param elsewhere: Write to another destination, which reuses the answers of the usual one.
    :param parser: Version of the step's parser, as a release of the provider might raise it.
    """

    label: str
    change: Callable[[Place], object] = nothing
    asks: float = 0.0
    done: bool = False
    trust_media: bool = False
    elsewhere: bool = False
    parser: int | None = None


KILLED = "killed at 90 % of the requests, run again"
# Each finds the shard as the one before has left it.
CASES = {
    "finish": Case(KILLED),
    "done": Case("nothing changed", done=True),
    "trusted": Case("nothing changed, trust_media", done=True, trust_media=True),
    "forgotten": Case("manifest and output are gone", forget_commit),
    "reuse": Case("another destination, reuse_from this one", elsewhere=True),
    "changed": Case("1 % of the rows changed", change_rows, asks=0.01),
    "replaced": Case("one picture replaced", replace_picture, asks=1e-9),
    "parser": Case("another version of the parser", parser=1_000_000),
}


def work(case: Case, place: Place, base_url: str) -> None:
    """Run the operator, in a process of its own, and write what that took."""
    os.environ[f"AIRFLOW_CONN_{CONNECTION.upper()}"] = connection(base_url, CAPACITY)
    # Two rows first, because the operator imports most things only when it needs them. Their answers are stored
    # from the second process on, so that nothing is sent for them; overwrite=True has them looked up all the same.
    small = place.folder / "two-rows"
    tag(small, place.folder / "warm-up", place.data, overwrite=True)
    if case.parser is not None:
        from airflow_vlm_provider.steps import tagging

        tagging.PARSER_VERSION = case.parser
    destination, parameters = place.destination, {"trust_media": case.trust_media}
    if case.elsewhere:
        destination, parameters = place.folder / "elsewhere", {"reuse_from": str(place.destination)}
    with measured() as figures:
        summary = tag(place.data, destination, place.data, **parameters)
    if (summary["shards_unchanged"] == 1) != case.done:
        raise SystemExit(f"The shard was found {'not ' if case.done else ''}to be done: {summary}")
    place.result.write_text(json.dumps({**asdict(figures), "tagged": tagged_rows(destination)}))


class Round:
    """Tasks that run one after another against one endpoint."""

    def __init__(self, place: Place, stub: StubServer) -> None:
        self.place = place
        self.stub = stub

    def asked(self) -> int:
        return int(self.stub.stats()["requests"])

    def prepare(self) -> None:
        """Copy the data, and tag two rows, so that no task has to ask about them any more."""
        shutil.copytree(dataset(rows=self.place.rows, size=PICTURE), self.place.data)
        small = self.place.folder / "two-rows"
        small.mkdir()
        lines = (self.place.data / SHARD).read_text(encoding="utf-8").splitlines(keepends=True)[:2]
        (small / SHARD).write_text("".join(lines), encoding="utf-8")

    def killed(self, kill_at: int) -> None:
        """Run a first task, and kill it."""
        with self._process("finish") as process:
            while self.asked() < kill_at:
                if process.poll() is not None:
                    raise ClientError(f"exit status {process.returncode} instead of being killed")
                time.sleep(POLL)
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def run(self, name: str) -> dict[str, float]:
        """Run one case.

        :raises ClientError: it failed, or did not tag every row.
        """
        CASES[name].change(self.place)
        self.place.result.unlink(missing_ok=True)
        before, start = self.asked(), time.perf_counter()
        with self._process(name) as process:
            cpu = wait(process)
        seconds = time.perf_counter() - start
        if process.returncode or not self.place.result.exists():
            raise ClientError(f"{name}: exit status {process.returncode}, see .bench/logs/rerun.log")
        figures: dict[str, float] = json.loads(self.place.result.read_text())
        if figures["tagged"] != self.place.rows:
            raise ClientError(f"{name}: {figures['tagged']} of {self.place.rows} rows are tagged")
        asked = self.asked() - before
        return {**figures, "asked": asked, "process_seconds": seconds, "process_cpu_seconds": cpu}

    @contextmanager
    def _process(self, name: str) -> Iterator[subprocess.Popen[bytes]]:
        environ = {**os.environ, "AIRFLOW_HOME": str(BENCH / "airflow"), "PYTHONPATH": str(ROOT)}
        command = [sys.executable, __file__, f"--case={name}", f"--rows={self.place.rows}"]
        command += [f"--folder={self.place.folder}", f"--base-url={self.stub.base_url}"]
        with (BENCH / "logs" / "rerun.log").open("a") as log:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env=environ, cwd=self.place.folder, start_new_session=True
            )
            try:
                yield process
            finally:
                if process.returncode is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()


@dataclass
class Row:
    """One case's runs.

    :param most: How many requests each may have sent, and ``least`` how many it had to.
    """

    case: Case
    least: int
    most: int
    runs: list[dict[str, float]] = field(default_factory=list)

    def median(self, name: str) -> float:
        return statistics.median(run[name] for run in self.runs)

    @property
    def asked(self) -> list[int]:
        return sorted({int(run["asked"]) for run in self.runs})

    def fits(self) -> bool:
        return self.least <= self.asked[0] and self.asked[-1] <= self.most

    def line(self, rows: int) -> str:
        seconds = self.median("seconds")
        cells = [
            self.case.label,
            " to ".join(dict.fromkeys((f"{self.asked[0]:,}", f"{self.asked[-1]:,}"))),
            f"{seconds:.2f}",
            "" if self.case.done else f"{rows / seconds:,.0f}",
            f"{self.median('cpu_seconds'):.2f}",
            f"{self.median('peak_mb'):.0f}",
            f"{self.median('process_seconds'):.1f}",
            f"{self.median('process_cpu_seconds'):.1f}",
        ]
        return f"| {' | '.join(cells)} |"


def bounds(rows: int) -> dict[str, Row]:
    """How many requests each case may send."""
    from airflow_vlm_provider.ledger.journal import FlushPolicy

    found = {}
    for name, case in CASES.items():
        asks = max(1, round(case.asks * rows)) if case.asks else 0
        found[name] = Row(case, asks, asks)
    # A kill costs what was in flight and what was answered, but not yet durable.
    found["finish"].most = round((1 - KILLED_AT) * rows) + CAPACITY + FlushPolicy().answers
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=10_000, help="of the shard (default: 10,000)")
    parser.add_argument("--rounds", type=int, default=3, help="medians are printed (default: 3)")
    for name, kind in {"case": str, "folder": Path, "base-url": str}.items():
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case is not None:
        work(CASES[options.case], Place(options.folder, options.rows), options.base_url)
        return 0

    table = bounds(options.rows)
    (BENCH / "logs").mkdir(parents=True, exist_ok=True)
    (BENCH / "logs" / "rerun.log").write_text("")
    for number in range(options.rounds):
        with (
            tempfile.TemporaryDirectory(dir=BENCH, prefix="scratch-") as folder,
            start_stub(capacity=CAPACITY) as stub,
        ):
            tasks = Round(Place(Path(folder), options.rows), stub)
            tasks.prepare()
            tasks.killed(round(KILLED_AT * options.rows))
            for name, row in table.items():
                row.runs.append(tasks.run(name))
                said = f"{row.runs[-1]['seconds']:.2f} s, {row.runs[-1]['asked']} requests"
                print(f"round {number + 1}: {row.case.label}: {said}", file=sys.stderr, flush=True)
    print(machine())
    print(f"{options.rows:,} rows, medians of {options.rounds} rounds\n")
    print("| | requests | execute(): s | rows/s | CPU s | peak MB | whole process: s | CPU s |")
    print("|---|--:|--:|--:|--:|--:|--:|--:|")
    for row in table.values():
        print(row.line(options.rows))
    wrong = [row for row in table.values() if not row.fits()]
    for row in wrong:
        print(f"{row.case.label}: {row.asked} requests, where {row.least} to {row.most} were due")
    slow = [row for row in table.values() if row.case.done and row.median("seconds") > GOAL]
    print(f"\ngoal: the requests that are due, and no others: {'missed' if wrong else 'met'}")
    print(f"goal: {GOAL} s where nothing changed: {'missed' if slow else 'met'}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
