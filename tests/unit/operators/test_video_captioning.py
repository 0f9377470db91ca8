from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from airflow_vlm_provider.hooks.vlm import VLMHook
from airflow_vlm_provider.operators.engines import make_engine
from airflow_vlm_provider.operators.parameters import ParameterError
from airflow_vlm_provider.operators.video_captioning import VideoCaptioningFromVLMOperator
from airflow_vlm_provider.steps.video_captioning import VideoCaptioningStep

PLACE = {"task_id": "caption", "source": "s3://b/in/", "destination": "s3://b/out/"}
STEP: dict[str, Any] = {
    "caption_num": 3,
    "keep_candidate_mode": "all",
    "keep_original_sample": False,
    "prompt": "Who moves?",
    "prompt_key": "ask",
    "system_prompt": "Be brief.",
    "sampling_params": {"temperature": 0.5},
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
}


def operator(**given: Any) -> VideoCaptioningFromVLMOperator:
    return VideoCaptioningFromVLMOperator(**{**PLACE, **given})


def test_without_parameters_the_step_is_as_without_and_frames_have_qwens_limit():
    task = operator()
    assert task.make_step().parameters() == VideoCaptioningStep().parameters()
    assert task.max_pixels == 602_112


def test_every_parameter_reaches_the_step():
    tokens = {"image": "<i>", "video": "<v>", "audio": "<a>", "eoc": "<e>"}
    task = operator(**STEP, **{f"{name}_special_token": value for name, value in tokens.items()})
    expected = VideoCaptioningStep(**STEP, special_tokens=list(tokens.values()))
    assert task.make_step().parameters() == expected.parameters()
    assert operator(max_pixels=None).max_pixels is None


WRONG = [
    ({"fps": 0}, ["fps", "0"]),
    ({"fps": -2}, ["fps", "-2"]),
    ({"max_frames": 0}, ["max_frames", "0"]),
    ({"max_frames": 1.5}, ["max_frames", "1.5", "whole"]),
    ({"window_seconds": 0}, ["window_seconds", "0"]),
    ({"window_seconds": -1}, ["window_seconds", "-1"]),
    ({"transport": "url"}, ["transport", "'url'", "'frames'"]),
    ({"windows_field_name": ""}, ["windows_field_name"]),
    ({"max_pixels": 0}, ["max_pixels=0"]),
    ({"caption_num": 4, "sampling_params": {"temperature": 0}}, ["caption_num=4", "temperature"]),
    ({"keep_candidate_mode": "best"}, ["keep_candidate_mode", "'best'"]),
    ({"sampling_params": {"n": 2}}, ["sampling_params", "n=2"]),
    ({"hf_model": "a/b", "api_or_hf_model": "c/d"}, ["hf_model='a/b'", "api_or_hf_model='c/d'"]),
    ({"hf_model": 5}, ["hf_model=5"]),
    ({"enable_vllm": True, "engine": "openai"}, ["enable_vllm=True", "engine='openai'"]),
    ({"enable_vllm": True, "is_api_model": True}, ["is_api_model=True", "enable_vllm=True"]),
    ({"enable_vllm": "yes"}, ["enable_vllm='yes'"]),
    ({"source": "s3://b/out/"}, ["destination"]),
]


@pytest.mark.parametrize(("given", "words"), WRONG)
def test_wrong_parameters_fail_when_the_dag_is_parsed(given, words):
    for make in (operator, lambda **given: VideoCaptioningFromVLMOperator.partial(**{**PLACE, **given})):
        with pytest.raises(ParameterError) as caught:
            make(**given)
        assert all(word in str(caught.value) for word in words), str(caught.value)


def test_what_is_mapped_is_not_judged_before_it_is_known():
    place = {name: value for name, value in PLACE.items() if name != "source"}
    assert VideoCaptioningFromVLMOperator.partial(**place, hf_model="a/b", window_seconds=30) is not None


def engine_of(task: VideoCaptioningFromVLMOperator, hook: VLMHook) -> Any:
    nothing = dict.fromkeys(("concurrency", "api_endpoint", "response_path", "model_params"))
    return make_engine(
        hook,
        engine=task.engine,
        model=task.api_or_hf_model,
        options=task.engine_options(),
        **nothing,
    )


@pytest.mark.parametrize("engine", ["openai", "transformers"])
@pytest.mark.parametrize(
    ("given", "extra", "model"),
    [
        ({}, {}, "Qwen/Qwen3-VL-8B-Instruct"),
        ({}, {"model": "theirs"}, "theirs"),
        ({"hf_model": "mine"}, {"model": "theirs"}, "mine"),
        ({"api_or_hf_model": "mine"}, {"model": "theirs"}, "mine"),
    ],
)
def test_the_model_is_the_operators_or_the_connections_or_one_that_takes_videos(
    monkeypatch, engine, given, extra, model
):
    fields = {"conn_type": "vlm", "host": "gpu:8000", "extra": extra}
    monkeypatch.setenv("AIRFLOW_CONN_VLM_X", json.dumps(fields))
    assert engine_of(operator(engine=engine, **given), VLMHook("vlm_x")).model == model


def test_data_juicers_names_are_other_names_for_model_and_engine():
    task = operator(hf_model="{{ params.model }}", enable_vllm=True)
    assert task.engine == "vllm"
    task.render_template_fields({"params": {"model": "mine"}})
    assert task.api_or_hf_model == "mine"
    assert operator(enable_vllm=True, engine="vllm").engine == "vllm"
    assert operator(enable_vllm=False, engine="openai").engine == "openai"


def test_a_dag_with_it_imports_nothing_heavy():
    code = (
        "import sys, airflow_vlm_provider.operators.video_captioning as v;"
        f"v.VideoCaptioningFromVLMOperator(**{PLACE!r});"
        "print(sorted({'av', 'torch', 'transformers', 'pyarrow', 'simhash', 'PIL'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=90)
    assert run.stdout.strip().endswith("[]")
