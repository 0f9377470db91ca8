from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_vlm_provider.errors import ConfigError, SampleError
from airflow_vlm_provider.steps.chunks import Chunk, SpecialTokens, read_chunks, write_chunks
from tests.support.captioning import AUDIO, EOC, IMAGE, VIDEO

TOKENS = SpecialTokens()
OWN = SpecialTokens("[img]", "[vid]", "[snd]", "[end]")

words = st.text(st.characters(exclude_characters="<>|[]", exclude_categories=["Cs"]), max_size=12)
# Also what looks like a token, and is none.
anything = st.one_of(
    words, st.text(st.sampled_from("<>|_[]djimage e\n")), st.sampled_from(["<__dj__imag", "[im"])
)


def texts(tokens: SpecialTokens) -> st.SearchStrategy[list[str]]:
    """Pieces of a text: special tokens in any order, and words between them."""
    return st.lists(st.one_of(st.sampled_from(tokens), words), max_size=20)


def placed(
    text: str, *, kind: str, tokens: SpecialTokens = TOKENS, prepend: bool = False
) -> tuple[int, list[Chunk]]:
    """A text's chunks, for as many media as it has placeholders (two where it has none)."""
    media = text.count(tokens.placeholder(kind)) or 2
    return media, read_chunks(text, tokens=tokens, kind=kind, media=media, prepend=prepend)


def specials(text: str, tokens: SpecialTokens) -> list[str]:
    """All special tokens of a text, in order, found letter by letter."""
    found = []
    while text:
        token = next((each for each in tokens if text.startswith(each)), None)
        found += [token] if token else []
        text = text[len(token) if token else 1 :]
    return found


@pytest.mark.parametrize("tokens", [TOKENS, OWN])
@pytest.mark.parametrize("kind", ["image", "video"])
@given(data=st.data())
def test_the_kth_caption_follows_the_kth_placeholder_and_special_tokens_keep_their_order(tokens, kind, data):
    text = "".join(data.draw(texts(tokens)))
    media, chunks = placed(text, kind=kind, tokens=tokens, prepend=True)
    captions = [f"caption {number}" for number in range(media)]
    written = write_chunks(chunks, captions, tokens=tokens, kind=kind)
    place = tokens.placeholder(kind)
    after = written.split(place)[1:]
    assert len(after) == media
    for number, rest in enumerate(after):
        assert rest.startswith(f" caption {number} ")
    kept = [chunk for chunk in text.split(tokens.eoc) if chunk.strip()]
    own = [token for chunk in kept for token in (*specials(chunk, tokens), tokens.eoc)]
    if place not in text:
        own = [*[place] * media, *(own or [tokens.eoc])]
    assert specials(written, tokens) == own
    assert written.endswith(tokens.eoc)


@given(pieces=texts(TOKENS), captions=st.lists(anything, min_size=20, max_size=20))
def test_what_is_written_is_read_again_as_the_same_chunks(pieces, captions):
    media, chunks = placed("".join(pieces), kind="image", prepend=True)
    captions = [TOKENS.without(caption) for caption in captions[:media]]
    written = write_chunks(chunks, captions, tokens=TOKENS, kind="image")
    again = read_chunks(written, tokens=TOKENS, kind="image", media=media)
    # A chunk without any token left nothing to be read but its end.
    assert [chunk.tokens for chunk in again] == [chunk.tokens for chunk in chunks if chunk.tokens]
    rewritten = write_chunks(again, captions, tokens=TOKENS, kind="image")
    assert rewritten.replace(EOC, "") == written.replace(EOC, "")


@given(pieces=texts(TOKENS), media=st.integers(1, 9))
def test_counts_that_differ_name_both_numbers(pieces, media):
    text = "".join(pieces)
    found = text.count(IMAGE)
    if found == media or not text.replace(EOC, "").strip():
        assert sum(c.tokens.count(IMAGE) for c in placed_for(text, media)) == media
        return
    with pytest.raises(SampleError) as failed:
        placed_for(text, media)
    assert failed.value.kind == "malformed_row"
    assert f"{found} placeholder" in failed.value.message
    assert f"{media} image" in failed.value.message


