"""Recipes that are refused: each thing that is wrong is said with its place, and no secret is quoted."""

from __future__ import annotations

import copy
import json
import pickle
from typing import Any

import pytest

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.recipes.operators import SUPPORTED
from airflow_vlm_provider.recipes.reading import MAX_RECIPE_BYTES, read_recipe
from airflow_vlm_provider.recipes.recipe import RecipeError
from tests.support.recipes import TAGGING

SECRET = "sk-not-to-be-seen-41d8"
CAPTIONING = "process:\n  - image_captioning_mapper:\n"
GPT4V = "process:\n  - image_captioning_from_gpt4v_mapper:\n"


def problems(read: Any, text: str) -> dict[str, str]:
    """What is wrong with a recipe, by its places. No secret is quoted, whatever it is."""
    with pytest.raises(RecipeError) as caught:
        read(text)
    assert SECRET not in str(caught.value)
    assert SECRET not in repr(caught.value)
    found = {problem.place: problem.sentence for problem in caught.value.problems}
    assert len(found) == len(caught.value.problems)
    assert all(f"- {place}: {sentence}" in str(caught.value) for place, sentence in found.items())
    return found


@pytest.mark.parametrize(
    ("text", "place", "said"),
    [
        ("nq: 4", "nq", "no such setting"),
        ("image_keys: x", "image_keys", "did you mean image_key?"),
        ("image_blur_mapper: {}", "image_blur_mapper", "stand in the list 'process'"),
        (f"openai_api_key: {SECRET}", "openai_api_key", "belongs in the Airflow connection"),
        ("text_keys: [a, b]", "text_keys", "Keep one"),
        ("text_keys: []", "text_keys", "Keep one"),
        ("text_keys: 3", "text_keys", "must be a field's name"),
        ("text_keys: text.instruction", "text_keys", "a field inside another"),
        ("image_key: [a]", "image_key", "must be a field's name"),
        ("video_key: a.b", "video_key", "a field inside another"),
        ("eoc_special_token: ''", "eoc_special_token", "string that is not empty"),
        ("image_special_token: 3", "image_special_token", "string that is not empty"),
        ("auto: true", "auto", "Remove it"),
        ("generated_dataset_config: {type: x}", "generated_dataset_config", "Write it to shards"),
        ("decrypt_after_reading: true", "decrypt_after_reading", "Decrypt them first"),
        ("encrypt_before_export: true", "encrypt_before_export", "Leave encryption"),
        (f"encryption_key_path: {SECRET}", "encryption_key_path", "remove it"),
        (
            f"export_aws_credentials: {{aws_secret_access_key: {SECRET}}}",
            "export_aws_credentials",
            "name the connection by aws_conn_id",
        ),
        ("dataset_path: [a, b]", "dataset_path", "one path or URI, not a list"),
        ("dataset_path: 2026-01-01", "dataset_path", "one path or URI, not a date"),
        ("dataset_path: 0.5 a.jsonl 0.5 b.jsonl", "dataset_path", "several datasets, or weights"),
        ("dataset_path: my data/x.jsonl", "dataset_path", "in quotes of its own"),
        ("dataset_path: data.json", "dataset_path", "Convert it"),
        ("dataset_path: data.CSV", "dataset_path", "Convert it"),
        (f"dataset_path: s3://me:{SECRET}@bucket/x", "dataset_path", "holds a password"),
        (f"export_path: s3://me:{SECRET}@bucket/x", "export_path", "holds a password"),
        ("export_path: 3", "export_path", "one path or URI, not a int"),
        ("suffixes: [.jsonl, .parquet]", "suffixes", "give recipe_task_group() a pattern"),
        ("suffixes: .csv", "suffixes", "'.csv' is no shard's"),
        ("suffixes: 3", "suffixes", "a list of them"),
        ("dataset: s3://bucket/x", "dataset", "a list 'configs'"),
        ("dataset: {configs: []}", "dataset", "a list 'configs'"),
        ("dataset: {configs: [a]}", "dataset", "a list 'configs'"),
        ("dataset: {configs: [{path: a}], seed: 3}", "dataset", "seed: not known"),
        ("dataset: {configs: [{path: a}], max_sample_num: 3}", "dataset.max_sample_num", "done whole"),
        ("dataset: {configs: [{path: a}, {path: b}]}", "dataset.configs", "there are 2 datasets"),
        ("dataset: {configs: [{type: local}]}", "dataset.configs[0].path", "missing"),
        ("dataset: {configs: [{path: a, split: b}]}", "dataset.configs[0].split", "not known"),
        ("dataset: {configs: [{type: hf, path: a}]}", "dataset.configs[0]", "type 'hf' can't be read"),
        (
            "dataset: {configs: [{type: remote, source: hdfs, path: 'hdfs://a/b'}]}",
            "dataset.configs[0]",
            "type 'remote' with source 'hdfs' can't be read",
        ),
        (
            "dataset: {configs: [{type: remote, source: s3, path: /a}]}",
            "dataset.configs[0].path",
            "begin with s3://",
        ),
        (
            f"dataset: {{configs: [{{type: remote, source: s3, path: 's3://a/b', aws_secret_access_key: {SECRET}}}]}}",
            "dataset.configs[0].aws_secret_access_key",
            "name the connection by aws_conn_id",
        ),
        (
            "dataset: {configs: [{type: remote, source: s3, path: 's3://a/b', endpoint_url: 'http://minio'}]}",
            "dataset.configs[0].endpoint_url",
            "name the connection by aws_conn_id",
        ),
        ("process: null", "process", "a list of operators"),
        ("process: []", "process", "a list of operators"),
        ("process: image_captioning_mapper", "process", "a list of operators"),
        ("process: [3]", "process[0]", "an operator's name"),
        ("process: [{}]", "process[0]", "an operator's name"),
        ("process: [{image_captioning_mapper: 3}]", "process[0].image_captioning_mapper", "a mapping of"),
        (
            "process:\n  - image_captioning_mapper:\n    caption_num: 2",
            "process[0]",
            "(image_captioning_mapper, caption_num). Indent",
        ),
        (
            f"{CAPTIONING}      caption_nun: 2",
            "process[0].image_captioning_mapper.caption_nun",
            "did you mean caption_num? Supported are hf_img2seq, ",
        ),
        (
            f"{CAPTIONING}      text_key: a.b",
            "process[0].image_captioning_mapper.text_key",
            "a field inside another",
        ),
        (
            f"{CAPTIONING}      index_key: n",
            "process[0].image_captioning_mapper.index_key",
            "rows are not numbered",
        ),
        (
            f"{CAPTIONING}      prompt: 2026-01-01",
            "process[0].image_captioning_mapper.prompt",
            "Put it in quotes",
        ),
        (
            f"{CAPTIONING}      sampling_params: &a {{b: *a}}",
            "process[0].image_captioning_mapper.sampling_params",
            "JSON does not know",
        ),
        (
            f"{GPT4V}      api_key: {SECRET}",
            "process[0].image_captioning_from_gpt4v_mapper.api_key",
            "an API key in its password",
        ),
        (
            f"{CAPTIONING}      api_key: {SECRET}",
            "process[0].image_captioning_mapper.api_key",
            "an API key in its password",
        ),
        (
            f"{TAGGING}      model_params: {{deep: [{{api_key: {SECRET}}}]}}",
            "process[0].image_tagging_vlm_mapper.model_params.deep[0].api_key",
            "an API key in its password",
        ),
        (
            f"{TAGGING}      model_params: {{base_url: 'http://me'}}",
            "process[0].image_tagging_vlm_mapper.model_params.base_url",
            "an address in its host",
        ),
        (
            f"{TAGGING}      model_params: {{default_headers: {{x: {SECRET}}}}}",
            "process[0].image_tagging_vlm_mapper.model_params.default_headers",
            "headers in its extra",
        ),
        (
            f"{TAGGING}      api_endpoint: 'https://me:{SECRET}@host/v1'",
            "process[0].image_tagging_vlm_mapper.api_endpoint",
            "belongs in the Airflow connection",
        ),
        (
            f"{TAGGING}      api_endpoint: 'https://host/v1?api-key={SECRET}'",
            "process[0].image_tagging_vlm_mapper.api_endpoint",
            "belongs in the Airflow connection",
        ),
    ],
)
def test_what_is_wrong_is_said_with_its_place_and_the_remedy(read, text, place, said):
    found = problems(read, text)
    assert set(found) == {place}
    assert said in found[place]


