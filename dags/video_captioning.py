"""Caption videos with a vision-language model: plan -> caption (mapped).

Copy this file and change what stands at its top. Videos are looked at in windows of half a minute, two frames a
second: each window gets a caption with its beginning and end, below ``__dj__meta__`` in ``video_windows``, and a
summary of these is the caption in the text, behind the video's placeholder (``<__dj__video>``). Frames are taken on
the task's side, so a video of hours is neither held in memory nor sent.

``transport`` is ``auto``: an endpoint that takes videos gets short clips, any other the frames as images.
"""

from __future__ import annotations

from datetime import datetime, timedelta

from airflow.sdk import DAG, Param, conf

from airflow_vlm_provider.operators.shards import PlanShardsOperator
from airflow_vlm_provider.operators.video_captioning import VideoCaptioningFromVLMOperator

SOURCE = "s3://datasets/videos"
DESTINATION = "s3://datasets/videos-captioned"
# Where the tasks that ask the model run is configuration. It is named here because the engine is the connection's, which is
# not known when this is parsed. Leave both out for an endpoint that needs no GPU of yours: then any worker will do.
QUEUE = conf.get("vlm", "gpu_queue", fallback="") or conf.get("operators", "default_queue")
POOL = conf.get("vlm", "gpu_pool", fallback="") or "default_pool"

with DAG(
    dag_id="video_captioning",
    schedule=None,
    start_date=datetime(2026, 1, 1),
    default_args={"retries": 2, "retry_delay": timedelta(minutes=5)},
    params={
        "source": Param(SOURCE, type="string", description="Prefix of the shards"),
        "destination": Param(DESTINATION, type="string", description="Where the captioned shards go"),
        "max_tasks": Param(50, type="integer", minimum=1, description="Most tasks to spread the shards over"),
    },
    tags=["vlm"],
    doc_md=__doc__,
) as dag:
    plan = PlanShardsOperator(
        task_id="plan", source="{{ params.source }}", max_tasks="{{ params.max_tasks }}"
    )

    VideoCaptioningFromVLMOperator.partial(
        task_id="caption",
        source="{{ params.source }}",
        destination="{{ params.destination }}",
        queue=QUEUE,
        pool=POOL,
        window_seconds=30,
        fps=2.0,
        max_frames=32,
        max_pixels=448 * 448,
        transport="auto",
        keep_original_sample=False,
    ).expand(shards=plan.output)
