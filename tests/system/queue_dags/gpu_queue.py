"""DAGs as their authors would write them where the GPU has a queue of its own."""

from __future__ import annotations

from datetime import timedelta

from airflow.sdk import DAG, Param

from airflow_vlm_provider.operators.image_tagging import ImageTaggingVLMOperator
from airflow_vlm_provider.operators.shards import PlanShardsOperator
from airflow_vlm_provider.operators.vlm_map import VLMMapOperator

GROUPS = 16
PLACES = {"source": "{{ params.source }}", "destination": "{{ params.destination }}"}
PARAMS = {"source": Param("", type="string"), "destination": Param("", type="string")}
RETRIED = {"retries": 5, "retry_delay": timedelta(seconds=1)}

ASK = {
    **PLACES,
    "engine": "vllm",
    "vlm_conn_id": "vlm_fake",
    "prompt": "What is {text}?",
    "concurrency": 2,
    **RETRIED,
}

with DAG("ask", schedule=None, params=PARAMS):
    plan = PlanShardsOperator(task_id="plan", source=PLACES["source"], max_tasks=GROUPS)
    VLMMapOperator.partial(task_id="ask", **ASK).expand(shards=plan.output)

with DAG("tag", schedule=None, params=PARAMS):
    plan = PlanShardsOperator(task_id="plan", source=PLACES["source"], max_tasks=GROUPS)
    ImageTaggingVLMOperator.partial(
        task_id="tag", **PLACES, engine="vllm", vlm_conn_id="vlm_demo", **RETRIED
    ).expand(shards=plan.output)

# With several executors, it is the executor that knows queues; those of LocalExecutor's tasks mean nothing.
with DAG("ask_at_the_edge", schedule=None, params=PARAMS, default_args={"executor": "LocalExecutor"}):
    plan = PlanShardsOperator(task_id="plan", source=PLACES["source"], max_tasks=GROUPS)
    VLMMapOperator.partial(task_id="ask", **ASK, executor="EdgeExecutor").expand(shards=plan.output)