def test_what_only_sounds_like_a_secret_is_none(read):
    params = {"max_tokens": 9, "image_token": "<i>", "pad_token": "<p>", "stop": ["token"], "top_p": 1}
    recipe = read(f"{TAGGING}      sampling_params: {json.dumps(params)}")
    assert recipe.steps[0].parameters == {"sampling_params": params}


def test_an_operator_that_is_not_supported_is_named_with_its_place_and_those_that_are(read):
    found = problems(read, "process: [image_captioning_mapper, image_blur_mapper, image_taging_vlm_mapper]")
    assert "not supported" in found["process[1].image_blur_mapper"]
    assert "did you mean image_tagging_vlm_mapper?" in found["process[2].image_taging_vlm_mapper"]
    assert "did you mean" not in found["process[1].image_blur_mapper"]
    assert all(name in found["process"] for name in SUPPORTED)
    assert len(found) == 3


def test_everything_that_is_wrong_is_said_at_once(read):
    found = problems(
        read,
        f"""
        nq: 3
        text_keys: [a, b]
        dataset_path: a b
        export_path: 3
        process:
          - image_blur_mapper
          - image_captioning_from_gpt4v_mapper:
              api_key: {SECRET}
              modus: description
        """,
    )
    gpt4v = "process[1].image_captioning_from_gpt4v_mapper"
    places = {"nq", "text_keys", "dataset_path", "export_path", "process", "process[0].image_blur_mapper"}
    assert set(found) == {*places, f"{gpt4v}.api_key", f"{gpt4v}.modus"}


