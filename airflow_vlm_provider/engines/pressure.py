"""How many requests an endpoint can take at the moment: the law by which the window follows it.

Three things tell of it:

- The server itself, where it is vLLM: how many requests it runs, and how many wait in it for room. As long as none do,
  there may be more. Those that do wait keep it busy until it is looked at the next time; beyond that they only cost time,
  memory and fairness. See :class:`ServerLaw`.
- The answers, where the server tells nothing: a larger window that brings no more of them in the same time only makes
  each take longer. See :class:`~airflow_vlm_provider.engines.congestion.AnswerLaw`.
- Requests that are turned away (429) or not answered in time, whoever the server is. See
  :class:`~airflow_vlm_provider.engines.congestion.RefusalLaw`.

Nothing here waits or measures time: what happens, and when, is said by the caller.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from airflow_vlm_provider.engines.congestion import AnswerLaw, RefusalLaw
from airflow_vlm_provider.engines.vllm_metrics import Metrics

FIRST_SIZE = 32
"""Requests in flight before anything is known of the endpoint."""
# The same, of all tasks together that are known to begin with one server, and for each of them at least.
FIRST_OF_ALL, FIRST_AT_LEAST = 128, 4
# Of the requests that run, so many may wait besides, and at least SPARE.
SPARE_SHARE, SPARE = 1 / 8, 4
# A cache that is as full as this has no room for one more; vLLM then drops what it has computed and begins again.
FULL_CACHE = 0.95
# On average, so few requests that wait for room are none, and a cache is full.
IDLE, FULL_ON_AVERAGE = 1.0, 0.9

Ended = Literal["answered", "refused", "failed"]
"""``refused``: turned away, or not answered in time; ``failed``: for any other reason, or given up by the caller."""


def first_size(tasks: int) -> int:
    """How large a task's window is at first that knows how many tasks ask the server, itself included.

    The window of each follows the server when that has been seen to let requests wait. What many tasks have sent before
    must be answered in time, all the same.
    """
    return min(FIRST_SIZE, max(FIRST_AT_LEAST, FIRST_OF_ALL // max(1, tasks)))


class ServerLaw:
    """Follows what a vLLM server tells of itself.

    Every task keeps a number of its own requests waiting in the server that grows with the root of its share of all
    requests there. So whoever has a larger share finds too many waiting and takes its window back, whoever has a
    smaller one finds too few, and the windows of all that have enough to ask become the same.

    :param size: The window to begin with.
    :param most: The largest.
    """

    def __init__(self, size: float, most: int) -> None:
        self.size = size
        self.has_met_bounds = False
        """Whether requests were seen to wait for room in the server."""
        self._most = most
        # As long as none were, the window may double.
        self._boost = 1.0

    def look(self, metrics: Metrics, *, in_flight: int, full: bool) -> None:
        """The server was looked at.

        :param in_flight: This task's requests.
        :param full: Whether there were as many of them as the window holds.
        """
        there = metrics.running + metrics.waiting
        # Some are on their way, and behind one address there may be more servers than the one that told of itself.
        load = max(in_flight, there)
        if not load or metrics.tells_nothing:
            return
        if metrics.waiting == 0:
            if full:
                # What the server has not got yet, it has not shown that it can take.
                size = in_flight * (1 + self._boost * metrics.running / load)
                room = in_flight * FULL_CACHE / metrics.kv_cache if metrics.kv_cache else math.inf
                self.size = min(float(self._most), max(self.size, min(size, room)))
                self._boost = min(1.0, 2 * self._boost)
            return
        self.has_met_bounds = True
        self._boost = SPARE_SHARE
        running = load * metrics.running / there
        spare = SPARE if metrics.kv_cache >= FULL_CACHE else max(SPARE, running * SPARE_SHARE)
        missing = spare * math.sqrt(in_flight / load) - in_flight * metrics.waiting / there
        if missing < 0 or full:
            # A window that was made smaller holds more than its size until enough have come back.
            size = max(self.size, in_flight) if full else in_flight
            self.size = max(1.0, min(self._most, size + missing / 2))


@dataclass(frozen=True)
class Sent:
    """One request on its way.

    :param number: Counts all requests.
    :param at: When it was sent, in seconds of the caller's clock.
    """

    number: int
    at: float


class Pressure:
    """Says how large the window is to be.

    :param most: The largest that it may become.
    :param first: How large it is at first.
    """

    def __init__(self, most: int, *, first: int = FIRST_SIZE) -> None:
        self._most = most
        self._answers = AnswerLaw(min(most, first), most)
        self._refusals = RefusalLaw(most)
        self._server: ServerLaw | None = None
        self._sent = 0
        self._in_flight = 0
        # The last request with which the window was full; the most that were in flight since the last look.
        self._filled = 0
        self._peak = 0
        self._refused = 0
        self._looks = 0
        self._waiting = 0.0
        self._kv_cache = 0.0

    @property
    def size(self) -> int:
        """Requests in flight at most, for now."""
        return max(1, int(min(self._refusals.size, (self._server or self._answers).size)))

    @property
    def in_flight(self) -> int:
        """Requests on their way."""
        return self._in_flight

    @property
    def is_limited(self) -> bool:
        """Whether it is the endpoint that keeps the window smaller than it may become."""
        met = self._answers.has_met_bounds if self._server is None else self._server.has_met_bounds
        return self.size < self._most and (met or self._refusals.size < self._most)

    def send(self, now: float) -> Sent:
        """A request is sent; what is returned is for :meth:`end`."""
        self._sent += 1
        self._in_flight += 1
        self._peak = max(self._peak, self._in_flight)
        if self._in_flight >= self.size:
            self._filled = self._sent
        self._answers.send(self._sent, now)
        return Sent(self._sent, now)

    def end(self, sent: Sent, now: float, ended: Ended) -> None:
        """A request has ended."""
        in_flight = self._in_flight
        self._in_flight -= 1
        if ended == "refused":
            self._refused += 1
            self._refusals.refused(sent.number, self._sent, in_flight)
        elif ended == "answered" and self._filled >= sent.number:
            self._refusals.answered(sent.number)
        self._answers.end(sent.number, now, answered=ended == "answered", filled=self._filled)

    def look(self, metrics: Metrics | None) -> None:
        """The server was looked at.

        :param metrics: None when it tells nothing of itself, or not any more.
        """
        peak, self._peak = self._peak, self._in_flight
        if metrics is None:
            if self._server is not None:
                self._answers = AnswerLaw(self._server.size, self._most)
                self._server = None
            return
        if self._server is None:
            self._server = ServerLaw(self._answers.size, self._most)
        full = peak >= self.size
        if full and not metrics.tells_nothing:
            self._looks += 1
            self._waiting += metrics.waiting
            self._kv_cache += metrics.kv_cache
        self._server.look(metrics, in_flight=self._in_flight, full=full)

    def sentence(self) -> str | None:
        """What kept more requests from being in flight, and what would help; None if it is not known."""
        waiting, kv_cache = (each / max(1, self._looks) for each in (self._waiting, self._kv_cache))
        law = self._server or self._answers
        said = []
        if self._looks:
            said.append(
                f"vLLM had {waiting:.1f} requests waiting on average, and {kv_cache:.0%} of its cache in use."
            )
        if self._refused:
            said.append(f"{self._refused} of {self._sent} requests were turned away or not answered in time.")
        if self._refusals.size < law.size:
            said.append(
                "Higher limits of the endpoint or, where answers take long, a larger timeout would make this faster."
            )
        elif kv_cache >= FULL_ON_AVERAGE:
            said.append(
                "Smaller media (max_pixels), shorter prompts, or more of the GPU's memory (gpu_memory_utilization) would make "
                "room for more requests at once."
            )
        elif self._server is None and law.has_met_bounds:
            said.append(
                "More requests at once brought no more answers. A faster endpoint, or fewer pixels and tokens for it, "
                "would make this faster."
            )
        elif self.size >= self._most and waiting < IDLE:
            said.append(
                f"No more than {self._most} requests were allowed at once. A larger concurrency (max_concurrency), or more "
                "tasks at the same time, may make this faster."
            )
        elif self._looks and self._server is not None and not law.has_met_bounds:
            said.append(
                "The window was still growing: longer tasks, with more shards each, spend less of their time so."
            )
        elif said:
            said.append("A faster GPU or model, or fewer pixels and tokens for it, would make this faster.")
        return " ".join(said) or None
