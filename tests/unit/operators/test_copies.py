"""Tasks are copied deeply where somebody takes a part of a DAG, as the UI and tests of DAGs do."""

from __future__ import annotations

from typing import Any

import pytest
from airflow.sdk import DAG, BaseOperator

from airflow_vlm_provider.operators.engine_servers import StartEngineOperator, StopEngineOperator
from airflow_vlm_provider.operators.export import ExportDatasetOperator
from airflow_vlm_provider.operators.image_captioning import ImageCaptioningOperator
from airflow_vlm_provider.operators.image_captioning_gpt4v import ImageCaptioningFromGPT4VOperator
from airflow_vlm_provider.operators.image_tagging import ImageTaggingVLMOperator
from airflow_vlm_provider.operators.redrive import RedriveOperator
from airflow_vlm_provider.operators.shards import PlanShardsOperator
from airflow_vlm_provider.operators.video_captioning import VideoCaptioningFromVLMOperator
from airflow_vlm_provider.operators.vlm_map import VLMMapOperator

PLACES = {"source": "s3://b/in", "destination": "s3://b/out"}


@pytest.mark.parametrize(
    ("operator", "kwargs"),
    [
        (StartEngineOperator, {}),
        (StopEngineOperator, {}),
        (PlanShardsOperator, {"source": "s3://b/in"}),
        (ImageTaggingVLMOperator, PLACES),
        (ImageCaptioningOperator, PLACES),
        (ImageCaptioningFromGPT4VOperator, PLACES),
        (VideoCaptioningFromVLMOperator, PLACES),
        (VLMMapOperator, {**PLACES, "prompt": "What?"}),
        (RedriveOperator, {"destination": "s3://b/out"}),
        (
            ExportDatasetOperator,
            {"source": "s3://b/out", "destination": "s3://b/coco.json", "format": "coco"},
        ),
    ],
)
def test_a_task_is_part_of_a_part_of_its_dag(operator: type[BaseOperator], kwargs: dict[str, Any]):
    with DAG("d", schedule=None) as dag:
        task = operator(task_id="it", **kwargs)
        # What runs is told so from another thread.
        task.on_kill()
    (copy,) = dag.partial_subset("it").tasks
    assert copy is not task
    assert type(copy) is operator
