from __future__ import annotations

import copy
import re
from typing import Any

import pytest

from airflow_vlm_provider.errors import SampleError, TransientError
from airflow_vlm_provider.steps.prompts import (
    VIDEO_CAPTIONING_INPUT,
    VIDEO_CAPTIONING_SYSTEM,
    VIDEO_SUMMARY_SYSTEM,
)
from airflow_vlm_provider.steps.video_captioning import VideoCaptioningStep
from airflow_vlm_provider.types import Answer, Choice, FrameSampling, MediaRef, Probe, Request
from tests.support.captioning import AUDIO, EOC, IMAGE, LOOP, REFUSAL, VIDEO, answer, drive, texts
from tests.support.lasting_videos import PLAIN, about, lasting

WHOLE = FrameSampling(2.0, 32)


def windows(step: VideoCaptioningStep, row: Any, says: Any) -> tuple[list[list[Any]], list[Any]]:
    """What was asked, and the windows in each new row."""
    asked, result = drive(step, row, says)
    return asked, [each["__dj__meta__"]["video_windows"] for each in result.rows if each is not row]


# As a whole


def test_the_request():
    ((request,),), result = drive(VideoCaptioningStep(), PLAIN, lambda request: "A dog runs.")
    assert request == Request(
        system=VIDEO_CAPTIONING_SYSTEM,
        parts=(MediaRef("video", "a.mp4", WHOLE), VIDEO_CAPTIONING_INPUT),
        sampling={"temperature": 0, "max_tokens": 256},
        n=1,
        completion="",
    )
    assert result.rows == (PLAIN, {**PLAIN, "text": f"{VIDEO} A dog runs. {EOC}"})


def test_which_frames_are_looked_at_is_the_users():
    step = VideoCaptioningStep(fps=0.5, max_frames=8, transport="frames")
    ((request,),), _ = drive(step, PLAIN, lambda request: "A dog runs.")
    assert request.parts[0] == MediaRef("video", "a.mp4", FrameSampling(0.5, 8, transport="frames"))


def test_candidates_are_one_request():
    step = VideoCaptioningStep(caption_num=3, keep_candidate_mode="all", keep_original_sample=False)
    ((request,),), result = drive(step, PLAIN, lambda request: ["one", "two", "three"])
    assert (request.n, request.sampling["temperature"]) == (3, 1.0)
    assert texts(result) == [f"{VIDEO} {each} {EOC}" for each in ("one", "two", "three")]


def test_videos_come_out_in_order_and_pictures_and_sounds_stay_where_they_are():
    row = {
        "text": f"{IMAGE} {VIDEO} one {EOC}{AUDIO}{VIDEO} two {VIDEO}{EOC}",
        "videos": ["b.mp4", "a.mp4", "c.mp4"],
        "images": ["x.png"],
    }
    (asked,), result = drive(
        VideoCaptioningStep(keep_original_sample=False), row, lambda request: request.parts[0].ref
    )
    assert [request.parts[0].ref for request in asked] == ["b.mp4", "a.mp4", "c.mp4"]
    (new,) = result.rows
    assert re.sub(r"\s+", " ", new["text"]) == (
        f"{IMAGE}{VIDEO} b.mp4 {EOC}{AUDIO}{VIDEO} a.mp4 {VIDEO} c.mp4 {EOC}"
    )
    assert new["images"] == ["x.png"]


def test_a_video_that_stands_twice_is_asked_about_once():
    row = {"text": f"{VIDEO}{VIDEO}{EOC}", "videos": ["a.mp4", "a.mp4"]}
    (asked,), result = drive(VideoCaptioningStep(), row, lambda request: "A dog runs.")
    assert len(asked) == 1
    assert result.rows[1]["text"].count("A dog runs.") == 2


@pytest.mark.parametrize(
    ("text", "videos", "numbers"),
    [(f"{VIDEO}{VIDEO}x", ["a.mp4"], ("2", "1")), ("a clip", ["a.mp4"], ("0", "1"))],
)
def test_placeholders_and_videos_that_differ_in_number_are_a_dead_letter_that_names_both(
    text, videos, numbers
):
    for step in (VideoCaptioningStep(), VideoCaptioningStep(window_seconds=10)):
        with pytest.raises(SampleError) as failed:
            drive(step, {"text": text, "videos": videos}, lasting(a=5.0))
        assert failed.value.kind == "malformed_row"
        assert all(number in str(failed.value) for number in numbers)


