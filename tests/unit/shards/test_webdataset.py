from __future__ import annotations

import io
import json
import tarfile
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from airflow_vlm_provider.errors import ShardError
from airflow_vlm_provider.shards.formats import RowKeys, is_shard, shard_format, shard_stem
from airflow_vlm_provider.shards.webdataset import MAX_MEMBERS
from tests.support.tars import KEYS, PLAIN, read, special, tar

# A busy machine is no failure.
untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

FORMATS = [".tar", ".tar.gz", ".tgz", ".tar.zst"]


def library(data: bytes, path: Path) -> list[dict[str, object]]:
    """The samples as the webdataset library groups them, without what it says about the file."""
    path.write_bytes(data)
    found = webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False)
    about = ("__url__", "__local_path__")
    return [{name: value for name, value in sample.items() if name not in about} for sample in found]


def test_a_samples_row_holds_what_its_members_say():
    data = tar(
        ("train/0001.front.JPG", b"front"),
        ("train/0001.back.webp", b"back"),
        ("train/0001.json", b'{"width": 3, "text": "of the json", "images": ["https://x/y.jpg"]}'),
        ("train/0001.txt", "Zwölf\n".encode()),
        ("train/0001.mp4", b"film"),
        ("train/0001.cls", b"7"),
        ("train/0002.json", b'{"text": "only", "images": ["https://x/z.jpg"]}'),
    )
    first, second = read(data)
    assert first.row == {
        "width": 3,
        "text": "Zwölf\n",
        "images": ["0001.front.JPG", "0001.back.webp"],
        "__key__": "train/0001",
        "videos": ["0001.mp4"],
    }
    assert (first.index, first.line, first.key, first.error) == (0, 1, "train/0001", None)
    assert first.embedded == {"0001.front.JPG": b"front", "0001.back.webp": b"back", "0001.mp4": b"film"}
    assert second.row == {"text": "only", "images": ["https://x/z.jpg"], "__key__": "train/0002"}
    assert (second.index, second.line, second.key) == (1, 2, "train/0002")
    assert second.embedded == {}


def test_fields_are_called_what_the_keys_say():
    with PLAIN.open(
        io.BytesIO(tar(("a.jpg", b""), ("a.mov", b""), ("a.txt", b"t"))), keys=RowKeys("T", "I", "V")
    ) as shard:
        (sample,) = shard
    assert sample.row == {"__key__": "a", "T": "t", "I": ["a.jpg"], "V": ["a.mov"]}


@pytest.mark.parametrize("suffix", FORMATS)
def test_the_suffix_tells_the_format(suffix):
    name = "days/01/a.b" + suffix
    assert is_shard(name)
    assert is_shard(name.upper())
    assert shard_stem(name) == "days/01/a.b"
    assert not shard_format(name).seekable
    with shard_format(name).open(io.BytesIO(), keys=KEYS) as shard:
        assert shard.embeds_media


def test_neighbours_with_one_key_are_one_sample_and_others_are_not():
    data = tar(("a.jpg", b"1"), ("b.jpg", b"2"), ("a.json", b"{}"), ("c/a.jpg", b"3"), ("c/a.png", b"4"))
    assert [(sample.key, list(sample.embedded)) for sample in read(data)] == [
        ("a", ["a.jpg"]),
        ("b", ["b.jpg"]),
        ("a", []),
        ("c/a", ["a.jpg", "a.png"]),
    ]


def test_what_is_part_of_no_sample_does_not_part_one():
    data = tar(
        ("README", b"x"),
        special("a", tarfile.DIRTYPE),
        ("a/1.jpg", b"1"),
        special("a/notes.d", tarfile.DIRTYPE),
        special("a/latest.v1", tarfile.SYMTYPE, "1.v1"),
        ("a/.hidden.jpg", b"h"),
        ("__manifest__", b"m"),
        ("__about__/1.json", b"{}"),
        ("a/1.json", b'{"n": 1}'),
    )
    (sample,) = read(data)
    assert sample.row == {"n": 1, "__key__": "a/1", "images": ["1.jpg"]}


@pytest.mark.parametrize(
    ("member", "fault"),
    [
        (("a.json", b"{"), "the member 'a.json' is not valid JSON: Expecting property name"),
        (("a.json", b"[1]"), "the member 'a.json' is not a JSON object but a list"),
        (("a.json", b'{"n": NaN}'), "the member 'a.json' is not valid JSON: NaN is not a JSON value"),
        (("a.json", b'"\xff"'), "the member 'a.json' is not valid UTF-8 at byte 2"),
        (("a.txt", b"ab\xff"), "the member 'a.txt' is not valid UTF-8 at byte 3"),
        (("a.JPG", b""), "the member 'a.JPG' has the same suffix as another member"),
        (("a.jpg", b""), "the member 'a.jpg' has the same suffix as another member"),
        (special("a.png", tarfile.SYMTYPE, "a.jpg"), "the member 'a.png' is a link"),
        (special("a.json", tarfile.LNKTYPE, "b.json"), "the member 'a.json' is a link"),
        (("a.png", b"x" * 101), "the member 'a.png' is larger than 100 bytes"),
        (("a.cls", b"x" * 100), "the member 'a.cls' makes its sample larger than 150 bytes"),
    ],
)
def test_a_malformed_sample_does_not_stop_the_shard(member, fault):
    form = replace(PLAIN, max_member_bytes=100, max_sample_bytes=150)
    data = tar(("a.jpg", b"j" * 60), member, ("b.jpg", b"2"))
    bad, good = read(data, form)
    assert bad.row is None
    assert bad.error is not None
    assert bad.error.startswith(fault)
    assert (bad.key, bad.index) == ("a", 0)
    assert good.row == {"__key__": "b", "images": ["b.jpg"]}
    assert (good.index, good.error) == (1, None)


