from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_vlm_provider.errors import ConfigError, SampleError
from airflow_vlm_provider.shards.http_urls import HttpUrl, parse_url
from airflow_vlm_provider.shards.media_roots import MAX_REFERENCE_CHARS, MediaRoots, shown

S3 = "s3://bucket/prefix/"
S3_SHARD = "s3://bucket/prefix/shards/"
LOCAL = "/data/pics"
LOCAL_SHARD = "file:///data/pics/shards/"


def places(ref: str, *roots: str, folder: str = S3_SHARD) -> list[str]:
    return [str(place) for place in MediaRoots(roots or (S3,)).places(ref, source=folder)]


def refusal(ref: str, *roots: str, folder: str = S3_SHARD) -> SampleError:
    with pytest.raises(SampleError) as caught:
        MediaRoots(roots or (S3,)).places(ref, source=folder)
    assert caught.value.kind == "media_refused"
    return caught.value


# ---------------------------------------------------------------- S3


@pytest.mark.parametrize(
    ("ref", "place"),
    [
        ("s3://bucket/prefix/a.jpg", "s3://bucket/prefix/a.jpg"),
        ("S3://bucket/prefix/a.jpg", "s3://bucket/prefix/a.jpg"),
        ("s3://bucket/prefix/x/../a.jpg", "s3://bucket/prefix/a.jpg"),
        ("s3://bucket/prefix/100%25 ?#.jpg", "s3://bucket/prefix/100%25 ?#.jpg"),
        ("s3://bucket/prefix/%2e%2e/%2e%2e/a.jpg", "s3://bucket/prefix/%2e%2e/%2e%2e/a.jpg"),
    ],
)
def test_an_absolute_s3_reference_below_the_root(ref: str, place: str) -> None:
    assert places(ref) == [place]


@pytest.mark.parametrize(
    ("ref", "first"),
    [
        ("a.jpg", "s3://bucket/prefix/shards/a.jpg"),
        ("./a.jpg", "s3://bucket/prefix/shards/a.jpg"),
        ("x/a.jpg", "s3://bucket/prefix/shards/x/a.jpg"),
        ("../images/a.jpg", "s3://bucket/prefix/images/a.jpg"),
        ("./12:30.jpg", "s3://bucket/prefix/shards/12:30.jpg"),
        ("12:30.jpg", "s3://bucket/prefix/shards/12:30.jpg"),
        ("%2e%2e/a.jpg", "s3://bucket/prefix/shards/%2e%2e/a.jpg"),
        ("caf\u00e9/\u732b.jpg", "s3://bucket/prefix/shards/caf\u00e9/\u732b.jpg"),
    ],
)
def test_a_relative_reference_is_looked_for_beside_its_shard(ref: str, first: str) -> None:
    assert places(ref)[0] == first


def test_a_relative_reference_is_then_looked_for_below_each_root() -> None:
    found = places("a.jpg", S3, "s3://pics", LOCAL, "https://images.example.com/cats/", "https://")
    assert found == [
        "s3://bucket/prefix/shards/a.jpg",
        "s3://bucket/prefix/a.jpg",
        "s3://pics/a.jpg",
        "file:///data/pics/a.jpg",
        "https://images.example.com/cats/a.jpg",
    ]


def test_the_shards_own_folder_counts_only_below_a_root() -> None:
    assert places("a.jpg", "s3://pics/") == ["s3://pics/a.jpg"]


@pytest.mark.parametrize(
    "ref",
    [
        "s3://bucket2/prefix/a.jpg",
        "s3://buck/prefix/a.jpg",
        "s3://bucket/prefix2/a.jpg",
        "s3://bucket/a.jpg",
        "s3://bucket",
        "s3://",
        "s3://bucket/prefix/../a.jpg",
        "s3://bucket/prefix/../../a.jpg",
        "s3://bucket/prefix/../prefix2/a.jpg",
        "s3://bucket/prefix/",
        "s3://user:password@bucket/prefix/a.jpg",
        "s3:bucket/prefix/a.jpg",
        "s3:/bucket/prefix/a.jpg",
        "s3a://bucket/prefix/a.jpg",
        "../../a.jpg",
        "../../../a.jpg",
        "../../../prefix/a.jpg",
        "x/../../../a.jpg",
        "/etc/passwd",
        "//etc/passwd",
        "file:///etc/passwd",
        "https://images.example.com/a.jpg",
    ],
)
def test_what_is_not_below_the_s3_root_is_refused(ref: str) -> None:
    assert refusal(ref).kind == "media_refused"


def test_a_root_without_a_slash_is_a_folder_all_the_same() -> None:
    assert places("s3://b/pre/a.jpg", "s3://b/pre") == ["s3://b/pre/a.jpg"]
    refusal("s3://b/prefix2/a.jpg", "s3://b/pre")


