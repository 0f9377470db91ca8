from __future__ import annotations

import io
import json
import subprocess
import tarfile
from dataclasses import replace
from pathlib import Path

import pytest
import webdataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from airflow_vlm_provider.errors import ShardError
from airflow_vlm_provider.shards.formats import shard_format
from tests.support.tars import KEYS, PLAIN, contents, read, rewrite, special, tar

# A busy machine is no failure.
untimed = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

FORMATS = [".tar", ".tar.gz", ".tgz", ".tar.zst"]


def captioned(sample):
    return [{**sample.row, "caption": f"of {sample.key}"}]


def headers(data: bytes) -> list[dict[str, object]]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        # The checksum is that of one way to write a header.
        return [{**info.get_info(), "pax": info.pax_headers, "chksum": None} for info in archive]


def rich_tar(form: int) -> bytes:
    """A tar with everything that a header can say."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form, encoding="utf-8") as archive:
        for number, (name, kind, content) in enumerate(
            [
                ("d", tarfile.DIRTYPE, b""),
                ("d/1.jpg", tarfile.REGTYPE, b"j" * 700),
                ("d/1.json", tarfile.REGTYPE, b'{ "n":1 }'),
                ("d/link.d", tarfile.SYMTYPE, b""),
                ("d/" + "long" * 60 + ".jpg", tarfile.REGTYPE, b"\0" * 512),
                ("d/zwölf.txt", tarfile.REGTYPE, "zwölf".encode()),
                ("d/pipe", tarfile.FIFOTYPE, b""),
            ]
        ):
            info = tarfile.TarInfo(name)
            info.type, info.size, info.mode, info.mtime = (
                kind,
                len(content),
                0o640 + number,
                1_700_000_000 + number,
            )
            info.uid, info.gid, info.uname, info.gname = 1000 + number, 2000, "ünal", "users"
            info.linkname = "1.jpg" if kind == tarfile.SYMTYPE else ""
            if form == tarfile.PAX_FORMAT:
                info.mtime = 1_700_000_000.25 + number
                info.pax_headers = {"comment": f"number {number}", "SCHILY.xattr.user.x": "y"}
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_unchanged_samples_keep_their_headers_and_bytes(form):
    data = rich_tar(form)
    written = rewrite(data, lambda sample: None)
    assert contents(written) == contents(data)
    extended = {"path", "uname", "gname"} if form == tarfile.GNU_FORMAT else set()
    for before, after in zip(headers(data), headers(written), strict=True):
        after["pax"] = {name: value for name, value in after["pax"].items() if name not in extended}
        assert after == before
    # Written once more, not a byte is different.
    assert rewrite(written, lambda sample: None) == written


def test_a_step_that_changes_nothing_changes_nothing():
    data = rich_tar(tarfile.PAX_FORMAT)
    assert rewrite(data, lambda sample: [dict(sample.row)]) == rewrite(data, lambda sample: None)


@pytest.mark.parametrize("suffix", FORMATS)
def test_generated_fields_stand_in_the_json(suffix):
    original = tar(
        ("README", b"about"),
        ("a.jpg", b"A"),
        ("a.json", b'{"z": 1, "__key__": "its own", "images": ["https://x/y.jpg"], "b": [1.5, null]}'),
        ("a.txt", b"text"),
        ("b.jpg", b"B"),
    )
    form = shard_format("x" + suffix)
    compressor = form.codec.compressor() if form.codec else None
    data = compressor.compress(original) + compressor.flush() if compressor else original
    written = rewrite(data, captioned, name="x" + suffix)
    assert written == rewrite(data, captioned, name="x" + suffix)
    with form.open(io.BytesIO(written), keys=KEYS) as shard:
        first, second = shard
    assert list(first.origin.fields.items()) == [
        ("z", 1),
        ("__key__", "its own"),
        ("images", ["https://x/y.jpg"]),
        ("b", [1.5, None]),
        ("caption", "of a"),
    ]
    assert second.origin.fields == {"caption": "of b"}
    assert first.row["images"] == ["a.jpg"]
    assert [member.info.name for member in first.origin.members] == ["README", "a.jpg", "a.json", "a.txt"]
    assert [(member.info.name, member.data) for member in second.origin.members] == [
        ("b.jpg", b"B"),
        ("b.json", b'{"caption": "of b"}'),
    ]


def test_a_new_json_has_its_neighbours_times_and_owner():
    written = rewrite(rich_tar(tarfile.PAX_FORMAT), captioned)
    rows = {str(header["name"]): header for header in headers(written)}
    new, beside = rows["d/zwölf.json"], rows["d/zwölf.txt"]
    for name in ("mode", "mtime", "uid", "gid", "uname", "gname"):
        assert new[name] == beside[name]


def test_a_new_json_follows_its_samples_last_member():
    data = tar(("a.jpg", b"1"), special("d", tarfile.DIRTYPE), ("a.txt", b"t"), special("e", tarfile.DIRTYPE))
    assert [name for name, _ in contents(rewrite(data, captioned))] == ["a.jpg", "d", "a.txt", "a.json", "e"]


def test_a_changed_text_goes_where_the_text_is():
    def step(sample):
        return [{**sample.row, "text": "néw"}]

    both = tar(("a.json", b'{"text": "in the json", "n": 1}'), ("a.txt", b"in the txt"))
    assert contents(rewrite(both, step)) == [
        ("a.json", '{"text": "néw", "n": 1}'.encode()),
        ("a.txt", "néw".encode()),
    ]
    only_txt = tar(("a.jpg", b""), ("a.txt", b"old"))
    assert contents(rewrite(only_txt, step)) == [("a.jpg", b""), ("a.txt", "néw".encode())]
    generated = contents(rewrite(only_txt, step, generated=["text"]))
    assert generated == [("a.jpg", b""), ("a.txt", "néw".encode()), ("a.json", '{"text": "néw"}'.encode())]
    only_json = tar(("a.jpg", b""), ("a.json", b"{}"))
    assert contents(rewrite(only_json, step)) == [("a.jpg", b""), ("a.json", '{"text": "néw"}'.encode())]
    # An empty text is the same object as any other empty one.
    empty = tar(("a.json", b'{"text": ""}'), ("a.txt", b""))
    assert contents(rewrite(empty, step))[1] == ("a.txt", "néw".encode())


def test_a_field_that_a_step_takes_away_is_gone():
    data = tar(
        ("a.json", b'{"x": 1, "y": 2}'),
    )
    written = rewrite(data, lambda sample: [{k: v for k, v in sample.row.items() if k != "x"}])
    assert contents(written) == [("a.json", b'{"y": 2}')]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"images": []}, ValueError),
        ({"__key__": "b"}, ValueError),
        ({"text": None}, TypeError),
        ({"text": "\udcff"}, ValueError),
        ({"n": float("nan")}, ValueError),
        ({"n": object()}, TypeError),
    ],
)
def test_what_a_tar_cannot_hold_is_refused_and_leaves_nothing(change, error):
    data = tar(("a.jpg", b"1"), ("a.txt", b"t"))
    output = io.BytesIO()
    with PLAIN.open(io.BytesIO(data), keys=KEYS) as shard, shard.writer(output, generated={}) as writer:
        (sample,) = shard
        with pytest.raises(error):
            writer.write(sample, [{**sample.row, "m": 1}, {**sample.row, **change}])
        writer.write_unchanged(sample)
    assert contents(output.getvalue()) == contents(data)


def test_several_rows_get_keys_of_their_own():
    data = tar(("README", b"x"), ("a.jpg", b"1"), ("a.txt", b"t"), ("a_1.jpg", b"2"), ("b.jpg", b"3"))

    def step(sample):
        return [{**sample.row, "n": n} for n in range(3)] if sample.key != "b" else []

    written = rewrite(data, step)
    assert contents(written) == [
        ("README", b"x"),
        *(("a.jpg", b"1"), ("a.txt", b"t"), ("a.json", b'{"n": 0}')),
        *(("a_2.jpg", b"1"), ("a_2.txt", b"t"), ("a_2.json", b'{"n": 1}')),
        *(("a_3.jpg", b"1"), ("a_3.txt", b"t"), ("a_3.json", b'{"n": 2}')),
        *(("a_1.jpg", b"2"), ("a_1.json", b'{"n": 0}')),
        *(("a_1_1.jpg", b"2"), ("a_1_1.json", b'{"n": 1}')),
        *(("a_1_2.jpg", b"2"), ("a_1_2.json", b'{"n": 2}')),
    ]
    assert [sample.row["n"] for sample in read(written)] == [0, 1, 2, 0, 1, 2]


def test_a_renamed_member_is_renamed_in_its_extended_header_too():
    name = "ü" * 120
    data = tar((f"{name}.jpg", b"1"), (f"{name}.json", b"{}"))
    written = rewrite(data, lambda sample: [{**sample.row, "n": "x" * 600}, dict(sample.row)])
    assert [each for each, _ in contents(written)] == [
        f"{key}.{suffix}" for key in (name, f"{name}_1") for suffix in ("jpg", "json")
    ]
    assert [sample.error for sample in read(written)] == [None, None]


def test_samples_do_not_grow_together_when_those_between_them_are_dropped():
    data = tar(("a.jpg", b"1"), ("b.jpg", b"2"), ("a.png", b"3"))
    written = rewrite(data, lambda sample: [] if sample.key == "b" else None)
    assert contents(written) == [("a.jpg", b"1"), ("a_1.png", b"3")]


def test_a_dropped_sample_leaves_what_is_not_its_own():
    data = tar(special("d", tarfile.DIRTYPE), ("d/a.jpg", b"1"), ("d/LICENSE", b"free"))
    assert contents(rewrite(data, lambda sample: [])) == [("d", b""), ("d/LICENSE", b"free")]


def test_a_tar_without_samples_is_written_back():
    data = tar(("README", b"x"), special("d", tarfile.DIRTYPE))
    assert contents(rewrite(data, captioned)) == contents(data)
    assert contents(rewrite(tar(), captioned)) == []


def test_malformed_samples_are_written_back_as_they_were():
    data = tar(
        ("a.json", b"{"),
        ("a.jpg", b"1"),
        ("b.txt", b"\xff"),
        ("c.jpg", b"2"),
        ("c.JPG", b"3"),
        special("d.jpg", tarfile.LNKTYPE, "c.jpg"),
        ("e.jpg", b"4"),
    )
    assert [sample.row is None for sample in read(data)] == [True, True, True, True, False]
    with tarfile.open(fileobj=io.BytesIO(rewrite(data, captioned))) as archive:
        names = archive.getnames()
        assert archive.getmember("d.jpg").linkname == "c.jpg"
    assert names == ["a.json", "a.jpg", "b.txt", "c.jpg", "c.JPG", "d.jpg", "e.jpg", "e.json"]


@pytest.mark.parametrize("large", ["a.mp4", "README"])
def test_what_was_too_large_to_be_held_is_not_left_out_silently(large):
    form = replace(PLAIN, max_member_bytes=100)
    data = tar((large, b"x" * 101), ("a.jpg", b"1"), ("b.jpg", b"2"))
    with form.open(io.BytesIO(data), keys=KEYS) as shard:
        writer = shard.writer(io.BytesIO(), generated={})
        first, second = shard
        with pytest.raises(ShardError, match=rf"'{large}' has 101 bytes, which is too large .* sidecar"):
            writer.write_unchanged(first)
        writer.write_unchanged(second)
    with form.open(io.BytesIO(tar(("README", b"x" * 101))), keys=KEYS) as shard:
        assert list(shard) == []
        with pytest.raises(ShardError, match="README"), shard.writer(io.BytesIO(), generated={}):
            pass


def test_nothing_is_finished_when_the_body_fails():
    output = io.BytesIO()
    with PLAIN.open(io.BytesIO(tar()), keys=KEYS) as shard, pytest.raises(RuntimeError):  # noqa: SIM117
        with shard.writer(output, generated={}):
            raise RuntimeError
    assert output.getvalue() == b""


def test_the_webdataset_library_reads_what_is_written(tmp_path):
    data = tar(
        ("train/1.front.jpg", b"\xff\xd8 1"),
        ("train/1.json", b'{"n": 1}'),
        ("train/1.txt", "Zwölf".encode()),
        ("train/2.jpg", b"\xff\xd8 2"),
    )
    path = tmp_path / "a.tar"
    path.write_bytes(rewrite(data, lambda sample: [*captioned(sample), dict(sample.row)]))
    found = webdataset.WebDataset(str(path), shardshuffle=False).decode()
    samples = [{k: v for k, v in each.items() if k not in ("__url__", "__local_path__")} for each in found]
    assert samples == [
        {
            "__key__": "train/1",
            "front.jpg": b"\xff\xd8 1",
            "json": {"n": 1, "caption": "of train/1"},
            "txt": "Zwölf",
        },
        {"__key__": "train/1_1", "front.jpg": b"\xff\xd8 1", "json": {"n": 1}, "txt": "Zwölf"},
        {"__key__": "train/2", "jpg": b"\xff\xd8 2", "json": {"caption": "of train/2"}},
        {"__key__": "train/2_1", "jpg": b"\xff\xd8 2"},
    ]


@pytest.mark.parametrize("suffix", [".tar", ".tar.gz"])
def test_gnu_tar_reads_what_is_written(suffix, tmp_path):
    data = rich_tar(tarfile.GNU_FORMAT)
    if suffix == ".tar.gz":
        compressor = shard_format("x.tgz").codec.compressor()
        data = compressor.compress(data) + compressor.flush()
    path: Path = tmp_path / ("a" + suffix)
    path.write_bytes(rewrite(data, captioned, name=path.name))
    listed = subprocess.run(
        ["tar", "--quoting-style=literal", "-tf", str(path)], capture_output=True, check=True, timeout=60
    )
    assert listed.stderr == b""
    assert listed.stdout.decode().splitlines() == [
        "d/",
        *("d/1.jpg", "d/1.json", "d/link.d"),
        *("d/" + "long" * 60 + ".jpg", "d/" + "long" * 60 + ".json"),
        *("d/zwölf.txt", "d/zwölf.json", "d/pipe"),
    ]


def test_what_the_webdataset_library_writes_is_read(tmp_path):
    path = tmp_path / "a.tar"
    with webdataset.TarWriter(str(path)) as writer:
        writer.write({"__key__": "x/1", "jpg": b"\xff\xd8", "json": {"a": "ä"}, "txt": "t", "cls": 3})
    data = path.read_bytes()
    (sample,) = read(data)
    assert sample.row == {"a": "ä", "__key__": "x/1", "text": "t", "images": ["1.jpg"]}
    assert headers(rewrite(data, lambda sample: None)) == headers(data)


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
).filter(lambda value: "Infinity" not in json.dumps(value))
samples = st.fixed_dictionaries(
    {},
    optional={
        "jpg": st.binary(max_size=1100),
        "0.png": st.binary(max_size=5),
        "json": st.dictionaries(st.text("ab_", max_size=2), values, max_size=3)
        .map(json.dumps)
        .map(str.encode),
        "txt": st.text(max_size=5).map(str.encode),
        "npy": st.binary(max_size=5),
    },
).filter(bool)


@untimed
@given(
    groups=st.lists(samples, max_size=4),
    added=st.dictionaries(st.text("xyz", min_size=1), values, max_size=2),
)
def test_samples_come_back_with_what_was_added_and_nothing_else(groups, added):
    data = tar(*((f"d/{n}.{name}", body) for n, group in enumerate(groups) for name, body in group.items()))
    written = rewrite(data, lambda sample: [{**sample.row, **added}])
    before, after = read(data), read(written)
    assert [sample.row for sample in after] == [{**sample.row, **added} for sample in before]
    assert [sample.embedded for sample in after] == [sample.embedded for sample in before]
    kept = [(name, body) for name, body in contents(data) if not name.endswith(".json")]
    assert [(name, body) for name, body in contents(written) if not name.endswith(".json")] == kept
