"""What it costs to get at a video's pictures: few others are decoded, few are held, few videos at once."""

from __future__ import annotations

import gc
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import pytest
from PIL import Image

from airflow_vlm_provider.shards import video_facts, video_frames
from airflow_vlm_provider.shards.video_files import Spool, VideoFile
from airflow_vlm_provider.shards.video_frames import VideoFrames, open_frames
from airflow_vlm_provider.shards.videos import sample_times
from airflow_vlm_provider.types import FrameSampling
from tests.support.videos import SIZE, load, number_of, numbers, probe, video

ROOT = Path(__file__).parents[3]
HOURS_10 = 36_000


def opened(data: bytes) -> VideoFile:
    spool = Spool()
    spool.write(data)
    return spool.file()


def decoded(data: bytes, times: list[float]) -> tuple[list[int], int]:
    """The numbers of the pictures at some times, and how many packets were decoded for them."""
    with open_frames(opened(data)) as frames:
        found = [number_of(frame.to_image()) for frame in frames.at(times)]
        return found, frames.decoded


@pytest.fixture(scope="module", params=["mp4", "matroska", "mpegts"])
def ten_hours(request: pytest.FixtureRequest) -> bytes:
    """Ten hours at a picture every ten seconds, of ten a keyframe."""
    return video(HOURS_10 // 10, fps=0.1, gop=10, container=request.param, b_frames=2)


def test_of_ten_hours_little_is_decoded(ten_hours: bytes) -> None:
    assert probe(ten_hours)["duration"] == pytest.approx(HOURS_10)
    times = sample_times(0, HOURS_10, 16)
    found, packets = decoded(ten_hours, times)
    assert found == [int(time / 10) for time in times]
    assert packets < 16 * 2 * 10
    assert decoded(ten_hours, [35_005.0])[1] < 3 * 10


def test_ten_hours_are_sent_either_way(ten_hours: bytes) -> None:
    window = FrameSampling(fps=2, max_frames=4, start=30_005, end=30_165)
    for as_video in (False, True):
        assert numbers(load(ten_hours, window, as_video=as_video)) == [3002, 3006, 3010, 3014]


def test_close_times_are_reached_by_decoding_on() -> None:
    data = video(200, fps=25, gop=250)
    found, packets = decoded(data, [k / 25 + 0.01 for k in range(150)])
    assert found == list(range(150))
    assert packets < 160


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts", "avi"])
@pytest.mark.parametrize("gop", [10, 50, 400])
def test_whichever_way_it_goes_the_pictures_are_the_same(container: str, gop: int) -> None:
    b_frames = 0 if container == "avi" else 2
    codec = "mpeg4" if container == "avi" else "libx264"
    data = video(400, fps=25, gop=gop, container=container, b_frames=b_frames, codec=codec)
    for step in (0.04, 0.3, 1.1, 3.7):
        times = [0.013 + step * k for k in range(400) if 0.013 + step * k < 15.9]
        found, packets = decoded(data, times)
        assert found == [int(time * 25) for time in times]
        assert packets <= 420
    # Keyframes that are closer than the times are sought.
    if gop == 10:
        _, packets = decoded(data, [0.02 + 3.7 * k for k in range(5)])
        assert packets < 150


def test_pictures_that_no_other_refers_to_are_left_out() -> None:
    """Without a keyframe on the way, they are what can be saved."""
    data = video(500, fps=25, gop=1000, b_frames=2, size=(64, 64))
    with open_frames(opened(data)) as frames:
        given: list[int] = []
        take = frames._take

        def counted(packet: Any) -> None:
            before = len(frames._pictures)
            take(packet)
            given.append(len(frames._pictures) - before)

        frames._take = counted  # type: ignore[method-assign]
        (frame,) = frames.at([18.01])
        assert number_of(frame.to_image()) == 450
    # Of three pictures, one is of that kind.
    assert sum(given) < 310


@pytest.mark.parametrize("before", [38, 39, 40, 41])
def test_durations_that_are_wrong_do_not_lead_to_another_picture(before: int) -> None:
    """What is left out is told by packets' durations, which are those between decoding."""
    times = [k * 0.04 for k in range(before)] + [5 + k * 0.04 for k in range(40)]
    data = video(times=times, last=0.04, gop=1000, b_frames=2)
    asked = [1.58, 1.59, 3.0, 4.99, 5.01, 6.0]
    expected = [max(n for n, at in enumerate(times) if at <= time) for time in asked]
    assert decoded(data, asked)[0] == expected
    seen = []
    for time in asked:
        found, _ = decoded(data, [time])
        seen += found
    assert seen == expected


@pytest.mark.parametrize("container", ["mp4", "matroska", "mpegts"])
def test_a_keyframe_that_is_too_late_is_gone_back_from(
    container: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Indexes are wrong, and some containers are not sought by keyframes at all."""
    data = video(300, fps=10, gop=20, container=container)
    seek = VideoFrames._seek

    def too_late(self: VideoFrames, time: float) -> bool:
        return seek(self, time + 2.5)

    def much_too_late(self: VideoFrames, time: float) -> bool:
        return seek(self, time + 1000 if time else 0)

    monkeypatch.setattr(VideoFrames, "_seek", too_late)
    asked = [5.05, 11.05, 17.05, 25.05]
    assert decoded(data, asked)[0] == [50, 110, 170, 250]
    monkeypatch.setattr(VideoFrames, "_seek", much_too_late)
    assert decoded(data, asked)[0] == [50, 110, 170, 250]


def test_what_can_not_be_sought_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VideoFrames, "_seek", lambda self, time: False)
    data = video(300, fps=10, gop=20)
    assert decoded(data, [5.05, 25.05])[0] == [50, 250]


# ---------------------------------------------------------------- few at once


def test_few_videos_are_decoded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_frames, "_turns", video_frames._Turns(2))
    at_once, most, lock = 0, 0, threading.Lock()
    both = threading.Barrier(2)
    facts = video_frames.video_facts

    def counted(file: VideoFile) -> video_facts.VideoFacts:
        nonlocal at_once, most
        with lock:
            at_once += 1
            most = max(most, at_once)
        both.wait(timeout=20)
        with lock:
            at_once -= 1
        return facts(file)

    monkeypatch.setattr(video_frames, "video_facts", counted)
    data = video(20)
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: probe(data)["fps"], range(8)))
    assert found == [10.0] * 8
    assert most == 2


def test_large_videos_are_decoded_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_frames, "_turns", video_frames._Turns(4))
    monkeypatch.setattr(video_frames, "BIG_PIXELS", 64 * 64)
    inside, most = 0, 0
    lock = threading.Lock()

    class Counted(VideoFrames):
        def at(self, times: Any) -> Iterator[Any]:
            nonlocal inside, most
            with lock:
                inside += 1
                most = max(most, inside)
            yield from super().at(times)
            with lock:
                inside -= 1

    monkeypatch.setattr(video_frames, "VideoFrames", Counted)
    large, small = video(60, size=(128, 64)), video(60)

    def all_at_once(data: bytes) -> int:
        nonlocal most
        most = 0
        with ThreadPoolExecutor(4) as threads:
            list(threads.map(lambda _: load(data, FrameSampling(fps=10, max_frames=60)), range(8)))
        return most

    assert all_at_once(large) == 1
    assert all_at_once(small) > 1


def test_a_turn_is_given_back_whatever_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    turns = video_frames._Turns(1)
    monkeypatch.setattr(video_frames, "_turns", turns)
    for _ in range(3):
        with pytest.raises(Exception, match="no video"):
            load(b"nothing", FrameSampling(fps=1, max_frames=1))
    assert probe(video(20))["fps"] == 10
    with turns.turn() as alone:
        assert alone


def test_pictures_do_not_wait_for_the_garbage_collector() -> None:
    """They are large, and it counts objects, not bytes."""
    data = video(20, rotation=90)
    load(data, FrameSampling(fps=5, max_frames=9))
    gc.collect()
    gc.set_debug(gc.DEBUG_SAVEALL)
    try:
        for as_video in (False, True):
            load(data, FrameSampling(fps=5, max_frames=9), as_video=as_video)
        gc.collect()
        left = [each for each in gc.garbage if isinstance(each, av.VideoFrame)]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
    assert all(frame.width < SIZE[0] for frame in left)


MEMORY = """
    import sys
    from pathlib import Path
    from airflow_vlm_provider.shards.media import MediaLoader
    from airflow_vlm_provider.types import FrameSampling, MediaRef

    path = Path(sys.argv[1])
    loader = MediaLoader(source_uri=f"file://{path.parent}/")
    source = loader.fetch(MediaRef("video", path.name))
    parts = loader.prepare(source, frames=FrameSampling(fps=2, max_frames=16), as_video=sys.argv[2] == "video")
    assert len(parts) == (1 if sys.argv[2] == "video" else 17)
    # What getrusage() tells may be the parent's, from before this program was started.
    (peak,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    print(int(peak.split()[1]) // 1024)
"""


@pytest.mark.parametrize("way", ["frames", "video"])
def test_a_long_clip_takes_little_memory(tmp_path: Path, way: str) -> None:
    """1,000 pictures of 720p are 1.4 GB when they are decoded; the whole process is to stay below 300 MB."""
    path = tmp_path / "long.mp4"
    pictures = [Image.new("RGB", (1280, 720), (n % 256, n // 4 % 256, 80)) for n in range(50)] * 20
    path.write_bytes(video(1000, fps=25, gop=250, pictures=pictures))
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(MEMORY), str(path), way],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert int(done.stdout) < 300
