"""Videos in the core: probed once, fetched once a sample, sent as what the engine takes, known by their content."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from airflow_vlm_provider.errors import ConfigError, NoVideoError, SampleError
from airflow_vlm_provider.steps.base import StepRun
from airflow_vlm_provider.types import (
    Answer,
    Choice,
    FrameSampling,
    Media,
    MediaRef,
    Part,
    Probe,
    Request,
    Result,
    Sample,
    SourceMedia,
    Transport,
)
from tests.support.fakes import FakeMedia, ScriptedEngine
from tests.support.place import Place


class FakeVideos(FakeMedia):
    """Videos whose content is their name, as :class:`FakeMedia` has it; counts what is done with them."""

    def __init__(self) -> None:
        super().__init__()
        self.probed: list[str] = []
        self.prepared: Counter[tuple[str, bool]] = Counter()
        self._lock = threading.Lock()

    def probe(self, source: SourceMedia) -> Mapping[str, Any]:
        with self._lock:
            self.probed.append(source.ref)
        if source.data.startswith(b"corrupt"):
            raise SampleError("media_corrupt", f"{source.ref} is corrupt", media=source.ref)
        return super().probe(source)

    def prepare(
        self, source: SourceMedia, *, frames: FrameSampling | None = None, as_video: bool = False, **how: Any
    ) -> Sequence[Part]:
        assert frames is not None
        with self._lock:
            self.prepared[source.ref, as_video] += 1
        if as_video:
            return (Media("video", "video/mp4", source.data, source.ref),)
        images = [Media("image", "image/jpeg", b"%d of " % at + source.data, source.ref) for at in range(2)]
        return ("Two frames of a video:", *images)


class WindowStep:
    """Probes a row's video and asks about so many parts of it at once; a summary of the answers follows.

    :param refused: An answer to this fails its sample, as the one at fault. No part of what is recorded.
    """

    name = "caption"
    asking = frozenset({"windows"})

    def __init__(
        self, windows: int = 3, *, transport: Transport = "auto", suffix: str = "", refused: str = ""
    ) -> None:
        self.windows = windows
        self.transport = transport
        self.suffix = suffix
        self.refused = refused

    def parameters(self) -> Mapping[str, Any]:
        return {"windows": self.windows, "suffix": self.suffix}

    def generated(self) -> Mapping[str, Any]:
        return {"caption": {"type": "string"}}

    def process(self, sample: Sample) -> StepRun:
        row = sample.row
        assert row is not None
        ref = row["video"]
        (probed,) = yield [Probe(MediaRef("video", ref))]
        length = json.loads(probed.choices[0].text)["duration"] / self.windows
        answers = yield [
            Request(None, (MediaRef("video", ref, self._frames(n * length, (n + 1) * length)), f"part {n}"))
            for n in range(self.windows)
        ]
        (whole,) = yield [Request(None, (" ".join(self._text(each, ref) for each in answers),))]
        return Result(rows=({**row, "caption": self._text(whole, ref) + self.suffix},))

    def _frames(self, start: float, end: float) -> FrameSampling:
        return FrameSampling(1.0, 4, start=start, end=end, transport=self.transport)

    def _text(self, answer: Answer, ref: str) -> str:
        text = answer.choices[0].text
        if self.refused and text == f"answer to {self.refused}":
            raise SampleError("refused", "declined", media=ref, attempts=1, keys=[answer.key])
        return text


class VideoEngine(ScriptedEngine):
    """Takes videos, until it is sent one where its model takes none, which is then known.

    :ivar sent: The requests that were answered.
    """

    def __init__(
        self, *, model_takes_video: bool = True, known: bool = False, refused: str = "", **options: Any
    ) -> None:
        super().__init__(**options)
        self.refused = refused
        self.takes_video = model_takes_video or not known
        self.model_takes_video = model_takes_video
        self.sent: list[Request] = []
        self.turned_away = 0

    async def ask(self, request: Request) -> Answer:
        holds_video = any(isinstance(part, Media) and part.kind == "video" for part in request.parts)
        if holds_video and not self.model_takes_video:
            self.takes_video = False
            self.turned_away += 1
            raise NoVideoError("no videos")
        self.sent.append(request)
        if request.parts[-1] == self.refused:
            raise SampleError("refused", "declined", attempts=1)
        answer = await super().ask(request)
        return dataclasses.replace(answer, choices=(Choice(f"answer to {request.parts[-1]}"),))


@pytest.fixture
def place(tmp_path):
    place = Place(tmp_path)
    place.media = FakeVideos()
    return place


def videos(*names: str) -> list[dict[str, Any]]:
    return [{"video": name} for name in names]


def kinds(request: Request) -> list[str]:
    return ["text" if isinstance(part, str) else part.kind for part in request.parts]  # type: ignore[union-attr]


def test_a_video_is_probed_once_and_fetched_once_for_a_sample_however_much_is_asked_about_it(place):
    engine = VideoEngine()
    (manifest,) = place.run(engine, place.shard("a.jsonl", videos("a", "b", "a")), step=WindowStep(5))
    assert sorted(place.media.probed) == ["a", "b"]
    assert Counter(place.media.fetched) == {"a": 2, "b": 1}
    # Five parts of each video, and the summary, which is the same for both.
    assert (manifest.counts.requests, manifest.counts.ok + manifest.counts.cached) == (11, 3)
    assert manifest.counts.prompt_tokens == 11 * 10
    assert {each["caption"] for each in place.output()} == {
        "answer to " + " ".join(f"answer to part {n}" for n in range(5))
    }


def test_a_run_again_neither_asks_nor_fetches_nor_probes(place):
    shard = place.shard("a.jsonl", videos("a", "b"))
    place.run(VideoEngine(), shard, step=WindowStep())
    place.media = FakeVideos()
    engine = VideoEngine()
    (manifest,) = place.run_what_is_left(engine, shard, step=WindowStep(suffix="!"))
    assert (engine.sent, place.media.fetched, place.media.probed) == ([], [], [])
    assert (manifest.counts.cached, manifest.counts.requests) == (2, 0)
    # What was known of the video serves other questions about it, for which it has to be fetched.
    place.run_what_is_left(engine, shard, step=WindowStep(4))
    assert (sorted(place.media.fetched), place.media.probed, len(engine.sent)) == (["a", "b"], [], 9)


def test_a_probe_is_in_the_journal_before_a_run_is_killed(place):
    shard = place.shard("a.jsonl", videos("a"))

    class Gone(VideoEngine):
        async def ask(self, request: Request) -> Answer:
            raise ConfigError("no such model")

    with pytest.raises(ConfigError):
        place.run(Gone(), shard, step=WindowStep())
    assert place.media.probed == ["a"]
    place.run(VideoEngine(), shard, step=WindowStep())
    assert place.media.probed == ["a"]


def test_a_video_that_was_replaced_under_its_name_is_probed_and_asked_about_again(place):
    shard = place.shard("a.jsonl", videos("a", "b"))
    place.run(VideoEngine(), shard, step=WindowStep())
    place.media.content["a"] = b"another"
    engine = VideoEngine()
    (manifest,) = place.run_what_is_left(engine, shard, step=WindowStep())
    assert (Counter(place.media.probed), manifest.counts.cached) == ({"a": 2, "b": 1}, 1)
    # The summary's question is the same as before.
    assert [request.parts[-1] for request in engine.sent] == ["part 0", "part 1", "part 2"]


def test_a_video_that_cannot_be_probed_is_a_dead_letter_and_stays_one_without_another_look(place):
    place.media.content["bad"] = b"corrupt"
    shard = place.shard("a.jsonl", videos("a", "bad"))
    (manifest,) = place.run(VideoEngine(), shard, step=WindowStep())
    assert (manifest.kinds, manifest.counts.ok) == ({"media_corrupt": 1}, 1)
    (letter,) = place.errors()
    assert (letter["media"], letter["attempts"]) == ("bad", 0)
    place.media.fetched.clear()
    (manifest,) = place.run_what_is_left(VideoEngine(), shard, step=WindowStep(suffix="!"))
    assert (manifest.kinds, place.media.fetched) == ({"media_corrupt": 1}, [])


def test_where_it_turns_out_that_a_model_takes_no_videos_their_frames_are_sent(place):
    engine = VideoEngine(model_takes_video=False, delay=lambda about: 0.01)
    (manifest,) = place.run(engine, place.shard("a.jsonl", videos("a", "b")), step=WindowStep(4))
    assert manifest.counts.ok == 2
    assert 1 <= engine.turned_away <= 8
    about = [request for request in engine.sent if len(request.parts) > 1]
    assert [kinds(request) for request in about] == [["text", "image", "image", "text"]] * 8
    assert manifest.counts.requests == len(engine.sent) == 9
    # Known from then on: a next shard's videos are not even made ready as such.
    before = +place.media.prepared
    place.run(engine, place.shard("b.jsonl", videos("c")), step=WindowStep(4))
    assert engine.turned_away <= 8
    assert place.media.prepared - before == {("c", False): 4}


def test_answers_about_frames_are_found_whether_or_not_the_engine_took_videos(place):
    shard = place.shard("a.jsonl", videos("a"))
    place.run(VideoEngine(model_takes_video=False), shard, step=WindowStep())
    engine = VideoEngine()
    place.run(engine, shard, step=WindowStep(suffix="!"))
    assert engine.sent == []


@pytest.mark.parametrize("known", [True, False])
def test_a_video_that_has_to_be_sent_as_such_to_a_model_that_takes_none_is_the_authors_to_mend(place, known):
    engine = VideoEngine(model_takes_video=False, known=known)
    with pytest.raises(ConfigError, match="transport='frames'"):
        place.run(engine, place.shard("a.jsonl", videos("a")), step=WindowStep(transport="video"))
    assert engine.sent == []


def test_frames_are_sent_as_images_also_to_a_model_that_takes_videos(place):
    engine = VideoEngine()
    place.run(engine, place.shard("a.jsonl", videos("a")), step=WindowStep(transport="frames"))
    assert place.media.prepared == {("a", False): 3}


@pytest.mark.parametrize("who", ["the step says so", "the engine says so"])
def test_asking_again_about_one_window_leaves_the_others_answers_alone(place, who):
    shard = place.shard("a.jsonl", videos("a", "b"))
    if who == "the step says so":
        (manifest,) = place.run(VideoEngine(), shard, step=WindowStep(refused="part 1"))
    else:
        (manifest,) = place.run(VideoEngine(refused="part 1"), shard, step=WindowStep())
    assert manifest.kinds == {"refused": 2}
    assert [len(letter["keys"]) for letter in place.errors()] == [1, 1]
    place.media.fetched.clear()
    engine = VideoEngine()
    place.run_what_is_left(engine, shard, step=WindowStep(), failed_only=True)
    assert [request.parts[-1] for request in engine.sent[:2]] == ["part 1", "part 1"]
    # The rest is the summary, which nobody has asked for yet; both videos' is the same.
    assert len(engine.sent) == 3
    assert place.media.probed == ["a", "b"]
