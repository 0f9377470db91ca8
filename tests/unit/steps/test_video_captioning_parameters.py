"""What a step that captions videos is given, and what is recorded of it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.steps.video_captioning import VideoCaptioningStep
from tests.support.captioning import drive
from tests.support.lasting_videos import PLAIN, lasting


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"fps": 0}, ["fps is 0"]),
        ({"fps": -1.0}, ["fps is -1.0"]),
        ({"fps": float("nan")}, ["fps is nan"]),
        ({"fps": float("inf")}, ["fps is inf"]),
        ({"fps": "2"}, ["fps is '2'"]),
        ({"fps": True}, ["fps is True"]),
        ({"max_frames": 0}, ["max_frames is 0"]),
        ({"max_frames": 2.5}, ["max_frames is 2.5", "whole"]),
        ({"max_frames": True}, ["max_frames is True"]),
        ({"window_seconds": 0}, ["window_seconds is 0", "None"]),
        ({"window_seconds": -30}, ["window_seconds is -30"]),
        ({"transport": "url"}, ["transport is 'url'", "'frames'"]),
        ({"windows_field_name": ""}, ["windows_field_name"]),
        ({"meta_key": None}, ["meta_key"]),
        ({"video_key": ""}, ["video_key"]),
        ({"caption_num": 2, "sampling_params": {"temperature": 0}}, ["caption_num=2", "temperature 0"]),
        ({"caption_num": 2, "sampling_params": {"do_sample": False}}, ["caption_num=2", "temperature 0"]),
    ],
)
def test_wrong_parameters_are_refused(given, words):
    with pytest.raises(ConfigError) as caught:
        VideoCaptioningStep(**given)
    assert all(word in str(caught.value) for word in words)


def test_data_juicers_sampling_parameters_are_understood():
    given = {"max_new_tokens": 64, "do_sample": True, "top_p": 0.9}
    step = VideoCaptioningStep(caption_num=2, sampling_params=given)
    assert step.sampling == {"temperature": 1.0, "max_tokens": 64, "top_p": 0.9}


EVERYTHING: dict[str, Any] = {
    "caption_num": 3,
    "keep_candidate_mode": "all",
    "keep_original_sample": False,
    "prompt": "Who moves?",
    "prompt_key": "ask",
    "system_prompt": "Be brief.",
    "sampling_params": {"temperature": 0.5, "max_tokens": None},
    "fps": 0.5,
    "max_frames": 8,
    "window_seconds": 12.5,
    "transport": "frames",
    "windows_field_name": "parts",
    "seed": 3,
    "try_num": 1,
    "missing_placeholders": "prepend",
    "text_key": "caption",
    "video_key": "clips",
    "meta_key": "meta",
    "special_tokens": ["<i>", "<v>", "<a>", "<e>"],
}


@pytest.mark.parametrize("given", [{}, EVERYTHING])
def test_a_step_is_made_again_from_what_is_recorded_of_it(given):
    step = VideoCaptioningStep(**given)
    recorded = json.loads(json.dumps(step.parameters()))
    again = VideoCaptioningStep.from_parameters(recorded)
    assert again.parameters() == step.parameters()
    row = {
        "caption": "<v> x <e>",
        "clips": ["a.mp4"],
        "text": PLAIN["text"],
        "videos": ["a.mp4"],
        "ask": "Who?",
    }
    says = lasting(a=30.0)
    assert drive(again, row, says) == drive(step, row, says)


def test_every_parameter_is_part_of_the_fingerprint_and_those_that_are_asked_with_are_said():
    plain = VideoCaptioningStep().parameters()
    names = {"sampling_params": "sampling", "seed": "sampling", "special_tokens": "special_tokens"}
    for name, value in EVERYTHING.items():
        given = {name: value} | ({"caption_num": 3} if name == "keep_candidate_mode" else {})
        changed = VideoCaptioningStep(**given).parameters()
        recorded = names.get(name, name)
        assert changed[recorded] != plain[recorded], name
    assert VideoCaptioningStep.asking <= set(plain)
    assert {
        "fps",
        "max_frames",
        "window_seconds",
        "transport",
        "windows_version",
    } <= VideoCaptioningStep.asking
    assert "windows_field_name" not in VideoCaptioningStep.asking


def test_what_is_generated_has_types():
    assert VideoCaptioningStep().generated() == {"text": {"type": "string"}}
    generated = VideoCaptioningStep(**EVERYTHING).generated()
    assert set(generated) == {"caption", "meta"}
    window = generated["meta"]["properties"]["parts"]["items"]["items"]
    assert {name: each["type"] for name, each in window["properties"].items()} == {
        "start": "number",
        "end": "number",
        "caption": "string",
    }
