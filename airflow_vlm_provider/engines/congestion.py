"""What answers tell of an endpoint that tells nothing of itself: whether it has more requests than it can work on.

Requests are numbered in the order in which they are sent. Whatever a change of the window brings shows in requests
that were sent after it, so earlier ones are never judged by.
"""

from __future__ import annotations

from typing import Literal

# A window is compared with one that is so many times larger, or smaller.
UP, DOWN = 2.0, 4.0
# A larger one is of no use that brings less than this part of what it would if the endpoint had nothing else to do; a
# smaller one will do that brings as much as this.
WORTH, AS_MUCH = 0.15, 0.9
# Requests that are judged by, at least.
ENOUGH = 32
# Rounds until what did not turn out well is tried again, at first and at last.
PATIENCE, MOST_PATIENCE = 8, 64
# So many times slower than it was, something has changed.
SLOWER = 2.0


class AnswerLaw:
    """Looks for a window with which the endpoint answers as many requests as it can, and few of them wait in it.

    What a window brings is its size divided by the time that an answer takes, on average over a round: some requests
    that were sent one after the other with the window full. The sizes that are compared are far apart, because
    answers of different lengths make any two rounds differ.

    :param size: The window to begin with.
    :param most: The largest.
    """

    def __init__(self, size: float, most: int) -> None:
        self.size = size
        self.has_met_bounds = False
        """Whether a larger window was found to bring nothing."""
        self._most = most
        self._since = 0
        self._sent = self._last = 0
        self._round: dict[int, float] = {}
        self._seconds: list[float] = []
        self._settled: tuple[float, float] | None = None
        self._usual: float | None = None
        self._trial: Literal["up", "down"] | None = None
        self._next: Literal["up", "down"] = "up"
        self._patience = PATIENCE
        self._rest = 0
        self._grown = False

    def send(self, number: int, now: float) -> None:
        """A request is sent."""
        self._sent = number
        if number > self._since and len(self._round) + len(self._seconds) < self._enough():
            self._round[number] = now
            self._last = number

    def end(self, number: int, now: float, *, answered: bool, filled: int) -> None:
        """A request has ended.

        :param filled: The number of the last one with which the window was full.
        """
        at = self._round.pop(number, None)
        if at is None:
            return
        if answered:
            self._seconds.append(now - at)
        enough = self._enough()
        # Who waited for the last ones would wait for those that are hardly ever answered.
        if (
            len(self._seconds) < enough * (0.5 if self._is_hasty() else 0.9)
            or len(self._round) + len(self._seconds) < enough
        ):
            return
        seconds = self._seconds + [now - at for at in self._round.values()]
        self._round, self._seconds = {}, []
        if filled >= self._last:
            self._judge(self.size * len(seconds) / max(sum(seconds), 1e-9))

    def _enough(self) -> float:
        return max(self.size, ENOUGH) * (1 if self._is_hasty() else 2)

    def _is_hasty(self) -> bool:
        """Whether a round costs throughput, as a small window does, and one that could have been larger for long."""
        return self._trial == "down" or not self.has_met_bounds

    def _judge(self, rate: float) -> None:
        """A round is over.

        :param rate: Answers in a second.
        """
        size = self.size
        if self._trial is None or self._settled is None:
            self._rested(rate)
        else:
            self._tried(rate, *self._settled)
        if self.size != size:
            # Those that a larger window lets in all at once queue like none after them.
            self._since = self._sent + max(0, int(self.size - size))

    def _rested(self, rate: float) -> None:
        """A round with the size that was settled on is over."""
        self._settled = self.size, rate
        if self._usual is not None and self._usual >= SLOWER * rate:
            # Fewer may do as well now.
            self._usual, self._next, self._rest, self._patience = rate, "down", 0, PATIENCE
        self._usual = self._usual or rate
        self._rest -= 1
        if self._rest <= 0:
            self._try()

    def _tried(self, rate: float, settled: float, settled_rate: float) -> None:
        """A round with a size that was tried is over."""
        gain, times = rate / settled_rate, self.size / settled
        # What was of no use before has to bring more than chance.
        worth = WORTH * (2 if self.has_met_bounds else 1)
        if gain >= (1 + worth * (times - 1) if times > 1 else AS_MUCH):
            self._settled, self._usual, self._patience = (self.size, rate), rate, PATIENCE
            self._grown = True
            self._try()
            return
        self.size, self._trial, self._usual = settled, None, None
        # Where nothing larger was ever worth it, something smaller may do.
        self._next, self._rest = ("up", self._patience) if self._grown else ("down", 0)
        self._grown = True
        self._patience = min(MOST_PATIENCE, 2 * self._patience)
        self.has_met_bounds = True

    def _try(self) -> None:
        size = min(float(self._most), self.size * UP) if self._next == "up" else self.size / DOWN
        self._trial = self._next if int(size) != int(self.size) and size >= 1 else None
        if self._trial is not None:
            self.size = size


class RefusalLaw:
    """Keeps the window below the number of requests at which the endpoint turns some away.

    A refusal takes its own place out of the window with it, and a round of them half of it at most. After that it
    grows again, quickly to where it was refused, and on from there after a while that becomes longer each time that
    it was in vain.

    :param most: The largest window.
    """

    def __init__(self, most: int) -> None:
        self.size = float(most)
        self._most = most
        self._since = 0
        self._least = 1.0
        self._good = 0
        self._refused_at: float | None = None
        self._patience = PATIENCE

    def refused(self, number: int, last: int, in_flight: int) -> None:
        """A request was refused.

        :param number: Its number.
        :param last: The number of the one that was sent last.
        :param in_flight: How many were on their way with it.
        """
        if number > self._since:
            self._since = last
            level = min(self.size, float(in_flight))
            if self._refused_at is not None and level >= self._refused_at - 1:
                self._patience = min(MOST_PATIENCE, 2 * self._patience)
            self._refused_at, self._least = level, max(1.0, level / 2)
        # In its place, none is sent.
        self.size = max(self._least, min(self.size, in_flight - 1.0))
        self._good = 0

    def answered(self, number: int) -> None:
        """A request was answered, and the window was full meanwhile."""
        if number <= self._since or self.size >= self._most:
            return
        self._good += 1
        brink = self._refused_at is not None and self._refused_at - 1 <= self.size < self._refused_at
        rounds = self._patience if brink else 1
        if self._good < self.size * rounds:
            return
        self._good = 0
        if self._refused_at is None:
            step = self.size / 8
        elif self.size >= self._refused_at:
            # What was refused once is taken now.
            step, self._refused_at, self._patience = 1.0, None, PATIENCE
        else:
            step = min((self._refused_at - self.size) / 8, self._refused_at - 1 - self.size)
        self.size = min(float(self._most), self.size + max(1.0, step))
