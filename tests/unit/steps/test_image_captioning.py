from __future__ import annotations

import copy
import json

import pytest

from airflow_vlm_provider.errors import ConfigError, SampleError
from airflow_vlm_provider.steps.image_captioning import ImageCaptioningStep
from airflow_vlm_provider.steps.prompts import CAPTIONING_INPUT, CAPTIONING_SYSTEM
from airflow_vlm_provider.types import Answer, Choice, MediaRef, Request
from tests.support.captioning import AUDIO, EOC, IMAGE, LOOP, REFUSAL, VIDEO, drive, sample, texts

ROW = {"text": f"{IMAGE} a dog {EOC}", "images": ["a.jpg"], "id": 7}


def ref_of(request: Request) -> str:
    return request.parts[0].ref


def asked_of(step, row=ROW) -> Request:
    ((request,),), _ = drive(step, row, lambda request: ["a cat"] * request.n)
    return request


# What is asked


def test_the_projects_own_prompt():
    assert asked_of(ImageCaptioningStep()) == Request(
        system=CAPTIONING_SYSTEM,
        parts=(MediaRef("image", "a.jpg"), CAPTIONING_INPUT),
        sampling={"temperature": 0, "max_tokens": 256},
        completion="",
    )


@pytest.mark.parametrize(
    ("given", "row", "system", "text", "completion"),
    [
        ({"prompt": "a photo of"}, {}, None, "a photo of", "a photo of"),
        ({"prompt": "What?", "system_prompt": "Be brief."}, {}, "Be brief.", "What?", "What?"),
        ({"system_prompt": "Be brief."}, {}, "Be brief.", CAPTIONING_INPUT, ""),
        ({"system_prompt": ""}, {}, None, CAPTIONING_INPUT, ""),
        ({"prompt": ""}, {}, None, None, ""),
        ({"prompt": "What?", "prompt_key": "ask"}, {"ask": "Who?"}, None, "Who?", "Who?"),
        ({"prompt_key": "ask"}, {"ask": "Who?"}, None, "Who?", "Who?"),
        ({"prompt": "What?", "prompt_key": "ask"}, {"ask": 5}, None, "What?", "What?"),
        ({"prompt": "What?", "prompt_key": "ask"}, {"ask": None}, None, "What?", "What?"),
        ({"prompt": "What?", "prompt_key": "ask"}, {}, None, "What?", "What?"),
        ({"prompt_key": "ask"}, {}, CAPTIONING_SYSTEM, CAPTIONING_INPUT, ""),
    ],
)
def test_prompts(given, row, system, text, completion):
    request = asked_of(ImageCaptioningStep(**given), {**ROW, **row})
    assert (request.system, request.completion) == (system, completion)
    assert request.parts[1:] == (() if text is None else (text,))


@pytest.mark.parametrize(
    ("given", "sampling"),
    [
        ({"caption_num": 4}, {"temperature": 1.0, "max_tokens": 256}),
        ({"max_new_tokens": 20, "seed": 0}, {"temperature": 0, "max_tokens": 20, "seed": 0}),
        (
            {"sampling_params": {"temperature": 0.5, "max_new_tokens": 9}},
            {"temperature": 0.5, "max_tokens": 9},
        ),
        (
            {"caption_num": 2, "sampling_params": {"top_p": 0.9}},
            {"temperature": 1.0, "max_tokens": 256, "top_p": 0.9},
        ),
        ({"sampling_params": {"temperature": None, "max_tokens": None}}, {}),
    ],
)
def test_sampling(given, sampling):
    assert asked_of(ImageCaptioningStep(**given)).sampling == sampling


def test_all_images_are_asked_about_at_once_and_each_once():
    row = {"text": f"{IMAGE}{IMAGE}{EOC}{IMAGE} other words", "images": ["b", "a", "b"]}
    step = ImageCaptioningStep(keep_original_sample=False)
    (asked,), result = drive(step, row, lambda request: f"of {ref_of(request)}")
    assert [ref_of(request) for request in asked] == ["b", "a"]
    assert texts(result) == [f"{IMAGE} of b {IMAGE} of a {EOC}{IMAGE} of b {EOC}"]


def test_what_was_useless_is_asked_again_for_all_images_at_once():
    row = {"text": "", "images": ["a", "b", "c", "d"]}
    said = {("b", None): REFUSAL, ("c", None): "", ("c", 1): LOOP}
    rounds, result = drive(
        ImageCaptioningStep(keep_original_sample=False),
        row,
        lambda request: said.get((ref_of(request), request.sampling.get("seed")), f"of {ref_of(request)}"),
    )
    assert [[ref_of(request) for request in each] for each in rounds] == [
        ["a", "b", "c", "d"],
        ["b", "c"],
        ["c"],
    ]
    assert texts(result) == [f"{IMAGE} of a {IMAGE} of b {IMAGE} of c {IMAGE} of d {EOC}"]


# What is written


