from __future__ import annotations

import json

import pytest
from airflow.sdk import DAG
from airflow.sdk.exceptions import AirflowFailException

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.hooks.vlm import VLMHook
from airflow_vlm_provider.operators.engines import make_engine
from airflow_vlm_provider.operators.image_captioning import ImageCaptioningOperator

GIVEN = {"task_id": "caption", "source": "s3://b/in/", "destination": "s3://b/out/"}


def operator(**given) -> ImageCaptioningOperator:
    return ImageCaptioningOperator(**{**GIVEN, **given})


WRONG = [
    (
        {"hf_img2seq": "a/b", "api_or_hf_model": "c/d"},
        ["hf_img2seq='a/b'", "api_or_hf_model='c/d'", "keep one"],
    ),
    ({"hf_img2seq": 5}, ["hf_img2seq=5"]),
    ({"caption_num": 0}, ["caption_num is 0"]),
    ({"caption_num": 3, "sampling_params": {"temperature": 0}}, ["caption_num=3", "temperature 0"]),
    ({"keep_candidate_mode": "best"}, ["keep_candidate_mode", "'similar_one_simhash'"]),
    ({"keep_original_sample": "no"}, ["keep_original_sample"]),
    ({"gpu_batch_size": 0}, ["gpu_batch_size=0"]),
    ({"gpu_batch_size": True}, ["gpu_batch_size=True"]),
    ({"gpu_batch_size": 1.5}, ["gpu_batch_size=1.5"]),
    ({"trust_remote_code": "yes"}, ["trust_remote_code='yes'"]),
    ({"max_new_tokens": 0}, ["max_new_tokens is 0"]),
    ({"seed": -1}, ["seed is -1"]),
    ({"prompt": 5}, ["prompt is 5"]),
    ({"missing_placeholders": "drop"}, ["missing_placeholders"]),
    ({"try_num": 0}, ["try_num"]),
    ({"engine": "ollama"}, ["engine='ollama'"]),
]


@pytest.mark.parametrize(("given", "words"), WRONG)
@pytest.mark.parametrize("make", [ImageCaptioningOperator, ImageCaptioningOperator.partial])
def test_wrong_parameters_fail_when_the_dag_is_parsed_and_no_retry_is_burnt(make, given, words):
    with pytest.raises(ConfigError) as caught:
        make(**{**GIVEN, **given})
    assert isinstance(caught.value, AirflowFailException)
    for word in words:
        assert word in str(caught.value)


def test_a_mapped_operator_is_made():
    with DAG("d"):
        mapped = ImageCaptioningOperator.partial(**GIVEN, hf_img2seq="a/b", caption_num=2).expand(
            shards=["a", "b"]
        )
    assert mapped.partial_kwargs["hf_img2seq"] == "a/b"


def test_hf_img2seq_is_another_name_for_the_model_and_may_be_a_template():
    task = operator(hf_img2seq="{{ params.model }}")
    task.render_template_fields({"params": {"model": "a/b"}})
    assert task.api_or_hf_model == "a/b"
    assert operator(api_or_hf_model="c/d").api_or_hf_model == "c/d"


def test_every_parameter_reaches_the_step():
    given = {
        "caption_num": 3,
        "keep_candidate_mode": "all",
        "keep_original_sample": False,
        "prompt": "What?",
        "prompt_key": "ask",
        "system_prompt": "Be brief.",
        "try_num": 2,
        "missing_placeholders": "prepend",
        "text_key": "say",
        "image_key": "pics",
    }
    tokens = {"image": "[i]", "video": "[v]", "audio": "[a]", "eoc": "[e]"}
    task = operator(
        **given,
        max_new_tokens=9,
        seed=4,
        sampling_params={"top_p": 0.5},
        **{f"{name}_special_token": token for name, token in tokens.items()},
    )
    parameters = task.make_step().parameters()
    assert {name: parameters[name] for name in given} == given
    assert parameters["sampling"] == {"temperature": 1.0, "max_tokens": 9, "seed": 4, "top_p": 0.5}
    assert parameters["special_tokens"] == list(tokens.values())


def engine_of(task: ImageCaptioningOperator, monkeypatch, **connection):
    monkeypatch.setenv("AIRFLOW_CONN_VLM_X", json.dumps({"conn_type": "vlm", **connection}))
    return make_engine(
        VLMHook("vlm_x"),
        engine=task.engine,
        model=task.api_or_hf_model,
        concurrency=None,
        api_endpoint=None,
        response_path=None,
        model_params=None,
        options=task.engine_options(),
    )


def test_the_model_is_the_operators_or_the_connections_or_what_suits_the_engine(monkeypatch):
    local, remote = {"extra": {"engine": "transformers"}}, {"host": "gpu:8000"}
    assert engine_of(operator(), monkeypatch, **local).model == "Salesforce/blip2-opt-2.7b"
    assert engine_of(operator(), monkeypatch, **remote).model == "Qwen/Qwen2.5-VL-7B-Instruct"
    assert engine_of(operator(hf_img2seq="a/b"), monkeypatch, **local).model == "a/b"
    theirs = {"host": "gpu:8000", "extra": {"model": "theirs"}}
    assert engine_of(operator(), monkeypatch, **theirs).model == "theirs"
    assert engine_of(operator(hf_img2seq="a/b"), monkeypatch, **theirs).model == "a/b"


def test_batch_size_is_the_operators_or_the_connections_or_8(monkeypatch):
    local = {"extra": {"engine": "transformers"}}
    theirs = {"extra": {"engine": "transformers", "engine_args": {"gpu_batch_size": 3}}}
    assert engine_of(operator(), monkeypatch, **local).gpu_batch_size == 8
    assert engine_of(operator(), monkeypatch, **theirs).gpu_batch_size == 3
    assert engine_of(operator(gpu_batch_size=5), monkeypatch, **theirs).gpu_batch_size == 5


def test_remote_code_is_only_trusted_where_somebody_says_so():
    assert "trust_remote_code" not in operator().engine_options().local
    assert operator(trust_remote_code=True).engine_options().local["trust_remote_code"] is True
