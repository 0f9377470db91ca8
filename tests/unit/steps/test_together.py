from __future__ import annotations

import pytest

from airflow_vlm_provider.errors import SampleError, TransientError
from airflow_vlm_provider.steps.together import together
from airflow_vlm_provider.types import Answer, Independent, MediaRef, Probe, Request
from tests.support.captioning import answer

NEVER = lambda error: False  # noqa: E731
ALWAYS = lambda error: True  # noqa: E731


def ask(text: str) -> Request:
    return Request(None, (text,))


def fails(kind: str = "refused") -> Answer:
    return Answer((), "", error=SampleError(kind, "no"))


def rounds(name: str, *numbers: int):
    """Asks so many requests a round; returns all that it was told."""
    told = []
    for turn, number in enumerate(numbers):
        answers = yield [ask(f"{name}{turn}{i}") for i in range(number)]
        told += [each.choices[0].text for each in answers]
    return told


def run(runs, answers, may_fail=NEVER):
    """The rounds that were asked, by their texts, and the results."""
    asked, driven, given = [], together(runs, may_fail=may_fail), None
    try:
        while True:
            requests = driven.send(given)
            assert isinstance(requests, Independent)
            asked.append([each.parts[0] for each in requests])
            given = [answers(each) for each in requests]
    except StopIteration as end:
        return asked, end.value


def echo(request):
    return answer(request.parts[0])


def test_what_each_asks_next_is_asked_at_once_and_each_gets_its_own_answers():
    asked, told = run([rounds("a", 1, 1, 2), rounds("b", 2), rounds("c"), rounds("d", 1, 0, 1)], echo)
    assert asked == [["a00", "b00", "b01", "d00"], ["a10"], ["a20", "a21", "d20"]]
    assert told == [["a00", "a10", "a20", "a21"], ["b00", "b01"], [], ["d00", "d20"]]


def test_equal_requests_are_asked_once_and_both_get_the_answer():
    asked, told = run([rounds("a", 1, 1), rounds("a", 1, 1)], echo)
    assert asked == [["a00"], ["a10"]]
    assert told == [["a00", "a10"]] * 2


def test_an_error_goes_to_the_run_that_asked():
    def patient():
        try:
            yield [ask("x"), ask("y")]
        except SampleError as error:
            (again,) = yield [ask(f"after {error.kind}")]
            return again.choices[0].text

    asked, told = run([patient(), rounds("b", 1, 1)], lambda r: fails() if r.parts[0] == "y" else echo(r))
    assert asked == [["x", "y", "b00"], ["after refused", "b10"]]
    assert told == ["after refused", ["b00", "b10"]]


def test_the_first_that_fails_fails_all_and_the_others_are_closed():
    closed = []

    def waiting():
        try:
            yield [ask("w")]
            yield [ask("never")]
        finally:
            closed.append(True)

    with pytest.raises(SampleError) as failed:
        run([rounds("a", 1), waiting(), rounds("b", 1)], lambda r: fails(r.parts[0]))
    assert failed.value.kind == "a00"
    assert closed == [True]


def test_errors_that_may_be_stand_among_the_results():
    def may_fail(error):
        return not isinstance(error, TransientError)

    _, told = run(
        [rounds("a", 1), rounds("b", 1)], lambda r: fails() if "a" in r.parts[0] else echo(r), may_fail
    )
    assert isinstance(told[0], SampleError)
    assert told[1] == ["b00"]
    with pytest.raises(TransientError):
        run([rounds("a", 1), rounds("b", 1)], lambda r: Answer((), "", error=TransientError("429")), may_fail)


def test_probes_are_asked_beside_requests():
    probe = Probe(MediaRef("video", "a.mp4"))

    def probing():
        (found,) = yield [probe]
        return found.choices[0].text

    driven = together([probing(), rounds("a", 1)], may_fail=NEVER)
    assert list(driven.send(None)) == [probe, ask("a00")]
    with pytest.raises(StopIteration) as end:
        driven.send([answer("{}"), answer("hm")])
    assert end.value.value == ["{}", ["hm"]]


def test_what_is_a_defect_is_no_samples_error():
    def broken():
        yield [ask("x")]
        raise KeyError("x")

    with pytest.raises(KeyError):
        run([broken()], echo, ALWAYS)


def test_runs_may_be_made_of_runs_whose_errors_stay_apart():
    def made_of_runs():
        told = yield from together([rounds("a", 1), rounds("b", 1, 1)], may_fail=ALWAYS)
        return ["failed" if isinstance(each, SampleError) else each for each in told]

    asked, told = run(
        [made_of_runs(), rounds("c", 1, 1)], lambda r: fails() if r.parts[0] == "a00" else echo(r)
    )
    assert asked == [["a00", "b00", "c00"], ["b10", "c10"]]
    assert told == [["failed", ["b00", "b10"]], ["c00", "c10"]]


def test_requests_that_differ_in_anything_are_asked_each():
    requests = [
        Request(None, ("x",)),
        Request("s", ("x",)),
        Request(None, ("x",), n=2),
        Request(None, ("x",), sampling={"seed": 1}),
        Request(None, ("x",)),
    ]

    def asks(request):
        (got,) = yield [request]
        return got.choices[0].text

    driven = together([asks(each) for each in requests], may_fail=NEVER)
    assert driven.send(None) == tuple(requests[:4])
    with pytest.raises(StopIteration) as end:
        driven.send([answer(str(number)) for number in range(4)])
    assert end.value.value == ["0", "1", "2", "3", "0"]
