"""What a vLLM server tells of itself at ``/metrics``, in Prometheus' text format.

Names as in vLLM's documentation of its production metrics. A server with several engines (data parallel) has a line
for each; together they are added up, and of the shares of cache in use, the largest counts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

_LINE = re.compile(r"^vllm:([a-z_]+)(?:\{([^}]*)\})? ([0-9.eE+-]+)$", re.MULTILINE)
_ENGINE = re.compile(r'\bengine="([^"]*)"')
_DEFERRED = 'reason="deferred"'
# Tokens read, tokens written, and tokens that any step has handled: of a long prompt, the first only counts at its end.
_PROGRESS = ("prompt_tokens_total", "generation_tokens_total", "iteration_tokens_total_sum")


@dataclass(frozen=True)
class Metrics:
    """How busy a server is, or one of its engines.

    :param running: Requests whose tokens are computed.
    :param waiting: Requests that wait, for room or for something else.
    :param kv_cache: Share of the key-value cache in use, from 0 to 1.
    :param progress: Tokens read and written so far; stands still when nothing is computed.
    :param deferred: Those of the waiting that vLLM calls deferred. Requests with a schema are, until they run, though their
        grammar has long been compiled. Older versions of vLLM don't tell.
    """

    running: int
    waiting: int
    kv_cache: float
    progress: float
    deferred: int = 0

    @property
    def tells_nothing(self) -> bool:
        """Whether those who wait may wait for something else than room: nothing runs, and a first grammar is compiled."""
        return self.running == 0 and 0 < self.waiting <= self.deferred


def read_metrics(text: str) -> Metrics | None:
    """Read an answer of ``/metrics``; None when it is not vLLM's."""
    engines = read_engines(text).values()
    if not engines:
        return None
    return Metrics(
        running=sum(each.running for each in engines),
        waiting=sum(each.waiting for each in engines),
        kv_cache=max(each.kv_cache for each in engines),
        progress=sum(each.progress for each in engines),
        deferred=sum(each.deferred for each in engines),
    )


def read_engines(text: str) -> dict[str, Metrics]:
    """Read an answer of ``/metrics``, each engine for itself; empty when it is not vLLM's."""
    found: dict[str, dict[str, float]] = {}
    for name, labels, value in _LINE.findall(text):
        label = _ENGINE.search(labels)
        engine = found.setdefault(label[1] if label else "", {})
        if _DEFERRED in labels:
            name = f"{name}:deferred"
        engine[name] = engine.get(name, 0.0) + float(value)
    return {
        engine: Metrics(
            running=int(values["num_requests_running"]),
            waiting=int(values.get("num_requests_waiting", 0)),
            kv_cache=values.get("kv_cache_usage_perc", 0.0),
            progress=sum(values.get(name, 0.0) for name in _PROGRESS),
            deferred=int(values.get("num_requests_waiting_by_reason:deferred", 0)),
        )
        for engine, values in found.items()
        if "num_requests_running" in values
    }
