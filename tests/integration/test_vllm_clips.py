"""What vLLM looks at of the clips that are made for it: all of their pictures, by its own readers."""

from __future__ import annotations

import random

import pytest

from airflow_vlm_provider.shards.media import MediaLoader
from airflow_vlm_provider.types import FrameSampling, Media, MediaRef
from demo.moving import decode, draw_moving
from tests.support.vllm_server import require_vllm

pytestmark = pytest.mark.integration


@pytest.mark.parametrize(
    "seconds", [0.1, 0.4, 0.75, 1.3, 2.3, 3.0, 3.9, 5.25, 5.75, 7.4, 10.3, 15.75, 16.0, 40.0]
)
@pytest.mark.parametrize("fps", [1.0, 2.0])
def test_every_picture_of_a_clip_is_looked_at(tmp_path, fps, seconds):
    require_vllm()
    from vllm.multimodal.video import Qwen2VLVideoBackend, Qwen3VLVideoBackend, VideoBackend

    drawing = draw_moving(random.Random(1), side=64, aspect=(1.0, 1.0), seconds=seconds, fps=10)
    (tmp_path / "a.mp4").write_bytes(drawing.encode())
    loader, frames = MediaLoader(source_uri=str(tmp_path)), FrameSampling(fps, 32)
    source = loader.fetch(MediaRef("video", "a.mp4", frames), shard="a.jsonl", embedded={})
    (clip,) = loader.prepare(source, frames=frames, as_video=True)
    assert isinstance(clip, Media)
    pictures = len(decode(clip.data))
    # As vLLM reads for Qwen2-VL and Qwen2.5-VL, for Qwen3-VL, and for models without rules of their own.
    for reader, options in (
        (Qwen2VLVideoBackend, {}),
        (Qwen3VLVideoBackend, {}),
        (VideoBackend, {"num_frames": 32}),
    ):
        taken, _ = reader.load_bytes(clip.data, **options)
        assert len(taken) == pictures, reader.__name__