def test_a_whole_bucket_can_be_a_root() -> None:
    assert places("s3://pics/a.jpg", "s3://pics") == ["s3://pics/a.jpg"]
    refusal("s3://pics2/a.jpg", "s3://pics")


# ---------------------------------------------------------------- other object stores


def test_a_root_can_be_in_any_object_store() -> None:
    assert places("gs://pics/cats/a%20b.jpg", "gs://pics/cats") == ["gs://pics/cats/a%20b.jpg"]
    assert places("GS://pics/cats/x/../a.jpg", "gs://pics/cats") == ["gs://pics/cats/a.jpg"]
    assert places("a.jpg", S3, "gs://pics", "abfs://container/b/") == [
        "s3://bucket/prefix/shards/a.jpg",
        "s3://bucket/prefix/a.jpg",
        "gs://pics/a.jpg",
        "abfs://container/b/a.jpg",
    ]


@pytest.mark.parametrize(
    "ref",
    [
        "gs://pics2/cats/a.jpg",
        "gs://pics/cats2/a.jpg",
        "gs://pics/cats/../a.jpg",
        "gs://pics/cats/",
        "s3://pics/cats/a.jpg",
        "abfs://pics/cats/a.jpg",
        "gs://somebody@pics/cats/a.jpg",
        "gs://me:hush@pics/cats/a.jpg",
        "gs:pics/cats/a.jpg",
        "//pics/cats/a.jpg",
    ],
)
def test_what_is_not_below_a_root_in_an_object_store_is_refused(ref: str) -> None:
    assert "hush" not in refusal(ref, "gs://pics/cats/").message


def test_the_connection_of_a_root_is_not_for_references_to_choose() -> None:
    root = "gs://mine@pics/cats/"
    assert places("gs://pics/cats/a.jpg", root) == ["gs://mine@pics/cats/a.jpg"]
    assert places("gs://mine@pics/cats/a.jpg", root) == ["gs://mine@pics/cats/a.jpg"]
    refusal("gs://yours@pics/cats/a.jpg", root)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("ref", "place"),
    [
        ("a.jpg", "file:///data/pics/shards/a.jpg"),
        ("../a.jpg", "file:///data/pics/a.jpg"),
        ("x//a.jpg", "file:///data/pics/shards/x/a.jpg"),
        ("/data/pics/a.jpg", "file:///data/pics/a.jpg"),
        ("//data//pics/./a.jpg", "file:///data/pics/a.jpg"),
        ("/data/other/../pics/a.jpg", "file:///data/pics/a.jpg"),
        ("/data/pics/100%.jpg", "file:///data/pics/100%.jpg"),
        ("/data/pics/%2e%2e/%2e%2e/passwd", "file:///data/pics/%2e%2e/%2e%2e/passwd"),
        ("file:///data/pics/a.jpg", "file:///data/pics/a.jpg"),
        ("FILE://localhost/data/pics/a.jpg", "file:///data/pics/a.jpg"),
    ],
)
def test_a_local_reference_below_the_root(ref: str, place: str) -> None:
    assert places(ref, LOCAL, folder=LOCAL_SHARD)[0] == place


def test_a_file_uri_may_be_percent_encoded_or_literal() -> None:
    found = places("file:///data/pics/my%20cat.jpg", LOCAL)
    assert found == ["file:///data/pics/my%20cat.jpg", "file:///data/pics/my cat.jpg"]


@pytest.mark.parametrize(
    "ref",
    [
        "file:///etc/passwd",
        "/etc/passwd",
        "/proc/self/environ",
        "file:///proc/self/environ",
        "../../a.jpg",
        "../../../../../../../../etc/passwd",
        "/data/pics/../secret.jpg",
        "/data/pics2/a.jpg",
        "/data/pics",
        "/data/pics/",
        "..",
        "../..",
        "file:///data/pics/../secret.jpg",
        "file:///data/pics/%2e%2e/secret.jpg",
        "file:///data/pics/%2E%2E/secret.jpg",
        "file:///data/pics/..%2fsecret.jpg",
        "file:///data/pics/%00.jpg",
        "file:///data/pics/%5c.jpg",
        "file://otherhost/data/pics/a.jpg",
        "file://otherhost",
        "file://",
        "file:/data/pics/a.jpg",
        "file:data/pics/a.jpg",
        "s3://bucket/a.jpg",
        "http://127.0.0.1/a.jpg",
    ],
)
def test_what_is_not_below_the_local_root_is_refused(ref: str) -> None:
    assert refusal(ref, LOCAL, folder=LOCAL_SHARD).kind == "media_refused"


