"""How a video's file gets here: found as images are, hashed on its way, never whole in memory."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import textwrap
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from airflow_vlm_provider.errors import SampleError, TransientError
from airflow_vlm_provider.shards.media import MediaLoader
from airflow_vlm_provider.shards.stores import ObjectChangedError
from airflow_vlm_provider.shards.video_files import PositionReader, Spool, SpoolError, VideoFile
from airflow_vlm_provider.types import FrameSampling, MediaRef, SourceMedia
from tests.support.videos import load, numbers, video

CLIP = video(20)
DIGEST = hashlib.sha256(CLIP).hexdigest()
ONE_A_SECOND = FrameSampling(fps=1, max_frames=9)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    (folder / "shards").mkdir(parents=True)
    (folder / "shards" / "a.mp4").write_bytes(CLIP)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.mp4").write_bytes(CLIP)
    return folder


def loader(folder: Path, **options: Any) -> MediaLoader:
    return MediaLoader(source_uri=f"file://{folder}/", **options)


def fetch(media: MediaLoader, ref: str = "a.mp4", **options: Any) -> SourceMedia:
    return media.fetch(MediaRef("video", ref), shard="shards/1.jsonl", **options)


def failure(media: MediaLoader, ref: str) -> SampleError:
    with pytest.raises(SampleError) as caught:
        fetch(media, ref)
    assert caught.value.media == ref
    return caught.value


def content(file: VideoFile) -> bytes:
    return file.reader().readall()


def spooled(data: bytes) -> VideoFile:
    spool = Spool()
    spool.write(data)
    return spool.file()


def test_a_local_file_is_hashed_and_kept_open(data: Path) -> None:
    source = fetch(loader(data))
    assert (source.kind, source.ref, source.data, source.digest) == ("video", "a.mp4", b"", DIGEST)
    assert [uri for uri, _ in source.looked] == [f"file://{data}/shards/a.mp4"]
    # What is decoded is what was hashed, whatever the name means by now.
    (data / "shards" / "a.mp4").unlink()
    (data / "shards" / "a.mp4").write_bytes(b"another")
    assert content(source.file) == CLIP
    parts = loader(data).prepare(source, frames=ONE_A_SECOND)
    assert numbers(parts) == [5, 15]


def test_a_local_file_is_not_copied(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_copy(**_: Any) -> Any:
        raise OSError("no room")

    monkeypatch.setattr(tempfile, "TemporaryFile", no_copy)
    assert fetch(loader(data)).digest == DIGEST


def test_what_a_shard_embeds_is_known_by_its_bytes(data: Path) -> None:
    source = fetch(loader(data), "x", embedded={"x": CLIP})
    assert (source.digest, source.looked, source.data) == (DIGEST, (), b"")
    assert numbers(loader(data).prepare(source, frames=ONE_A_SECOND)) == [5, 15]


def test_a_remote_file_goes_through_a_temporary_one_without_a_name() -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    memory = MemoryFileSystem()
    folder = f"memory://{uuid.uuid4().hex}"
    memory.pipe(f"{folder}/set/shards/a.mp4", CLIP)
    shared = MediaLoader(source_uri=f"{folder}/set", filesystem=lambda uri: memory)
    before = set(Path(tempfile.gettempdir()).iterdir())
    source = fetch(shared)
    left = {path for path in set(Path(tempfile.gettempdir()).iterdir()) - before if path.is_file()}
    assert not [path for path in left if path.stat().st_ino == os.fstat(source.file.fileno()).st_ino]
    assert os.fstat(source.file.fileno()).st_nlink == 0
    assert (source.digest, content(source.file)) == (DIGEST, CLIP)
    uri, identity = source.looked[-1]
    assert dict(shared.identities([uri])) == {uri: identity}
    memory.pipe(f"{folder}/set/shards/a.mp4", CLIP + b"x")
    assert dict(shared.identities([uri])) != {uri: identity}


def test_a_file_is_closed_when_nobody_refers_to_it(data: Path) -> None:
    source = fetch(loader(data))
    number = source.file.fileno()
    os.fstat(number)
    del source
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(number)


# ---------------------------------------------------------------- found and refused as images are


@pytest.mark.parametrize(
    "ref",
    [
        "../../outside/secret.mp4",
        "/etc/passwd",
        "file:///etc/passwd",
        "/dev/zero",
        "http://169.254.169.254/a.mp4",
        "s3://bucket/a.mp4",
        "concat:a.mp4|a.mp4",
        "pipe:0",
        "subfile,,start,0,end,100,,:/etc/passwd",
        "",
        "a\0.mp4",
    ],
)
def test_a_dataset_can_not_reach_out(data: Path, ref: str) -> None:
    assert failure(loader(data), ref).kind in ("media_refused", "media_missing")
    with pytest.raises(SampleError) as image:
        loader(data).fetch(MediaRef("image", ref), shard="shards/1.jsonl")
    assert image.value.kind == failure(loader(data), ref).kind


def test_links_and_odd_files(data: Path, tmp_path: Path) -> None:
    (data / "link.mp4").symlink_to(tmp_path / "outside" / "secret.mp4")
    assert failure(loader(data), "../link.mp4").kind == "media_refused"
    roots = [str(data), str(tmp_path / "outside")]
    assert fetch(loader(data, roots=roots), "../link.mp4").digest == DIGEST
    os.mkfifo(data / "pipe.mp4")
    assert failure(loader(data), "../pipe.mp4").kind == "media_refused"
    assert failure(loader(data), "nowhere.mp4").kind == "media_missing"
    assert failure(loader(data), "../shards").kind == "media_missing"
    with pytest.raises(SampleError) as caught:
        loader(data).fetch(MediaRef("video", 7))  # type: ignore[arg-type]
    assert caught.value.kind == "media_refused"


def test_a_video_over_the_limit_is_not_read(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fetch(loader(data, max_video_bytes=len(CLIP))).digest == DIGEST
    monkeypatch.setattr(PositionReader, "_fill", None)
    small = loader(data, max_video_bytes=len(CLIP) - 1)
    error = failure(small, "a.mp4")
    assert error.kind == "media_too_large"
    assert f"{len(CLIP) - 1:,}" in error.message
    with pytest.raises(SampleError) as caught:
        fetch(small, "x", embedded={"x": CLIP})
    assert caught.value.kind == "media_too_large"
    # Images' limit is another.
    assert loader(data, max_bytes=5).memory_parameters() != loader(data).memory_parameters()
    assert small.memory_parameters() != loader(data).memory_parameters()


# ---------------------------------------------------------------- files that change


def test_a_file_that_is_written_to_while_it_is_hashed(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = data / "shards" / "a.mp4"
    read = PositionReader._fill

    def read_and_write(self: PositionReader, view: memoryview, start: int) -> None:
        read(self, view, start)
        with path.open("r+b") as stream:
            stream.write(b"changed")

    monkeypatch.setattr(PositionReader, "_fill", read_and_write)
    assert isinstance(failure(loader(data), "a.mp4"), TransientError)


@pytest.mark.parametrize("change", ["written", "damaged", "cut"])
def test_a_file_that_is_written_to_before_it_is_decoded(data: Path, change: str) -> None:
    """An answer about it must not be filed under the old bytes' key."""
    media = loader(data)
    source = fetch(media)
    with (data / "shards" / "a.mp4").open("r+b") as stream:
        if change == "cut":
            stream.truncate(len(CLIP) // 2)
        else:
            stream.write(CLIP[:100] if change == "written" else bytes(len(CLIP)))
    for attempt in (media.probe, lambda source: media.prepare(source, frames=ONE_A_SECOND)):
        with pytest.raises(TransientError) as caught:
            attempt(source)
        assert (caught.value.media, caught.value.looked) == ("a.mp4", source.looked)


@pytest.mark.parametrize("fails_at", range(6))
def test_bytes_that_do_not_come_are_not_the_videos_fault(
    data: Path, monkeypatch: pytest.MonkeyPatch, fails_at: int
) -> None:
    (data / "shards" / "large.mp4").write_bytes(video(40, size=(320, 320), noisy=True))
    media = loader(data)
    source = fetch(media, "large.mp4")
    reads = 0
    real = os.pread

    def broken(fileno: int, size: int, offset: int) -> bytes:
        nonlocal reads
        reads += 1
        if reads > fails_at:
            raise OSError(5, "Input/output error")
        return real(fileno, size, offset)

    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises(TransientError, match="Input/output error"):
        media.prepare(source, frames=ONE_A_SECOND)


# ---------------------------------------------------------------- room


def test_a_full_disk_stops_the_task_and_names_the_folder(tmp_path: Path) -> None:
    """No sample's fault: it would be a dead letter only because another worker's disk was full."""
    code = f"""
        import resource
        from airflow_vlm_provider.shards.media import MediaLoader
        from airflow_vlm_provider.shards.video_files import SpoolError
        from airflow_vlm_provider.errors import SampleError
        from airflow_vlm_provider.types import MediaRef
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        loader = MediaLoader(source_uri="file://{tmp_path}/")
        loader.fetch(MediaRef("video", "v"), embedded={{"v": bytes(100_000)}})
        try:
            loader.fetch(MediaRef("video", "v"), embedded={{"v": bytes(100_001)}})
        except SpoolError as error:
            assert not isinstance(error, (SampleError, OSError))
            print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"can't be kept in {tmp_path}" in done.stdout
    assert "File too large" in done.stdout
    assert "TMPDIR" in done.stdout


def test_no_folder_at_all_for_temporary_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere/at/all")
    with pytest.raises(SpoolError, match="/nowhere/at/all"):
        Spool()


# ---------------------------------------------------------------- reading by position


def test_readers_do_not_disturb_each_other() -> None:
    data = os.urandom(3_000_000)
    file = spooled(data)

    def read(seed: int) -> bool:
        reader = file.reader()
        for step in range(200):
            start = (seed * 7919 + step * 104_729) % len(data)
            reader.seek(start)
            if reader.read(1000) != data[start : start + 1000]:
                return False
        return True

    with ThreadPoolExecutor(8) as threads:
        assert all(threads.map(read, range(8)))
    assert file.digest == hashlib.sha256(data).hexdigest()
    assert file.read(5, 10) == data[10:15]


def test_many_threads_decode_one_video() -> None:
    file_data = video(300, fps=10, gop=20)
    windows = [FrameSampling(fps=1, max_frames=9, start=start, end=start + 5) for start in range(0, 30, 5)]
    media = MediaLoader(source_uri="file:///nowhere/")
    source = media.fetch(MediaRef("video", "v"), embedded={"v": file_data})
    with ThreadPoolExecutor(6) as threads:
        found = list(threads.map(lambda window: numbers(media.prepare(source, frames=window)), windows))
    assert found == [[start * 10 + 5 + 10 * k for k in range(5)] for start in range(0, 30, 5)]
    assert found == [numbers(load(file_data, window)) for window in windows]


def test_a_file_that_ends_early_is_noticed() -> None:
    file = spooled(b"x" * 1000)
    os.ftruncate(file.fileno(), 500)
    reader = file.reader()
    with pytest.raises(ObjectChangedError):
        reader.readall()
    with pytest.raises(ObjectChangedError):
        file.check()
