"""The step that captions videos, long ones in windows."""

from __future__ import annotations

import json
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, get_args

from airflow_vlm_provider.errors import ANSWERED_KINDS, ConfigError, SampleError
from airflow_vlm_provider.steps.captioning import Captioned, Captioning
from airflow_vlm_provider.steps.chunks import SpecialTokens
from airflow_vlm_provider.steps.prompted_captioning import PromptedCaptioningStep
from airflow_vlm_provider.steps.prompts import (
    VIDEO_CAPTIONING_INPUT,
    VIDEO_CAPTIONING_SYSTEM,
    VIDEO_SUMMARY_SYSTEM,
)
from airflow_vlm_provider.steps.rows import malformed
from airflow_vlm_provider.steps.together import together
from airflow_vlm_provider.steps.video_windows import (
    SUMMARY_CAPTIONS,
    WINDOWS_VERSION,
    Window,
    grouped,
    in_window,
    joined,
    listed,
    recorded,
    to_sum_up,
    windows_of,
)
from airflow_vlm_provider.types import (
    Answer,
    FrameSampling,
    MediaKind,
    MediaRef,
    Probe,
    Request,
    Row,
    Transport,
)

# Parts of a video, each with its caption.
Told = Sequence[tuple[Window, str]]
Asking = Generator[Sequence[Request | Probe], Sequence[Answer], list[str]]


