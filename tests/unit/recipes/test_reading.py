"""Recipes as people have them: what is read of one, what is ignored and said to be, and everything that is refused."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from textwrap import dedent, indent
from typing import Any

import pytest

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.recipes.operators import FIELDS, IGNORED_PARAMETERS, SUPPORTED
from airflow_vlm_provider.recipes.reading import MAX_RECIPE_BYTES, read_recipe
from airflow_vlm_provider.recipes.recipe import Recipe, RecipeError
from airflow_vlm_provider.recipes.settings import IGNORED, READ, REFUSED, SHARED

SECRET = "sk-not-to-be-seen-41d8"
TAGGING = "process:\n  - image_tagging_vlm_mapper:\n"
CAPTIONING = "process:\n  - image_captioning_mapper:\n"
GPT4V = "process:\n  - image_captioning_from_gpt4v_mapper:\n"


@pytest.fixture
def read(tmp_path):
    """Read a recipe of this text; with ``process`` added where it is left out."""

    def read(text: str) -> Recipe:
        text = dedent(text)
        path = tmp_path / "recipe.yaml"
        path.write_text(text if "process" in text else f"{text}\n{TAGGING}")
        return read_recipe(path)

    return read


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


def ignored(recipe: Recipe) -> dict[str, str]:
    return {each.place: each.reason for each in recipe.ignored}


# --- what a recipe says ----------------------------------------------------------------------------------------


def test_a_whole_recipe(read, tmp_path):
    recipe = read(
        """
        project_name: demo
        dataset_path: s3://bucket/raw
        export_path: s3://bucket/out/captioned.jsonl
        np: 4
        text_keys: caption
        image_key: pictures
        video_key: clips
        audio_key: sounds
        image_special_token: <img>
        video_special_token: <vid>
        audio_special_token: <aud>
        eoc_special_token: <end>
        process:
          - image_tagging_vlm_mapper:
              api_or_hf_model: some/model
              try_num: 2
              sampling_params: {temperature: 0.5, max_tokens: 99}
          - image_captioning_mapper
          - image_captioning_mapper: null
        """
    )
    shared = {
        "text_key": "caption",
        "image_key": "pictures",
        "video_key": "clips",
        "image_special_token": "<img>",
        "video_special_token": "<vid>",
        "audio_special_token": "<aud>",
        "eoc_special_token": "<end>",
    }
    assert (recipe.path, recipe.source) == (tmp_path / "recipe.yaml", "s3://bucket/raw")
    assert (recipe.destination, recipe.pattern) == ("s3://bucket/out/captioned", None)
    tagging, one, two = recipe.steps
    assert tagging.parameters == {
        **shared,
        "api_or_hf_model": "some/model",
        "try_num": 2,
        "sampling_params": {"temperature": 0.5, "max_tokens": 99},
    }
    assert (tagging.name, tagging.place) == ("image_tagging", "process[0].image_tagging_vlm_mapper")
    assert (one.name, two.name) == ("image_captioning", "image_captioning_2")
    assert one.parameters == two.parameters == shared
    assert two.position == 2
    assert set(ignored(recipe)) == {"project_name", "np", "audio_key", "export_path"}


def test_what_is_left_out_is_left_to_the_operators(read):
    recipe = read("")
    assert (recipe.source, recipe.destination, recipe.pattern) == (None, None, None)
    assert [dict(step.parameters) for step in recipe.steps] == [{}]
    assert ignored(recipe) == {}


def test_null_is_left_out_too(read):
    names = [*SHARED, *READ - {"process"}, *REFUSED]
    recipe = read("\n".join(f"{name}: null" for name in names))
    assert (recipe.source, recipe.destination) == (None, None)
    assert [dict(step.parameters) for step in recipe.steps] == [{}]


def test_fields_of_one_operator_come_before_the_recipes(read):
    recipe = read(
        """
        text_keys: [a]
        image_key: b
        process:
          - image_tagging_vlm_mapper:
              text_key: c
              video_key: d
              image_key: null
          - image_tagging_vlm_mapper
        """
    )
    assert [dict(step.parameters) for step in recipe.steps] == [
        {"text_key": "c", "image_key": "b", "video_key": "d"},
        {"text_key": "a", "image_key": "b"},
    ]


@pytest.mark.parametrize("name", sorted(SUPPORTED))
def test_every_parameter_of_every_operator_is_mapped(read, name):
    supported = SUPPORTED[name]
    assert not set(supported.known) & ({*IGNORED_PARAMETERS, *FIELDS, *supported.secrets})
    given = {parameter: f"value of {parameter}" for parameter in supported.known}
    recipe = read(f"process:\n  - {name}: {json.dumps(given)}")
    assert recipe.steps[0].parameters == given
    assert recipe.steps[0].operator == name


# As Data-Juicer's own collection of all operators has them, with its defaults.
EVERY_DEFAULT = """
project_name: 'all'
dataset_path: '/path/to/your/dataset'
dataset:
  max_sample_num: 10000
  configs:
    - type: 'local'
      weight: 0.5
      path: '/path/to/json/file'
    - type: 'local'
      weight: 0.5
      path: '/path/to/csv/file'
