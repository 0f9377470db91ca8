"""A step that asks for one caption of a row's video."""

from __future__ import annotations

from typing import Any

from airflow_vlm_provider.steps.base import StepRun
from airflow_vlm_provider.types import FrameSampling, MediaRef, Request, Result, Sample, Transport


class VideoStep:
    """Takes whatever is answered for the caption.

    :param fps: Frames that are looked at of every second.
    :param max_frames: How many at most.
    :param sampling: Sampling parameters of the request.
    """

    name = "caption"
    asking = frozenset({"fps", "max_frames", "sampling"})

    def __init__(
        self, transport: Transport, *, fps: float = 1.0, max_frames: int = 2, **sampling: Any
    ) -> None:
        self.frames = FrameSampling(fps, max_frames, transport=transport)
        self.sampling = sampling

    def parameters(self) -> dict[str, Any]:
        return {"fps": self.frames.fps, "max_frames": self.frames.max_frames, "sampling": self.sampling}

    def generated(self) -> dict[str, Any]:
        return {"caption": {"type": "string"}}

    def process(self, sample: Sample) -> StepRun:
        row = sample.row
        assert row is not None
        video = MediaRef("video", row["video"], self.frames)
        (answer,) = yield [Request(None, (video, "Describe this video."), sampling=self.sampling)]
        return Result(rows=({**row, "caption": answer.choices[0].text},))
