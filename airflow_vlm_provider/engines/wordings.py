"""The words by which endpoints say what is wrong, where status and code leave it open."""

from __future__ import annotations

import re

NO_CREDIT = re.compile(r"insufficient_quota|billing_hard_limit|exceeded your current quota", re.I)
SCHEMA = re.compile(r"response_format|json.?schema|guided|structured.?output|grammar", re.I)
REFUSED = re.compile(r"content.?(filter|policy|management)|moderation|safety|responsible_?ai", re.I)
TOO_LONG = re.compile(
    r"context.?(length|window)|maximum model length|max_model_len|too (long|many tokens)|string_above_max_length",
    re.I,
)
NO_VISION = re.compile(
    r"not a multimodal model|image_url is only supported|(not|n't) support (image|vision|multimodal)|"
    r"no endpoints? .*support image",
    re.I,
)
TOO_MANY = re.compile(r"at most \d+ (image|video)", re.I)
BAD_MEDIA = re.compile(
    r"(invalid|unsupported|corrupt\w*|cannot identify|could not|failed|unable|truncated|too (large|small)).{0,60}"
    r"\b(image|video)|\b(image|video)\b.{0,60}(invalid|unsupported|corrupt|truncated|too (large|small)|not valid)|"
    r"invalid_(image|base64)|image_parse_error",
    re.I | re.S,
)
NO_MODEL = re.compile(r"model_not_found|invalid.model|model\b.{0,120}(does not exist|not found)", re.I | re.S)
BAD_PARAMETER = re.compile(
    r"(unsupported|unknown|invalid|missing|unrecognized).(parameter|value|type|argument|request argument|field)|"
    r"extra_forbidden|extra inputs are not permitted|permitted range",
    re.I,
)

_VIDEO = r"['\"`]?(?:input_)?videos?(?:_url|\(s\))?['\"`]?"
# "Invalid value for 'messages[0].content[0].video_url.url'" is about one video.
_ALONE = r"(?![\w(]|[.\[]\w)"
_NO_VIDEO = re.compile(
    "|".join(
        (
            # vLLM, for a model without videos
            "at most 0 video|only image modality",
            # in plain words; a codec or a length that is not supported is no refusal of all videos
            rf"(?:not|n't) (?:support|accept|allow|take)\w* (?:\w+ ){{0,2}}{_VIDEO}{_ALONE}"
            r"(?! (?:codec|format|resolution|length|duration|longer|larger|over|of more))",
            rf"{_VIDEO} (?:(?:input|content|modality|understanding|part)s? )?(?:(?:is|are) )?"
            r"(?:not (?:yet )?|un)(?:supported|accepted|allowed|available|enabled)",
            r"no endpoints? .*support.{0,20} video",
            # lists of what may be the type of a part of a message
            r"(?:unsupported|unknown|invalid|unexpected|unrecognized) (?:(?:content|message|input|media|part) ?)?"
            rf"(?:type|part|modality|value|variant|tag)s?[:.]? {_VIDEO}{_ALONE}",
            rf"input tag {_VIDEO}|did not match any variant|unsupported content\[\]\.type",
            r"(?:should|expected to) be (?:either )?['\"`]?text['\"`]?(?:,| or) ['\"`]?image_url",
        )
    ),
    re.I,
)


def says_no_video(words: str) -> bool:
    """Whether a request that holds a video was refused because the model or the endpoint takes none at all."""
    return bool(_NO_VIDEO.search(words)) and not (TOO_LONG.search(words) or REFUSED.search(words))
