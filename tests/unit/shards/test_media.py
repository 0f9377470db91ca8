from __future__ import annotations

import errno
import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from airflow_vlm_provider.errors import ConfigError, SampleError, TransientError
from airflow_vlm_provider.shards import local
from airflow_vlm_provider.shards.media import MediaLoader
from airflow_vlm_provider.types import MediaRef
from tests.support.images import decode, encode, photo, png
from tests.support.media import load_media
from tests.support.media_folders import JPEG, SECRET, dataset_folder, load, loader, looked_at


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return dataset_folder(tmp_path)


def failure(folder: Path, ref: str, *, shard: str = "shards/1.jsonl", **options: object) -> SampleError:
    with pytest.raises(SampleError) as caught:
        load(folder, ref, shard=shard, **options)
    assert (caught.value.media or "").startswith(ref[:1000])
    assert len(caught.value.message) > 20
    return caught.value


def test_relative_to_the_shard_or_absolute(data: Path) -> None:
    for ref in ("b.jpg", "./b.jpg", "pics/c.jpg", "../a.jpg", f"{data}/a.jpg", f"file://{data}/a.jpg"):
        assert load(data, ref) == JPEG
    assert load(data, "a.jpg", shard="1.jsonl") == JPEG


def test_the_mime_type_is_told_by_content(data: Path) -> None:
    (data / "wrong.jpg").write_bytes(encode(photo(), "PNG"))
    media = load_media(loader(data), MediaRef("image", "wrong.jpg"))
    assert media.mime == "image/png"


def test_beside_the_shard_comes_before_the_roots(data: Path, tmp_path: Path) -> None:
    (tmp_path / "outside" / "b.jpg").write_bytes(SECRET)
    roots = [str(data), str(tmp_path / "outside")]
    assert load(data, "b.jpg", roots=roots) == JPEG
    assert load(data, "secret.png", roots=roots) == SECRET
    error = failure(data, "nowhere.jpg", roots=roots)
    assert error.kind == "media_missing"
    assert str(tmp_path / "outside") in error.message


def test_given_roots_replace_the_shards_own_place(data: Path, tmp_path: Path) -> None:
    assert failure(data, str(data / "a.jpg"), roots=[str(tmp_path / "outside")]).kind == "media_refused"


def test_no_roots_at_all_allow_nothing(data: Path) -> None:
    assert failure(data, "b.jpg", roots=[]).kind == "media_refused"


def test_a_percent_encoded_file_uri(data: Path) -> None:
    (data / "my cat.jpg").write_bytes(JPEG)
    (data / "100%.jpg").write_bytes(JPEG)
    assert load(data, (data / "my cat.jpg").as_uri()) == JPEG
    assert load(data, (data / "100%.jpg").as_uri()) == JPEG
    assert load(data, f"file://{data}/100%.jpg") == JPEG
    assert load(data, "../100%.jpg") == JPEG


def test_a_file_name_that_is_not_unicode_is_refused(data: Path) -> None:
    Path(os.fsdecode(os.fsencode(data) + b"/caf\xe9.jpg")).write_bytes(JPEG)
    assert failure(data, os.fsdecode(b"../caf\xe9.jpg")).kind == "media_refused"


@pytest.mark.parametrize(
    "ref",
    [
        "../../outside/secret.png",
        "../../../../../../../etc/passwd",
        "/etc/passwd",
        "file:///etc/passwd",
        "/proc/self/environ",
        "/dev/zero",
        "file://otherhost/etc/passwd",
        "http://169.254.169.254/latest/meta-data/",
        "http://127.0.0.1/a.jpg",
        "s3://bucket/a.jpg",
        "ftp://example.com/a.jpg",
        "a\0.jpg",
        "",
        "x\ud800.jpg",
        "/".join(["x" * 200] * 30),
    ],
)
def test_a_dataset_can_not_reach_out(data: Path, ref: str) -> None:
    assert failure(data, ref).kind == "media_refused"


def test_a_symbolic_link_out_of_the_root_is_refused(data: Path, tmp_path: Path) -> None:
    (data / "link.png").symlink_to(tmp_path / "outside" / "secret.png")
    (data / "folder").symlink_to(tmp_path / "outside")
    for ref in ("../link.png", "../folder/secret.png", str(data / "folder" / "secret.png")):
        error = failure(data, ref)
        assert error.kind == "media_refused"
        assert "media_roots" in error.message


