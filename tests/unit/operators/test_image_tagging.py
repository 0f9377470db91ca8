from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk.exceptions import AirflowFailException

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.hooks.vlm import VLMHook
from airflow_vlm_provider.operators.destination import check_destination
from airflow_vlm_provider.operators.engines import make_engine
from airflow_vlm_provider.operators.image_tagging import ImageTaggingVLMOperator

CONTEXT: Any = {"ti": SimpleNamespace(dag_id="d", run_id="r", task_id="t", map_index=-1, try_number=1)}


def operator(**given) -> ImageTaggingVLMOperator:
    return ImageTaggingVLMOperator(
        **{"task_id": "tag", "source": "s3://b/in/", "destination": "s3://b/out/", **given}
    )


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"engine": "ollama"}, ["engine='ollama'", "'openai'"]),
        ({"engine": "transformers", "is_api_model": True}, ["is_api_model=True", "engine='transformers'"]),
        ({"max_error_rate": 5}, ["max_error_rate=5", "0 to 1"]),
        ({"max_error_rate": "0.1"}, ["max_error_rate='0.1'"]),
        ({"max_pixels": 0}, ["max_pixels=0"]),
        ({"concurrency": 1.5}, ["concurrency=1.5"]),
        ({"concurrency": True}, ["concurrency=True"]),
        ({"media_roots": "s3://b/"}, ["media_roots='s3://b/'", "list"]),
        ({"image_key": ""}, ["image_key=''"]),
        ({"try_num": 0}, ["try_num", "0"]),
        ({"tag_field_name": ""}, ["tag_field_name"]),
        ({"sampling_params": "hot"}, ["sampling_params", "hot"]),
        ({"destination": "s3://b/in"}, ["destination='s3://b/in'", "replaced by their own output"]),
        ({"destination": "s3://b/in/tagged/"}, ["lies inside source", "beside the source"]),
        ({"source": ""}, ["source=''"]),
        ({"model_params": "x"}, ["model_params='x'", "dict"]),
        ({"model_params": {"a": {1}}}, ["model_params", "JSON"]),
        ({"media_roots": 5}, ["media_roots=5", "list"]),
        ({"media_roots": [5]}, ["media_roots=[5]"]),
        ({"shards": 5}, ["shards=5"]),
        ({"response_path": 5}, ["response_path=5"]),
        ({"api_endpoint": 5}, ["api_endpoint=5"]),
    ],
)
def test_wrong_parameters_fail_when_the_dag_is_parsed(given, words):
    with pytest.raises(ConfigError) as caught:
        operator(**given)
    for word in words:
        assert word in str(caught.value)


def test_what_is_templated_is_not_judged_before_it_is_rendered():
    task = operator(source="{{ params.here }}", destination="{{ params.here }}")
    task.render_template_fields({"params": {"here": "s3://b/in/"}})
    with pytest.raises(ConfigError, match="replaced by their own output"):
        check_destination(task.source, task.destination)


