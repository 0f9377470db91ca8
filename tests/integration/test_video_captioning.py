"""The operator with small models of the real kind, from clips on disk to the rows that are written."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from airflow_vlm_provider.operators.redrive import RedriveOperator
from airflow_vlm_provider.operators.video_captioning import VideoCaptioningFromVLMOperator
from tests.support.captioning import EOC, VIDEO
from tests.support.tiny_models import tiny_qwen, tiny_qwen3_vl
from tests.support.videos import video

pytestmark = pytest.mark.integration

MAKERS = {"qwen2.5-vl": tiny_qwen, "qwen3-vl": tiny_qwen3_vl}
# Videos of so many pictures, ten a second.
PICTURES = (40, 100, 250)


def ending(model: Path) -> Path:
    """Have every eighth token end an answer: random weights would hardly ever come to an end."""
    path = model / "generation_config.json"
    config = json.loads(path.read_text())
    config["eos_token_id"] = sorted({*config["eos_token_id"], *range(0, 1000, 8)})
    path.write_text(json.dumps(config))
    return model


@pytest.fixture(scope="module", params=MAKERS)
def model(request, tmp_path_factory) -> str:
    return str(ending(MAKERS[request.param](tmp_path_factory.mktemp("models") / request.param)))


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    (tmp_path / "in").mkdir()
    rows: list[dict[str, Any]] = []
    for number, pictures in enumerate(PICTURES):
        (tmp_path / "in" / f"{number}.mp4").write_bytes(video(pictures, fps=10))
        rows.append({"id": number, "text": f"{VIDEO} old {EOC}", "videos": [f"{number}.mp4"]})
    rows.append({"id": "sound", "text": "no video"})
    rows.append({"id": "gone", "text": "", "videos": ["gone.mp4"]})
    (tmp_path / "in" / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setenv("AIRFLOW_CONN_VLM_DEFAULT", json.dumps({"conn_type": "vlm"}))
    return tmp_path


def execute(operator: Any) -> dict[str, Any]:
    ti = SimpleNamespace(dag_id="d", run_id="r", task_id="t", map_index=-1, try_number=1)
    summary: dict[str, Any] = operator.execute({"ti": ti, "outlet_events": {}})
    return summary


def caption(place: Path, model: str, **given: Any) -> VideoCaptioningFromVLMOperator:
    return VideoCaptioningFromVLMOperator(
        task_id="caption",
        source=str(place / "in"),
        destination=str(place / "out"),
        engine="transformers",
        hf_model=model,
        fps=0.5,
        max_frames=4,
        max_error_rate=1.0,
        sampling_params={"max_new_tokens": 64},
        try_num=8,
        keep_original_sample=False,
        **given,
    )


@pytest.mark.parametrize("transport", ["auto", "frames"])
def test_long_videos_are_captioned_in_windows_and_a_run_again_asks_nothing(place, model, transport):
    operator = caption(place, model, window_seconds=10, transport=transport)
    summary = execute(operator)
    assert (summary["rows_in"], summary["ok"], summary["skipped"], summary["failed"]) == (5, 3, 1, 1)
    # A short one, one of just a window, and one of three, which are summed up.
    assert summary["requests"] >= 1 + 1 + 4
    # Every frame takes some tokens, and every request some words.
    assert summary["prompt_tokens"] > 50 * summary["requests"]
    written = (place / "out" / "a.jsonl").read_text()
    rows = [json.loads(line) for line in written.splitlines()]
    assert [row["id"] for row in rows] == [0, 1, 2, "sound", "gone"]
    found = [row["__dj__meta__"]["video_windows"] for row in rows[:3]]
    spans = [[(each["start"], each["end"]) for each in windows] for ((*windows,),) in found]
    assert spans == [[(0, 4)], [(0, 10)], [(0, 10), (10, 20), (20, 25)]]
    for row, ((*windows,),) in zip(rows, found, strict=False):
        said = row["text"].removeprefix(VIDEO).removesuffix(EOC).strip()
        assert said
        assert "old" not in row["text"]
        assert all(each["caption"] for each in windows)
        assert len(windows) > 1 or said == windows[0]["caption"]
    again = execute(operator)
    assert (again["requests"], again["shards_unchanged"]) == (0, 1)
    # The missing video has come: nothing else is asked about.
    (place / "in" / "gone.mp4").write_bytes(video(20, fps=10))
    redriven = execute(
        RedriveOperator(
            task_id="redrive", destination=str(place / "out"), engine="transformers", max_error_rate=1.0
        )
    )
    assert (redriven["redriven"], redriven["recovered"]) == (1, 1)
    assert 1 <= redriven["requests"] <= 8
    after = (place / "out" / "a.jsonl").read_text().splitlines()
    assert after[:4] == written.splitlines()[:4]


def test_candidates_of_a_whole_video_are_one_request(place, model):
    operator = caption(place, model, caption_num=3, keep_candidate_mode="all", seed=1)
    summary = execute(operator)
    rows = [json.loads(line) for line in (place / "out" / "a.jsonl").read_text().splitlines()]
    assert (summary["ok"], len(rows)) == (3, 3 * 3 + 2)
    assert all("__dj__meta__" not in row for row in rows)
    texts = [row["text"] for row in rows if row["id"] == 2]
    # They were drawn, each by itself.
    assert len(set(texts)) > 1