def test_a_symbolic_link_between_allowed_roots_is_followed(data: Path, tmp_path: Path) -> None:
    (data / "link.png").symlink_to(tmp_path / "outside" / "secret.png")
    assert load(data, "../link.png", roots=[str(data), str(tmp_path / "outside")]) == SECRET


def test_a_symbolic_link_within_the_root_is_followed(data: Path) -> None:
    (data / "link.jpg").symlink_to("shards/b.jpg")
    assert load(data, "../link.jpg") == JPEG


def test_a_loop_of_links_ends(data: Path) -> None:
    (data / "one").symlink_to("two")
    (data / "two").symlink_to("one")
    assert failure(data, "../one").kind in ("media_missing", "media_refused")


def test_a_fifo_is_not_waited_for(data: Path) -> None:
    os.mkfifo(data / "fifo.jpg")
    assert failure(data, "../fifo.jpg").kind == "media_refused"


@pytest.mark.parametrize("ref", ["nowhere.jpg", "../nowhere/a.jpg", "b.jpg/x.jpg", "pics", "pics/"])
def test_what_is_not_there_is_missing(data: Path, ref: str) -> None:
    assert failure(data, ref).kind == "media_missing"


def test_what_may_not_be_read_is_unreadable(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The file system's own refusal can't be provoked by root, who may read everything.
    def deny(path: object, flags: int) -> int:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(local, "_open_without_blocking", deny)
    assert failure(data, "b.jpg").kind == "media_unreadable"


def test_a_failing_disk_is_not_the_samples_fault(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: object, flags: int) -> int:
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(local, "_open_without_blocking", fail)
    error = failure(data, "b.jpg")
    assert isinstance(error, TransientError)
    assert error.kind == "transient"


def test_a_file_over_the_limit_is_too_large(data: Path) -> None:
    error = failure(data, "b.jpg", max_bytes=len(JPEG) - 1)
    assert error.kind == "media_too_large"
    assert load(data, "b.jpg", max_bytes=len(JPEG)) == JPEG


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        (b"", "media_corrupt"),
        (b"no picture", "media_corrupt"),
        (JPEG[:-100], "media_corrupt"),
        (b"<html>404</html>", "media_corrupt"),
        (b"<svg/>", "media_unsupported"),
        (png(60_000, 60_000, b"\0"), "media_too_large"),
    ],
)
def test_content_that_is_no_good(data: Path, content: bytes, kind: str) -> None:
    (data / "shards" / "bad.jpg").write_bytes(content)
    assert failure(data, "bad.jpg").kind == kind


def test_large_images_are_shrunk(data: Path) -> None:
    (data / "shards" / "large.jpg").write_bytes(encode(photo(200, 100), "JPEG"))
    assert decode(load(data, "large.jpg", max_pixels=5000)).size == (100, 50)


@pytest.mark.parametrize("ref", [None, 7, ["a.jpg"], {"path": "a.jpg"}])
def test_a_reference_that_is_no_string_is_refused(data: Path, ref: object) -> None:
    with pytest.raises(SampleError) as caught:
        load_media(loader(data), MediaRef("image", ref))  # type: ignore[arg-type]
    assert caught.value.kind == "media_refused"
    assert caught.value.media == repr(ref)


def test_a_reference_that_holds_a_picture_is_reported_in_part(data: Path) -> None:
    with pytest.raises(SampleError) as caught:
        load_media(loader(data), MediaRef("image", "data:image/png;base64," + "A" * 1_000_000))
    assert caught.value.kind == "media_refused"
    assert len(caught.value.media or "") < 2000


def test_parameters_tell_what_decides_the_pixels_and_nothing_else(data: Path, tmp_path: Path) -> None:
    plain = loader(data).parameters()
    assert loader(tmp_path, max_bytes=5).parameters() == plain
    assert loader(tmp_path, roots=["https://"]).parameters() != plain
    assert loader(data, max_pixels=1000).parameters() != plain


@pytest.mark.parametrize("max_pixels", [0, -1])
def test_a_limit_below_one_is_a_config_error(data: Path, max_pixels: int) -> None:
    with pytest.raises(ConfigError, match="max_pixels"):
        loader(data, max_pixels=max_pixels)


