"""The few records that all rooms speak. They hold data and no behaviour that touches a network or a disk."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from airflow_vlm_provider.errors import SampleError

MediaKind = Literal["image", "video"]
Status = Literal["ok", "cached", "skipped", "failed"]
Transport = Literal["auto", "video", "frames"]
# URIs in the order in which they were looked at, each with the identity that its store gave it (see ``ObjectInfo``),
# None where there was nothing, and "" where identities are not to be had (http).
Looked = tuple[tuple[str, str | None], ...]
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Usage:
    """What answers cost: requests sent and tokens billed, as the engine reports them."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(
            self.requests + other.requests,
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
        )


@dataclass(frozen=True, slots=True)
class Sample:
    """One row of a shard.

    :param index: Place among the shard's rows, from 0; malformed rows count too.
    :param line: Where a person finds it: the line number, from 1, in a line-based format.
    :param row: The parsed fields, or None when the row could not be parsed.
    :param raw: In a line-based format, the row's bytes as they stood in the shard, without the line end. An
        unchanged row is written back from these, so that nothing about it changes. Empty in other formats.
    :param error: Why ``row`` is None.
    :param key: The name that the shard itself gives the sample, as a WebDataset tar does; None where rows have none.
    :param embedded: Media that the shard holds itself, by the reference that stands for them in ``row``.
    :param origin: What the format needs to write the sample back as it was; nobody else's to look at.
    :param memory: About how many bytes ``row`` and ``origin`` keep occupied, from formats that know; then ``embedded``
        is only made when it is looked at, out of these.
    """

    index: int
    line: int
    row: Row | None
    raw: bytes = field(default=b"", repr=False)
    error: str | None = None
    key: str | None = None
    embedded: Mapping[str, bytes] = field(default_factory=dict, repr=False)
    origin: Any = field(default=None, repr=False, compare=False)
    memory: int | None = field(default=None, repr=False, compare=False)

    @property
    def size(self) -> int:
        """About how many bytes of memory the sample keeps occupied."""
        if self.memory is not None:
            return self.memory
        return len(self.raw) + sum(len(data) for data in self.embedded.values())


@dataclass(frozen=True, slots=True)
class FrameSampling:
    """Which frames of a video a model is shown, and as what.

    :param fps: Frames to take of every second of the video.
    :param max_frames: Most frames; where ``fps`` would make more, so many are spread evenly over the time span.
    :param start: Beginning of the time span, in seconds from the video's beginning.
    :param end: Its end, in seconds; None is the video's end.
    :param transport: ``video`` (as one video), ``frames`` (as one image each), or ``auto``: as a video where the
        engine takes one.
    """

    fps: float
    max_frames: int
    start: float = 0.0
    end: float | None = None
    transport: Transport = "auto"


@dataclass(frozen=True, slots=True)
class MediaRef:
    """A media reference as it stands in a row: a path or URI, absolute or relative to the shard.

    :param frames: Of a video, which of its frames are looked at.
    """

    kind: MediaKind
    ref: str
    frames: FrameSampling | None = None


@dataclass(frozen=True, slots=True)
class SourceMedia:
    """A media file as it was found: not yet checked, nor made fit for a model.

    :param data: The file's bytes; empty for a video, which is not held in memory.
    :param digest: SHA-256 of the file's bytes, in hexadecimal: what an answer about it is found by.
    :param looked: Where it was looked for, in order, each with the identity of what was there; see
        :data:`Looked`. Empty for media that a shard embeds.
    """

    kind: MediaKind
    ref: str
    data: bytes = field(repr=False)
    digest: str
    looked: Looked = ()
    file: Any = field(default=None, repr=False, compare=False)
    """A video's bytes: an open binary file, read by position and never sought, as several threads may share it. It
    is closed when nobody refers to it any more."""


