"""A place with videos in files, a step that captions them, and what it is to find there."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from airflow_vlm_provider.shards.media import MediaLoader
from airflow_vlm_provider.steps.video_captioning import VideoCaptioningStep
from tests.support.captioning import EOC, VIDEO
from tests.support.place import Place

META = "__dj__meta__"
# Thirty seconds, ten pictures each: two looked at of every window of ten seconds show 25 and 75, and so on.
LOOKED_AT = {"fps": 0.2, "max_frames": 2, "keep_original_sample": False}
THIRTY_SECONDS = "saw 25 75", "saw 125 175", "saw 225 275"


class CountingLoader(MediaLoader):
    """Counts what is done with files."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.fetched: Counter[str] = Counter()
        self.probed: Counter[str] = Counter()

    def fetch(self, ref: Any, **where: Any) -> Any:
        self.fetched[ref.ref] += 1
        return super().fetch(ref, **where)

    def probe(self, source: Any) -> Any:
        self.probed[source.ref] += 1
        return super().probe(source)


class VideoPlace(Place):
    """A place whose media are files."""

    def __init__(self, root: Path, **options: Any) -> None:
        super().__init__(root)
        self.options = options
        self.forget()

    def forget(self) -> None:
        """Count anew."""
        self.loader = CountingLoader(source_uri=str(self.source_path), **self.options)
        self.media = self.loader  # type: ignore[assignment]

    def put(self, **videos: bytes) -> list[dict[str, Any]]:
        """Put videos there, and return a row for each."""
        for name, data in videos.items():
            (self.source_path / f"{name}.mp4").write_bytes(data)
        return [{"id": name, "text": f"{VIDEO} old {EOC}", "videos": [f"{name}.mp4"]} for name in videos]

    def letters(self) -> dict[str, dict[str, Any]]:
        """Dead letters by the name of their video."""
        path = self.destination_path / "_vlm" / "a.jsonl" / "video_captioning" / "errors.jsonl"
        letters = [json.loads(line) for line in path.read_text().splitlines()]
        return {letter["media"].removesuffix(".mp4"): letter for letter in letters}

    def captions(self) -> dict[str, str]:
        """What stands in the texts, by the name of the row."""
        return {row["id"]: row["text"].replace(VIDEO, "").replace(EOC, "").strip() for row in self.output()}


def step(**given: Any) -> VideoCaptioningStep:
    """A step that looks at few pictures, and else is as given."""
    return VideoCaptioningStep(**{**LOOKED_AT, **given})


def windows(row: dict[str, Any]) -> list[list[tuple[float, float, str]]]:
    """The windows of each video of a new row: start, end and caption."""
    return [
        [(each["start"], each["end"], each["caption"]) for each in one] for one in row[META]["video_windows"]
    ]
