"""The general step, driven by hand: what it asks about a row, and what it makes of answers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
from pydantic import BaseModel

from airflow_vlm_provider.errors import ConfigError, SampleError
from airflow_vlm_provider.steps.vlm_map import VLMMapStep
from airflow_vlm_provider.types import (
    Answer,
    Choice,
    FinishReason,
    FrameSampling,
    MediaRef,
    Request,
    Result,
    Sample,
)

ROW = {
    "text": "<__dj__image>a dog<|__dj__eoc|>",
    "images": ["a.png", "b.png"],
    "videos": ["c.mp4"],
    "meta": {"id": 7},
}


class Seen(BaseModel):
    what: str
    count: int = 1


def step(prompt: Any = "What is it?", **given: Any) -> VLMMapStep:
    return VLMMapStep(prompt=prompt, **given)


def drive(
    made: VLMMapStep, row: dict[str, Any], *said: Sequence[str | Choice]
) -> tuple[Result, list[Request]]:
    """Answer a row's requests one after the other with these choices; all of them have to be asked for."""
    run = made.process(Sample(0, 1, row))
    asked: list[Request] = []
    answers = list(said)
    try:
        requests = next(run)
        while True:
            (request,) = requests
            asked.append(request)
            choices = [Choice(each) if isinstance(each, str) else each for each in answers.pop(0)]
            requests = run.send([Answer(tuple(choices), "m", key=f"key-{len(asked)}")])
    except StopIteration as stop:
        assert not answers
        return stop.value, asked


def failure(made: VLMMapStep, row: dict[str, Any], *said: Sequence[str | Choice]) -> SampleError:
    with pytest.raises(SampleError) as caught:
        drive(made, row, *said)
    return caught.value


def test_a_row_is_asked_about_with_all_its_media_before_the_prompt():
    result, (request,) = drive(step("{meta.id}: {text}?"), ROW, ["An answer.\n"])
    frames = FrameSampling(fps=2.0, max_frames=32)
    assert request == Request(
        system=None,
        parts=(
            MediaRef("image", "a.png"),
            MediaRef("image", "b.png"),
            MediaRef("video", "c.mp4", frames),
            "7: a dog?",
        ),
        sampling={"temperature": 0, "max_tokens": 512},
        completion="7: a dog?",
    )
    assert result.rows == ({**ROW, "answer": "An answer."},)
    assert "answer" not in ROW


@pytest.mark.parametrize(
    ("given", "media"),
    [
        ({"images": False}, ["c.mp4"]),
        ({"videos": False}, ["a.png", "b.png"]),
        ({"images": False, "videos": False}, []),
        ({"image_key": "videos", "video_key": "images"}, ["c.mp4", "a.png", "b.png"]),
        ({"image_key": "pics"}, ["c.mp4"]),
    ],
)
def test_media_can_be_left_out(given, media):
    _, (request,) = drive(step(**given), ROW, ["x"])
    assert [part.ref for part in request.parts if isinstance(part, MediaRef)] == media
    assert request.parts[-1] == "What is it?"


def test_which_frames_of_a_video_are_looked_at_is_the_authors_choice():
    _, (request,) = drive(step(fps=0.5, max_frames=3, transport="frames"), {"videos": "c.mp4"}, ["x"])
    assert request.parts[0] == MediaRef(
        "video", "c.mp4", FrameSampling(fps=0.5, max_frames=3, transport="frames")
    )


def test_a_row_without_media_is_asked_with_the_text_alone():
    _, (request,) = drive(step(system_prompt="Be brief."), {"images": None}, ["x"])
    assert (request.system, request.parts) == ("Be brief.", ("What is it?",))


def test_a_function_gets_a_copy_of_the_row_and_makes_the_prompt():
    def ask(sample: dict[str, Any], style: str) -> str:
        sample["meta"]["id"] = "changed"
        del sample["images"]
        return f"{style}: {sample['text']}"

    result, (request,) = drive(step(ask, arguments={"style": "brief"}), ROW, ["x"])
    # Raw, as the row has it.
    assert request.parts[-1] == f"brief: {ROW['text']}"
    assert result.rows == ({**ROW, "answer": "x"},)
    assert ROW["meta"] == {"id": 7}