@dataclass(frozen=True, slots=True)
class Media:
    """Media ready to be sent: checked, upright, small enough.

    :param mime: MIME type, told by content (``image/jpeg``, ``image/png``, ``image/webp``, ``video/mp4``, ...).
    :param data: The encoded file, untouched when it was fit already.
    :param ref: The reference that it was loaded from.
    """

    kind: MediaKind
    mime: str
    data: bytes = field(repr=False)
    ref: str


Part = str | MediaRef | Media


@dataclass(frozen=True, slots=True)
class Request:
    """One question to a model: ``n`` candidates are one request, never several.

    :param system: System prompt; None sends none. It comes first and does not vary between samples, so that an
        engine can reuse its prefix.
    :param parts: The user message, text and media in order. A step names media by :class:`MediaRef`; the runner
        hands the engine the same request with :class:`Media` in their place.
    :param schema: JSON schema that each answer must satisfy. An engine that cannot constrain its output answers
        freely; the step's parser has to cope with both.
    :param sampling: Sampling parameters by their OpenAI names (``temperature``, ``top_p``, ``max_tokens``,
        ``seed``, ``stop``, ...); what is missing is the engine's default.
    :param n: How many candidate answers to draw.
    :param completion: What to say beside the media to a model that knows no conversation and only continues a text
        (BLIP, GIT): instead of ``system`` and the texts among ``parts``. None: such a model can't be asked this.
    :param note: Makes of the answer what else is to be kept beside it in the journal, as JSON values. No part of
        the question.
    """

    system: str | None
    parts: tuple[Part, ...]
    schema: Mapping[str, Any] | None = None
    sampling: Mapping[str, Any] = field(default_factory=dict)
    n: int = 1
    completion: str | None = None
    note: Callable[[Answer], Mapping[str, Any]] | None = field(default=None, repr=False, compare=False)


@dataclass(frozen=True, slots=True)
class Probe:
    """A question about a video file itself, which no model is asked.

    The answer's one choice is a JSON object: ``duration`` (seconds), ``width`` and ``height`` (pixels, upright) and
    ``fps`` (frames per second, on average). It is kept in the journal like any other, and costs nothing.
    """

    ref: MediaRef

    @property
    def parts(self) -> tuple[MediaRef]:
        """The medium in question, as in a :class:`Request`."""
        return (self.ref,)


class Independent(tuple["Request | Probe", ...]):
    """Requests that a step yields of which each may fail for itself: its answer then holds the error.

    Of any others, the first error of the sample's own is thrown into the step, and the answers beside it are lost
    to it.
    """

    __slots__ = ()


FinishReason = Literal["stop", "length", "refusal", "other"]


@dataclass(frozen=True, slots=True)
class Choice:
    """One candidate answer.

    :param finish_reason: ``stop`` (complete), ``length`` (cut at ``max_tokens``), ``refusal`` (the model or a
        content filter declined; ``text`` holds what it said), ``other``.
    """

    text: str
    finish_reason: FinishReason = "stop"


@dataclass(frozen=True, slots=True)
class Answer:
    """What an engine made of one request: ``n`` choices, the model as the engine names it, and the cost.

    :param key: What the answer is found by in the journal. The engine leaves it empty; a step always sees it.
    :param error: Why there is no answer, to one of several :class:`Independent` requests; the rest is empty then.
    """

    choices: tuple[Choice, ...]
    model: str
    usage: Usage = field(default_factory=Usage)
    key: str = ""
    error: SampleError | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """What a step made of a sample.

    :param rows: The rows to write in the sample's place; empty drops it, several multiply it.
    :param skipped: There was nothing to do and the sample is written back as it was; ``rows`` is then empty.
    """

    rows: tuple[Row, ...] = ()
    skipped: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one sample ended: every row read becomes exactly one of these.

    :param error: Kind, message and so on of a dead letter; only with status ``failed``.
    :param keys: With status ``failed``, the keys of the requests that were made for it.
    """

    sample: Sample
    status: Status
    rows: Sequence[Row] = ()
    error: Exception | None = None
    usage: Usage = field(default_factory=Usage)
    keys: Sequence[str] = ()
