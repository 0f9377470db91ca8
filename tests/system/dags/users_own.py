"""DAGs as their authors would write them: public names only."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG, Asset, Param

from airflow_vlm_provider.operators.image_tagging import ImageTaggingVLMOperator
from airflow_vlm_provider.operators.redrive import RedriveOperator
from airflow_vlm_provider.operators.shards import PlanShardsOperator

RETRIED = {"retries": 5, "retry_delay": timedelta(seconds=1)}
PLACES = {"source": Param("", type="string"), "destination": Param("", type="string")}

with DAG("users_own", schedule=None, params=PLACES):
    plan = PlanShardsOperator(task_id="plan", source="{{ params.source }}", max_tasks=3)
    ImageTaggingVLMOperator.partial(
        task_id="tag",
        source="{{ params.source }}",
        destination="{{ params.destination }}",
        vlm_conn_id="vlm_stub",
        outlets=[Asset(name="users_tags", uri="s3://users/tags")],
        **RETRIED,
    ).expand(shards=plan.output)

with DAG("one_task", schedule=None, params=PLACES):
    ImageTaggingVLMOperator(
        task_id="tag",
        source="{{ params.source }}",
        destination="{{ params.destination }}",
        vlm_conn_id="vlm_stub",
        concurrency=4,
        **RETRIED,
    )

with DAG("dead_letters", schedule=None, params={"destination": Param("", type="string")}):
    RedriveOperator(
        task_id="redrive", destination="{{ params.destination }}", vlm_conn_id="vlm_stub", **RETRIED
    )

with DAG("embedded", schedule=None, params=PLACES):
    beside = ImageTaggingVLMOperator(
        task_id="beside",
        source="{{ params.source }}",
        destination="{{ params.destination }}/beside",
        vlm_conn_id="vlm_stub",
        **RETRIED,
    )
    in_full = ImageTaggingVLMOperator(
        task_id="in_full",
        source="{{ params.source }}",
        destination="{{ params.destination }}/full",
        reuse_from="{{ params.destination }}/beside",
        output="full",
        vlm_conn_id="vlm_stub",
        **RETRIED,
    )
    beside >> in_full

with DAG("wrong_key", schedule=None, params={"source": Param("", type="string")}):
    ImageTaggingVLMOperator(
        task_id="tag",
        source="{{ params.source }}",
        destination="s3://users/never",
        vlm_conn_id="vlm_wrong_key",
        retries=3,
    )
