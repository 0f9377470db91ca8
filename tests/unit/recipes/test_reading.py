"""Recipes as people have them: what is read of one, and what is ignored and said to be."""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import indent

import pytest

from airflow_vlm_provider.recipes.operators import FIELDS, IGNORED_PARAMETERS, SUPPORTED
from airflow_vlm_provider.recipes.reading import read_recipe
from airflow_vlm_provider.recipes.recipe import Recipe
from airflow_vlm_provider.recipes.settings import IGNORED, READ, REFUSED, SHARED
from tests.support.recipes import TAGGING


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


def test_a_recipe_may_begin_with_a_byte_order_mark(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + indent(TAGGING, "").encode())
    assert len(read_recipe(path).steps) == 1


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