def test_a_sample_without_videos_is_left_alone():
    for row in ({"text": "x"}, {"text": f"{IMAGE} x", "images": ["x.png"], "videos": []}):
        asked, result = drive(VideoCaptioningStep(window_seconds=10), row, lasting())
        assert (asked, result.skipped) == ([], True)


def test_own_prompts_are_asked_and_fields_of_the_row_win():
    step = VideoCaptioningStep(prompt="Who moves?", prompt_key="ask", system_prompt="Be brief.")
    for row, expected in ((PLAIN, "Who moves?"), ({**PLAIN, "ask": "What falls?"}, "What falls?")):
        ((request,),), _ = drive(step, row, lambda request: "A dog.")
        assert (request.system, request.parts[1], request.completion) == ("Be brief.", expected, expected)


# In windows


def test_a_long_video_is_captioned_in_windows_and_summed_up():
    (probes, parts, (summary,)), result = drive(
        VideoCaptioningStep(window_seconds=10, keep_original_sample=False), PLAIN, lasting(a=25.5)
    )
    assert probes == [Probe(MediaRef("video", "a.mp4"))]
    assert [request.parts[0].frames for request in parts] == [
        FrameSampling(2.0, 32, start=0.0, end=10.0),
        FrameSampling(2.0, 32, start=10.0, end=20.0),
        FrameSampling(2.0, 32, start=20.0, end=None),
    ]
    assert [request.parts[1].split("\n")[0] for request in parts] == [VIDEO_CAPTIONING_INPUT] * 3
    for request, span in zip(parts, ("0 to 10 s", "10 to 20 s", "20 to 25.5 s"), strict=True):
        assert f"{span} of 25.5 seconds" in request.parts[1]
    assert {request.system for request in parts} == {VIDEO_CAPTIONING_SYSTEM}
    assert summary.system == VIDEO_SUMMARY_SYSTEM
    assert summary.parts == (
        "0 to 10 s: a.mp4 0-10 #0\n10 to 20 s: a.mp4 10-20 #0\n20 to 25.5 s: a.mp4 20- #0",
    )
    assert summary.completion is None
    (row,) = result.rows
    assert row["text"] == f"{VIDEO} whole of 20; 25.5 #0 {EOC}"
    assert row["__dj__meta__"] == {
        "video_windows": [
            [
                {"start": 0.0, "end": 10.0, "caption": "a.mp4 0-10 #0"},
                {"start": 10.0, "end": 20.0, "caption": "a.mp4 10-20 #0"},
                {"start": 20.0, "end": 25.5, "caption": "a.mp4 20- #0"},
            ]
        ]
    }


def test_windows_are_captioned_without_drawing_and_candidates_are_summaries():
    step = VideoCaptioningStep(window_seconds=10, caption_num=3, keep_candidate_mode="all", seed=7)
    asked, found = windows(step, PLAIN, lasting(a=20.0))
    assert [[getattr(each, "n", None) for each in requests] for requests in asked] == [[None], [1, 1], [3]]
    assert {request.sampling["temperature"] for request in asked[1]} == {0}
    assert asked[2][0].sampling == {"temperature": 1.0, "max_tokens": 256, "seed": 7}
    assert len(found) == 3
    assert all(each == found[0] for each in found)
    # Other draws of the summary find the windows' captions among what is known.
    other, _ = windows(VideoCaptioningStep(window_seconds=10, caption_num=2, seed=8), PLAIN, lasting(a=20.0))
    assert other[1] == asked[1]


def test_an_endpoint_that_takes_no_temperature_is_sent_none():
    step = VideoCaptioningStep(window_seconds=10, sampling_params={"temperature": None})
    (_, parts, _), _ = drive(step, PLAIN, lasting(a=20.0))
    assert {tuple(request.sampling) for request in parts} == {("max_tokens",)}


@pytest.mark.parametrize("duration", [9.5, 10.0, 10.5, 0.0, None])
def test_a_video_no_longer_than_a_window_is_asked_about_as_without_and_recorded_as_one(duration):
    step = VideoCaptioningStep(window_seconds=10, caption_num=2, keep_candidate_mode="all")
    (_, (request,)), found = windows(step, PLAIN, lasting(a=duration))
    ((plain,),), _ = drive(
        VideoCaptioningStep(caption_num=2, keep_candidate_mode="all"), PLAIN, lasting(a=duration)
    )
    assert request == plain
    end = duration or None
    # Each copy's window has the caption that stands in its text.
    assert found == [[[{"start": 0.0, "end": end, "caption": f"a.mp4 0- #{number}"}]] for number in range(2)]


