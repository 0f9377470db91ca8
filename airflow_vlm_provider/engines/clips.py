"""Videos for a model in this process: a clip's frames, and when each of them is to be seen."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from airflow_vlm_provider.errors import ConfigError, SampleError
from airflow_vlm_provider.types import Media

# Frames have their times as places on a line of so many frames per second, which is how processors take them.
_TICKS_PER_SECOND = 1000


@dataclass(frozen=True)
class Clip:
    """All frames of a clip.

    :param frames: An array (frames, height, width, 3) of bytes: red, green, blue.
    :param times: When each is seen, in seconds from the video's beginning.
    :param duration: How long they are seen together, in seconds.
    """

    frames: Any = field(repr=False)
    times: tuple[float, ...]
    duration: float

    def metadata(self) -> Mapping[str, Any]:
        """What transformers' video processors want to know."""
        return {
            "fps": float(_TICKS_PER_SECOND),
            "frames_indices": [round(time * _TICKS_PER_SECOND) for time in self.times],
            # Frames per second of what is shown are reckoned from this number and how many indices there are.
            "total_num_frames": max(len(self.times), round(self.duration * _TICKS_PER_SECOND)),
            "duration": self.duration,
            "height": self.frames.shape[1],
            "width": self.frames.shape[2],
        }


def decode_clip(media: Media) -> Clip:
    """Decode every frame: what a model is not to see was left out when the clip was made.

    :raises SampleError: ``media_corrupt``: it can't be decoded.
    :raises ConfigError: PyAV is missing.
    """
    try:
        import av
    except ImportError as error:
        raise ConfigError("Videos need PyAV: pip install 'airflow-provider-vlm[video]'") from error
    import numpy

    frames, times = [], []
    try:
        with av.open(io.BytesIO(media.data), format="mp4") as container:
            for frame in container.decode(video=0):
                frames.append(frame.to_ndarray(format="rgb24"))
                times.append(float(frame.time or 0.0))
        stacked = numpy.stack(frames)
    except Exception as error:
        raise SampleError("media_corrupt", f"The video can't be decoded: {error}", media=media.ref) from error
    if len(times) == 1:
        # Models look at frames in pairs, and some processors refuse half a pair.
        stacked, times = numpy.repeat(stacked, 2, axis=0), times * 2
    # How long the last one is seen, clips do not say reliably: as long as the others, on average.
    duration = (times[-1] - times[0]) * len(times) / (len(times) - 1)
    return Clip(frames=stacked, times=tuple(times), duration=duration)


def video_markers_doubled(processor: Any, tokenizer: Any) -> bool:
    """Whether a processor puts marks around every group of frames, and leaves those around the video, too.

    transformers 5 does so with Qwen3-VL's prompts, which have the marks around the groups alone.
    """
    import numpy

    start, end, token = (
        getattr(processor, name, None) for name in ("vision_start_token", "vision_end_token", "video_token")
    )
    if start is None or end is None or token is None:
        return False
    blank = Clip(frames=numpy.zeros((4, 64, 64, 3), numpy.uint8), times=(0.0, 0.5, 1.0, 1.5), duration=2.0)
    ids = processor(
        text=[f"{start}{token}{end}"],
        videos=[blank.frames],
        video_metadata=[blank.metadata()],
        do_sample_frames=False,
    )["input_ids"][0]
    first, last = (tokenizer.convert_tokens_to_ids(str(mark)) for mark in (start, end))
    marks = [token_id for token_id in ids if token_id in (first, last)]
    return marks[:2] == [first, first]