validators:
  - type: 'required_fields'
    required_fields:
      - "text"
    field_types:
      text: 'str'
export_path: '/path/to/result/dataset.jsonl'
export_type: 'jsonl'
export_shard_size: 0
export_in_parallel: false
export_extra_args: {}
load_dataset_kwargs: {}
load_jsonl_lenient: false
auto_op_parallelism: true
np: 4
text_keys: 'text'
suffixes: []
turbo: false
skip_op_error: true
use_cache: true
ds_cache_dir: null
decrypt_after_reading: false
encrypt_before_export: false
encryption_key_path: null
image_key: 'images'
image_bytes_key: 'image_bytes'
image_special_token: '<__dj__image>'
audio_key: 'audios'
audio_special_token: '<__dj__audio>'
video_key: 'videos'
video_special_token: '<__dj__video>'
eoc_special_token: '<|__dj__eoc|>'
executor_type: default
partition:
  mode: auto
checkpoint:
  enabled: true
checkpoint.n_ops: 3
export_aws_credentials: null
process:
  - image_tagging_vlm_mapper:
      api_or_hf_model: 'Qwen/Qwen2.5-VL-7B-Instruct'
      is_api_model: false
      tag_field_name: 'image_tags'
      api_endpoint: null
      response_path: null
      system_prompt: null
      input_template: null
      model_params: {}
      sampling_params: {}
      try_num: 3
  - image_captioning_mapper:
      hf_img2seq: 'Salesforce/blip2-opt-2.7b'
      trust_remote_code: false
      caption_num: 1
      keep_candidate_mode: 'random_any'
      keep_original_sample: true
      prompt: null
      prompt_key: null
      gpu_batch_size: 8
      memory: '16GB'
  - image_captioning_from_gpt4v_mapper:
      mode: 'description'
      api_key: ''
      max_token: 500
      temperature: 1.0
      system_prompt: ''
      user_prompt: ''
      user_prompt_key: null
      keep_original_sample: true
      any_or_all: 'any'
  - video_captioning_from_vlm_mapper:
      hf_model: 'Qwen/Qwen3-VL-8B-Instruct'
      enable_vllm: false
      caption_num: 1
      keep_candidate_mode: 'random_any'
      keep_original_sample: true
      prompt: null
      prompt_key: null
      system_prompt: null
      model_params: {}
      sampling_params: {}
      num_gpus: 1