def test_a_single_shard_is_not_replaced_by_its_own_output(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text("{}\n")
    monkeypatch.setenv("AIRFLOW_CONN_VLM_DEFAULT", json.dumps({"conn_type": "vlm", "host": "h"}))
    task = operator(source=str(tmp_path / "a.jsonl"), destination=str(tmp_path))
    with pytest.raises(AirflowFailException, match="replaced by their own output"):
        task.execute(CONTEXT)
    assert (tmp_path / "a.jsonl").read_text() == "{}\n"


@pytest.mark.parametrize(
    ("source", "given", "words"),
    [
        ("", {}, "holds no shards"),
        ("", {"shards": ["absent.jsonl"]}, "'absent.jsonl', which is not to be found"),
        ("", {"shards": "picture.png"}, "not a shard of a supported format"),
    ],
)
def test_a_source_without_the_shards_fails_without_retries(tmp_path, source, given, words):
    task = operator(source=str(tmp_path / source), destination=str(tmp_path.parent / "out"), **given)
    with pytest.raises(AirflowFailException, match=words):
        task.execute(CONTEXT)


def connect(monkeypatch, **fields) -> VLMHook:
    monkeypatch.setenv("AIRFLOW_CONN_VLM_X", json.dumps({"conn_type": "vlm", **fields}))
    return VLMHook("vlm_x")


def choose(hook: VLMHook, **given):
    nothing = dict.fromkeys(
        ("engine", "model", "concurrency", "api_endpoint", "response_path", "model_params")
    )
    return make_engine(hook, **{**nothing, **given})


def test_the_connection_supplies_what_the_operator_leaves_open(monkeypatch):
    hook = connect(monkeypatch, host="gpu:8000", extra={"model": "theirs", "max_concurrency": 7})
    engine = choose(hook)
    assert (type(engine).__name__, engine.model, engine.concurrency) == ("OpenAIEngine", "theirs", 7)
    engine = choose(hook, model="mine", concurrency=3)
    assert (engine.model, engine.concurrency) == ("mine", 3)
    engine = choose(connect(monkeypatch, host="gpu:8000"))
    assert (engine.model, engine.concurrency) == ("Qwen/Qwen2.5-VL-7B-Instruct", 32)
    engine = choose(
        connect(monkeypatch, extra={"engine": "transformers", "engine_args": {"gpu_batch_size": 3}})
    )
    assert (type(engine).__name__, engine.gpu_batch_size) == ("TransformersEngine", 3)


def test_an_engine_that_cannot_be_had_is_refused_with_its_remedy(monkeypatch):
    with pytest.raises(ConfigError, match="has no host"):
        choose(connect(monkeypatch))
    with pytest.raises(ConfigError, match="engine argument 'port' can't be given"):
        choose(connect(monkeypatch), engine="vllm", model_params={"port": 8000})
    with pytest.raises(ConfigError, match="api_endpoint='/x' is for the engine openai"):
        choose(connect(monkeypatch), engine="transformers", api_endpoint="/x")
    hook = connect(monkeypatch, host="gpu:8000")
    with pytest.raises(ConfigError, match="api_key") as caught:
        choose(hook, model_params={"api_key": "sk-leaked-in-a-dag"})
    assert "sk-leaked" not in str(caught.value)


@pytest.mark.parametrize(("value", "size"), [("8", 8), (3, 3)])
def test_a_batch_size_may_be_a_string_as_in_a_connection_written_as_a_uri(monkeypatch, value, size):
    extra = {"engine": "transformers", "engine_args": {"gpu_batch_size": value}}
    assert choose(connect(monkeypatch, extra=extra)).gpu_batch_size == size


@pytest.mark.parametrize("value", [2.5, "many", 0, True])
def test_a_batch_size_that_is_no_whole_number_is_refused(monkeypatch, value):
    extra = {"engine": "transformers", "engine_args": {"gpu_batch_size": value}}
    with pytest.raises(ConfigError, match="gpu_batch_size"):
        choose(connect(monkeypatch, extra=extra))


def test_the_label_of_a_mapped_task_names_its_shards():
    context: dict = {"params": {}}
    task = operator(shards=["a.jsonl", "b.jsonl", "c.jsonl"])
    assert task.map_index_template == "{{ shard_name }}"
    task.render_template_fields(context)
    assert context["shard_name"] == "a.jsonl and 2 more"
    assert operator(map_index_template=None).map_index_template == "{{ shard_name }}"
    for shards, label in (("a.jsonl", "a.jsonl"), (["a.jsonl"], "a.jsonl"), (None, "in")):
        operator(shards=shards).render_template_fields(context)
        assert context["shard_name"] == label


def test_a_key_among_the_arguments_is_refused_with_where_it_belongs_and_is_not_repeated():
    for make in (operator, ImageTaggingVLMOperator.partial):
        with pytest.raises(ConfigError, match="password of the connection") as caught:
            make(**({"task_id": "t"} if make is not operator else {}), api_key="sk-hush-123456")
        assert "hush" not in str(caught.value)
