"""The DAGs that users copy caption drawings and moving drawings, with the demo model, under a real scheduler."""

from __future__ import annotations

import json
import random
from datetime import datetime, timezone
from typing import Any

import pytest

from demo.drawings import draw
from demo.moving import draw_moving
from tests.support.stub_endpoint import tag_of
from tests.system.conftest import DEMO_MODEL, Deployment, tags

pytestmark = pytest.mark.system

IMAGE, VIDEO, EOC = "<__dj__image>", "<__dj__video>", "<|__dj__eoc|>"
ROWS = 8


def put_rows(deployment: Deployment, prefix: str, rows: list[dict[str, Any]]) -> None:
    """Upload rows as two shards."""
    half = len(rows) // 2
    for name, some in (("part-0.jsonl", rows[:half]), ("part-1.jsonl", rows[half:])):
        body = "".join(json.dumps(row) + "\n" for row in some)
        deployment.put("users", prefix + name, body.encode())


def put_drawings(deployment: Deployment, prefix: str, seed: int) -> list[str]:
    """Upload rows of drawings; returns their captions, by id."""
    rng, captions, rows = random.Random(seed), [], []
    for number in range(ROWS):
        drawing = draw(rng)
        deployment.put("users", f"{prefix}images/{number}.png", drawing.encode("PNG"))
        captions.append(drawing.caption)
        rows.append(
            {"id": number, "images": [f"images/{number}.png"], "text": f"{IMAGE} drawing {number} {EOC}"}
        )
    put_rows(deployment, prefix, rows)
    return captions


def written(deployment: Deployment, prefix: str) -> list[dict[str, Any]]:
    names = ("part-0.jsonl", "part-1.jsonl")
    return [row for name in names for row in deployment.rows("users", prefix + name)]


def assert_right(texts: list[str], expected: list[str]) -> None:
    """At most one drawing may be captioned wrongly: the model is a small one."""
    assert len(texts) == len(expected)
    wrong = [(text, right) for text, right in zip(texts, expected, strict=True) if right not in text]
    assert len(wrong) <= 1, wrong


def test_nightly_captions_double_the_samples(deployment):
    day = f"{datetime.now(timezone.utc):%Y-%m-%d}"
    captions = put_drawings(deployment, f"nightly/{day}/", seed=31)
    conf = {"source": "s3://users/nightly", "destination": "s3://users/out/nightly", "max_tasks": 1}
    model = DEMO_MODEL["model"]
    run_id = deployment.airflow.trigger_dag("demo_nightly_image_captioning", {**conf, "model": model})
    deployment.wait_for_success("demo_nightly_image_captioning", run_id)
    rows = written(deployment, f"out/nightly/{day}/")
    assert [row["id"] for row in rows] == [number for number in range(ROWS) for _ in "ab"]
    originals, new = rows[::2], rows[1::2]
    assert [row["text"] for row in originals] == [f"{IMAGE} drawing {n} {EOC}" for n in range(ROWS)]
    assert all(row["text"].startswith(IMAGE) and row["text"].endswith(EOC) for row in new)
    # Of four candidates that are drawn at temperature 1, the one most like the text is kept, not the most likely.
    assert sum(caption in row["text"] for row, caption in zip(new, captions, strict=True)) >= ROWS // 2


def test_tags_then_captions_with_one_plan(deployment):
    captions = put_drawings(deployment, "both/", seed=32)
    run_id = deployment.run("demo_tag_then_caption", "both/", max_tasks=2)
    rows = written(deployment, "out/both/")
    assert [row["id"] for row in rows] == list(range(ROWS))
    assert_right([row["text"] for row in rows], captions)
    assert all(tags(row)[0][1] in caption for row, caption in zip(rows, captions, strict=True))
    # Of what both steps have done, the next plan maps nothing.
    again = deployment.run("demo_tag_then_caption", "both/", max_tasks=2)
    assert len(deployment.airflow.xcom("demo_tag_then_caption", run_id, "plan")) == 2
    assert deployment.airflow.xcom("demo_tag_then_caption", again, "plan") == []


def test_moving_pictures_are_captioned(deployment):
    rng, captions, rows = random.Random(33), [], []
    for number in range(ROWS):
        moving = draw_moving(rng)
        deployment.put("users", f"moving/videos/{number}.mp4", moving.encode())
        captions.append(moving.caption)
        rows.append({"id": number, "videos": [f"videos/{number}.mp4"], "text": f"{VIDEO} no. {number} {EOC}"})
    put_rows(deployment, "moving/", rows)
    deployment.run("demo_video_captioning", "moving/", max_tasks=1)
    found = written(deployment, "out/moving/")
    assert [row["id"] for row in found] == list(range(ROWS))
    assert_right([row["text"] for row in found], captions)
    for row in found:
        (((window,),),) = [row["__dj__meta__"]["video_windows"]]
        assert (window["start"], window["end"]) == (0, 4)
        assert window["caption"] in row["text"]


def test_instruction_data_of_three_kinds_from_one_plan(deployment):
    shards = deployment.dataset("users", "kinds/", shards=2, rows=4, seed=34)
    rows = [row for shard in shards for row in deployment.rows("users", f"kinds/{shard}")]
    put_rows(deployment, "kinds/", [{**row, "text": IMAGE} for row in rows])
    for shard in shards:
        deployment.s3.delete_object(Bucket="users", Key=f"kinds/{shard}")
    asked = deployment.asked()
    deployment.run("instruction_data", "kinds/", max_tasks=1)
    # Each kind is another question about the same pictures.
    assert deployment.asked() - asked == 3 * len(rows)
    for kind in ("reasoning", "description", "conversation"):
        found = written(deployment, f"out/kinds/{kind}/")
        assert len(found) == len(rows)
        for row in found:
            picture = deployment.pictures[f"users/kinds/{row['images'][0]}"]
            assert tag_of(picture) in row["text"]
