"""Several runs at the same time: what each of them asks next is asked at once.

A run is a generator as a step's ``process`` is one, and may be made of several itself. Each goes on with its own
answers, and the error of a request is thrown into the run that it is of, or stands among the answers of one that asked
for that. Equal requests are asked once.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator, Sequence
from typing import TypeVar

from airflow_vlm_provider.errors import SampleError
from airflow_vlm_provider.types import Answer, Independent, Part, Probe, Request

T = TypeVar("T")
Asking = Sequence[Request | Probe]


def together(
    runs: Sequence[Generator[Asking, Sequence[Answer], T]],
    *,
    may_fail: Callable[[SampleError], bool],
) -> Generator[Asking, Sequence[Answer], list[T | SampleError]]:
    """What the runs return, in their order.

    :param may_fail: Whether a run may end in this error; the error then stands in the place of its result.
    :raises SampleError: the first run that fails, where it may not. Nothing more is asked of the others then.
    """
    ended: dict[int, T | SampleError] = {}
    asking: dict[int, Asking] = {}

    def go_on(number: int, answers: Sequence[Answer] | None, *, throw: bool = True) -> None:
        run = runs[number]
        error = next((answer.error for answer in answers or () if answer.error is not None), None)
        try:
            if error is not None and throw:
                asking[number] = run.throw(error)
            else:
                asking[number] = run.send(answers)  # type: ignore[arg-type]
        except StopIteration as stop:
            ended[number] = stop.value
        except SampleError as failure:
            if not may_fail(failure):
                raise
            ended[number] = failure

    try:
        for number in range(len(runs)):
            go_on(number, None)
        while asking:
            now = list(asking.items())
            asking.clear()
            distinct = _Distinct()
            places = [[distinct.place(request) for request in requests] for _, requests in now]
            answers = yield Independent(distinct.requests)
            for (number, requests), theirs in zip(now, places, strict=True):
                go_on(
                    number, [answers[place] for place in theirs], throw=not isinstance(requests, Independent)
                )
    finally:
        for run in runs:
            run.close()
    return [ended[number] for number in range(len(runs))]


class _Distinct:
    """Requests, each once, in the order in which they came."""

    def __init__(self) -> None:
        self.requests: list[Request | Probe] = []
        # Compared are only those about the same media and in the same words: a long video makes thousands.
        self._alike: defaultdict[Sequence[Part], list[int]] = defaultdict(list)

    def place(self, request: Request | Probe) -> int:
        """Where the request stands among them."""
        alike = self._alike[request.parts]
        for place in alike:
            if self.requests[place] == request:
                return place
        alike.append(len(self.requests))
        self.requests.append(request)
        return alike[-1]
