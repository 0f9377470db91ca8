from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_vlm_provider.errors import SampleError
from airflow_vlm_provider.steps.video_windows import (
    MAX_WINDOWS,
    SUMMARY_CAPTIONS,
    Window,
    grouped,
    in_window,
    joined,
    listed,
    recorded,
    windows_of,
)


def edges(duration: object, seconds: float) -> list[tuple[float, float | None]]:
    return [tuple(window) for window in windows_of(duration, seconds, ref="a.mp4")]


@pytest.mark.parametrize(
    ("duration", "expected"),
    [
        (25, [(0, 10), (10, 20), (20, 25)]),
        (30.0, [(0, 10), (10, 20), (20, 30)]),
        (20.99, [(0, 10), (10, 20.99)]),
        (21, [(0, 10), (10, 20), (20, 21)]),
        (10, [(0, 10)]),
        (10.9, [(0, 10.9)]),
        (0.04, [(0, 0.04)]),
    ],
)
def test_windows_follow_each_other_and_a_short_rest_is_joined_to_the_last(duration, expected):
    assert edges(duration, 10.0) == expected


@pytest.mark.parametrize("duration", [0, 0.0, -1.0, None, float("nan"), float("inf"), "10", True])
def test_a_video_whose_duration_is_not_known_is_one_window(duration):
    assert edges(duration, 10.0) == [(0.0, None)]


@given(
    st.floats(min_value=1e-3, max_value=1e5, allow_nan=False),
    st.floats(min_value=1e-3, max_value=1e5, allow_nan=False),
)
def test_windows_cover_a_video_without_gaps(duration, seconds):
    if duration / seconds > MAX_WINDOWS:
        return
    windows = windows_of(duration, seconds, ref="a.mp4")
    assert (windows[0].start, windows[-1].end) == (0.0, duration)
    assert all(one.end == other.start for one, other in pairwise(windows))
    lengths = [window.end - window.start for window in windows]
    if len(windows) > 1:
        assert all(0.0999 * seconds <= length <= 1.1001 * seconds for length in lengths)
        assert all(length == pytest.approx(seconds, rel=1e-6) for length in lengths[:-1])


def test_a_duration_that_would_take_more_windows_than_anybody_wants_to_pay_for_fails_the_sample():
    assert len(windows_of(MAX_WINDOWS * 2.0, 2.0, ref="a.mp4")) == MAX_WINDOWS
    for duration in (MAX_WINDOWS * 2.0 + 1, 1e300):
        with pytest.raises(SampleError, match="window_seconds") as caught:
            windows_of(duration, 2.0, ref="a.mp4")
        assert (caught.value.kind, caught.value.media) == ("media_too_large", "a.mp4")


def test_what_a_model_is_told_of_a_window():
    said = in_window("What happens?", Window(30.0, 62.5), 3600.0)
    assert said.startswith("What happens?\n\n")
    assert "30 to 62.5 s of 3600 seconds" in said
    assert not in_window("", Window(30.0, 60.0), 90.0).startswith("\n")


def test_captions_are_listed_one_a_line_with_their_spans():
    captions = [(Window(0.0, 30.0), "A circle\n moves."), (Window(30.0, 40.504), "It stops.")]
    assert listed(captions) == "0 to 30 s: A circle moves.\n30 to 40.5 s: It stops."
    assert listed([(Window(0.0, None), "It stops.")]) == "from 0 s on: It stops."


@given(st.integers(min_value=1, max_value=5 * SUMMARY_CAPTIONS))
def test_groups_keep_the_order_and_are_few_and_of_nearly_one_size(count):
    items = list(range(count))
    groups = grouped(items)
    assert [item for group in groups for item in group] == items
    sizes = {len(group) for group in groups}
    assert max(sizes) <= SUMMARY_CAPTIONS
    assert max(sizes) - min(sizes) <= 1
    assert (len(groups) - 1) * SUMMARY_CAPTIONS < count


def test_a_group_is_a_window_itself():
    assert joined([Window(0.0, 10.0), Window(10.0, 20.0), Window(20.0, 25.0)]) == (0.0, 25.0)


def test_what_stands_in_a_row():
    assert recorded(Window(0.1 * 3, 10.23456), "It stops.") == {
        "start": 0.3,
        "end": 10.235,
        "caption": "It stops.",
    }
    assert recorded(Window(0.0, None), "It stops.")["end"] is None