@pytest.mark.parametrize(
    ("prompt", "row"),
    [
        (lambda sample: None, ROW),
        (lambda sample: " ", {"text": "x"}),
        ("{text}", {"text": None}),
        ("{text}", {"text": "<__dj__image><|__dj__eoc|>"}),
        ("What is it?", {**ROW, "answer": ""}),
        ("What is it?", {**ROW, "answer": False}),
    ],
)
def test_a_row_with_nothing_to_ask_or_with_an_answer_is_skipped(prompt, row):
    result, asked = drive(step(prompt), row)
    assert (result, asked) == (Result(skipped=True), [])


def test_media_alone_are_something_to_ask_about_and_null_is_no_answer():
    result, (request,) = drive(step(lambda sample: ""), {"images": ["a.png"], "answer": None}, ["x"])
    assert request.parts == (MediaRef("image", "a.png"),)
    assert result.rows[0]["answer"] == "x"


@pytest.mark.parametrize("returned", [5, ["x"], b"x"])
def test_a_function_that_returns_something_else_has_a_defect(returned):
    with pytest.raises(TypeError, match="return a string, or None"):
        drive(step(lambda sample: returned), ROW)


def test_a_file_that_a_function_does_not_find_is_about_one_row_only():
    def ask(sample: dict[str, Any]) -> str:
        raise FileNotFoundError("labels.txt")

    with pytest.raises(RuntimeError, match=r"labels\.txt"):
        drive(step(ask), ROW)


def test_a_function_may_say_itself_what_is_wrong_with_a_row():
    def ask(sample: dict[str, Any]) -> str:
        raise SampleError("malformed_row", "no licence")

    assert failure(step(ask), ROW).message == "no licence"


def test_answers_in_the_form_of_a_model_are_written_as_its_values():
    made = step(output_type=Seen, field="seen")
    result, (request,) = drive(made, {}, ['{"what": "dog"}'])
    assert result.rows == ({"seen": {"what": "dog", "count": 1}},)
    assert request.schema is not None
    assert request.schema["required"] == ["what", "count"]
    assert made.generated()["seen"]["properties"].keys() == {"what", "count"}


def test_an_answer_of_no_use_is_asked_for_again_with_another_seed():
    result, asked = drive(step(output_type=Seen), {}, ["a dog"], ['{"what": 1}'], ['{"what": "dog"}'])
    assert result.rows[0]["answer"]["what"] == "dog"
    assert [dict(each.sampling) for each in asked] == [
        {"temperature": 0, "max_tokens": 512},
        {"temperature": 0.7, "max_tokens": 512, "seed": 1},
        {"temperature": 0.7, "max_tokens": 512, "seed": 2},
    ]
    error = failure(step(output_type=Seen, try_num=2), {}, ["a dog"], ['{"what": 1}'])
    assert (error.kind, error.attempts, error.keys) == ("unparsable", 2, ("key-2",))
    assert "what: Input should be a valid string" in error.message
    assert "2 tries" in error.message


LOOP = "a dog and a cat and " * 40


@pytest.mark.parametrize(
    ("text", "finish_reason", "kind"),
    [
        ("", "stop", "empty_answer"),
        (" \n", "stop", "empty_answer"),
        ("I can't say.", "refusal", "refused"),
        ("I'm sorry, but I can't help with that.", "stop", "refused"),
        ("A dog that", "length", "cut_short"),
        (LOOP, "length", "repetitive"),
    ],
)
@pytest.mark.parametrize("output_type", [None, Seen])
def test_answers_of_no_use_are_told_apart(text, finish_reason: FinishReason, kind, output_type):
    made = step(output_type=output_type, try_num=1)
    error = failure(made, {}, [Choice(text, finish_reason)])
    assert (error.kind, error.attempts) == (kind, 1)
    assert "max_tokens" in error.message or kind != "cut_short"


def test_what_a_picture_says_again_and_again_is_an_answer():
    result, _ = drive(step("Read it."), {}, [LOOP])
    assert result.rows[0]["answer"] == LOOP.strip()


def test_a_whole_model_at_the_very_limit_is_an_answer():
    result, _ = drive(step(output_type=Seen), {}, [Choice('{"what": "dog", "count": 2}', "length")])
    assert result.rows[0]["answer"]["count"] == 2


