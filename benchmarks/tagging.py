"""Ours beside a bare loop, saturate and Data-Juicer, in one run: ``make bench``.

Every client tags the same pictures through the same endpoint, a stub in its own process that takes 0.2 s for
an answer and serves 64 requests at once. All figures come from that run and that machine; nothing is
remembered from an earlier one. What is measured, and what it means, is in ``docs/performance.md``.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from dataset import BENCH, ROOT, dataset
from environments import DATA_JUICER, SATURATE, NotInstalledError, environment
from harness import CAPACITY, LATENCY, Client, ClientError, Run, machine, run

IDEAL = CAPACITY / LATENCY  # images a second
LEDGER_GOAL = 0.95  # of the rate without journal and manifests

DATA_JUICER_ENVIRONMENT = ("data-juicer", DATA_JUICER)
CLIENTS = {
    "raw": Client("sockets only (ceiling)", "client_raw.py"),
    "bare": Client("bare AsyncOpenAI loop", "client_bare.py"),
    "ours": Client("ImageTaggingVLMOperator", "client_ours.py"),
    "ours-without-ledger": Client(
        "the same without journal and manifests", "client_ours.py", options=("--without-ledger",)
    ),
    "saturate": Client("saturate 0.2.0, Fixed(64)", "client_saturate.py", ("saturate", SATURATE)),
    "saturate-auto": Client(
        "saturate 0.2.0, Auto()", "client_saturate.py", ("saturate", SATURATE), options=("--adaptive",)
    ),
    "data-juicer": Client(
        "Data-Juicer 1.6.1, np=1", "client_data_juicer.py", DATA_JUICER_ENVIRONMENT, share=0.1
    ),
    "data-juicer-2": Client(
        "Data-Juicer 1.6.1, np=2",
        "client_data_juicer.py",
        DATA_JUICER_ENVIRONMENT,
        share=0.1,
        options=("--processes", "2"),
    ),
}


@dataclass
class Row:
    """One client's runs, or why there are none."""

    client: Client
    runs: list[Run] = field(default_factory=list)
    failure: str = ""

    def median(self, name: str) -> float:
        return float(statistics.median(getattr(run, name) for run in self.runs))


def table(rows: Mapping[str, Row]) -> str:
    """The figures as Markdown: medians, and the rates' range."""
    lines = [
        "| client | images | images/s | range | of ideal | of bare loop | CPU ms/image | peak MB | "
        "whole process: s | CPU ms/image | other load: cores |",
        "|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|",
    ]
    bare = rows["bare"].median("rate") if "bare" in rows and rows["bare"].runs else None
    for row in rows.values():
        if not row.runs:
            lines.append(f"| {row.client.label} | not run: {row.failure} {'| ' * 10}".rstrip())
            continue
        rate = row.median("rate")
        rates = [run.rate for run in row.runs]
        cells = [
            row.client.label,
            str(row.runs[0].images),
            f"{rate:.1f}",
            f"{min(rates):.1f} to {max(rates):.1f}",
            f"{rate / IDEAL:.2f}",
            f"{rate / bare:.2f}" if bare else "",
            f"{row.median('cpu_ms'):.2f}",
            f"{row.median('peak_mb'):.0f}",
            f"{row.median('process_seconds'):.1f}",
            f"{row.median('process_cpu_ms'):.2f}",
            f"{row.median('others'):.1f}",
        ]
        note = f" ({len(rates)} runs, then {row.failure})" if row.failure else ""
        lines.append(f"| {' | '.join(cells)} |{note}")
    return "\n".join(lines)


def ledger_cost(rows: Mapping[str, Row]) -> str:
    """What journal and manifests cost, in a sentence; empty when that was not measured."""
    both = [rows[name] for name in ("ours", "ours-without-ledger") if name in rows and rows[name].runs]
    if len(both) < 2:
        return ""
    share = both[0].median("rate") / both[1].median("rate")
    cpu = [row.median("cpu_ms") for row in both]
    return (
        f"Journal and manifests: {share:.3f} of the rate without them, {cpu[0]:.2f} CPU ms/image beside {cpu[1]:.2f} "
        f"(goal: at least {LEDGER_GOAL} of the rate): {'met' if share >= LEDGER_GOAL else 'missed'}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", help=f"comma-separated choice of {', '.join(CLIENTS)}")
    parser.add_argument("--rounds", type=int, default=3, help="medians are printed (default: 3)")
    parser.add_argument("--images", type=int, default=2000, help="distinct pictures (default: 2000)")
    parser.add_argument("--shards", type=int, default=1, help="shards that hold them (default: 1)")
    options = parser.parse_args()
    names = options.only.split(",") if options.only else list(CLIENTS)
    if unknown := set(names) - set(CLIENTS):
        parser.error(f"--only: unknown {', '.join(sorted(unknown))}; there are {', '.join(CLIENTS)}")

    data = dataset(rows=options.images, shards=options.shards)
    rows = {name: Row(CLIENTS[name]) for name in names}
    pythons: dict[str, Path] = {}
    for name, row in rows.items():
        try:
            wanted = row.client.environment
            pythons[name] = environment(*wanted) if wanted else Path(sys.executable)
        except NotInstalledError as why:
            row.failure = f"its environment could not be made: {why}"
    for number in range(options.rounds):
        # Another order each round: whoever goes first or last finds the machine in a different state.
        shift = number % len(names)
        order = names[shift:] + names[:shift]
        for name in reversed(order) if number % 2 else order:
            row = rows[name]
            if row.failure:
                continue
            images = round(options.images * row.client.share)
            try:
                row.runs.append(run(row.client, pythons[name], images=images, data=data, log_name=name))
            except ClientError as why:
                row.failure = str(why)
            done = f"{row.runs[-1].rate:.1f} images/s" if not row.failure else row.failure
            print(f"round {number + 1}: {row.client.label}: {done}", file=sys.stderr, flush=True)

    runs = [run for row in rows.values() for run in row.runs]
    print(machine())
    print(
        f"{options.rounds} rounds, {options.shards} shard(s); ideal {IDEAL:.0f} images/s; the endpoint took "
        f"{max((run.stub_cpu_ms for run in runs), default=0):.2f} CPU ms/image at most\n"
    )
    print(table(rows))
    if sentence := ledger_cost(rows):
        print(f"\n{sentence}")
    results = BENCH / "results" / f"tagging-{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}.json"
    results.parent.mkdir(exist_ok=True)
    record = {
        name: {"failure": row.failure, "runs": [asdict(run) for run in row.runs]}
        for name, row in rows.items()
    }
    results.write_text(json.dumps({"machine": machine(), "clients": record}, indent=1), encoding="utf-8")
    print(f"\nEvery run: {results.relative_to(ROOT)}")
    return int(any(row.failure for row in rows.values()))


if __name__ == "__main__":
    sys.exit(main())