def test_several_videos_are_asked_about_at_once_and_recorded_in_the_order_of_the_row():
    row = {"text": f"{VIDEO}{VIDEO}{EOC}{VIDEO}{EOC}", "videos": ["b.mp4", "a.mp4", "b.mp4"]}
    step = VideoCaptioningStep(window_seconds=10, keep_original_sample=False)
    asked, (found,) = windows(step, row, lasting(a=5.0, b=20.0))
    assert [each.ref.ref for each in asked[0]] == ["b.mp4", "a.mp4"]
    assert [about(each) for each in asked[1]] == ["b.mp4 0-10", "b.mp4 10-", "a.mp4 0-"]
    assert len(asked[2]) == 1
    assert [[each["start"] for each in one] for one in found] == [[0.0, 10.0], [0.0], [0.0, 10.0]]


def test_a_video_in_two_chunks_is_asked_about_once_too():
    row = {"text": f"{VIDEO} a dog {EOC}{VIDEO} a cat {EOC}", "videos": ["a.mp4", "a.mp4"]}
    asked, _ = windows(VideoCaptioningStep(window_seconds=10), row, lasting(a=30.0))
    assert [len(each) for each in asked] == [1, 3, 1]


def test_other_meta_fields_are_kept_and_the_row_is_left_as_it_is():
    row = {**PLAIN, "__dj__meta__": {"source": "x", "video_windows": "old"}}
    before = copy.deepcopy(row)
    _, result = drive(VideoCaptioningStep(window_seconds=10), row, lasting(a=5.0))
    assert row == before
    assert result.rows[0] == before
    assert result.rows[1]["__dj__meta__"]["source"] == "x"
    assert result.rows[1]["__dj__meta__"]["video_windows"][0][0]["caption"] == "a.mp4 0- #0"
    _, result = drive(VideoCaptioningStep(), row, lasting(a=5.0))
    assert result.rows[1]["__dj__meta__"] == before["__dj__meta__"]


def test_a_row_that_cannot_take_the_windows_fails_before_anything_is_asked():
    asked = []
    with pytest.raises(SampleError, match="__dj__meta__"):
        drive(
            VideoCaptioningStep(window_seconds=10),
            {**PLAIN, "__dj__meta__": [1]},
            lambda request: asked.append(request),
        )
    assert asked == []


def test_many_windows_are_summed_up_in_groups():
    (_, parts, groups, (summary,)), result = drive(
        VideoCaptioningStep(window_seconds=10, caption_num=2), PLAIN, lasting(a=1000.0)
    )
    assert (len(parts), len(groups)) == (100, 3)
    lines = [line for request in groups for line in request.parts[0].split("\n")]
    assert lines == [f"{10 * n} to {10 * n + 10} s: {about(parts[n])} #0" for n in range(100)]
    assert max(len(request.parts[0].split("\n")) for request in groups) <= 40
    assert {(request.n, request.system, request.sampling["temperature"]) for request in groups} == {
        (1, VIDEO_SUMMARY_SYSTEM, 0)
    }
    assert [line.split(":")[0] for line in summary.parts[0].split("\n")] == [
        "0 to 330 s",
        "330 to 660 s",
        "660 to 1000 s",
    ]
    assert summary.n == 2
    assert len(result.rows[1]["__dj__meta__"]["video_windows"][0]) == 100


def test_ten_hours_take_a_request_a_window_and_a_few_more():
    asked, (found,) = windows(VideoCaptioningStep(window_seconds=30), PLAIN, lasting(a=36_000.0))
    assert [len(each) for each in asked] == [1, 1200, 30, 1]
    assert found[0][-1]["end"] == 36_000.0


def test_a_duration_that_would_take_countless_windows_fails_before_any_is_asked_about():
    with pytest.raises(SampleError) as failed:
        drive(VideoCaptioningStep(window_seconds=1), PLAIN, lasting(a=1e12))
    assert (failed.value.kind, failed.value.media) == ("media_too_large", "a.mp4")


