"""Does memory grow with a shard? Ours on a shard of 2,000 rows and on one of 20,000: ``python benchmarks/memory.py``.

The pictures are small and the endpoint answers at once, so that rows go through as fast as they can.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

from dataset import dataset
from harness import Client, machine, run

GOAL = 1.15
PICTURE = 64  # pixels


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs=2, default=(2_000, 20_000), metavar=("SMALL", "LARGE"))
    parser.add_argument("--rounds", type=int, default=3, help="medians are printed (default: 3)")
    options = parser.parse_args()
    ours = Client("ImageTaggingVLMOperator", "client_ours.py")
    peaks: dict[int, list[float]] = {rows: [] for rows in options.rows}
    for _ in range(options.rounds):
        for rows, peak in peaks.items():
            data = dataset(rows=rows, size=PICTURE)
            done = run(ours, Path(sys.executable), images=rows, data=data, latency=0, log_name="memory")
            peak.append(done.peak_mb)
            print(f"{rows} rows: {done.peak_mb:.0f} MB, {done.rate:.0f} rows/s", file=sys.stderr, flush=True)
    small, large = (statistics.median(peak) for peak in peaks.values())
    print(machine())
    print(
        f"peak memory: {small:.0f} MB for {options.rows[0]} rows, {large:.0f} MB for {options.rows[1]} rows"
    )
    print(f"ratio {large / small:.2f} (goal: at most {GOAL}): {'met' if large / small <= GOAL else 'missed'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