"""


def test_a_recipe_with_every_default_passes_unchanged(read):
    recipe = read(EVERY_DEFAULT)
    assert [step.operator for step in recipe.steps] == list(SUPPORTED)
    for step in recipe.steps:
        assert set(step.supported.parameters) <= set(step.parameters)
    assert (recipe.source, recipe.destination) == ("/path/to/your/dataset", "/path/to/result/dataset")
    told = ignored(recipe)
    assert {"np", "dataset", "validators", "partition", "checkpoint", "checkpoint.n_ops"} <= set(told)
    assert "process[1].image_captioning_mapper.memory" in told
    assert "process[3].video_captioning_from_vlm_mapper.num_gpus" in told
    assert all(told.values())


def test_every_setting_without_a_meaning_is_listed_with_the_reason(read):
    recipe = read("\n".join(f"{name}: 1" for name in IGNORED))
    assert ignored(recipe) == dict(IGNORED)
    recipe = read(f"{TAGGING}      " + json.dumps(dict.fromkeys(IGNORED_PARAMETERS, 1)))
    places = {f"process[0].image_tagging_vlm_mapper.{name}": why for name, why in IGNORED_PARAMETERS.items()}
    assert ignored(recipe) == places
    assert recipe.steps[0].parameters == {}


def test_no_setting_means_two_things():
    tables = [set(SHARED), set(READ), set(IGNORED), set(REFUSED)]
    assert sum(map(len, tables)) == len(set.union(*tables))


# --- where things are ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "source"),
    [
        ("data/x.jsonl", "{folder}/data/x.jsonl"),
        ("./data/x.jsonl", "{folder}/data/x.jsonl"),
        ("./data/", "{folder}/data/"),
        ("../data", "{parent}/data"),
        ("/abs/data.parquet", "/abs/data.parquet"),
        ("/abs//data/", "/abs/data/"),
        ("'my data/x.jsonl'", "{folder}/my data/x.jsonl"),
        ("bob's.jsonl", "{folder}/bob's.jsonl"),
        ("file:///abs/data", "file:///abs/data"),
        ("gs://bucket/data", "gs://bucket/data"),
        ("{{ params.source }}", "{{ params.source }}"),
        ("s3://bucket/{{ ds }}/", "s3://bucket/{{ ds }}/"),
    ],
)
def test_a_relative_dataset_path_is_relative_to_the_recipe(read, tmp_path, given, source):
    expected = source if "{{" in source else source.format(folder=tmp_path, parent=tmp_path.parent)
    assert read(f"dataset_path: {json.dumps(given)}").source == expected


@pytest.mark.parametrize(
    ("given", "destination"),
    [
        ("./outputs/demo/demo.jsonl", "{folder}/outputs/demo/demo"),
        ("./outputs/demo/", "{folder}/outputs/demo/"),
        ("out.parquet", "{folder}/out"),
        ("out.json", "{folder}/out"),
        ("/abs/v1.2", "/abs/v1.2"),
        ("s3://bucket/out/result.jsonl.gz", "s3://bucket/out/result"),
        ("s3://bucket/out", "s3://bucket/out"),
        ("{{ params.out }}", "{{ params.out }}"),
    ],
)
def test_a_file_to_export_to_becomes_a_folder(read, tmp_path, given, destination):
    recipe = read(f"export_path: {json.dumps(given)}")
    assert recipe.destination == (destination if "{{" in destination else destination.format(folder=tmp_path))
    assert ("export_path" in ignored(recipe)) == (
        Path(given).suffix in (".jsonl", ".parquet", ".json", ".gz")
    )


@pytest.mark.parametrize(
    "config",
    [
        {"type": "local", "path": "data/a.jsonl", "weight": 1.0},
        {"path": "data/a.jsonl"},
    ],
)
def test_one_local_dataset_by_configs(read, tmp_path, config):
    recipe = read(f"dataset: {json.dumps({'configs': [config]})}")
    assert recipe.source == f"{tmp_path}/data/a.jsonl"
    assert ("dataset.configs[0].weight" in ignored(recipe)) == ("weight" in config)


def test_one_dataset_on_s3_by_configs(read):
    config = {"type": "remote", "source": "s3", "path": "s3://b/data", "aws_region": "eu-west-1"}
    recipe = read(f"dataset: {json.dumps({'configs': [config]})}")
    assert recipe.source == "s3://b/data"
    assert "aws_conn_id" in ignored(recipe)["dataset.configs[0].aws_region"]


def test_one_suffix_chooses_among_the_shards(read):
    assert read("suffixes: .jsonl").pattern == "*.jsonl"
    assert read("suffixes: [tar.gz]").pattern == "*.tar.gz"
    assert read("suffixes: []").pattern is None


# --- what is wrong ---------------------------------------------------------------------------------------------


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


def test_a_recipe_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + indent(TAGGING, "").encode())
    assert len(read_recipe(path).steps) == 1