def placed_for(text: str, media: int) -> list[Chunk]:
    return read_chunks(text, tokens=TOKENS, kind="image", media=media)


@given(
    st.lists(
        st.one_of(st.sampled_from(TOKENS), anything, st.sampled_from(["<__dj__", "image>"])), max_size=12
    )
)
def test_no_special_token_is_left_in_a_text_without_them(pieces):
    left = TOKENS.without("".join(pieces))
    assert not any(token in left for token in TOKENS)
    assert left == left.strip()


def test_tokens_that_appear_where_others_are_taken_out_are_taken_out_too():
    assert TOKENS.without(f"a <__dj__{IMAGE}image> b {EOC}") == "a  b"


@pytest.mark.parametrize(
    ("text", "captions", "written"),
    [
        (f"{IMAGE} old words {EOC}", ["a cat"], f"{IMAGE} a cat {EOC}"),
        (f"x {IMAGE} y {IMAGE}", ["a", "b"], f"{IMAGE} a {IMAGE} b {EOC}"),
        (f"{IMAGE} y {EOC}{VIDEO}{IMAGE} z", ["a", "b"], f"{IMAGE} a {EOC}{VIDEO}{IMAGE} b {EOC}"),
        (f"{AUDIO} w {VIDEO} {IMAGE}{VIDEO}", ["a"], f"{AUDIO}{VIDEO}{IMAGE} a {VIDEO}{EOC}"),
        (f"just words {EOC}{IMAGE}{EOC}  {EOC}", ["a"], f"{EOC}{IMAGE} a {EOC}"),
        (f"{IMAGE}{IMAGE}{IMAGE}", ["a", None, "c"], f"{IMAGE} a {IMAGE}{IMAGE} c {EOC}"),
        ("", ["a", "b"], f"{IMAGE} a {IMAGE} b {EOC}"),
        (f" \n {EOC} {EOC}", ["a"], f"{IMAGE} a {EOC}"),
    ],
)
def test_captions_take_the_place_of_words(text, captions, written):
    chunks = placed_for(text, len(captions))
    assert write_chunks(chunks, captions, tokens=TOKENS, kind="image") == written


def test_each_chunk_has_its_own_words():
    chunks = placed_for(f"a {IMAGE} b{EOC}{IMAGE}{AUDIO} c d ", 2)
    assert [chunk.words for chunk in chunks] == ["a  b", "c d"]


@pytest.mark.parametrize("text", ["some words", f"{VIDEO} some words", VIDEO])
def test_placeholders_are_put_before_a_text_that_has_none_only_where_that_is_wanted(text):
    with pytest.raises(SampleError, match=r"0 placeholders .* 2 images.*missing_placeholders='prepend'"):
        placed_for(text, 2)
    (chunk,) = read_chunks(text, tokens=TOKENS, kind="image", media=2, prepend=True)
    assert chunk.tokens[:2] == (IMAGE, IMAGE)
    assert chunk.words == text.replace(VIDEO, "").strip()


def test_too_few_placeholders_are_never_made_up_for():
    with pytest.raises(SampleError, match=r"1 placeholder .* 2 images") as failed:
        read_chunks(f"{IMAGE} a", tokens=TOKENS, kind="image", media=2, prepend=True)
    assert "prepend" not in failed.value.message


@pytest.mark.parametrize(
    "tokens",
    ["abcd", ["a", "b", "c"], ["a", "b", "c", ""], ["a", "b", "c", 4], None, ["<i>", "<v>", "<a>", "<i"]],
)
def test_tokens_that_cannot_be_told_apart_are_refused(tokens):
    with pytest.raises(ConfigError):
        SpecialTokens.of(tokens)
