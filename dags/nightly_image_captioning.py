"""Caption last night's images with a BLIP-2-style model in the workers' own processes: plan -> caption (mapped).

Copy this file and change what stands at its top. Every sample with images comes out twice: as it was, and with a
caption behind each image's placeholder (``<__dj__image>``) in place of its words; with ``KEEP_ORIGINALS = False``
only the captioned one. Of four candidates that the model draws for each image, the one that is most like the
sample's own words is kept.

The model is loaded by each task into its own process, so there should be few tasks, each with many shards, and no
more of them at a time than there are GPUs (``AT_ONCE``). They run where ``[vlm] gpu_queue`` and ``[vlm] gpu_pool`` say.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from airflow.sdk import DAG, Param

from airflow_vlm_provider.operators.image_captioning import ImageCaptioningOperator
from airflow_vlm_provider.operators.shards import PlanShardsOperator

SOURCE = "s3://datasets/images"
DESTINATION = "s3://datasets/images-captioned"
MODEL = "Salesforce/blip2-opt-2.7b"
KEEP_ORIGINALS = True
# As many as there are GPUs for them. The pool does not say it: tasks of the engine vllm share a GPU.
AT_ONCE = 1

with DAG(
    dag_id="nightly_image_captioning",
    schedule="@daily",
    start_date=datetime(2026, 1, 1),
    catchup=False,
    max_active_runs=1,
    default_args={"retries": 2, "retry_delay": timedelta(minutes=5)},
    params={
        "source": Param(SOURCE, type="string", description="Prefix with one folder of shards a day"),
        "destination": Param(DESTINATION, type="string", description="Where the captioned shards go"),
        "model": Param(MODEL, type="string", description="Image-to-text model on the hub, or a folder"),
        "max_tasks": Param(4, type="integer", minimum=1, description="Most tasks to spread the shards over"),
    },
    tags=["vlm"],
    doc_md=__doc__,
) as dag:
    # A run that was triggered by hand or by an asset may have no logical date.
    day = "{{ (dag_run.logical_date or dag_run.run_after) | ds }}"
    source = "{{ params.source.rstrip('/') }}/" + day + "/"

    plan = PlanShardsOperator(task_id="plan", source=source, max_tasks="{{ params.max_tasks }}")

    ImageCaptioningOperator.partial(
        task_id="caption",
        source=source,
        destination="{{ params.destination.rstrip('/') }}/" + day + "/",
        engine="transformers",
        max_active_tis_per_dag=AT_ONCE,
        hf_img2seq="{{ params.model }}",
        caption_num=4,
        keep_candidate_mode="similar_one_simhash",
        keep_original_sample=KEEP_ORIGINALS,
        gpu_batch_size=8,
        max_new_tokens=64,
        seed=1,
    ).expand(shards=plan.output)
