from __future__ import annotations

import hashlib
import json
from types import MappingProxyType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_vlm_provider.ledger import keys as keys_module
from airflow_vlm_provider.ledger.keys import RequestKeys
from airflow_vlm_provider.types import FrameSampling, Media, MediaRef, Request

ENGINE = {"model": "m", "sampling": {"temperature": 0}}
MEDIA = {"max_pixels": 1000}
DIGEST = hashlib.sha256(b"a picture").hexdigest()
OTHER = hashlib.sha256(b"another").hexdigest()


def key(request: Request, *digests: str, engine: Any = ENGINE, media: Any = MEDIA) -> str:
    return RequestKeys(engine=engine, media=media).of(request, digests)


def ask(**changes: Any) -> Request:
    base: dict[str, Any] = {
        "system": "You tag.",
        "parts": (MediaRef("image", "a.jpg"), "What is it?"),
        "schema": {"type": "object", "properties": {"tags": {"type": "array"}}},
        "sampling": {"temperature": 0, "max_tokens": 256},
        "n": 1,
    }
    return Request(**{**base, **changes})


def test_a_key_is_the_hash_that_answers_on_disk_were_stored_under():
    """Spelled out by hand: keys that come out otherwise find nothing of what was paid for before."""

    def sha(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()

    common = sha(
        '{"engine":{"model":"m","sampling":{"temperature":0}},"media":{"max_pixels":1000},"version":1}'
    )
    frame = sha('["You tag.",{"type":"object"},{"max_tokens":256,"temperature":0},1]')
    whole = sha(f'["{common}","{frame}",[["image","{DIGEST}"],["text","What is \\u00fc?"]]]')
    request = ask(schema={"type": "object"}, parts=(MediaRef("image", "a.jpg"), "What is ü?"))
    assert key(request, DIGEST) == whole[:32]


def test_how_something_is_written_is_not_in_the_key():
    base = key(ask(), DIGEST)
    assert base == key(ask(parts=(MediaRef("image", "moved/b.png"), "What is it?")), DIGEST)
    assert base == key(ask(parts=(Media("image", "image/png", b"shrunk", "x"), "What is it?")), DIGEST)
    assert base == key(ask(sampling={"max_tokens": 256.0, "temperature": 0.0}), DIGEST)
    assert base == key(
        ask(schema={"properties": {"tags": {"type": "array"}}, "type": "object"}, n=1.0), DIGEST
    )
    assert base == key(ask(schema=MappingProxyType(dict(ask().schema or {}))), DIGEST)
    assert base == key(ask(), DIGEST, engine={"sampling": {"temperature": 0.0}, "model": "m"})
    assert key(ask(sampling={"stop": ("a",)}), DIGEST) == key(ask(sampling={"stop": ["a"]}), DIGEST)


# Each of these asks for something else than every other does.
QUESTIONS: list[tuple[Request, tuple[str, ...]]] = [
    (ask(), (DIGEST,)),
    (ask(), (OTHER,)),
    (ask(system=None), (DIGEST,)),
    (ask(system=""), (DIGEST,)),
    (ask(system="null"), (DIGEST,)),
    (ask(system="You tag. "), (DIGEST,)),
    (ask(schema=None), (DIGEST,)),
    (ask(schema={}), (DIGEST,)),
    (ask(sampling={}), (DIGEST,)),
    (ask(sampling={"temperature": 0, "max_tokens": 256, "seed": 1}), (DIGEST,)),
    (ask(sampling={"temperature": 0, "max_tokens": 256, "seed": True}), (DIGEST,)),
    (ask(sampling={"temperature": 0, "max_tokens": 256, "seed": "1"}), (DIGEST,)),
    (ask(sampling={"temperature": 0.1, "max_tokens": 256}), (DIGEST,)),
    (ask(n=2), (DIGEST,)),
    (ask(parts=(MediaRef("video", "a.jpg"), "What is it?")), (DIGEST,)),
    (ask(parts=("What is it?", MediaRef("image", "a.jpg"))), (DIGEST,)),
    (ask(parts=(DIGEST, "What is it?")), ()),
    (ask(parts=(f"image{DIGEST}", "What is it?")), ()),
    (ask(parts=("What is it?",)), ()),
    (ask(parts=("What ", "is it?")), ()),
    (ask(parts=("What is it?", "")), ()),
    (ask(parts=('What ","is it?',)), ()),
    (ask(parts=('What "],["text","is it?',)), ()),
    (ask(parts=()), ()),
    (ask(parts=(MediaRef("image", "a"), MediaRef("image", "b"))), (DIGEST, OTHER)),
    (ask(parts=(MediaRef("image", "a"), MediaRef("image", "b"))), (OTHER, DIGEST)),
    (ask(parts=(MediaRef("image", "a"), MediaRef("image", "a"))), (DIGEST, DIGEST)),
    (ask(parts=("\ud83d",)), ()),
    (ask(parts=("\\ud83d",)), ()),
]


def test_different_questions_never_share_a_key():
    found = {key(request, *digests) for request, digests in QUESTIONS}
    found |= {
        key(ask(), DIGEST, engine={"model": "n", "sampling": {"temperature": 0}}),
        key(ask(), DIGEST, media={"max_pixels": 1001}),
        key(ask(), DIGEST, engine=MEDIA, media=ENGINE),
    }
    assert len(found) == len(QUESTIONS) + 3
    assert all(len(each) == 32 and set(each) <= set("0123456789abcdef") for each in found)


texts = st.text(st.sampled_from('ab",[]'), max_size=3)
parts = st.lists(
    st.one_of(texts, st.tuples(st.sampled_from(["image", "video"]), st.sampled_from([DIGEST, OTHER]))),
    max_size=3,
)
values = st.recursive(
    st.none() | st.booleans() | st.integers(0, 2) | st.sampled_from([0.5, 1.0]) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
questions = st.tuples(st.none() | texts, parts, st.dictionaries(texts, values, max_size=2), st.integers(1, 2))


def built(question: tuple[Any, ...]) -> tuple[Request, list[str]]:
    system, pieces, sampling, n = question
    refs = tuple(each if isinstance(each, str) else MediaRef(each[0], "ref") for each in pieces)
    digests = [each[1] for each in pieces if not isinstance(each, str)]
    return Request(system=system, parts=refs, sampling=sampling, n=n), digests


def as_json(value: Any) -> str:
    """What JSON tells apart; whole numbers are written as such by hand."""
    return json.dumps(value, sort_keys=True).replace("1.0", "1")


@given(questions, questions)
def test_keys_are_equal_exactly_when_the_questions_are(one, other):
    keys = RequestKeys(engine=ENGINE, media=MEDIA)
    assert (keys.of(*built(one)) == keys.of(*built(other))) == (as_json(one) == as_json(other))


@pytest.mark.parametrize("digests", [(), (DIGEST, DIGEST)])
def test_every_medium_needs_its_digest(digests):
    with pytest.raises(ValueError, match=f"the {len(digests)} digests given"):
        key(ask(), *digests)


def test_what_is_no_json_value_has_no_key():
    with pytest.raises(TypeError):
        key(ask(sampling={"stop": {1, 2}}), DIGEST)
    with pytest.raises(TypeError):
        key(ask(), DIGEST, engine={"model": object()})


def test_a_schema_that_is_changed_in_place_is_another_question():
    keys = RequestKeys(engine=ENGINE, media=MEDIA)
    schema: dict[str, Any] = {"type": "object"}
    request = ask(schema=schema)
    before = keys.of(request, [DIGEST])
    schema["type"] = "array"
    assert keys.of(request, [DIGEST]) != before
    schema["type"] = "object"
    assert keys.of(request, [DIGEST]) == before


def test_what_repeats_is_hashed_once_and_what_does_not_is_not_hoarded():
    cached = keys_module._digest_of_packed
    cached.cache_clear()
    keys = RequestKeys(engine=ENGINE, media=MEDIA)
    for number in range(50):
        keys.of(ask(parts=(f"sample {number}",), sampling={"temperature": 0}), [])
    assert cached.cache_info().misses == 1
    for number in range(500):
        keys.of(ask(parts=(), system=f"sample {number}"), [])
    assert cached.cache_info().currsize < 100


VIDEO = FrameSampling(fps=2.0, max_frames=32)


def video_key(frames: FrameSampling = VIDEO, digest: str = DIGEST, video: Any = None, **common: Any) -> str:
    keys = RequestKeys(**{"engine": ENGINE, "media": MEDIA, **common}, video=video)
    return keys.of(ask(parts=(MediaRef("video", "a.mp4", frames), "What is it?")), [digest])


def test_which_frames_of_a_video_are_shown_and_how_is_part_of_its_key():
    frames = [
        VIDEO,
        FrameSampling(1.0, 32),
        FrameSampling(2.0, 16),
        FrameSampling(2.0, 32, start=10.0),
        FrameSampling(2.0, 32, end=10.0),
        FrameSampling(2.0, 32, transport="video"),
        FrameSampling(2.0, 32, transport="frames"),
    ]
    keys = {video_key(each) for each in frames} | {video_key(digest=OTHER), video_key(video={"version": 2})}
    assert len(keys) == len(frames) + 2
    assert video_key(FrameSampling(2, 32)) == video_key()


def test_how_videos_are_prepared_is_in_no_key_of_a_picture():
    plain = key(ask(), DIGEST)
    assert plain == RequestKeys(engine=ENGINE, media=MEDIA, video={"version": 2}).of(ask(), [DIGEST])


def test_a_probe_is_known_by_the_file_whichever_model_is_asked_about_it():
    def probe(digest: str = DIGEST, *, video: Any = None, **common: Any) -> str:
        return RequestKeys(**{"engine": ENGINE, "media": MEDIA, **common}, video=video).of_probe(digest)

    assert probe() == probe(engine={"model": "another"}) == probe(media={"max_pixels": 2000})
    assert len({probe(), probe(OTHER), probe(video={"version": 2}), video_key()}) == 4


def test_what_continues_a_text_is_asked_something_else():
    assert len({key(ask(completion=each), DIGEST) for each in (None, "", "a photo of")}) == 3
