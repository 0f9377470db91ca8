from __future__ import annotations

import hashlib

import pytest

from airflow_vlm_provider.errors import ConfigError, SampleError
from airflow_vlm_provider.steps.candidates import BITS, Candidates, distances
from airflow_vlm_provider.steps.captions import read_caption
from airflow_vlm_provider.steps.chunks import SpecialTokens
from airflow_vlm_provider.types import Choice, MediaRef, Request
from tests.support.captioning import LOOP, REFUSAL, answer

ASK = Request(None, (MediaRef("image", "a.png"), "What?"), sampling={"temperature": 1.0, "max_tokens": 9})


def candidates(number=4, mode="random_any", try_num=3):
    return Candidates(number, mode, try_num, lambda choice: read_caption(choice, tokens=SpecialTokens()))


def draw(drawn, *answers, text=""):
    """The requests of each round, and the captions kept."""
    run = drawn.draw(ASK, text=text, media="a.png")
    asked, given = [], None
    try:
        while True:
            (request,) = run.send(given)
            asked.append(request)
            given = [answers[len(asked) - 1]]
    except StopIteration as end:
        assert len(asked) == len(answers), "not every answer was asked for"
        return asked, end.value


def key(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()[:32]


ABCD = ["a", "b", "c", "d"]


def test_all_candidates_are_one_request():
    (request,), kept = draw(candidates(mode="all"), answer(ABCD))
    assert request.n == 4
    assert request.sampling == ASK.sampling
    assert kept == ABCD


def test_one_drawn_at_random_agrees_between_reruns_and_differs_between_samples():
    def drawn(number):
        return draw(candidates(), answer(ABCD, key=key(number)))[1]

    first = [drawn(number) for number in range(40)]
    assert first == [drawn(number) for number in range(40)]
    assert {caption for (caption,) in first} == set(ABCD)
    assert all(len(kept) == 1 for kept in first)


SIMILAR = [
    (
        "一只黑猫坐在红色的沙发上",
        ["一辆蓝色的汽车停在路边", "两个人在海边散步", "黑色的猫在沙发上睡觉", "厨房里有苹果"],
    ),
    (
        "猫がソファに座っている",
        ["車が道に止まっている", "人々が海辺を歩いている", "猫が赤いソファに座っています", "りんご"],
    ),
    (
        "고양이가 소파에 앉아 있다",
        ["자동차가 길에 서 있다", "사람들이 바다에 있다", "소파에 앉은 고양이", "사과가 많다"],
    ),
    ("cat", ["dog", "car", "cats", "tree"]),
    ("Katze", ["Hund", "Auto", "Katzen", "Baum"]),
    ("猫", ["犬", "車", "猫です", "木"]),
    ("ЧЁРНАЯ КОШКА", ["собака бежит", "машина", "чёрная кошка спит", "дерево"]),
    (
        "A black cat sits on a red sofa",
        ["Two people walk", "A blue car", "A black cat on a sofa", "Apples in a kitchen"],
    ),
    ("แมวดำนั่งบนโซฟาสีแดง", ["รถสีน้ำเงินจอดอยู่", "คนเดินริมทะเล", "แมวดำนอนบนโซฟา", "แอปเปิ้ลในครัว"]),
    ("🐈", ["🐕", "🚗", "🐈", "🌳"]),
]


@pytest.mark.parametrize(("text", "said"), SIMILAR)
@pytest.mark.parametrize("place", range(4))
def test_the_one_most_like_the_text_is_kept_wherever_it_stands(text, said, place):
    similar = said[2]
    others = [each for each in said if each != similar]
    said = [*others[:place], similar, *others[place:]]
    _, kept = draw(candidates(mode="similar_one_simhash"), answer(said), text=text)
    assert kept == [similar]


@pytest.mark.parametrize("text", ["", "?", "a b"])
def test_of_equally_similar_ones_the_first_is_kept(text):
    _, kept = draw(candidates(mode="similar_one_simhash"), answer(["x y", "X  y!", "x, y", "x y"]), text=text)
    assert kept == ["x y"]


def test_a_text_without_words_is_equally_far_from_all():
    assert distances(" ", ["a cat", "一只猫", ""]) == [BITS] * 3
    assert distances("a cat", ["A cat.", ""]) == [0, BITS]


def test_distances_of_all_candidates_are_noted_beside_the_answer():
    for mode in ("random_any", "similar_one_simhash", "all"):
        (request,), _ = draw(candidates(mode=mode), answer(ABCD), text="b")
        noted = request.note(answer([*ABCD, ""]))
        assert noted == {"distances": distances("b", [*ABCD, ""])}
        assert noted["distances"][1] == 0 < min(noted["distances"][0], noted["distances"][2])
    (request,), _ = draw(candidates(number=1), answer("a"))
    assert request.note is None


def test_useless_candidates_are_left_out():
    said = [REFUSAL, "a", Choice("b", "length"), ""]
    for mode in ("random_any", "similar_one_simhash"):
        (_,), kept = draw(candidates(mode=mode), answer(said), text="b")
        assert kept == ["a"]


def test_what_is_missing_of_all_is_asked_for_and_no_more():
    asked, kept = draw(
        candidates(mode="all"), answer([REFUSAL, "a", "", "b"]), answer(["c", LOOP]), answer("d")
    )
    assert [request.n for request in asked] == [4, 2, 1]
    seeds = [request.sampling.get("seed") for request in asked]
    assert seeds == [None, 1, 2]
    assert kept == ["a", "b", "c", "d"]


def test_where_one_is_kept_one_is_asked_for_when_all_were_useless():
    asked, kept = draw(candidates(), answer([REFUSAL] * 4), answer("a"))
    assert [request.n for request in asked] == [4, 1]
    assert kept == ["a"]


def test_more_candidates_than_were_asked_for_are_none_of_ours():
    _, kept = draw(candidates(number=2, mode="all"), answer(ABCD))
    assert kept == ["a", "b"]


@pytest.mark.parametrize(
    ("said", "kind", "words"),
    [
        (REFUSAL, "refused", "declined"),
        ("", "empty_answer", "no caption"),
        (Choice("a cat", "length"), "cut_short", "max_new_tokens"),
        (LOOP, "repetitive", "repeats"),
    ],
)
def test_when_all_tries_are_used_up_the_reason_is_told(said, kind, words):
    last = answer([said], key=key(3))
    with pytest.raises(SampleError) as failed:
        draw(candidates(mode="all", number=2), answer(["a", ""]), answer(""), last)
    error = failed.value
    assert (error.kind, error.media, error.attempts, error.keys) == (kind, "a.png", 3, (key(3),))
    assert words in error.message
    assert "1 of 2 captions in 3 tries" in error.message


def test_an_endpoint_that_knows_no_candidates_is_asked_for_the_rest():
    asked, kept = draw(candidates(number=3, mode="all"), *(answer(each) for each in "abc"))
    assert [request.n for request in asked] == [3, 2, 1]
    assert kept == ["a", "b", "c"]
    with pytest.raises(SampleError, match="fewer candidates than it was asked for"):
        draw(candidates(number=5, mode="all"), *(answer(each) for each in "abc"))


def test_an_answer_without_any_choice_is_empty():
    with pytest.raises(SampleError) as failed:
        draw(candidates(try_num=1), answer([]))
    assert failed.value.kind == "empty_answer"


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"number": 0}, "caption_num"),
        ({"number": True}, "caption_num"),
        ({"number": "2"}, "caption_num"),
        ({"try_num": 0}, "try_num"),
        ({"mode": "best"}, "'similar_one_simhash'"),
        ({"mode": ["all"]}, "keep_candidate_mode"),
    ],
)
def test_wrong_parameters(given, word):
    with pytest.raises(ConfigError, match=word):
        candidates(**given)


def test_candidates_that_would_all_be_equal_are_refused():
    with pytest.raises(ConfigError, match=r"caption_num=4 with temperature 0 .*Raise temperature"):
        candidates().check_sampling({"temperature": 0.0})
    candidates().check_sampling({"temperature": 0.1})
    candidates().check_sampling({})
    candidates(number=1).check_sampling({"temperature": 0})