@pytest.mark.parametrize("how", ["prompt", "prompt_key", "system_prompt"])
def test_who_asks_something_else_asks_it_about_the_windows_and_about_the_whole(how):
    given = {"prompt": "Wer bewegt sich?", "prompt_key": "ask", "system_prompt": "Antworte auf Deutsch."}
    step = VideoCaptioningStep(window_seconds=10, **{how: given[how]})
    row = {**PLAIN, "ask": "Wer bewegt sich?"}
    (_, parts, (summary,)), _ = drive(step, row, lasting(a=20.0))
    system, asks = (
        (given["system_prompt"], VIDEO_CAPTIONING_INPUT)
        if how == "system_prompt"
        else (None, given["prompt"])
    )
    assert {request.system for request in (*parts, summary)} == {system}
    assert all(request.parts[1].startswith(asks) for request in parts)
    (said,) = summary.parts
    assert said.endswith(asks)
    assert "0 to 10 s: a.mp4 0-10 #0\n10 to 20 s" in said


# Answers of no use


def spoil(says: Any, **bad: Any):
    """The same, but for what is bad: what a request is about with ``_`` for what is no letter."""

    def spoilt(request: Request | Probe) -> Any:
        if isinstance(request, Request):
            named = re.sub(r"\W+", "_", about(request)).strip("_")
            if named in bad:
                said = bad[named]
                return said(request) if callable(said) else said
        return says(request)

    return spoilt


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        ("", "empty_answer"),
        (REFUSAL, "refused"),
        (LOOP, "repetitive"),
        (Choice("A dog runs over", "length"), "cut_short"),
        (Choice("No.", "refusal"), "refused"),
    ],
)
@pytest.mark.parametrize("which", ["a_mp4_10_20", "whole_of_20_30"])
def test_a_useless_answer_is_asked_for_again_and_then_fails_the_sample_for_its_reason(which, said, kind):
    asked = []

    def bad(request):
        asked.append(request)
        return answer(said, key=f"key {len(asked)}")

    step = VideoCaptioningStep(window_seconds=10, try_num=2)
    with pytest.raises(SampleError) as failed:
        drive(step, PLAIN, spoil(lasting(a=30.0), **{which: bad}))
    assert (failed.value.kind, failed.value.media) == (kind, "a.mp4")
    assert [request.sampling["temperature"] for request in asked] == [0, 0.7]
    # Only the last answer is at fault: what is asked again for it is that.
    assert failed.value.keys == ("key 2",)


def test_a_window_that_does_better_when_asked_again_costs_nobody_else_anything():
    tries = iter(["", "A dog runs."])
    asked, (found,) = windows(
        VideoCaptioningStep(window_seconds=10),
        PLAIN,
        spoil(lasting(a=30.0), a_mp4_10_20=lambda request: next(tries)),
    )
    assert [len(each) for each in asked] == [1, 3, 1, 1]
    assert found[0][1]["caption"] == "A dog runs."


def test_of_several_windows_that_fail_all_answers_are_at_fault():
    step = VideoCaptioningStep(window_seconds=10, try_num=1)
    says = spoil(
        lasting(a=30.0),
        a_mp4_0_10=answer("", key="one"),
        a_mp4_20=answer(Choice("No.", "refusal"), key="three"),
    )
    with pytest.raises(SampleError) as failed:
        drive(step, PLAIN, says)
    assert (failed.value.kind, failed.value.keys) == ("empty_answer", ("one", "three"))


def test_a_window_that_a_next_run_asks_about_by_itself_decides_what_the_sample_fails_for():
    error = TransientError("429")
    says = spoil(lasting(a=30.0), a_mp4_0_10="", a_mp4_20=Answer((), "", error=error))
    with pytest.raises(SampleError) as failed:
        drive(VideoCaptioningStep(window_seconds=10, try_num=1), PLAIN, says)
    assert failed.value.kind == "transient"


def test_a_probe_that_fails_fails_the_sample_before_anything_is_paid_for():
    error = SampleError("media_corrupt", "cut short", media="a.mp4")
    asked = []
    with pytest.raises(SampleError) as failed:
        drive(
            VideoCaptioningStep(window_seconds=10),
            PLAIN,
            lambda request: asked.append(request) or Answer((), "", error=error),
        )
    assert failed.value.kind == "media_corrupt"
    assert len(asked) == 1