def test_the_new_sample_differs_in_its_text_alone_and_follows_the_original():
    row = {**ROW, "__dj__meta__": {"x": [1]}}
    before = copy.deepcopy(row)
    _, result = drive(ImageCaptioningStep(), row, lambda request: "a cat")
    original, new = result.rows
    assert original is row == before
    assert new == {**before, "text": f"{IMAGE} a cat {EOC}"}
    assert list(new) == list(before)
    assert all(new[name] is row[name] for name in row if name != "text")


@pytest.mark.parametrize(
    ("mode", "keep", "written"),
    [
        ("random_any", True, 2),
        ("random_any", False, 1),
        ("similar_one_simhash", True, 2),
        ("similar_one_simhash", False, 1),
        ("all", True, 4),
        ("all", False, 3),
    ],
)
def test_row_counts(mode, keep, written):
    step = ImageCaptioningStep(caption_num=3, keep_candidate_mode=mode, keep_original_sample=keep)
    (asked,), result = drive(step, ROW, lambda request: ["a", "b", "c"])
    assert len(result.rows) == written
    assert [request.n for request in asked] == [3]
    new = texts(result)[keep:]
    if mode == "all":
        assert new == [f"{IMAGE} {each} {EOC}" for each in "abc"]


def test_with_all_the_kth_new_sample_has_the_kth_candidates():
    row = {"text": "", "images": ["a", "b"]}
    step = ImageCaptioningStep(caption_num=2, keep_candidate_mode="all", keep_original_sample=False)
    _, result = drive(step, row, lambda request: [f"{ref_of(request)}{i}" for i in range(2)])
    assert texts(result) == [f"{IMAGE} a{i} {IMAGE} b{i} {EOC}" for i in range(2)]


def test_candidates_are_chosen_for_each_image_by_its_own_chunk():
    row = {
        "text": f"{IMAGE} a black cat {EOC}{IMAGE} a red car {EOC}{IMAGE} a red car",
        "images": ["x", "y", "x"],
    }
    step = ImageCaptioningStep(
        caption_num=2, keep_candidate_mode="similar_one_simhash", keep_original_sample=False
    )
    (asked,), result = drive(step, row, lambda request: ["one red car", "one black cat"])
    assert [ref_of(request) for request in asked] == ["x", "y"]
    black, red = f"{IMAGE} one black cat {EOC}", f"{IMAGE} one red car {EOC}"
    assert texts(result) == [black + red + red]


@pytest.mark.parametrize("images", [None, [], "absent"])
@pytest.mark.parametrize("keep", [True, False])
def test_a_sample_without_images_is_skipped(images, keep):
    row = {"text": f"{VIDEO} words", "images": images}
    if images == "absent":
        del row["images"]
    rounds, result = drive(ImageCaptioningStep(keep_original_sample=keep), row, lambda request: "x")
    assert (rounds, result.skipped, result.rows) == ([], True, ())


@pytest.mark.parametrize("text", ["", None, " \n", "absent"])
def test_placeholders_of_a_sample_without_text_are_implied(text):
    row = {"text": text, "images": ["a", "b"]}
    if text == "absent":
        del row["text"]
    _, result = drive(ImageCaptioningStep(), row, lambda request: ref_of(request))
    assert result.rows == (row, {**row, "text": f"{IMAGE} a {IMAGE} b {EOC}"})


def test_a_caption_can_not_bring_placeholders_of_its_own():
    step = ImageCaptioningStep(keep_original_sample=False)
    _, result = drive(step, ROW, lambda request: f"{IMAGE}a {EOC}cat{VIDEO}{AUDIO}")
    assert texts(result) == [f"{IMAGE} a cat {EOC}"]


def test_own_fields_and_tokens():
    step = ImageCaptioningStep(
        text_key="say",
        image_key="pics",
        special_tokens=["[i]", "[v]", "[a]", "[e]"],
        keep_original_sample=False,
    )
    row = {"say": f"[v] {IMAGE} [i] old [e]", "pics": "one.jpg", "images": ["not", "this"]}
    _, result = drive(step, row, lambda request: ref_of(request))
    assert result.rows == ({**row, "say": "[v][i] one.jpg [e]"},)
    assert step.generated() == {"say": {"type": "string"}}


def test_missing_placeholders_are_prepended_where_that_is_wanted():
    row = {"text": "an old caption", "images": ["a"]}
    step = ImageCaptioningStep(missing_placeholders="prepend")
    _, result = drive(step, row, lambda request: "a cat")
    assert texts(result) == ["an old caption", f"{IMAGE} a cat {EOC}"]


# What fails


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"text": f"{IMAGE}{IMAGE}", "images": ["a"]},
            "2 placeholders '<__dj__image>', but the sample has 1 image,",
        ),
        (
            {"text": f"{IMAGE}", "images": ["a", "b"]},
            "1 placeholder '<__dj__image>', but the sample has 2 images,",
        ),
        ({"text": "words", "images": ["a"]}, "0 placeholders"),
        ({"text": 5, "images": ["a"]}, "Field 'text' holds 5"),
        ({"text": "", "images": [None]}, "Field 'images' holds None"),
        ({"text": "", "images": {"a": 1}}, "Field 'images'"),
        ({"text": "", "images": [""]}, "Field 'images'"),
        (None, "could not be read"),
    ],
)
def test_a_malformed_row_is_told_before_anything_is_asked(row, words):
    with pytest.raises(SampleError) as failed:
        next(ImageCaptioningStep().process(sample(row)))
    assert failed.value.kind == "malformed_row"
    assert words in failed.value.message


