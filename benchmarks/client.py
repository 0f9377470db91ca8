"""What every client script shares: its command line, its clock, and the question it asks.

Standard library only: the scripts run in environments of their own, where this project is not installed.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

MODEL = "stub"
SYSTEM = "You label pictures for a search index. Answer with JSON only."
PROMPT = 'Name five to ten things that this picture shows, as {"tags": ["...", "..."]}.'


def arguments() -> argparse.Namespace:
    """The options that ``tagging.py`` passes to each client."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--base-url", required=True, help="of the endpoint, /v1 included")
    parser.add_argument("--data", type=Path, required=True, help="folder with part-*.jsonl and images/")
    parser.add_argument("--out", type=Path, required=True, help="empty folder for output")
    parser.add_argument("--result", type=Path, required=True, help="JSON file for the figures")
    parser.add_argument("--images", type=int, required=True, help="how many rows to process")
    parser.add_argument("--in-flight", type=int, default=64, help="requests at once")
    parser.add_argument("--processes", type=int, default=1, help="worker processes, where the client has any")
    parser.add_argument(
        "--adaptive", action="store_true", help="let the client find --in-flight out by itself"
    )
    parser.add_argument("--without-ledger", action="store_true", help="ours: no journal and no manifests")
    return parser.parse_args()


def rows(data: Path, limit: int) -> list[dict[str, Any]]:
    """The first ``limit`` rows, image paths made absolute."""
    found: list[dict[str, Any]] = []
    for shard in sorted(data.glob("part-*.jsonl")):
        for line in shard.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            found.append({**row, "images": [str(data / name) for name in row["images"]]})
    return found[:limit]


def messages(image_url: str) -> list[dict[str, Any]]:
    """The question about one picture, as the chat-completions API takes it."""
    return [
        {"role": "system", "content": SYSTEM},
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": image_url}},
                {"type": "text", "text": PROMPT},
            ],
        },
    ]


def _cpu_seconds() -> float:
    used = (resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN))
    return sum(each.ru_utime + each.ru_stime for each in used)


def _peak_mb() -> float:
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    status = Path("/proc/self/status")
    if status.exists():
        # ru_maxrss starts at the size of the process that this one was started from; VmHWM is its own.
        kilobytes = int(status.read_text(encoding="utf-8").partition("VmHWM:")[2].split(maxsplit=1)[0])
    return max(kilobytes, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) / 1024


@dataclass
class Figures:
    """What one run cost.

    :param peak_mb: Most memory that this process or one of its finished children ever held.
    """

    seconds: float = 0.0
    cpu_seconds: float = 0.0
    peak_mb: float = 0.0

    def write(self, result: Path, *, tagged: int) -> None:
        """Report the figures, and how many rows of the output hold tags: a count of the work really done."""
        result.write_text(json.dumps({**asdict(self), "tagged": tagged}), encoding="utf-8")


@contextmanager
def measured() -> Iterator[Figures]:
    """Time the block: wall, and the CPU of this process and of its finished children."""
    figures = Figures()
    cpu, start = _cpu_seconds(), time.perf_counter()
    yield figures
    figures.seconds = time.perf_counter() - start
    figures.cpu_seconds = _cpu_seconds() - cpu
    figures.peak_mb = _peak_mb()
