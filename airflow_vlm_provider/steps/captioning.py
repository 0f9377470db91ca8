"""What all steps that caption share: from a row to the same row with captions in its text.

Invariants:

- Every medium of a sample is asked about at the same time, and once, however often it stands there.
- Only the text changes, and the fields that a step says it generates besides.
- A sample without media of the kind is left alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from airflow_vlm_provider.errors import ConfigError, SampleError
from airflow_vlm_provider.steps.base import StepRun
from airflow_vlm_provider.steps.captions import CAPTIONS_VERSION
from airflow_vlm_provider.steps.chunks import SpecialTokens, read_chunks, write_chunks
from airflow_vlm_provider.steps.rows import read_references, read_text
from airflow_vlm_provider.steps.together import together
from airflow_vlm_provider.types import Answer, MediaKind, Probe, Request, Result, Row, Sample

MISSING_PLACEHOLDERS = ("error", "prepend")


@dataclass(frozen=True, slots=True)
class Captioned:
    """What came of one medium.

    :param captions: As many as a sample becomes new ones.
    :param about: What else the step knows of it then, for :meth:`CaptioningStep._fields`.
    """

    captions: Sequence[str]
    about: Any = None


Captioning = Generator[Sequence[Request | Probe], Sequence[Answer], Captioned]


class CaptioningStep(ABC):
    """Base of the steps that caption.

    :param keep_original_sample: Write the sample as it was before the new ones.
    :param missing_placeholders: What is done with a text that has words, but no placeholder for any of the media:
        ``error`` makes a dead letter of it, ``prepend`` puts the placeholders before it.
    :param text_key: Field of the row that holds the text.
    :param media_key: Field that holds the references: a list, null, or a single reference.
    :param special_tokens: What stands in the text for an image, a video and a sound, and what ends a chunk.
    :raises ConfigError: A parameter is wrong.
    """

    name: str
    asking: frozenset[str]
    kind: ClassVar[MediaKind]

    def __init__(
        self,
        *,
        keep_original_sample: bool,
        missing_placeholders: str,
        text_key: str,
        media_key: str,
        special_tokens: Sequence[str],
    ) -> None:
        if not isinstance(keep_original_sample, bool):
            raise ConfigError(f"keep_original_sample is {keep_original_sample!r}; give True or False.")
        if missing_placeholders not in MISSING_PLACEHOLDERS:
            raise ConfigError(f"missing_placeholders is {missing_placeholders!r}; give 'error' or 'prepend'.")
        for parameter, value in {"text_key": text_key, f"{self.kind}_key": media_key}.items():
            if not isinstance(value, str) or not value:
                raise ConfigError(f"{parameter} is {value!r}; give the name of a field.")
        self.keep_original_sample = keep_original_sample
        self.missing_placeholders = missing_placeholders
        self.text_key = text_key
        self.media_key = media_key
        self.special_tokens = SpecialTokens.of(special_tokens)

    @property
    def new_rows(self) -> int:
        """How many new rows a sample becomes, besides the original."""
        return 1

    @abstractmethod
    def _captions(self, row: Row, words: str, ref: str) -> Captioning:
        """Caption one medium.

        :param words: The text of its chunk without special tokens.
        :raises SampleError: Thrown from the generator: it can't be captioned.
        """

    def _may_stay_bare(self, error: SampleError) -> bool:  # noqa: ARG002
        """Whether a medium may be left without a caption for this reason, as long as others have theirs."""
        return False

    def _fields(
        self,
        row: Row,  # noqa: ARG002
        captioned: Sequence[Captioned | None],  # noqa: ARG002
        number: int,  # noqa: ARG002
    ) -> Mapping[str, Any]:
        """What is written into a new row besides the text; each field has to be one of :meth:`generated`.

        :param captioned: What came of each medium, in the order of the placeholders; None of one that stays bare.
        :param number: Which of the new rows it is, from 0.
        """
        return {}

    def parameters(self) -> Mapping[str, Any]:
        """Everything that decides what is asked and written, as JSON values."""
        return {
            "keep_original_sample": self.keep_original_sample,
            "missing_placeholders": self.missing_placeholders,
            "text_key": self.text_key,
            f"{self.kind}_key": self.media_key,
            "special_tokens": list(self.special_tokens),
            "captions_version": CAPTIONS_VERSION,
        }

    def generated(self) -> Mapping[str, Any]:
        """See :class:`~airflow_vlm_provider.steps.base.Step`."""
        return {self.text_key: {"type": "string"}}

    def process(self, sample: Sample) -> StepRun:
        """Take one sample from row to rows; the given row is left as it is.

        :raises SampleError: Thrown from the generator: ``malformed_row``, or why a medium can't be captioned.
        """
        row = sample.row
        if row is None:
            raise SampleError("malformed_row", sample.error or "The row could not be read.")
        references = read_references(row, self.media_key)
        if not references:
            return Result(skipped=True)
        tokens = self.special_tokens
        chunks = read_chunks(
            read_text(row, self.text_key),
            tokens=tokens,
            kind=self.kind,
            media=len(references),
            prepend=self.missing_placeholders == "prepend",
        )
        placeholder = tokens.placeholder(self.kind)
        words = [chunk.words for chunk in chunks for token in chunk.tokens if token == placeholder]
        places = list(zip(words, references, strict=True))
        distinct = list(dict.fromkeys(places))
        runs = [self._captions(row, *place) for place in distinct]
        ended = yield from together(runs, may_fail=self._may_stay_bare)
        errors = [each for each in ended if isinstance(each, SampleError)]
        if len(errors) == len(ended):
            raise _first_of(errors)
        found = {
            place: each if isinstance(each, Captioned) else None
            for place, each in zip(distinct, ended, strict=True)
        }
        captioned = [found[place] for place in places]
        rows: list[Row] = [row] if self.keep_original_sample else []
        for number in range(self.new_rows):
            captions = [None if each is None else each.captions[number] for each in captioned]
            text = write_chunks(chunks, captions, tokens=tokens, kind=self.kind)
            fields = self._fields(row, captioned, number)
            rows.append({**row, **fields, self.text_key: text})
        return Result(rows=tuple(rows))


def _first_of(errors: Sequence[SampleError]) -> SampleError:
    """The first error, which stands for all: when it is asked about again, then about all of them."""
    if all(error.keys for error in errors):
        errors[0].keys = tuple(key for error in errors for key in error.keys)
    return errors[0]