def test_one_loader_serves_many_threads(data: Path) -> None:
    for number in range(40):
        (data / "shards" / f"{number}.png").write_bytes(encode(photo(8 + number, 8), "PNG"))
    shared = loader(data, max_pixels=100)
    refs = [MediaRef("image", f"{number}.png") for number in range(40)] * 5
    with ThreadPoolExecutor(8) as threads:
        loaded = list(threads.map(lambda ref: load_media(shared, ref, shard="shards/1.jsonl"), refs))
    assert [media.ref for media in loaded] == [ref.ref for ref in refs]
    assert all(decode(media.data).width <= 100 for media in loaded)
    assert [media.data for media in loaded[:40]] == [media.data for media in loaded[40:80]]


@given(st.text(max_size=60))
@example("%00")
@example("file://%")
@example("http://[")
@example("~/secret")
@example("$HOME/secret")
def test_no_reference_raises_anything_but_a_sample_error(ref: str) -> None:
    with pytest.raises(SampleError):
        load_media(
            MediaLoader(source_uri="file:///nowhere/at/all/", roots=["/nowhere", "/nowhere/else"]),
            MediaRef("image", ref),
            shard="x/1.jsonl",
        )


def test_fetching_hands_out_the_source_bytes_whatever_they_are(data: Path) -> None:
    for content in (JPEG, b"no picture", b""):
        (data / "shards" / "x.jpg").write_bytes(content)
        source = loader(data, max_pixels=10).fetch(MediaRef("image", "x.jpg"), shard="shards/1.jsonl")
        assert source.data == content
        assert source.digest == hashlib.sha256(content).hexdigest()
        assert (source.kind, source.ref) == ("image", "x.jpg")


def test_preparing_decodes_what_was_fetched(data: Path) -> None:
    shared = loader(data, max_pixels=16)
    source = shared.fetch(MediaRef("image", "b.jpg"), shard="shards/1.jsonl")
    (media,) = shared.prepare(source)
    assert (media.kind, media.ref, media.mime) == ("image", "b.jpg", "image/jpeg")
    width, height = decode(media.data).size
    assert width * height <= 16
    (data / "shards" / "b.jpg").write_bytes(JPEG[:-100])
    with pytest.raises(SampleError) as caught:
        shared.prepare(shared.fetch(MediaRef("image", "b.jpg"), shard="shards/1.jsonl"))
    assert (caught.value.kind, caught.value.media) == ("media_corrupt", "b.jpg")
    assert caught.value.looked == looked_at(shared, "b.jpg")


def test_what_the_shard_embeds_is_looked_for_nowhere_else(data: Path) -> None:
    shared = loader(data, roots=[])
    embedded = {"b.jpg": SECRET, "/etc/passwd": JPEG}
    for ref, content in embedded.items():
        source = shared.fetch(MediaRef("image", ref), shard="shards/1.jsonl", embedded=embedded)
        assert (source.data, source.looked) == (content, ())
        assert source.digest == hashlib.sha256(content).hexdigest()
        assert shared.prepare(source)[0].ref == ref
    with pytest.raises(SampleError) as caught:
        shared.fetch(MediaRef("image", "a.jpg"), embedded=embedded)
    assert caught.value.kind == "media_refused"


def test_what_the_shard_embeds_has_limits_too(data: Path) -> None:
    with pytest.raises(SampleError) as caught:
        loader(data, max_bytes=10).fetch(MediaRef("image", "x"), embedded={"x": b"." * 11})
    assert (caught.value.kind, caught.value.media, caught.value.looked) == ("media_too_large", "x", ())
    source = loader(data, max_bytes=10).fetch(MediaRef("image", "x"), embedded={"x": b"." * 10})
    with pytest.raises(SampleError) as caught:
        loader(data).prepare(source)
    assert (caught.value.kind, caught.value.media) == ("media_corrupt", "x")


def test_a_request_is_not_another_for_other_roots(data: Path, tmp_path: Path) -> None:
    plain = loader(data).answering_parameters()
    assert loader(tmp_path, max_bytes=5, roots=["https://"]).answering_parameters() == plain
    assert loader(data, max_pixels=1000).answering_parameters() != plain


def test_what_is_remembered_holds_only_where_references_mean_the_same(data: Path, tmp_path: Path) -> None:
    plain = loader(data).memory_parameters()
    assert loader(data).memory_parameters() == plain
    for other in (
        loader(tmp_path),
        loader(data, roots=[str(data), str(tmp_path)]),
        loader(data, max_bytes=5),
        loader(data, max_pixels=1000),
    ):
        assert other.memory_parameters() != plain
