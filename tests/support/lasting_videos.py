"""A row with a video, and answers about videos of which each lasts as long as a test says."""

from __future__ import annotations

import json
import re
from typing import Any

from airflow_vlm_provider.types import MediaRef, Probe, Request
from tests.support.captioning import EOC, VIDEO, answer

PLAIN = {"text": f"{VIDEO} a clip {EOC}", "videos": ["a.mp4"]}


def lasting(**durations: Any):
    """Says how long videos are, and captions each request by its media and its span."""

    def says(request: Request | Probe) -> Any:
        if isinstance(request, Probe):
            facts = {"duration": durations[request.ref.ref.removesuffix(".mp4")], "width": 4, "height": 4}
            return answer(json.dumps({**facts, "fps": 25.0}), key=f"probe of {request.ref.ref}")
        return [f"{about(request)} #{number}" for number in range(request.n)]

    return says


def about(request: Request) -> str:
    """What a request is about, in few words: the video and its frames' span, or the captions of spans."""
    first = request.parts[0]
    if isinstance(first, MediaRef):
        frames = first.frames
        assert frames is not None
        return f"{first.ref} {frames.start:g}-{'' if frames.end is None else f'{frames.end:g}'}"
    return "whole of " + "; ".join(re.findall(r"^(\S+) to (\S+) s: ", first, re.MULTILINE)[-1])