class VideoCaptioningStep(PromptedCaptioningStep):
    """Write a caption behind every video of a sample's text, in place of the words that were there.

    A sample becomes itself, where ``keep_original_sample`` says so, and a new one, or ``caption_num`` new ones where
    all candidates are kept. Samples without videos are skipped.

    With ``window_seconds``, a longer video is captioned in windows: all at the same time, one caption each, and
    without drawing. A last request, which shows no media, sums the captions up; its candidates are the video's. More
    than 40 captions are summed up in groups first. The windows stand in ``row[meta_key][windows_field_name]`` of the
    new rows: a list for each video in the order of ``row[video_key]``, of objects with ``start`` and ``end`` (seconds;
    the end is null where a video's duration is not known) and ``caption``. A video that is no longer than a window is
    asked about as without windows, and recorded as one.

    What is not listed is a parameter of
    :class:`~airflow_vlm_provider.steps.prompted_captioning.PromptedCaptioningStep` or
    :class:`~airflow_vlm_provider.steps.captioning.CaptioningStep`. A prompt is asked about every window and, beside
    their captions, about the whole.

    :param fps: Frames that are looked at of every second.
    :param max_frames: Most frames of a video, or of a window.
    :param window_seconds: How long a window is; None takes every video as a whole.
    :param transport: See :class:`~airflow_vlm_provider.types.FrameSampling`.
    :param windows_field_name: Field of the meta data that takes the windows.
    :param video_key: Field of the video references.
    :param meta_key: Field that holds the meta data: an object, or null.
    :raises ConfigError: A parameter is wrong.
    """

    name = "video_captioning"
    kind: ClassVar[MediaKind] = "video"
    asking = PromptedCaptioningStep.asking | {
        "fps",
        "max_frames",
        "window_seconds",
        "transport",
        "windows_version",
    }
    derived = PromptedCaptioningStep.derived | {"windows_version"}
    own_prompts: Mapping[str, str] = {
        "system": VIDEO_CAPTIONING_SYSTEM,
        "prompt": VIDEO_CAPTIONING_INPUT,
        "summary": VIDEO_SUMMARY_SYSTEM,
    }

    def __init__(
        self,
        *,
        caption_num: int = 1,
        keep_candidate_mode: str = "random_any",
        keep_original_sample: bool = True,
        prompt: str | None = None,
        prompt_key: str | None = None,
        system_prompt: str | None = None,
        sampling_params: Mapping[str, Any] | None = None,
        fps: float = 2.0,
        max_frames: int = 32,
        window_seconds: float | None = None,
        transport: str = "auto",
        windows_field_name: str = "video_windows",
        seed: int | None = None,
        try_num: int = 3,
        missing_placeholders: str = "error",
        text_key: str = "text",
        video_key: str = "videos",
        meta_key: str = "__dj__meta__",
        special_tokens: Sequence[str] = SpecialTokens(),
    ) -> None:
        super().__init__(
            caption_num=caption_num,
            keep_candidate_mode=keep_candidate_mode,
            keep_original_sample=keep_original_sample,
            prompt=prompt,
            prompt_key=prompt_key,
            system_prompt=system_prompt,
            sampling_params=sampling_params,
            max_new_tokens=None,
            seed=seed,
            try_num=try_num,
            missing_placeholders=missing_placeholders,
            text_key=text_key,
            media_key=video_key,
            special_tokens=special_tokens,
        )
        _check_seconds("fps", fps, "frames of a second, such as 2.0 or 0.5")
        if window_seconds is not None:
            _check_seconds("window_seconds", window_seconds, "seconds, such as 30, or None")
        if isinstance(max_frames, bool) or not isinstance(max_frames, int) or max_frames < 1:
            raise ConfigError(f"max_frames is {max_frames!r}; give a whole number from 1 on.")
        if transport not in get_args(Transport):
            raise ConfigError(f"transport is {transport!r}; give 'auto', 'video' or 'frames'.")
        for parameter, value in {"windows_field_name": windows_field_name, "meta_key": meta_key}.items():
            if not isinstance(value, str) or not value:
                raise ConfigError(f"{parameter} is {value!r}; give the name of a field.")
        self.frames = FrameSampling(fps=fps, max_frames=max_frames, transport=transport)  # type: ignore[arg-type]
        self.window_seconds = window_seconds
        self.windows_field_name = windows_field_name
        self.meta_key = meta_key
        self._single = replace(self.candidates, number=1, mode="random_any")

    def parameters(self) -> Mapping[str, Any]:
        """Everything that decides what is asked and written, as JSON values."""
        return {
            **super().parameters(),
            "fps": self.frames.fps,
            "max_frames": self.frames.max_frames,
            "window_seconds": self.window_seconds,
            "transport": self.frames.transport,
            "windows_field_name": self.windows_field_name,
            "meta_key": self.meta_key,
            "windows_version": WINDOWS_VERSION,
        }

    def generated(self) -> Mapping[str, Any]:
        """See :class:`~airflow_vlm_provider.steps.base.Step`."""
        if self.window_seconds is None:
            return super().generated()
        window = {
            "type": "object",
            "properties": {
                "start": {"type": "number"},
                "end": {"type": "number"},
                "caption": {"type": "string"},
            },
        }
        windows = {"type": "array", "items": {"type": "array", "items": window}}
        meta = {"type": "object", "properties": {self.windows_field_name: windows}}
        return {**super().generated(), self.meta_key: meta}

    def _captions(self, row: Row, words: str, ref: str) -> Captioning:
        if self.window_seconds is None:
            return Captioned((yield from self._of_whole(row, words, ref)))
        self._meta(row)  # a row that can't take the windows is told before anything is paid for
        (probed,) = yield [Probe(MediaRef("video", ref))]
        duration = json.loads(probed.choices[0].text)["duration"]
        windows = windows_of(duration, self.window_seconds, ref=ref)
        if len(windows) == 1:
            captions = yield from self._of_whole(row, words, ref)
            return Captioned(captions, [[recorded(windows[0], caption)] for caption in captions])
        asking = [self._of_window(row, ref, window, duration) for window in windows]
        told = list(zip(windows, (yield from self._singly(asking, ref)), strict=True))
        captions = yield from self._summary(row, words, ref, told)
        return Captioned(captions, [[recorded(*each) for each in told]] * len(captions))

    def _fields(self, row: Row, captioned: Sequence[Captioned | None], number: int) -> Mapping[str, Any]:
        if self.window_seconds is None:
            return {}
        windows = [each.about[number] for each in captioned if each is not None]
        return {self.meta_key: {**self._meta(row), self.windows_field_name: windows}}

    def _meta(self, row: Row) -> Mapping[str, Any]:
        meta = row.get(self.meta_key)
        if meta is None:
            return {}
        if not isinstance(meta, Mapping):
            raise malformed(self.meta_key, meta, "an object or null")
        return meta

    def _of_whole(self, row: Row, words: str, ref: str) -> Asking:
        request = self._request(row, MediaRef("video", ref, self.frames))
        return self.candidates.draw(request, text=words, media=ref)

    def _of_window(self, row: Row, ref: str, window: Window, duration: float) -> Request:
        # What a file says of its end may be wrong by a little: the last window goes on for as long as there is video.
        end = None if window.end == duration else window.end
        frames = replace(self.frames, start=window.start, end=end)
        request = self._request(row, MediaRef("video", ref, frames))
        message = "".join(part for part in request.parts if isinstance(part, str))
        return replace(request, parts=(request.parts[0], in_window(message, window, duration)))

    def _summary(self, row: Row, words: str, ref: str, told: Told) -> Asking:
        """The captions of a video, from those of its windows."""
        while len(told) > SUMMARY_CAPTIONS:
            groups = grouped(told)
            captions = yield from self._singly([self._of_captions(row, group) for group in groups], ref)
            spans = [joined([window for window, _ in group]) for group in groups]
            told = list(zip(spans, captions, strict=True))
        return (yield from self.candidates.draw(self._of_captions(row, told), text=words, media=ref))

    def _of_captions(self, row: Row, told: Told) -> Request:
        request = self._request(row)
        if request.system == self.own_prompts["system"]:
            return replace(
                request, system=self.own_prompts["summary"], parts=(listed(told),), completion=None
            )
        (message,) = request.parts or ("",)
        assert isinstance(message, str)
        return replace(request, parts=(to_sum_up(message, told),), completion=None)

    def _singly(self, requests: Sequence[Request], ref: str) -> Asking:
        """One caption for each request, all asked at the same time."""
        runs = [
            self._single.draw(replace(request, sampling=self._undrawn), text="", media=ref)
            for request in requests
        ]
        ended = yield from together(runs, may_fail=lambda _: True)
        errors = [each for each in ended if isinstance(each, SampleError)]
        if errors:
            raise _first(errors)
        return [each[0] for each in ended]  # type: ignore[index]

    @property
    def _undrawn(self) -> Mapping[str, Any]:
        """The sampling parameters of requests whose answer is not to be drawn; a seed would only make others of them."""
        if "temperature" not in self.sampling:
            return self.sampling
        return {name: value for name, value in self.sampling.items() if name != "seed"} | {"temperature": 0}


def _first(errors: Sequence[SampleError]) -> SampleError:
    """The error to fail for: one that the next run tries again by itself, if there is any; all are at fault."""
    error = min(errors, key=lambda each: each.kind in ANSWERED_KINDS)
    error.keys = tuple(dict.fromkeys(key for each in errors for key in each.keys))
    return error


def _check_seconds(name: str, value: object, example: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise ConfigError(f"{name} is {value!r}; give a number above 0 of {example}.")
