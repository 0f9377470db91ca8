"""A long video in windows: where they begin and end, what is said of them, and how their captions become one.

Invariants:

- The windows of a video follow each other without gaps, from its beginning to its end, whatever is known of it.
- No window but a video's only one is shorter than a tenth of the others.
- What is made of a video depends on its duration and on the window's length alone, so every run makes the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

from airflow_vlm_provider.errors import SampleError

T = TypeVar("T")

WINDOWS_VERSION = 1
"""Part of the fingerprint of every step that captions in windows: a change to where they begin, or to what is said of
them, asks other questions."""

SHORTEST = 0.1
"""A last window below this share of a window is joined to the one before."""

MAX_WINDOWS = 10_000
"""Most windows of one video. A file may claim any duration, and each window is a request."""

SUMMARY_CAPTIONS = 40
"""Most captions that are summed up at once: so many fit into the context of every model that takes pictures."""


class Window(NamedTuple):
    """A part of a video.

    :param start: Seconds from the video's beginning.
    :param end: Likewise; None where the video's duration is not known.
    """

    start: float
    end: float | None


def windows_of(duration: object, seconds: float, *, ref: str) -> list[Window]:
    """The windows of a video; a single one where it is not longer than a window.

    :param duration: The video's, in seconds, as its file says; anything else than a number above 0 counts as unknown.
    :param seconds: How long a window is.
    :param ref: What the video is called.
    :raises SampleError: ``media_too_large``: there would be more than :data:`MAX_WINDOWS`.
    """
    length = _known(duration)
    if length is None:
        return [Window(0.0, None)]
    if length / seconds > MAX_WINDOWS:
        raise SampleError(
            "media_too_large",
            f"{ref} is {_seconds(length)} seconds long, more than {MAX_WINDOWS:,} windows of {_seconds(seconds)}. "
            "Raise window_seconds.",
            media=ref,
        )
    count = max(1, math.floor(length / seconds))
    if length - count * seconds >= SHORTEST * seconds:
        count += 1
    edges = [*(float(seconds) * number for number in range(count)), length]
    return [Window(start, end) for start, end in pairwise(edges)]


def _known(duration: object) -> float | None:
    if isinstance(duration, bool) or not isinstance(duration, int | float):
        return None
    return float(duration) if math.isfinite(duration) and duration > 0 else None


def in_window(message: str, window: Window, last: float) -> str:
    """What a model is told that sees one window of several.

    :param message: What it would be told of the whole video.
    :param last: Where the video ends, in seconds.
    """
    where = (
        f"This is a part of a longer video: {span(window.start, window.end)} of {_seconds(last)} seconds. "
        "Speak of this part only."
    )
    return f"{message}\n\n{where}" if message else where


def listed(captions: Sequence[tuple[Window, str]]) -> str:
    """Captions as they are shown to a model that sums them up: one a line, each with its span."""
    return "\n".join(
        f"{span(window.start, window.end)}: {' '.join(caption.split())}" for window, caption in captions
    )


def to_sum_up(message: str, captions: Sequence[tuple[Window, str]]) -> str:
    """What a model is asked about the whole video that is shown nothing but captions of its parts.

    :param message: What it would be asked beside the video.
    """
    return (
        f"These are captions of the parts of one video, in order, each with its time span:\n\n{listed(captions)}\n\n"
        f"From these captions alone, do the following for the whole video. {message}"
    ).rstrip()


def grouped(items: Sequence[T]) -> list[Sequence[T]]:
    """Items in as few groups as can be of at most :data:`SUMMARY_CAPTIONS`, in order, all of nearly one size."""
    count = math.ceil(len(items) / SUMMARY_CAPTIONS)
    edges = [len(items) * number // count for number in range(count + 1)]
    return [items[start:end] for start, end in pairwise(edges)]


def joined(windows: Sequence[Window]) -> Window:
    """The window from the first one's beginning to the last one's end."""
    return Window(windows[0].start, windows[-1].end)


def recorded(window: Window, caption: str) -> dict[str, Any]:
    """A window as it stands in a row."""
    return {
        "start": _short(window.start),
        "end": None if window.end is None else _short(window.end),
        "caption": caption,
    }


def span(start: float, end: float | None) -> str:
    """A window in words."""
    return f"from {_seconds(start)} s on" if end is None else f"{_seconds(start)} to {_seconds(end)} s"


def _seconds(value: float) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".")


def _short(value: float) -> float:
    """To a millisecond: what lies below is nothing but the way numbers are kept."""
    return round(value, 3)