@pytest.mark.parametrize(
    ("said", "kind"),
    [
        (REFUSAL, "refused"),
        (Choice("no", "refusal"), "refused"),
        ("", "empty_answer"),
        (Choice("a cat on", "length"), "cut_short"),
        (LOOP, "repetitive"),
    ],
)
def test_every_useless_answer_fails_its_sample_for_its_own_reason_after_three_tries(said, kind):
    row = {"text": "", "images": ["a", "b"]}
    rounds: list = []

    def says(request):
        rounds.append(request.sampling.get("seed"))
        return said if ref_of(request) == "b" else "fine"

    with pytest.raises(SampleError) as failed:
        drive(ImageCaptioningStep(), row, says)
    assert (failed.value.kind, failed.value.media, failed.value.attempts) == (kind, "b", 3)
    assert rounds == [None, None, 1, 2]


def test_an_image_that_cannot_be_asked_about_fails_the_sample():
    row = {"text": "", "images": ["a", "b"]}
    missing = SampleError("media_missing", "there is no b", media="b")
    with pytest.raises(SampleError) as failed:
        drive(
            ImageCaptioningStep(), row, lambda r: Answer((), "", error=missing) if ref_of(r) == "b" else "x"
        )
    assert failed.value is missing


# Parameters


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"caption_num": 0}, "caption_num is 0"),
        ({"keep_candidate_mode": "one"}, "keep_candidate_mode is 'one'"),
        ({"keep_original_sample": "yes"}, "keep_original_sample is 'yes'"),
        ({"missing_placeholders": "drop"}, "'error' or 'prepend'"),
        ({"prompt": 5}, "prompt is 5"),
        ({"system_prompt": 5}, "system_prompt is 5"),
        ({"prompt_key": ""}, "prompt_key is ''"),
        ({"prompt_key": 5}, "prompt_key is 5"),
        ({"text_key": ""}, "text_key is ''"),
        ({"image_key": None}, "image_key is None"),
        ({"special_tokens": ["a"]}, "special_tokens"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"max_new_tokens": 1.5}, r"max_new_tokens is 1\.5"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": True}, "seed is True"),
        ({"max_new_tokens": 5, "sampling_params": {"max_tokens": 6}}, "max_new_tokens=5 and max_tokens"),
        ({"seed": 5, "sampling_params": {"seed": 0}}, "seed=5 and seed in sampling_params"),
        ({"sampling_params": {"n": 3}}, "n=3"),
        ({"sampling_params": "hot"}, "hot"),
        ({"caption_num": 3, "sampling_params": {"temperature": 0}}, "temperature 0"),
        ({"caption_num": 3, "sampling_params": {"do_sample": False}}, "temperature 0"),
        ({"try_num": 0}, "try_num"),
    ],
)
def test_wrong_parameters(given, word):
    with pytest.raises(ConfigError, match=word):
        ImageCaptioningStep(**given)


GIVEN = [
    {},
    {"prompt": "What?", "prompt_key": "ask", "system_prompt": "", "seed": 3},
    {
        "caption_num": 3,
        "keep_candidate_mode": "all",
        "keep_original_sample": False,
        "sampling_params": {"temperature": None, "max_completion_tokens": 9, "top_p": 0.5},
        "try_num": 1,
        "missing_placeholders": "prepend",
        "text_key": "t",
        "image_key": "i",
        "special_tokens": ["[i]", "[v]", "[a]", "[e]"],
    },
]


@pytest.mark.parametrize("given", GIVEN)
def test_a_step_is_made_again_from_its_parameters(given):
    step = ImageCaptioningStep(**given)
    recorded = json.loads(json.dumps(step.parameters()))
    again = ImageCaptioningStep.from_parameters(recorded)
    assert json.loads(json.dumps(again.parameters())) == recorded
    row = {"t": "", "i": ["a"], "text": "", "images": ["a"]}
    assert asked_of(again, row) == asked_of(step, row)


def test_a_step_is_made_again_with_the_prompts_of_its_time():
    recorded = {
        **ImageCaptioningStep().parameters(),
        "own_prompts": {"system": "Then.", "prompt": "What then?"},
    }
    again = ImageCaptioningStep.from_parameters(recorded)
    request = asked_of(again)
    assert (request.system, request.parts[1], request.completion) == ("Then.", "What then?", "")
    assert again.parameters() == recorded


def test_what_decides_what_is_asked_is_among_the_parameters():
    assert set(ImageCaptioningStep().parameters()) >= ImageCaptioningStep.asking
    assert "keep_candidate_mode" not in ImageCaptioningStep.asking
