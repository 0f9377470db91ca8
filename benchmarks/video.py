"""What it takes to show a model some frames of a video: ours beside decoding all of it: ``python benchmarks/video.py``.

Each way runs in a process of its own, on the same file, one after the other, several rounds; medians are printed. The
clips: 1,000 frames of 720p with a keyframe every 10, every 2 and every half second, and ten hours of small frames.

- ``PyAV, all``: every frame decoded, none kept, with PyAV's own threads. The least that looking at all of it can cost.
- ``PyAV, into memory``: every frame decoded and kept as RGB, as loaders do that choose frames afterwards.
- ``OpenCV, all``: every frame decoded by OpenCV, as servers do, where it is installed.
- ``ours, frames`` and ``ours, clip``: the file fetched (hashed) and 16 frames prepared, as JPEGs and as an MP4.

Times begin when everything is imported. CPU time is the fairer one where others work on the machine.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset import ROOT
from harness import machine

sys.path.insert(0, str(ROOT))

FRAMES = 16
GOAL_MB = 300
# Beyond this, keeping all frames is not tried: ten hours would be terabytes.
MOST_KEPT_BYTES = 4 * 1024**3


@dataclass(frozen=True)
class Clip:
    label: str
    name: str
    frames: int
    size: tuple[int, int]
    fps: int
    gop: int


CLIPS = (
    Clip("1,000 frames of 720p, keyframes every 10 s", "rare.mp4", 1000, (1280, 720), 25, 250),
    Clip("1,000 frames of 720p, keyframes every 2 s", "usual.mp4", 1000, (1280, 720), 25, 50),
    Clip("1,000 frames of 720p, keyframes every 0.5 s", "often.mp4", 1000, (1280, 720), 25, 12),
    Clip("10 hours of 128 x 72, one frame a second", "hours.mp4", 36_000, (128, 72), 1, 10),
)


def make(clip: Clip, path: Path) -> None:
    """Encode a moving picture with detail everywhere."""
    import av
    from PIL import Image, ImageChops

    width, height = clip.size
    texture = Image.effect_noise((width // 8, height // 8), 60).resize(clip.size).convert("L")
    ramp = Image.linear_gradient("L").resize(clip.size)
    # A few dozen pictures over and over: drawing them must not take longer than encoding.
    pictures = [
        av.VideoFrame.from_image(
            Image.merge(
                "RGB", (ImageChops.offset(texture, 3 * n, n), ramp, ImageChops.offset(texture, -2 * n))
            )
        ).reformat(format="yuv420p")
        for n in range(min(clip.frames, 48))
    ]
    with av.open(str(path), "w") as file:
        options = {"preset": "veryfast", "g": str(clip.gop), "sc_threshold": "0"}
        stream: Any = file.add_stream("libx264", rate=clip.fps, options=options)
        stream.width, stream.height = clip.size
        stream.pix_fmt = "yuv420p"
        for number in range(clip.frames):
            # Back and forth, as a jump would be.
            place = number % (2 * len(pictures))
            frame = pictures[min(place, 2 * len(pictures) - 1 - place)]
            frame.pts = number
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))


def pyav_all(path: Path) -> int:
    import av

    with av.open(str(path)) as file:
        file.streams.video[0].thread_type = "AUTO"
        return sum(1 for _ in file.decode(video=0))


def pyav_into_memory(path: Path) -> int:
    import av

    with av.open(str(path)) as file:
        file.streams.video[0].thread_type = "AUTO"
        return len([frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)])


def opencv_all(path: Path) -> int:
    import cv2

    reader = cv2.VideoCapture(str(path))
    count = 0
    while reader.read()[0]:
        count += 1
    return count


def ours(path: Path, *, as_video: bool) -> int:
    from airflow_vlm_provider.shards.media import MediaLoader
    from airflow_vlm_provider.types import FrameSampling, MediaRef

    loader = MediaLoader(source_uri=f"file://{path.parent}/")
    source = loader.fetch(MediaRef("video", path.name))
    parts = loader.prepare(source, frames=FrameSampling(fps=2, max_frames=FRAMES), as_video=as_video)
    assert len(parts) == (1 if as_video else 1 + FRAMES)
    return FRAMES


WAYS: dict[str, Callable[[Path], int]] = {
    "PyAV, all": pyav_all,
    "PyAV, into memory": pyav_into_memory,
    "OpenCV, all": opencv_all,
    "ours, frames": lambda path: ours(path, as_video=False),
    "ours, clip": lambda path: ours(path, as_video=True),
}
IMPORTS = {
    "PyAV, all": ("av",),
    "PyAV, into memory": ("av", "numpy"),
    "OpenCV, all": ("cv2",),
    "ours, frames": ("av", "PIL.Image", "PIL.JpegImagePlugin", "airflow_vlm_provider.shards.media"),
    "ours, clip": ("av", "PIL.Image", "airflow_vlm_provider.shards.media"),
}


def one(way: str, path: Path) -> None:
    """Run one way in this process and print what it took."""
    for name in IMPORTS[way]:
        importlib.import_module(name)
    wall, processor = time.perf_counter(), time.process_time()
    frames = WAYS[way](path)
    wall, processor = time.perf_counter() - wall, time.process_time() - processor
    status = Path("/proc/self/status").read_text()
    (peak,) = [line.split()[1] for line in status.splitlines() if line.startswith("VmHWM")]
    print(json.dumps({"frames": frames, "wall": wall, "cpu": processor, "mb": int(peak) / 1024}))


def measured(way: str, path: Path, rounds: int) -> dict[str, float]:
    runs = []
    for _ in range(rounds):
        command = [sys.executable, __file__, "--one", way, str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        runs.append(json.loads(done.stdout))
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def table(clip: Clip, path: Path, rounds: int) -> bool:
    """Print one clip's table; return whether ours met its goals."""
    print(f"\n## {clip.label} ({path.stat().st_size / 1e6:.1f} MB); {FRAMES} frames sampled\n")
    print(
        "| | frames decoded or taken | seconds | CPU seconds | x of CPU of PyAV, all | x of its time | peak MB |"
    )
    print("|---|---|---|---|---|---|---|")
    kept = clip.frames * clip.size[0] * clip.size[1] * 3
    base: dict[str, float] | None = None
    met = True
    for way in WAYS:
        if way == "PyAV, into memory" and kept > MOST_KEPT_BYTES:
            print(f"| {way} | not tried: {kept / 1e9:.1f} GB | | | | | |")
            continue
        if way.startswith("OpenCV") and importlib.util.find_spec("cv2") is None:
            continue
        run = measured(way, path, rounds)
        base = base or run
        print(
            f"| {way} | {run['frames']:.0f} | {run['wall']:.2f} | {run['cpu']:.2f} "
            f"| {run['cpu'] / base['cpu']:.2f} | {run['wall'] / base['wall']:.2f} | {run['mb']:.0f} |",
            flush=True,
        )
        if way.startswith("ours"):
            met = met and run["mb"] <= GOAL_MB and run["cpu"] < base["cpu"]
    print(f"\nFaster than decoding all of it, in at most {GOAL_MB} MB: {'met' if met else 'missed'}")
    return met


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="medians are printed (default: 3)")
    parser.add_argument("--one", nargs=2, metavar=("WAY", "FILE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(options.one[0], Path(options.one[1]))
        return 0
    print(machine())
    met = True
    with tempfile.TemporaryDirectory() as folder:
        for clip in CLIPS:
            path = Path(folder) / clip.name
            make(clip, path)
            met = table(clip, path, options.rounds) and met
            path.unlink()
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
