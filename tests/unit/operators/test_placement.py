"""Where tasks go: as the scheduler sees it, which reads nothing but the serialised DAG."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from airflow.sdk import DAG, BaseOperator, TaskGroup, task
from airflow.serialization.serialized_objects import DagSerialization

from airflow_vlm_provider.operators.engine_servers import StartEngineOperator, StopEngineOperator
from airflow_vlm_provider.operators.image_captioning import ImageCaptioningOperator
from airflow_vlm_provider.operators.image_captioning_gpt4v import ImageCaptioningFromGPT4VOperator
from airflow_vlm_provider.operators.image_tagging import ImageTaggingVLMOperator
from airflow_vlm_provider.operators.redrive import RedriveOperator
from airflow_vlm_provider.operators.shards import PlanShardsOperator
from airflow_vlm_provider.operators.video_captioning import VideoCaptioningFromVLMOperator
from airflow_vlm_provider.operators.vlm_map import VLMMapOperator

PLACES = {"source": "s3://b/in", "destination": "s3://b/out"}
SHARDS = ["a.jsonl", "b.jsonl"]
NOWHERE = ("default", "default_pool")
GPU = ("gpu", "gpu_slots")


@pytest.fixture
def configured(monkeypatch):
    monkeypatch.setenv("AIRFLOW__VLM__GPU_QUEUE", "gpu")
    monkeypatch.setenv("AIRFLOW__VLM__GPU_POOL", "gpu_slots")


def scheduled(dag: DAG) -> dict[str, tuple[str, str]]:
    """Queue and pool of each task of a DAG, as the scheduler sees them."""
    back = DagSerialization.from_dict(json.loads(json.dumps(DagSerialization.to_dict(dag))))
    return {each.task_id: (each.queue, each.pool) for each in back.tasks}


def tag(**kwargs: Any) -> BaseOperator:
    return ImageTaggingVLMOperator(task_id="tag", **PLACES, **kwargs)


def tag_mapped(**kwargs: Any) -> Any:
    return ImageTaggingVLMOperator.partial(task_id="tag", **PLACES, **kwargs).expand(shards=SHARDS)


def look(**kwargs: Any) -> Any:
    @task.vlm(task_id="tag", **PLACES, **kwargs)
    def look(sample: dict[str, Any]) -> str:
        return "What is it?"

    return look()


def look_mapped(**kwargs: Any) -> Any:
    @task.vlm(task_id="tag", **PLACES, **kwargs)
    def look(sample: dict[str, Any]) -> str:
        return "What is it?"

    return look.expand(shards=SHARDS)


each_way = pytest.mark.parametrize("make", [tag, tag_mapped, look, look_mapped])


@each_way
@pytest.mark.parametrize("engine", ["vllm", "transformers"])
def test_a_local_engine_takes_its_task_to_the_gpu(configured, make: Callable[..., Any], engine):
    with DAG("d", schedule=None) as dag:
        make(engine=engine)
    assert scheduled(dag) == {"tag": GPU}


@each_way
@pytest.mark.parametrize("kwargs", [{}, {"engine": "openai"}, {"is_api_model": True}])
def test_other_engines_and_those_that_only_the_connection_knows_stay_where_they_are(configured, make, kwargs):
    with DAG("d", schedule=None) as dag:
        make(**kwargs)
    assert scheduled(dag) == {"tag": NOWHERE}


@each_way
def test_without_configuration_nothing_changes(make, monkeypatch):
    with DAG("d", schedule=None) as dag:
        make(engine="vllm")
    assert scheduled(dag) == {"tag": NOWHERE}
    monkeypatch.setenv("AIRFLOW__VLM__GPU_QUEUE", "gpu")
    with DAG("d", schedule=None) as dag:
        make(engine="vllm")
    assert scheduled(dag) == {"tag": ("gpu", "default_pool")}


@each_way
@pytest.mark.parametrize(
    ("own", "where"),
    [
        ({"queue": "a100"}, ("a100", "gpu_slots")),
        ({"pool": "few"}, ("gpu", "few")),
        # It is the author's word though it is what Airflow would have taken.
        ({"queue": "default", "pool": "default_pool"}, NOWHERE),
    ],
)
def test_an_authors_word_counts_more_than_the_configuration(configured, make, own, where):
    with DAG("d", schedule=None) as dag:
        make(engine="vllm", **own)
    assert scheduled(dag) == {"tag": where}
    with DAG("d", schedule=None) as dag:
        make(engine="vllm", default_args=own)
    assert scheduled(dag) == {"tag": where}
    with DAG("d", schedule=None, default_args=own) as dag:
        make(engine="vllm")
    assert scheduled(dag) == {"tag": where}
    with DAG("d", schedule=None) as dag, TaskGroup("g", default_args=own):
        make(engine="vllm")
    assert scheduled(dag) == {"g.tag": where}
    # A group's word counts more than its DAG's.
    other = {name: f"another_{name}" for name in own}
    with DAG("d", schedule=None, default_args=other) as dag, TaskGroup("g", default_args=own):
        make(engine="vllm")
    assert scheduled(dag) == {"g.tag": where}


@each_way
def test_the_engine_may_be_told_by_default_args(configured, make):
    with DAG("d", schedule=None, default_args={"engine": "vllm"}) as dag:
        make()
        with TaskGroup("g", default_args={"engine": "openai"}):
            make()
    assert scheduled(dag) == {"tag": GPU, "g.tag": NOWHERE}


def test_a_function_is_decorated_outside_of_the_dag_that_it_is_used_in(configured):
    @task.vlm(engine="vllm", **PLACES)
    def look(sample: dict[str, Any]) -> str:
        return "What is it?"

    with DAG("d", schedule=None, default_args={"queue": "a100"}) as dag:
        look.expand(shards=SHARDS)
        look.override(task_id="again", pool="few").expand(shards=SHARDS)
        look.override(task_id="elsewhere", engine="openai", queue="default").expand(shards=SHARDS)
    assert scheduled(dag) == {
        "look": ("a100", "gpu_slots"),
        "again": ("a100", "few"),
        "elsewhere": NOWHERE,
    }


@pytest.mark.parametrize(
    ("operator", "kwargs"),
    [
        (ImageCaptioningOperator, {"engine": "transformers"}),
        (ImageCaptioningFromGPT4VOperator, {"engine": "vllm"}),
        (VideoCaptioningFromVLMOperator, {"engine": "vllm"}),
        (VideoCaptioningFromVLMOperator, {"enable_vllm": True}),
        (VLMMapOperator, {"engine": "vllm", "prompt": "What?"}),
        (RedriveOperator, {"engine": "vllm"}),
    ],
)
def test_every_operator_with_an_engine_goes_where_its_engine_is(configured, operator, kwargs):
    places = {"destination": "s3://b/out"} if operator is RedriveOperator else PLACES
    with DAG("d", schedule=None) as dag:
        operator(task_id="one", **places, **kwargs)
        operator.partial(task_id="many", **places, **kwargs).expand(shards=SHARDS)
    assert scheduled(dag) == {"one": GPU, "many": GPU}


def test_servers_are_started_and_stopped_where_they_are_used(configured):
    # Other tasks of the DAG may have another engine.
    with DAG("d", schedule=None, default_args={"engine": "openai"}) as dag:
        PlanShardsOperator(task_id="plan", source="s3://b/in")
        start = StartEngineOperator(task_id="start")
        stop = StopEngineOperator.partial(task_id="stop").expand(vlm_conn_id=["a", "b"])
        start >> stop
    assert scheduled(dag) == {"plan": NOWHERE, "start": GPU, "stop": GPU}
