from __future__ import annotations

import json

import pytest

from airflow_vlm_provider.errors import ConfigError, SampleError, TransientError
from airflow_vlm_provider.steps.image_captioning_gpt4v import ImageCaptioningFromGPT4VStep
from airflow_vlm_provider.steps.prompts import INSTRUCTION_SYSTEMS
from airflow_vlm_provider.types import Answer, Choice, MediaRef, Request
from tests.support.captioning import EOC, IMAGE, LOOP, REFUSAL, VIDEO, drive, texts

ROW = {"text": f"{IMAGE} a dog {EOC}", "images": ["a.jpg"]}
THREE = {"text": f"{IMAGE}{VIDEO} x {IMAGE}{EOC}{IMAGE}", "images": ["a", "b", "c"]}


def ref_of(request: Request) -> str:
    return request.parts[0].ref


def asked_of(step, row=ROW) -> Request:
    ((request,),), _ = drive(step, row, lambda request: "Q: What?\nA: That.")
    return request


def saying(**errors):
    """Answers with the reference, but for those that something else is said of."""

    def says(request):
        said = errors.get(ref_of(request), f"of {ref_of(request)}")
        return Answer((), "", error=said) if isinstance(said, SampleError) else said

    return says


@pytest.mark.parametrize("mode", ["reasoning", "description", "conversation"])
def test_each_mode_has_its_own_system_prompt(mode):
    assert asked_of(ImageCaptioningFromGPT4VStep(mode=mode)) == Request(
        system=INSTRUCTION_SYSTEMS[mode],
        parts=(MediaRef("image", "a.jpg"),),
        sampling={"temperature": 1.0, "max_tokens": 500},
    )


def test_data_juicers_spelling_of_a_mode_is_understood():
    theirs, ours = (ImageCaptioningFromGPT4VStep(mode=mode) for mode in ("resoning", "reasoning"))
    assert theirs.parameters() == ours.parameters()
    assert asked_of(theirs).system == INSTRUCTION_SYSTEMS["reasoning"]


@pytest.mark.parametrize(
    ("given", "row", "system", "text"),
    [
        ({"mode": "custom", "system_prompt": "Be odd."}, {}, "Be odd.", None),
        ({"mode": "custom", "user_prompt": "What?"}, {}, None, "What?"),
        ({"mode": "custom", "user_prompt_key": "ask"}, {"ask": "Who?"}, None, "Who?"),
        ({"user_prompt": "What?", "user_prompt_key": "ask"}, {"ask": "Who?"}, "description", "Who?"),
        ({"user_prompt": "What?", "user_prompt_key": "ask"}, {"ask": None}, "description", "What?"),
        ({"user_prompt": "What?", "user_prompt_key": "ask"}, {}, "description", "What?"),
        ({"user_prompt_key": "ask"}, {}, "description", None),
    ],
)
def test_prompts(given, row, system, text):
    request = asked_of(ImageCaptioningFromGPT4VStep(**given), {**ROW, **row})
    assert request.system == INSTRUCTION_SYSTEMS.get(system, system)
    assert request.parts[1:] == (() if text is None else (text,))


def test_sampling():
    request = asked_of(ImageCaptioningFromGPT4VStep(max_token=7, temperature=0))
    assert (request.sampling, request.n) == ({"temperature": 0, "max_tokens": 7}, 1)


def test_what_the_model_says_is_kept_with_its_lines():
    _, result = drive(ImageCaptioningFromGPT4VStep(), ROW, lambda request: "Q: What?\nA: That.\n")
    assert result.rows == (ROW, {**ROW, "text": f"{IMAGE} Q: What?\nA: That. {EOC}"})
    _, result = drive(ImageCaptioningFromGPT4VStep(keep_original_sample=False), ROW, lambda request: "x")
    assert texts(result) == [f"{IMAGE} x {EOC}"]


MISSING = SampleError("media_missing", "there is no b", media="b")


