"""What answers tell of an endpoint that tells nothing of itself: whether it has more requests than it can work on.

Requests are numbered in the order in which they are sent. Whatever a change of the window brings shows in requests
that were sent after it, so earlier ones are never judged by.
"""

from __future__ import annotations

from typing import Literal

# A window is compared with one of twice its size, or half of it.
STEP = 2.0
# As long as a larger one brings this part of what it would if the endpoint had nothing else to do, there is no doubt.
PLAIN = 0.5
# A larger one is worth it that brings this part, or that one when larger ones were of no use before; a smaller one will
# do that brings this much of what there was.
WORTH, SURE_WORTH, AS_MUCH = 0.1, 0.2, 0.93
# Requests that are judged by, at least; so many times as many where it has to be certain.
ENOUGH, CERTAIN = 32, 4
# Rounds until a larger window that was of no use is tried again, at first and at last.
PATIENCE, MOST_PATIENCE = 4, 32
# So many times slower than it was, something has changed.
SLOWER = 2.0


class AnswerLaw:
    """Looks for a window with which the endpoint answers as many requests as it can, and few of them wait in it.

    What a window brings is its size divided by the time that an answer takes, on average over a round: some requests
    that were sent one after the other with the window full. At first it doubles with every round. When that brings
    less than plainly more, it is compared with its half and its double, over so many answers that their different
    lengths make no difference. In case of doubt it stays as it is.

    :param size: The window to begin with.
    :param most: The largest.
    """

    def __init__(self, size: float, most: int) -> None:
        self.size = size
        self.has_met_bounds = False
        """Whether a larger window was found to bring nothing."""
        self._most = most
        # The round: its last request, when those were sent that are not answered yet, and how long the others took.
        self._last = 0
        self._open: dict[int, float] = {}
        self._seconds: list[float] = []
        self._starting = True
        self._settled: tuple[float, float] | None = None
        self._usual: float | None = None
        self._trial: Literal["up", "down"] | None = None
        self._next: Literal["up", "down"] = "up"
        self._patience = PATIENCE
        self._rest = 0

    def send(self, number: int, now: float) -> None:
        """A request is sent."""
        if len(self._open) + len(self._seconds) < self._enough():
            self._open[number] = now
            self._last = number

    def end(self, number: int, now: float, *, answered: bool, filled: int) -> None:
        """A request has ended.

        :param filled: The number of the last one with which the window was full.
        """
        at = self._open.pop(number, None)
        if at is None:
            return
        if answered:
            self._seconds.append(now - at)
        enough = self._enough()
        # Who waited for the last ones would wait for those that are hardly ever answered.
        share = 0.5 if self._starting else 0.9
        if len(self._seconds) < share * enough or len(self._seconds) + len(self._open) < enough:
            return
        seconds = self._seconds + [now - at for at in self._open.values() if self._starting]
        self._open, self._seconds = {}, []
        if filled >= self._last:
            self._judge(self.size * len(seconds) / max(sum(seconds), 1e-9))

    def _enough(self) -> int:
        return int(max(self.size, ENOUGH) * (1 if self._starting else CERTAIN))

    def _judge(self, rate: float) -> None:
        """A round is over.

        :param rate: Answers in a second.
        """
        if self._starting:
            self._started(rate)
        elif self._trial is None or self._settled is None:
            self._rested(rate)
        else:
            self._tried(rate, *self._settled)

    def _started(self, rate: float) -> None:
        before, self._settled = self._settled, (self.size, rate)
        plain = before is None or rate >= before[1] * (1 + PLAIN * (self.size / before[0] - 1))
        if plain and self.size < self._most:
            self.size = min(float(self._most), self.size * STEP)
            return
        self._starting, self._settled = False, None
        if not plain:
            self._next = "down"

    def _rested(self, rate: float) -> None:
        """A round with the size that was settled on is over."""
        self._settled = self.size, rate
        if self._usual is not None and self._usual >= SLOWER * rate:
            # Half of it may do now.
            self._usual, self._next, self._rest, self._patience = rate, "down", 0, PATIENCE
        self._usual = self._usual or rate
        self._rest -= 1
        if self._rest < 0:
            self._try()

    def _tried(self, rate: float, settled: float, settled_rate: float) -> None:
        """A round with a size that was tried is over."""
        gain, times = rate / settled_rate, self.size / settled
        # Chance would make it larger again and again, if it were tried often enough.
        worth = SURE_WORTH if self.has_met_bounds else WORTH
        useful = gain >= (1 + worth * (times - 1) if times > 1 else AS_MUCH)
        self.has_met_bounds = self.has_met_bounds or useful == (times < 1)
        self._usual = None
        if useful:
            self._settled, self._patience = (self.size, rate), PATIENCE
            self._try()
            return
        self.size, self._trial = settled, None
        # A larger one is tried now and then: that costs nothing. A smaller one would cost answers.
        self._next, self._rest = "up", 0
        if times > 1:
            self._rest, self._patience = self._patience, min(MOST_PATIENCE, 2 * self._patience)

    def _try(self) -> None:
        size = min(float(self._most), self.size * STEP) if self._next == "up" else self.size / STEP
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
