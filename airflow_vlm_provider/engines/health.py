"""Whether an endpoint is alive: what single failures say together."""

from __future__ import annotations

import re
import time
from collections.abc import Callable

from airflow_vlm_provider.engines.failures import PassingError
from airflow_vlm_provider.errors import ConfigError, EngineError, SampleError

_EXHAUSTED = 16
"""Requests given up in a row, without a success in between, that make an outage."""
_FAILING = 8
"""Requests that must be failing at the same time before their failures count as an outage: fewer may have
themselves to blame."""
_REJECTED = 16
"""First answers in a row that may be the same rejection before it is taken for a wrong setting."""


class Turn:
    """The attempts of one request."""

    __slots__ = ("counted", "epoch", "sent", "sent_at")

    def __init__(self) -> None:
        self.sent = 0
        self.sent_at = 0.0
        self.counted = 0
        self.epoch = -1


class Health:
    """Follows successes and failures over all requests of an engine.

    :param name: What messages call the engine's connection.
    :param endpoint: URL that is asked, without credentials.
    :param max_attempts: Failed attempts after which a request is given up.
    :param outage_timeout: Seconds without an answer after which the endpoint is.
    :param clock: Seconds of a steady clock.
    """

    def __init__(
        self,
        *,
        name: str,
        endpoint: str,
        max_attempts: int,
        outage_timeout: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = name
        self._endpoint = endpoint
        self._max_attempts = max_attempts
        self._outage_timeout = outage_timeout
        self._clock = clock
        self._ever_succeeded = False
        # An epoch ends with every answer; what fails is counted within one.
        self._epoch = 0
        self._answered_at = float("-inf")
        self._down_since: float | None = None
        self._failing = 0
        self._given_up = 0
        self._rejection = ""
        self._rejections = 0

    def sending(self, turn: Turn) -> None:
        """A request is about to be sent."""
        turn.sent += 1
        turn.sent_at = self._clock()

    def succeeded(self) -> None:
        """A request was answered."""
        self._ever_succeeded = True
        self._alive()

    def rejected(self, error: SampleError) -> ConfigError | None:
        """A request was refused for its own sake; the same ever since the beginning is no sample's fault."""
        self._alive()
        if self._ever_succeeded or error.kind != "rejected":
            return None
        rejection = re.sub(r"\d+", "#", error.message)
        self._rejections = self._rejections + 1 if rejection == self._rejection else 1
        self._rejection = rejection
        if self._rejections < _REJECTED:
            return None
        return ConfigError(
            f"{self._name}: the first {self._rejections} requests were all rejected alike. "
            f"{error.message.rstrip('.')}. Check the model, what media it takes, and its context length against "
            "max_pixels and the prompts."
        )

    def failed(self, turn: Turn, failure: PassingError) -> bool:
        """An attempt failed; tells whether its request is to be given up."""
        if self._down_since is None:
            self._down_since = self._clock()
        if turn.epoch != self._epoch:
            turn.epoch = self._epoch
            self._failing += 1
        # No connection says nothing about the request: time alone ends these. And while others are answered, a
        # rate limit says only that the endpoint is busy.
        busy = failure.reason == "rate_limit" and self._answered_at > turn.sent_at
        if failure.reason != "unreachable" and not busy:
            turn.counted += 1
        return (
            turn.counted >= self._max_attempts
            or turn.sent >= 10 * self._max_attempts
            or self._is_outage(failure)
        )

    def given_up(self, failure: PassingError) -> EngineError | None:
        """A request was given up; tells whether the engine is to be, too."""
        self._given_up += 1
        if not self._is_outage(failure) and self._given_up < _EXHAUSTED:
            return None
        what = "could not be reached" if failure.reason == "unreachable" else "has not answered"
        return EngineError(
            f"{self._name}: {self._endpoint} {what} for {self._down_for():.0f} s; the last failure: {failure}. "
            "Check that it runs and that the connection's host and port are right."
        )

    def _alive(self) -> None:
        self._epoch += 1
        self._answered_at = self._clock()
        self._down_since = None
        self._failing = 0
        self._given_up = 0

    def _down_for(self) -> float:
        return 0.0 if self._down_since is None else self._clock() - self._down_since

    def _is_outage(self, failure: PassingError) -> bool:
        """A rate limit is no outage: the endpoint speaks, and says when to come back."""
        if failure.reason == "rate_limit" or self._down_for() < self._outage_timeout:
            return False
        return failure.reason == "unreachable" or self._failing >= _FAILING