def test_a_model_that_was_cut_is_not_read_as_it_was_meant():
    said = "{what: 'dog', count: 1, count: 2"
    assert failure(step(output_type=Seen, try_num=1), {}, [Choice(said, "length")]).kind == "cut_short"
    result, _ = drive(step(output_type=Seen), {}, [f"{said}}}"])
    assert result.rows[0]["answer"] == {"what": "dog", "count": 2}


def test_several_answers_are_one_request_and_only_what_is_missing_is_asked_for_again():
    result, asked = drive(step(n=3), {}, ["one", "", "three"], ["two"])
    assert result.rows[0]["answer"] == ["one", "three", "two"]
    assert [each.n for each in asked] == [3, 1]
    assert asked[0].sampling["temperature"] == 1.0
    # An endpoint that gives more, or fewer, than it was asked for.
    result, _ = drive(step(n=2), {}, ["one", "two", "three"])
    assert result.rows[0]["answer"] == ["one", "two"]
    error = failure(step(n=2, try_num=2), {}, ["one"], [])
    assert (error.kind, "1 of 2" in error.message) == ("empty_answer", True)
    assert step(n=2).generated() == {"answer": {"type": "array", "items": {"type": "string"}}}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": 5}, "prompt"),
        ({"prompt": lambda: "x"}, "can't be called"),
        ({"prompt": eval("lambda s: 'x'")}, "version='1'"),
        ({"field": ""}, "field"),
        ({"field": "images"}, "holds no media"),
        ({"step_name": "a/b"}, "step_name"),
        ({"step_name": ""}, "step_name"),
        ({"system_prompt": 5}, "system_prompt"),
        ({"version": 5}, "version"),
        ({"output_type": dict}, "output_type"),
        ({"n": 0}, "n is 0"),
        ({"n": True}, "n is True"),
        ({"n": 2, "sampling_params": {"temperature": 0}}, "n=2 with temperature 0"),
        ({"try_num": 0}, "try_num"),
        ({"fps": 0}, "fps"),
        ({"fps": float("nan")}, "fps"),
        ({"max_frames": 0}, "max_frames"),
        ({"transport": "mail"}, "transport"),
        ({"text_key": ""}, "text_key"),
        ({"special_tokens": ["x"]}, "special_tokens"),
        ({"sampling_params": {"n": 2}}, "n=2"),
    ],
)
def test_wrong_parameters_are_refused(given, words):
    with pytest.raises(ConfigError, match=words):
        VLMMapStep(**{"prompt": "x", **given})


def test_what_only_changes_the_writing_is_not_among_what_decides_the_asking():
    made = step(output_type=Seen)
    assert made.asking < set(made.parameters())
    assert set(made.parameters()) - made.asking == {"field", "output_type", "try_num", "reader_version"}


def test_parameters_are_json_values_and_tell_steps_apart():
    def other(sample: dict[str, Any], style: str = "") -> str:
        return "other"

    class More(Seen):
        pass

    made = [
        step(),
        step("Another?"),
        step(other),
        step(lambda sample: "x"),
        step(other, version="1"),
        step(other, version="2"),
        step(other, arguments={"style": "a"}),
        step(other, arguments={"style": "b"}),
        step(output_type=Seen),
        step(output_type=More),
        step(output_type=Seen, version="1"),
        step(n=2),
        step(fps=1),
        step(images=False),
        step(field="x"),
    ]
    assert len({json.dumps(each.parameters(), sort_keys=True) for each in made}) == len(made)
    assert step(other).parameters() == step(other).parameters()
    with pytest.raises(ConfigError, match="argument style="):
        step(other, arguments={"style": object()}).parameters()


def test_a_template_can_be_made_again_from_what_is_recorded_and_code_cannot():
    made = step(
        "{text}?",
        field="f",
        n=2,
        try_num=5,
        videos=False,
        fps=1,
        max_frames=4,
        transport="frames",
        sampling_params={"max_tokens": None, "top_p": 0.5},
        special_tokens=("<i>", "<v>", "<a>", "<e>"),
        text_key="caption",
    )
    recorded = json.loads(json.dumps(made.parameters()))
    assert VLMMapStep.from_parameters(recorded).parameters() == made.parameters()
    for code in (step(lambda sample: "x"), step(output_type=Seen), step(lambda sample: "x", version="1")):
        with pytest.raises(ConfigError, match="failed_only=True"):
            VLMMapStep.from_parameters(json.loads(json.dumps(code.parameters())))
