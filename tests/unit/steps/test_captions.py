from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from airflow_vlm_provider.errors import SampleError
from airflow_vlm_provider.steps.captions import is_loop, is_refusal, read_caption
from airflow_vlm_provider.steps.chunks import SpecialTokens
from airflow_vlm_provider.types import Choice
from tests.support.captioning import EOC, IMAGE, LOOP, REFUSAL

TOKENS = SpecialTokens()


def kind(text, finish_reason="stop", **options):
    with pytest.raises(SampleError) as failed:
        read_caption(Choice(text, finish_reason), tokens=TOKENS, **options)
    return failed.value.kind, failed.value.message


def test_a_caption_is_what_was_said_without_space_around_it_or_special_tokens():
    assert read_caption(Choice(f"\n {IMAGE}A cat. {EOC}\n"), tokens=TOKENS) == "A cat."
    assert read_caption(Choice("Q: Why?\nA: So.", "other"), tokens=TOKENS) == "Q: Why?\nA: So."


@pytest.mark.parametrize(
    ("text", "finish_reason", "expected", "words"),
    [
        ("", "stop", "empty_answer", "no caption"),
        (" \n", "other", "empty_answer", "no caption"),
        (f"{IMAGE} {EOC}", "stop", "empty_answer", "no caption"),
        ("", "length", "cut_short", "raise max_token"),
        ("A cat on a", "length", "cut_short", "raise max_token"),
        ("no", "refusal", "refused", "declined"),
        ("", "refusal", "refused", "declined"),
        (REFUSAL, "stop", "refused", "can't assist"),
        (REFUSAL, "length", "refused", "can't assist"),
        (LOOP, "stop", "repetitive", "repeats itself"),
        (LOOP, "length", "repetitive", "repeats itself"),
    ],
)
def test_useless_answers_are_told_apart(text, finish_reason, expected, words):
    found, message = kind(text, finish_reason, limit="max_token")
    assert found == expected
    assert words in message


REFUSALS = [
    REFUSAL,
    "I’m sorry, I can’t help with identifying people in images.",
    "Sorry, but I cannot describe this image.",
    "I apologize, but I am unable to provide a caption.",
    "Unfortunately, I can't see any image.",
    "I cannot assist with that.",
    "I can't help with this request.",
    "I'm unable to view images directly.",
    "I'm not able to identify the person in the picture.",
    "As an AI language model, I cannot view images.",
    "We cannot comply with this request.",
    "抱歉，我无法描述这张图片。",
    "很抱歉,我不能帮助你。",
    "对不起，我无法识别图中的人物。",
    "我无法提供这张图片的描述。",
    "申し訳ありませんが、その画像については説明できません。",
    "죄송합니다. 이 이미지를 설명할 수 없습니다.",
]

CAPTIONS = [
    "A woman says sorry to a man.",
    "A sign that reads \"I'm sorry, but I can't assist with that.\"",
    "I can see a cat that cannot reach the table.",
    "Sorry! The shop is closed, says a sign on the door.",
    "A man who is unable to open a jar asks for help.",
    "Unfortunately located billboard beside a highway.",
    "Apologies written in chalk on a pavement.",
    "Cannot Buy Me Love, a record by the Beatles, lies on a table.",
    "一个男孩对女孩说抱歉，我无法参加。",
    "我们可以看到一只猫无法跳上桌子。",
    "一张写着对不起的卡片。",
    "Q: Can you see the number plate?\nA: I'm sorry, but I cannot read it: it is too blurred.",
    "The image shows " + "a very long description, " * 3 + "and I'm sorry, I can't say more.",
]


@pytest.mark.parametrize("text", REFUSALS)
def test_common_refusals_are_known(text):
    assert is_refusal(text)


@pytest.mark.parametrize("text", CAPTIONS)
def test_captions_are_not_taken_for_refusals_or_loops(text):
    assert not is_refusal(text)
    assert not is_loop(text)
    assert read_caption(Choice(text), tokens=TOKENS) == text


LOOPS = [
    LOOP,
    "a dog " * 8,
    "The image shows a red car. " * 5,
    "A cat, a cat, a cat, a cat, a cat, a cat, a cat, a cat.",
    "A nice view of the city with the sea behind it, and of the old harbour at night. " * 3,
    "ha" * 40,
    "!" * 50,
    "一只猫" * 5,
    "图中有一只狗，" * 6,
    "街に人がいる。" * 5,
    "개가 있다. " * 6,
    "A street with people. " + "people walking and " * 9 + "peop",
    "one\ntwo\n" * 6,
]


@pytest.mark.parametrize("text", LOOPS)
def test_loops_are_known_in_scripts_with_and_without_spaces(text):
    assert is_loop(text)


@pytest.mark.parametrize(
    "text",
    [
        "A man laughs: ha ha ha ha!",
        "A very, very, very, very big dog.",
        "哈哈哈哈",
        "A clock that shows 10:10:10.",
        "two cats and two dogs and two birds and two mice and two horses",
        "Q: How many cats?\nA: Two.\nQ: How many dogs?\nA: Two.\nQ: How many birds?\nA: Two.",
        "a red circle, a blue circle, a green circle, a yellow circle, a black circle",
        "一只黑猫和一只白猫和一只花猫坐在一张桌子上",
        "",
        "a",
        "...",
    ],
)
def test_what_merely_repeats_a_word_is_no_loop(text):
    assert not is_loop(text)


@given(st.text(min_size=1, max_size=60).filter(str.strip), st.integers(0, 50))
def test_whatever_comes_often_enough_is_a_loop(unit, cut):
    text = " ".join(unit.split()) + " "
    if text.strip(" .,;:!?\"'”’)、。！？…"):
        assert is_loop(text * 40 + text[:cut])


def test_a_long_answer_is_looked_through_quickly_enough():
    # Nearly a loop at every length is the worst there is.
    assert not is_loop("ab" * 40_000 + "c" + "d")
