from __future__ import annotations

import pytest

from airflow_vlm_provider.engines.failures import PassingError
from airflow_vlm_provider.engines.health import Health, Turn
from airflow_vlm_provider.errors import ConfigError, EngineError, SampleError

OTHER = PassingError("status 500")
RATE = PassingError("status 429", reason="rate_limit")
UNREACHABLE = PassingError("refused", reason="unreachable")


class _Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> _Clock:
    return _Clock()


@pytest.fixture
def health(clock) -> Health:
    return Health(
        name="connection 'vlm'", endpoint="http://host/v1", max_attempts=3, outage_timeout=120, clock=clock
    )


def _try(health: Health, turn: Turn, failure: PassingError) -> bool:
    health.sending(turn)
    return health.failed(turn, failure)


def test_a_request_is_given_up_after_its_attempts(health):
    turn = Turn()
    assert [_try(health, turn, OTHER) for _ in range(3)] == [False, False, True]
    assert health.given_up(OTHER) is None


def test_a_busy_endpoint_costs_no_attempts_while_others_are_answered(health, clock):
    turn = Turn()
    for _ in range(20):
        health.sending(turn)
        clock.now += 1
        health.succeeded()
        assert health.failed(turn, RATE) is False
    assert [_try(health, turn, RATE) for _ in range(3)] == [False, False, True]


def test_but_not_without_end(health, clock):
    turn = Turn()
    for _ in range(29):
        health.sending(turn)
        clock.now += 1
        health.succeeded()
        assert health.failed(turn, RATE) is False
    health.sending(turn)
    clock.now += 1
    health.succeeded()
    assert health.failed(turn, RATE) is True


def test_without_a_connection_time_counts_and_not_attempts(health, clock):
    turn = Turn()
    assert not any(_try(health, turn, UNREACHABLE) for _ in range(20))
    clock.now += 119
    assert _try(health, turn, UNREACHABLE) is False
    clock.now += 1
    assert _try(health, turn, UNREACHABLE) is True
    error = health.given_up(UNREACHABLE)
    assert isinstance(error, EngineError)
    for words in ("connection 'vlm'", "http://host/v1", "120 s", "refused"):
        assert words in str(error)


def test_an_answer_starts_the_clock_anew(health, clock):
    turn = Turn()
    _try(health, turn, UNREACHABLE)
    clock.now += 100
    health.succeeded()
    _try(health, turn, UNREACHABLE)
    clock.now += 100
    assert _try(health, turn, UNREACHABLE) is False


def test_a_few_that_fail_for_long_have_themselves_to_blame(health, clock):
    turns = [Turn() for _ in range(7)]
    for turn in turns:
        _try(health, turn, OTHER)
    clock.now += 500
    assert not any(_try(health, turn, OTHER) for turn in turns)
    assert health.given_up(OTHER) is None


def test_many_that_fail_for_long_are_an_outage(health, clock):
    turns = [Turn() for _ in range(8)]
    for turn in turns:
        _try(health, turn, OTHER)
    clock.now += 500
    assert _try(health, turns[0], OTHER) is True
    assert isinstance(health.given_up(OTHER), EngineError)


def test_a_rate_limit_is_no_outage(health, clock):
    turns = [Turn() for _ in range(20)]
    for turn in turns:
        _try(health, turn, RATE)
    clock.now += 500
    assert _try(health, turns[0], RATE) is False


def test_many_given_up_in_a_row_are_an_outage_however_soon(health):
    errors = [health.given_up(OTHER) for _ in range(16)]
    assert errors[:15] == [None] * 15
    assert isinstance(errors[15], EngineError)


@pytest.mark.parametrize("sign_of_life", ["succeeded", "rejected"])
def test_any_answer_breaks_the_row(health, sign_of_life):
    for _ in range(15):
        assert health.given_up(OTHER) is None
    if sign_of_life == "succeeded":
        health.succeeded()
    else:
        health.rejected(SampleError("rejected", "too long"))
    assert all(health.given_up(OTHER) is None for _ in range(15))


def _rejections(health: Health, count: int, message: str = "too long: {} tokens", kind: str = "rejected"):
    return [health.rejected(SampleError(kind, message.format(1000 + index))) for index in range(count)]


def test_the_same_rejection_from_the_start_is_a_setting(health):
    errors = _rejections(health, 16)
    assert errors[:15] == [None] * 15
    assert isinstance(errors[15], ConfigError)
    assert "too long: 1015 tokens" in str(errors[15])


def test_rejections_after_a_success_are_the_samples(health):
    health.succeeded()
    assert _rejections(health, 50) == [None] * 50


def test_different_rejections_are_the_samples(health):
    errors = [error for _ in range(20) for message in ("a", "b") for error in _rejections(health, 1, message)]
    assert errors == [None] * 40


def test_refusals_are_the_samples(health):
    assert _rejections(health, 50, "not safe", "refused") == [None] * 50
