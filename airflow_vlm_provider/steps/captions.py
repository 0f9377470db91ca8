"""From an answer to a caption, or to the reason why it is none: each kind of useless answer is told apart."""

from __future__ import annotations

import re
import unicodedata

from airflow_vlm_provider.errors import SampleError
from airflow_vlm_provider.steps.chunks import SpecialTokens
from airflow_vlm_provider.steps.rows import excerpt
from airflow_vlm_provider.types import Choice

CAPTIONS_VERSION = 1
"""Part of the fingerprint of every step that reads captions: a change here makes others of the same answers."""

# A caption that merely quotes such a sentence begins with other words, and one that goes on is none of these.
_REFUSAL_LENGTH = 400
_APOLOGY = (
    r"(?:(?:i['’]m|i am|we['’]re|we are)\s+(?:very\s+|really\s+)?(?:sorry|afraid)|sorry|apologies|my apologies"
    r"|i apologi[sz]e|unfortunately|as an ai(?:\s+\w+){0,3})"
)
_CANNOT = (
    r"(?:i|we)(?:['’]m|['’]re|\s+am|\s+are)?\s+(?:can['’]?t|cannot|can not|am unable to|unable to|not able to"
    r"|won['’]t|will not|must decline to|not allowed to)"
)
_REFUSED_TASK = (
    r"(?:help|assist|comply|fulfil+|do\s+(?:that|this)|answer|provide|continue|respond|engage"
    r"|(?:describe|caption|analy[sz]e|process|view|see|identify|discuss|create|generate|write|give|offer|produce|tag)"
    r"\b[^.!?]{0,60}?\b(?:image|images|picture|pictures|photo|photos|video|videos|content|person|people|individual"
    r"|individuals|caption|description|request|that|this))"
)
_REFUSALS = re.compile(
    rf"{_APOLOGY}[,.!:;—-]*\s*(?:but\s+|that\s+|because\s+)?{_CANNOT}\b"
    rf"|{_CANNOT}\s+{_REFUSED_TASK}\b"
    r"|(?:很|非常)?(?:抱歉|对不起|對不起|不好意思)[,，。!！\s]*(?:但是?)?我?(?:们|們)?(?:无法|無法|不能|没有办法|沒有辦法|不可以)"
    r"|我(?:无法|無法|不能)(?:协助|協助|帮助|幫助|提供|描述|识别|識別|回答|满足|滿足)"
    r"|(?:大変)?(?:申し訳|もうしわけ)(?:ありません|ございません|ない)"
    r"|すみません[がけ、,。]"
    r"|(?:정말\s*)?죄송(?:합니다|하지만|해요|스럽지만)",
    re.IGNORECASE,
)

# A loop is a passage that comes so many times in a row at the end of a text; of a long one, fewer times are enough.
_TIMES, _TIMES_IF_LONG, _LONG = 4, 3, 40
# What stands between two passages, as a comma and a space, does not follow the last.
_SEPARATOR = 2
# As wide as so many letters at least: "ha ha ha ha" is something that can be said.
_WIDTH = 30
# What is looked at for loops.
_TAIL = 2000


def read_caption(choice: Choice, *, tokens: SpecialTokens, limit: str = "max_new_tokens") -> str:
    """The caption in an answer, without special tokens, which would stand for media.

    :param limit: The parameter that says how long an answer may be, for the remedy.
    :raises SampleError: there is none: ``refused``, ``repetitive``, ``cut_short`` or ``empty_answer``.
    """
    text = tokens.without(choice.text)
    said = f" It said: {excerpt(choice.text)}." if choice.text.strip() else ""
    if choice.finish_reason == "refusal" or is_refusal(text):
        raise SampleError("refused", f"The model declined to write a caption.{said}")
    if is_loop(text):
        raise SampleError("repetitive", f"The answer repeats itself without end.{said}")
    if choice.finish_reason == "length":
        raise SampleError("cut_short", f"The answer was cut for its length: raise {limit}.{said}")
    if not text:
        raise SampleError("empty_answer", f"The answer holds no caption.{said}")
    return text


def is_refusal(text: str) -> bool:
    """Whether a text is one of the sentences by which models commonly decline, and nothing else."""
    return len(text) <= _REFUSAL_LENGTH and _REFUSALS.match(text) is not None


def is_loop(text: str) -> bool:
    """Whether a text ends in the same passage over and over, as when a model can't stop."""
    text = re.sub(r"\s+", " ", text.casefold())[-_TAIL:]
    text = text.rstrip(" .,;:!?\"'”’)、。！？…") or text
    for period in range(1, (len(text) + _SEPARATOR) // _TIMES_IF_LONG + 1):
        times = _TIMES if period < _LONG else _TIMES_IF_LONG
        end = len(text) - period
        # Most periods are ruled out by the last few letters.
        if text[end - period : end] != text[end:]:
            continue
        start = end
        while start and text[start - 1] == text[start - 1 + period]:
            start -= 1
        if len(text) - start + _SEPARATOR < times * period:
            continue
        if _width(text[start:]) >= _WIDTH:
            return True
    return False


def _width(text: str) -> int:
    """The length of a text in letters, where one of a script that writes whole words with a few signs counts as 3."""
    return sum(3 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in text)
