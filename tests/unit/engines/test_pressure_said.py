"""What is said of a window: why it was no larger, and what would help."""

from __future__ import annotations

import pytest

from airflow_vlm_provider.engines.pressure import FIRST_SIZE, Pressure, Sent
from airflow_vlm_provider.engines.vllm_metrics import Metrics

MOST = 128


def _full(pressure: Pressure) -> list[Sent]:
    return [pressure.send(0.0) for _ in range(pressure.size)]


def test_what_kept_the_window_small_is_said():
    pressure = Pressure(MOST)
    assert (pressure.size, pressure.is_limited, pressure.sentence()) == (FIRST_SIZE, False, None)
    sent = _full(pressure)
    for waiting in (6, 9):
        pressure.look(Metrics(26, waiting, 0.5, 0))
    assert pressure.is_limited
    said = str(pressure.sentence())
    assert said.startswith(
        "vLLM had 7.5 requests waiting on average, and 50% of its cache in use. A faster GPU"
    )
    pressure.end(sent[0], 1.0, "refused")
    assert "1 of 32 requests were turned away" in str(pressure.sentence())


def test_a_full_cache_is_said_with_what_makes_room_in_it():
    pressure = Pressure(MOST)
    _full(pressure)
    pressure.look(Metrics(26, 6, 0.97, 0))
    assert "97% of its cache in use. Smaller media (max_pixels)" in str(pressure.sentence())


def test_of_a_window_that_was_still_growing_this_is_said():
    pressure = Pressure(MOST, first=4)
    for running in (4, 8):
        while pressure.in_flight < pressure.size:
            pressure.send(0.0)
        pressure.look(Metrics(running, 0, 0.1, 0))
    said = str(pressure.sentence())
    assert "The window was still growing: longer tasks" in said
    assert "GPU" not in said


def test_where_requests_are_turned_away_a_faster_engine_is_not_what_helps():
    pressure = Pressure(64)
    for each in _full(pressure):
        pressure.end(each, 1.0, "refused")
    said = str(pressure.sentence())
    assert said.startswith(
        "32 of 32 requests were turned away or not answered in time. Higher limits of the endpoint"
    )
    assert "GPU" not in said
    assert "max_concurrency" not in said


@pytest.mark.parametrize("looks", [True, False], ids=["vLLM", "silent"])
def test_a_window_at_its_maximum_with_nothing_waiting_asks_for_a_larger_one(looks):
    pressure = Pressure(FIRST_SIZE)
    _full(pressure)
    for _ in range(20 if looks else 0):
        pressure.look(Metrics(FIRST_SIZE, 0, 0.3, 0))
    said = str(pressure.sentence())
    assert "No more than 32 requests were allowed at once. A larger concurrency (max_concurrency)" in said
    assert "GPU" not in said


def test_a_window_at_its_maximum_with_requests_waiting_does_not():
    pressure = Pressure(FIRST_SIZE)
    _full(pressure)
    pressure.look(Metrics(28, 4, 0.3, 0))
    assert "max_concurrency" not in str(pressure.sentence())
