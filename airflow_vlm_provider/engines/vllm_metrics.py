"""What a vLLM server tells of itself at ``/metrics``, in Prometheus' text format.

Names as in vLLM's documentation of its production metrics. A server with several engines (data parallel) has a line
for each, which are added up; of the shares of cache in use, the largest counts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_LINE = re.compile(r"^vllm:([a-z_]+)(?:\{[^}]*\})? ([0-9.eE+-]+)$", re.MULTILINE)


@dataclass(frozen=True)
class Metrics:
    """How busy a server is.

    :param running: Requests whose tokens are computed.
    :param waiting: Requests that wait for room.
    :param kv_cache: Share of the key-value cache in use, from 0 to 1.
    :param progress: Tokens read and written so far; stands still when nothing is computed.
    """

    running: int
    waiting: int
    kv_cache: float
    progress: float


def read_metrics(text: str) -> Metrics | None:
    """Read an answer of ``/metrics``; None when it is not vLLM's."""
    found: dict[str, list[float]] = {}
    for name, value in _LINE.findall(text):
        found.setdefault(name, []).append(float(value))
    if "num_requests_running" not in found:
        return None
    return Metrics(
        running=int(sum(found["num_requests_running"])),
        waiting=int(sum(found.get("num_requests_waiting", []))),
        kv_cache=max(found.get("kv_cache_usage_perc", [0.0])),
        progress=sum(found.get("prompt_tokens_total", [])) + sum(found.get("generation_tokens_total", [])),
    )