def test_the_error_survives_its_journey_between_processes(read):
    with pytest.raises(RecipeError) as caught:
        read("nq: 3")
    for again in (pickle.loads(pickle.dumps(caught.value)), copy.copy(caught.value)):
        assert (str(again), again.problems) == (str(caught.value), caught.value.problems)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"api_key: {SECRET}: x", r"is no YAML, line 1, column 32: mapping values are not allowed"),
        (f"a: [{SECRET}", "is no YAML, line 1, column"),
        (f"- {SECRET}", "must be a mapping"),
        ("", "must be a mapping"),
        (f"a: !!python/object/apply:os.system [{SECRET}]", "could not determine a constructor"),
        ("a: \x00", "is no YAML"),
        ("[" * 5000, "nested too deeply"),
        ("#" * (MAX_RECIPE_BYTES + 1), "is no recipe"),
    ],
)
def test_what_is_no_recipe_is_refused_without_quoting_it(tmp_path, text, said):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=said) as caught:
        read_recipe(path)
    assert SECRET not in str(caught.value)
    assert str(path) in str(caught.value)
    assert caught.value.__cause__ is None


def test_a_recipe_that_is_not_there(tmp_path):
    with pytest.raises(
        ConfigError, match=r"nowhere\.yaml can't be read: No such file.*beside the DAG's file"
    ):
        read_recipe(tmp_path / "nowhere.yaml")
    with pytest.raises(ConfigError, match="can't be read: Is a directory"):
        read_recipe(tmp_path)