def test_a_name_that_is_not_unicode_makes_its_sample_malformed():
    info = tarfile.TarInfo("a\udcff.jpg")
    data = tar(info, ("b.jpg", b""), form=tarfile.USTAR_FORMAT)
    bad, good = read(data.replace("a\udcff".encode("utf-8", "surrogateescape"), b"a\xff"))
    assert bad.row is None
    assert "not valid UTF-8" in str(bad.error)
    assert good.key == "b"


def test_what_is_too_large_and_no_part_of_a_sample_does_no_harm():
    form = replace(PLAIN, max_member_bytes=100, max_sample_bytes=150)
    (sample,) = read(tar(("README", b"x" * 101), ("a.jpg", b"1")), form)
    assert sample.row == {"__key__": "a", "images": ["a.jpg"]}


def test_a_tar_without_samples_is_an_empty_shard():
    assert read(tar()) == []
    assert read(tar(("README", b"x"), special("d", tarfile.DIRTYPE))) == []


@pytest.mark.parametrize("name", ["frame.{:06}.jpg", "n{:06}"])
def test_names_that_make_one_endless_sample_are_refused(name):
    data = tar(*((name.format(number), b"") for number in range(MAX_MEMBERS + 1)))
    with pytest.raises(ShardError, match=f"More than {MAX_MEMBERS} members"):
        read(data)


@pytest.mark.parametrize("suffix", FORMATS[1:])
def test_a_compressed_shard_cut_off_anywhere_is_an_error(suffix):
    whole = compressed(suffix, tar(("a.jpg", b"picture" * 99), ("a.json", b"{}"), ("b.txt", b"b")))
    form = shard_format("x" + suffix)
    assert [sample.key for sample in read(whole, form)] == ["a", "b"]
    for cut in range(len(whole)):
        with pytest.raises(ShardError):
            read(whole[:cut], form)


def compressed(suffix: str, data: bytes) -> bytes:
    compressor = shard_format("x" + suffix).codec.compressor()
    return compressor.compress(data) + compressor.flush()


def test_a_truncated_shard_gives_no_sample_that_may_lack_members():
    whole = tar(("a.jpg", b"1"), ("a.txt", b"t"), ("b.jpg", b"2"))
    with PLAIN.open(io.BytesIO(whole[:1024]), keys=KEYS) as shard, pytest.raises(ShardError):
        next(iter(shard))


stems = st.text("ab", min_size=1, max_size=2)
suffixes = st.sampled_from(["jpg", "png", "txt", "json", "cls", "0.jpg", "0.json", "JPG", ""])
names = st.builds(lambda folder, stem, suffix: f"{folder}{stem}.{suffix}", st.sampled_from(["", "d/", "d.e/"]), stems, suffixes)  # fmt: skip
others = st.sampled_from(["README", "d/x", ".hidden.jpg", "__meta__", "__meta__/a.jpg"])


@untimed
@given(members=st.lists(names | others, max_size=12))
def test_grouping_is_the_webdataset_librarys(members, tmp_path_factory):
    data = tar(*((name, b"{}") for name in members))
    samples = read(data)
    try:
        expected = library(data, tmp_path_factory.getbasetemp() / "grouping.tar")
    except ValueError:
        # The library stops where a sample has two members of one suffix.
        assert any("same suffix" in (sample.error or "") for sample in samples)
        return
    assert [sample.key for sample in samples] == [each["__key__"] for each in expected]
    assert [
        sorted(member.suffix for member in sample.origin.members if member.suffix is not None)
        for sample in samples
    ] == [sorted(name for name in each if name != "__key__") for each in expected]


def test_memory_does_not_grow_with_the_shard(tmp_path):
    def peak(count: int) -> int:
        path = tmp_path / f"{count}.tar"
        with tarfile.open(path, "w") as archive:
            for number in range(count):
                info = tarfile.TarInfo(f"{number:06}.jpg")
                info.size = 100_000
                archive.addfile(info, io.BytesIO(bytes(100_000)))
        with path.open("rb") as stream, PLAIN.open(stream, keys=KEYS) as shard:
            tracemalloc.start()
            assert sum(1 for _ in shard) == count
            most = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
        return most

    assert peak(200) < 1.5 * peak(20)


def test_a_samples_size_counts_all_that_it_keeps():
    (sample,) = read(tar(("a.npy", bytes(5000)), ("a.jpg", bytes(300)), ("a.json", json.dumps({}).encode())))
    assert 5302 <= sample.size < 10_000
    form = replace(PLAIN, max_sample_bytes=5000)
    (sample,) = read(tar(("a.npy", bytes(5000)), ("a.jpg", bytes(300))), form)
    assert sample.row is None
    assert 5000 <= sample.size < 10_000
