from __future__ import annotations

import pytest
from airflow.sdk import DAG
from airflow.sdk.exceptions import AirflowFailException

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.operators.image_captioning_gpt4v import ImageCaptioningFromGPT4VOperator
from airflow_vlm_provider.steps.prompts import INSTRUCTION_SYSTEMS

GIVEN = {"task_id": "caption", "source": "s3://b/in/", "destination": "s3://b/out/"}
MAKE = [ImageCaptioningFromGPT4VOperator, ImageCaptioningFromGPT4VOperator.partial]


def operator(**given) -> ImageCaptioningFromGPT4VOperator:
    return ImageCaptioningFromGPT4VOperator(**{**GIVEN, **given})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"mode": "poem"}, ["mode is 'poem'", "'description'"]),
        ({"temperature": 1.5}, ["temperature is 1.5", "0 to 1"]),
        ({"max_token": 0}, ["max_token is 0"]),
        ({"any_or_all": "some"}, ["'any' or 'all'"]),
        ({"system_prompt": "Be odd."}, ["mode='custom'"]),
        ({"user_prompt_key": ""}, ["user_prompt_key"]),
        ({"detail": "max"}, ["detail='max'", "'low'"]),
        ({"detail": "low", "engine": "transformers"}, ["detail='low'", "engine openai"]),
        ({"model": "a", "api_or_hf_model": "b"}, ["model='a'", "api_or_hf_model='b'"]),
        ({"model": 4}, ["model=4"]),
        ({"missing_placeholders": "drop"}, ["missing_placeholders"]),
    ],
)
@pytest.mark.parametrize("make", MAKE)
def test_wrong_parameters_fail_when_the_dag_is_parsed_and_no_retry_is_burnt(make, given, words):
    with pytest.raises(ConfigError) as caught:
        make(**{**GIVEN, **given})
    assert isinstance(caught.value, AirflowFailException)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("make", MAKE)
@pytest.mark.parametrize("key", ["sk-leaked-in-a-dag", "", None])
def test_a_key_is_refused_with_where_it_belongs_and_is_not_repeated(make, key):
    with pytest.raises(ConfigError, match=r"password of the connection that vlm_conn_id names") as caught:
        make(**GIVEN, api_key=key)
    assert isinstance(caught.value, AirflowFailException)
    assert "sk-leaked" not in str(caught.value)


def test_a_mapped_operator_is_made():
    with DAG("d"):
        mapped = ImageCaptioningFromGPT4VOperator.partial(**GIVEN, mode="resoning").expand(shards=["a", "b"])
    assert mapped.partial_kwargs["mode"] == "resoning"


def test_model_is_another_name_for_the_model_and_may_be_a_template():
    task = operator(model="{{ params.model }}")
    task.render_template_fields({"params": {"model": "gpt"}})
    assert task.api_or_hf_model == "gpt"
    assert operator().api_or_hf_model is None


def test_every_parameter_reaches_the_step_and_the_engine():
    given = {
        "mode": "custom",
        "max_token": 9,
        "temperature": 0.5,
        "system_prompt": "Be odd.",
        "user_prompt": "What?",
        "user_prompt_key": "ask",
        "keep_original_sample": False,
        "any_or_all": "all",
        "missing_placeholders": "prepend",
        "text_key": "say",
        "image_key": "pics",
    }
    tokens = {"image": "[i]", "video": "[v]", "audio": "[a]", "eoc": "[e]"}
    task = operator(
        **given, detail="low", **{f"{name}_special_token": token for name, token in tokens.items()}
    )
    parameters = task.make_step().parameters()
    assert {name: parameters[name] for name in given} == given
    assert parameters["special_tokens"] == list(tokens.values())
    assert task.engine_options().detail == "low"


def test_the_defaults_ask_for_a_description():
    parameters = operator().make_step().parameters()
    assert (parameters["mode"], parameters["max_token"], parameters["temperature"]) == (
        "description",
        500,
        1.0,
    )
    assert parameters["system_prompt"] == INSTRUCTION_SYSTEMS["description"]