def test_a_root_may_be_spelled_through_a_symbolic_link_or_not(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    folder = f"file://{tmp_path}/"
    expected = [f"file://{tmp_path}/link/a.jpg"]
    assert places(f"{tmp_path}/real/a.jpg", f"{tmp_path}/link", folder=folder) == expected
    assert places(f"{tmp_path}/link/a.jpg", f"{tmp_path}/link", folder=folder) == expected


@given(
    st.lists(st.sampled_from(["..", ".", "", "a", "pics", "data", "%2e%2e", "etc"]), min_size=1, max_size=8),
    st.sampled_from(["", "/", "file:///", "s3://bucket/", "/data/pics/", "s3://bucket/prefix/"]),
)
def test_no_path_leads_out_of_its_root(parts: list[str], start: str) -> None:
    for roots, folder in (((S3,), S3_SHARD), ((LOCAL,), LOCAL_SHARD), ((S3, LOCAL), S3_SHARD)):
        try:
            found = MediaRoots(roots).places(start + "/".join(parts), source=folder)
        except SampleError:
            continue
        for place in found:
            assert str(place).startswith((S3, "file:///data/pics/"))
            assert not isinstance(place, HttpUrl)
            assert ".." not in place.name.split("/")
            assert "." not in place.name.split("/")


# ---------------------------------------------------------------- malformed references


@pytest.mark.parametrize(
    "ref",
    [
        "",
        "   ",
        "a\0.jpg",
        "/data/pics/\0",
        "a\\b.jpg",
        "..\\..\\windows\\win.ini",
        "C:\\pics\\a.jpg",
        "C:/pics/a.jpg",
        "ftp://example.com/a.jpg",
        "gs://bucket/a.jpg",
        "data:image/png;base64,iVBORw0KGgo=",
        "javascript:alert(1)",
        "gopher://127.0.0.1:6379/_INFO",
        "dict://127.0.0.1:11211/stat",
        "unix:/var/run/docker.sock",
        "jar:file:///data/pics/x.zip!/a.jpg",
        "x" * (MAX_REFERENCE_CHARS + 1),
        "https:images.example.com/a.jpg",
    ],
)
def test_malformed_references_and_other_schemes_are_refused(ref: str) -> None:
    assert refusal(ref, LOCAL, S3, "https://", "http://", folder=LOCAL_SHARD).kind == "media_refused"


def test_a_refusal_names_the_remedy() -> None:
    assert "media_roots" in refusal("s3://other/a.jpg").message
    assert "media_roots" in refusal("https://example.com/a.jpg").message
    assert "./" in refusal("cat:1.jpg").message


def test_a_message_holds_neither_secrets_nor_whole_pictures() -> None:
    for ref in ("https://me:hush@example.com/a.jpg", "https://example.com/a.jpg?X-Amz-Signature=hush#hush"):
        assert "hush" not in refusal(ref).message
        assert "hush" not in shown(ref)
    assert len(refusal("data:image/png;base64," + "A" * 100_000).message) < 500
    assert "\n" not in refusal("s3://other/a\nb").message


# ---------------------------------------------------------------- http

CATS = "https://images.example.com/cats/"


@pytest.mark.parametrize(
    ("ref", "place"),
    [
        ("https://images.example.com/cats/1.jpg", "https://images.example.com/cats/1.jpg"),
        ("HTTPS://IMAGES.example.COM./cats/1.jpg", "https://images.example.com/cats/1.jpg"),
        ("https://images.example.com:443/cats/1.jpg", "https://images.example.com/cats/1.jpg"),
        ("https://images.example.com/cats/1.jpg?w=8&h=8#x", "https://images.example.com/cats/1.jpg?w=8&h=8"),
        ("https://images.example.com/dogs/../cats/1.jpg", "https://images.example.com/cats/1.jpg"),
        ("https://images.example.com/cats/my cat%20.jpg", "https://images.example.com/cats/my%20cat%20.jpg"),
        ("https://images.example.com/cats/\u732b.jpg", "https://images.example.com/cats/%E7%8C%AB.jpg"),
    ],
)
def test_a_url_below_the_root(ref: str, place: str) -> None:
    assert places(ref, CATS) == [place]


@pytest.mark.parametrize(
    "ref",
    [
        "http://images.example.com/cats/1.jpg",
        "https://images.example.com/dogs/1.jpg",
        "https://images.example.com/cats2/1.jpg",
        "https://images.example.com/cats",
        "https://images.example.com:8443/cats/1.jpg",
        "http://images.example.com:443/cats/1.jpg",
        "https://images.example.com.evil.org/cats/1.jpg",
        "https://evil.org/images.example.com/cats/1.jpg",
        "https://images.example.com@evil.org/cats/1.jpg",
        "https://evil.org#@images.example.com/cats/1.jpg",
        "https://evil.org?@images.example.com/cats/1.jpg",
        "https://evil.org\\@images.example.com/cats/1.jpg",
        "https://user:password@images.example.com/cats/1.jpg",
        "https://images.example.com/cats/../dogs/1.jpg",
        "https://images.example.com/cats/%2e%2e/dogs/1.jpg",
        "https://images.example.com/cats/.%2E/dogs/1.jpg",
        "https://images.example.com/cats/%252e%252e/dogs/1.jpg",
        "https://images.example.com/cats/..%2fdogs/1.jpg",
        "https://images.example.com/cats/..%5cdogs/1.jpg",
        "https://images.example.com/cats/..;/dogs/1.jpg",
        "https://images.example.com/cats/%00.jpg",
        "https://images.example.com/../../cats/1.jpg",
        "https://images.example.com/cats/1.jpg\r\nHost: evil.org",
        "https://images.example.com/cats/1\t.jpg",
        "https://images.example.com:port/cats/1.jpg",
        "https://images.example.com:99999/cats/1.jpg",
        "https://[::1/cats/1.jpg",
        "https:///cats/1.jpg",
        "https://",
        "https://images example.com/cats/1.jpg",
        "http://169.254.169.254/latest/meta-data/",
        "http://localhost/",
    ],
)
def test_what_is_not_below_the_http_root_is_refused(ref: str) -> None:
    assert refusal(ref, CATS).kind == "media_refused"


def test_http_is_off_unless_a_root_allows_it() -> None:
    assert not MediaRoots([S3, LOCAL]).allow_http
    refusal("https://images.example.com/cats/1.jpg", S3, LOCAL)


def test_an_open_root_is_one_of_its_scheme() -> None:
    assert places("https://anywhere.example/a.jpg", "https://") == ["https://anywhere.example/a.jpg"]
    refusal("http://anywhere.example/a.jpg", "https://")


@pytest.mark.parametrize(
    ("root", "reach"),
    [
        ("https://", "public"),
        ("https://images.example.com/cats/", "private"),
        ("https://10.0.0.7/", "private"),
        ("http://127.0.0.1:9000/pics/", "loopback"),
        ("http://localhost:9000", "loopback"),
        ("http://[::1]:9000/", "loopback"),
        ("http://2130706433/", "loopback"),
        ("http://8.8.8.8/", "private"),
    ],
)
def test_how_near_a_root_lets_a_url_come(root: str, reach: str) -> None:
    url = parse_url((root if root != "https://" else "https://anywhere.example") + "/a.jpg")
    assert MediaRoots(["https://", "http://", root]).reach(url) == reach


def test_the_word_of_a_root_holds_for_its_host_port_and_path_only() -> None:
    roots = MediaRoots(["http://", "http://127.0.0.1:9000/pics/"])
    assert roots.reach(parse_url("http://127.0.0.1:9000/pics/a.jpg")) == "loopback"
    for other in (
        "http://127.0.0.1:9001/pics/a.jpg",
        "http://127.0.0.1:9000/",
        "http://127.0.0.2:9000/pics/",
    ):
        assert roots.reach(parse_url(other)) == "public"


@pytest.mark.parametrize(
    "root",
    [
        "http://169.254.169.254/",
        "http://169.254.170.2/",
        "http://2852039166/",
        "http://0xa9fea9fe/",
        "http://[fe80::1]/",
        "http://[::ffff:169.254.169.254]/",
        "http://[fd00:ec2::254]/",
        "http://0.0.0.0/",
        "http://224.0.0.1/",
        "http://me:hush@host/",
        "http://host/a?b=c",
        "http:///path",
        "s3a://bucket/",
        "gs://me:hush@bucket/",
        "gs:///prefix/",
        "s 3://bucket/",
        "",
        "s3://",
        "file://host/data",
    ],
)
def test_a_root_that_can_not_be_is_a_config_error(root: str) -> None:
    with pytest.raises(ConfigError) as caught:
        MediaRoots([root])
    assert "hush" not in str(caught.value)


def test_a_shard_that_was_written_elsewhere_finds_its_images_where_they_were() -> None:
    roots = MediaRoots(["s3://raw/", "s3://raw2/pics/"])
    found = [str(place) for place in roots.places("i/a.jpg", source="s3://tagged/", folder="day1/eu")]
    assert found == [
        "s3://raw/day1/eu/i/a.jpg",
        "s3://raw2/pics/day1/eu/i/a.jpg",
        "s3://raw/i/a.jpg",
        "s3://raw2/pics/i/a.jpg",
    ]
    with pytest.raises(SampleError) as caught:
        MediaRoots(["s3://raw2/pics/"]).places(
            "../../../../secret.jpg", source="s3://tagged/", folder="day1/eu"
        )
    assert caught.value.kind == "media_refused"