@pytest.mark.parametrize("failure", [REFUSAL, "", LOOP, Choice("x", "length"), MISSING])
def test_with_any_an_image_that_cannot_be_captioned_stays_bare(failure):
    step = ImageCaptioningFromGPT4VStep(keep_original_sample=False)
    rounds, result = drive(step, THREE, saying(b=failure))
    assert len(rounds) == 1
    assert texts(result) == [f"{IMAGE} of a {VIDEO}{IMAGE}{EOC}{IMAGE} of c {EOC}"]


@pytest.mark.parametrize(
    ("failure", "kind"),
    [
        (REFUSAL, "refused"),
        (Choice("", "refusal"), "refused"),
        ("", "empty_answer"),
        (LOOP, "repetitive"),
        (Choice("x", "length"), "cut_short"),
        (MISSING, "media_missing"),
    ],
)
def test_with_all_it_fails_the_sample_for_its_own_reason(failure, kind):
    with pytest.raises(SampleError) as failed:
        drive(ImageCaptioningFromGPT4VStep(any_or_all="all"), THREE, saying(b=failure))
    assert (failed.value.kind, failed.value.media) == (kind, "b")


def test_with_any_the_first_reason_is_told_when_no_image_has_a_caption():
    with pytest.raises(SampleError) as failed:
        drive(ImageCaptioningFromGPT4VStep(), THREE, saying(a="", b=MISSING, c=REFUSAL))
    assert (failed.value.kind, failed.value.media) == ("empty_answer", "a")


def test_an_image_that_was_merely_out_of_luck_fails_the_sample_so_that_it_is_asked_again():
    with pytest.raises(TransientError):
        drive(ImageCaptioningFromGPT4VStep(), THREE, saying(b=TransientError("timed out", media="b")))


def test_an_answer_cut_short_names_this_operators_parameter():
    with pytest.raises(SampleError, match="raise max_token"):
        drive(ImageCaptioningFromGPT4VStep(), ROW, lambda request: Choice("x", "length"))


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"mode": "poem"}, "mode is 'poem'; give one of 'reasoning'"),
        ({"mode": None}, "mode is None"),
        ({"mode": ["description"]}, "mode is"),
        ({"any_or_all": "some"}, "'any' or 'all'"),
        ({"temperature": 1.1}, r"temperature is 1\.1; give a number from 0 to 1"),
        ({"temperature": -0.1}, "from 0 to 1"),
        ({"temperature": True}, "from 0 to 1"),
        ({"temperature": "1"}, "from 0 to 1"),
        ({"max_token": 0}, "max_token is 0"),
        ({"max_token": 5.0}, "max_token is"),
        ({"system_prompt": None, "mode": "custom"}, "system_prompt is None"),
        ({"user_prompt": None}, "user_prompt is None"),
        ({"user_prompt_key": ""}, "user_prompt_key is ''"),
        ({"system_prompt": "x"}, "Set mode='custom', or leave system_prompt out"),
        ({"mode": "custom"}, "give system_prompt, user_prompt or user_prompt_key"),
        ({"keep_original_sample": 1}, "keep_original_sample is 1"),
        ({"image_key": ""}, "image_key is ''"),
    ],
)
def test_wrong_parameters(given, words):
    with pytest.raises(ConfigError, match=words):
        ImageCaptioningFromGPT4VStep(**given)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"mode": "custom", "system_prompt": "Be odd.", "any_or_all": "all", "temperature": 0.5},
        {"mode": "conversation", "user_prompt": "x", "user_prompt_key": "y", "max_token": 3},
    ],
)
def test_a_step_is_made_again_from_its_parameters(given):
    step = ImageCaptioningFromGPT4VStep(**given)
    recorded = json.loads(json.dumps(step.parameters()))
    again = ImageCaptioningFromGPT4VStep.from_parameters(recorded)
    assert json.loads(json.dumps(again.parameters())) == recorded
    assert asked_of(again) == asked_of(step)
    then = ImageCaptioningFromGPT4VStep.from_parameters({**recorded, "system_prompt": "Then."})
    assert asked_of(then).system == "Then."
    assert set(recorded) >= step.asking
