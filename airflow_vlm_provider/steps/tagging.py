"""The step that tags images: 5 to 10 tags for every image of a sample."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any

from airflow_vlm_provider.errors import ConfigError, SampleError
from airflow_vlm_provider.steps.base import StepRun
from airflow_vlm_provider.steps.parsing import PARSER_VERSION, parse_tags
from airflow_vlm_provider.steps.prompts import TAGGING_INPUT, TAGGING_SYSTEM
from airflow_vlm_provider.steps.rows import excerpt, malformed, read_references, read_text
from airflow_vlm_provider.steps.sampling import RETRY_TEMPERATURE, asked_again, read_sampling
from airflow_vlm_provider.steps.tags import MAX_TAG_LENGTH, MAX_TAGS, MIN_TAGS
from airflow_vlm_provider.types import Answer, Choice, MediaRef, Request, Result, Row, Sample

SPECIAL_TOKENS = ("<__dj__image>", "<__dj__video>", "<__dj__audio>", "<|__dj__eoc|>")
"""What Data-Juicer puts into a sample's text in place of media and at the end of a chunk."""

DEFAULT_SAMPLING: Mapping[str, Any] = {"temperature": 0, "max_tokens": 256}

# Longer than a tag may be: a grammar cuts where its room ends, also inside a word, and whole words are kept afterwards.
_ROOM = MAX_TAG_LENGTH + 10

TAGS_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {
        "tags": {
            "type": "array",
            # The length is part of the pattern, because OpenAI's strict mode knows no maxLength, and xgrammar no
            # maxLength beside a pattern. Excluded is what an answer that goes astray could run on with.
            "items": {"type": "string", "pattern": rf'^[^"\\,\[\]{{}}\x00-\x1f]{{1,{_ROOM}}}$'},
            "minItems": MIN_TAGS,
            "maxItems": MAX_TAGS,
        }
    },
    "required": ["tags"],
    "additionalProperties": False,
}
"""What an answer looks like, for engines that can constrain it."""


class TaggingStep:
    """Ask for the tags of every image of a sample, and write them into its meta data.

    Every distinct image of a sample is one request, and all are yielded at once. An answer without tags (not to be
    parsed, declined, cut too early) is asked for again with another seed and, where the temperature is 0, with
    temperature 0.7; so is an answer with fewer than 5 tags. When ``try_num`` is used up, an image keeps the fullest
    answer that it got, be it short of 5 tags; so it does when asking again fails. An image without any tag fails
    the whole sample.

    The tags stand in ``row[meta_key][tag_field_name]``, one list for each image in the order of ``row[image_key]``,
    repeated images included. A sample without images gets ``[[]]``; one that has tags already is skipped. (A null
    there is what Parquet writes for "no tags yet", and does not count.)

    :param tag_field_name: Field of the meta data that takes the tags.
    :param system_prompt: System prompt; None is the project's own, an empty string sends none.
    :param input_template: User message beside the image. Every ``{text}`` in it is replaced by the sample's text
        without special tokens; all other braces are left alone. None is the project's own, which has no ``{text}``.
    :param sampling_params: Sampling parameters over the defaults ``{"temperature": 0, "max_tokens": 256}``, as
        :func:`~airflow_vlm_provider.steps.sampling.read_sampling` takes them.
    :param try_num: How often an image is asked about at most, the first time included.
    :param text_key: Field of the row that holds the text.
    :param image_key: Field that holds the image references: a list, null, or a single reference.
    :param meta_key: Field that holds the meta data: an object, or null.
    :param special_tokens: What is removed from the text.
    :raises ConfigError: A parameter is wrong.
    """

    name = "image_tagging"
    asking = frozenset(
        {
            "system_prompt",
            "input_template",
            "special_tokens",
            "schema",
            "sampling",
            "retry_temperature",
            "text_key",
            "image_key",
        }
    )

    def __init__(
        self,
        *,
        tag_field_name: str = "image_tags",
        system_prompt: str | None = None,
        input_template: str | None = None,
        sampling_params: Mapping[str, Any] | None = None,
        try_num: int = 3,
        text_key: str = "text",
        image_key: str = "images",
        meta_key: str = "__dj__meta__",
        special_tokens: Sequence[str] = SPECIAL_TOKENS,
    ) -> None:
        names = {
            "tag_field_name": tag_field_name,
            "text_key": text_key,
            "image_key": image_key,
            "meta_key": meta_key,
        }
        for parameter, value in names.items():
            if not isinstance(value, str) or not value:
                raise ConfigError(f"{parameter} is {value!r}; give the name of a field.")
        for parameter, prompt in {"system_prompt": system_prompt, "input_template": input_template}.items():
            if prompt is not None and not isinstance(prompt, str):
                raise ConfigError(f"{parameter} is {prompt!r}; give a string, or None for the project's own.")
        if isinstance(try_num, bool) or not isinstance(try_num, int) or try_num < 1:
            raise ConfigError(f"try_num is {try_num!r}; give a whole number from 1 on.")
        if not isinstance(special_tokens, list | tuple) or not all(
            isinstance(token, str) and token for token in special_tokens
        ):
            what = f"special_tokens is {special_tokens!r}"
            raise ConfigError(f"{what}; give a list of strings that are not empty.")
        self.tag_field_name = tag_field_name
        self.system_prompt = TAGGING_SYSTEM if system_prompt is None else system_prompt
        self.input_template = TAGGING_INPUT if input_template is None else input_template
        self.sampling = read_sampling(sampling_params, defaults=DEFAULT_SAMPLING)
        self.try_num = try_num
        self.text_key = text_key
        self.image_key = image_key
        self.meta_key = meta_key
        self.special_tokens = tuple(special_tokens)

    def parameters(self) -> Mapping[str, Any]:
        """Everything that decides what is asked and written, as JSON values."""
        return {
            "tag_field_name": self.tag_field_name,
            "system_prompt": self.system_prompt,
            "input_template": self.input_template,
            "special_tokens": list(self.special_tokens),
            "schema": dict(TAGS_SCHEMA),
            "sampling": dict(self.sampling),
            "retry_temperature": RETRY_TEMPERATURE,
            "try_num": self.try_num,
            "text_key": self.text_key,
            "image_key": self.image_key,
            "meta_key": self.meta_key,
            "parser_version": PARSER_VERSION,
        }

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> TaggingStep:
        """The step whose :meth:`parameters` these are, as this version of the package parses answers."""
        names = ("tag_field_name", "system_prompt", "input_template", "try_num", "special_tokens")
        keys = ("text_key", "image_key", "meta_key")
        # The defaults stand in the recorded sampling already: what is not there was removed on purpose.
        sampling = {**dict.fromkeys(DEFAULT_SAMPLING), **parameters["sampling"]}
        return cls(sampling_params=sampling, **{name: parameters[name] for name in (*names, *keys)})

    def generated(self) -> Mapping[str, Any]:
        """See :class:`~airflow_vlm_provider.steps.base.Step`."""
        tags = {"type": "array", "items": {"type": "array", "items": {"type": "string"}}}
        return {self.meta_key: {"type": "object", "properties": {self.tag_field_name: tags}}}

    def process(self, sample: Sample) -> StepRun:
        """Take one sample from row to tagged row; the given row is left as it is.

        :raises SampleError: Thrown from the generator: ``malformed_row``, ``unparsable`` or ``refused``.
        """
        row = sample.row
        if row is None:
            raise SampleError("malformed_row", sample.error or "The row could not be read.")
        meta = self._meta(row)
        if meta.get(self.tag_field_name) is not None:
            return Result(skipped=True)
        tags: list[list[str]] = [[]]
        if references := read_references(row, self.image_key):
            found = yield from self._ask(list(dict.fromkeys(references)), self._message(row))
            tags = [list(found[reference]) for reference in references]
        return Result(rows=({**row, self.meta_key: {**meta, self.tag_field_name: tags}},))

    def _meta(self, row: Row) -> Mapping[str, Any]:
        meta = row.get(self.meta_key)
        if meta is None:
            return {}
        if not isinstance(meta, Mapping):
            raise malformed(self.meta_key, meta, "an object or null")
        return meta

    def _message(self, row: Row) -> str:
        if "{text}" not in self.input_template:
            return self.input_template
        text = read_text(row, self.text_key)
        for token in self.special_tokens:
            text = text.replace(token, "")
        return self.input_template.replace("{text}", text.strip())

    def _ask(
        self, references: list[str], message: str
    ) -> Generator[Sequence[Request], Sequence[Answer], Mapping[str, list[str]]]:
        """The tags of every reference."""
        tags: dict[str, list[str]] = {reference: [] for reference in references}
        choices: dict[str, Choice] = {}
        unsettled = references
        for attempt in range(self.try_num):
            try:
                answers = yield [self._request(reference, message, attempt) for reference in unsettled]
            except SampleError:
                if all(tags.values()):
                    break
                raise
            for reference, answer in zip(unsettled, answers, strict=True):
                choice = choices[reference] = answer.choices[0] if answer.choices else Choice("", "other")
                if len(found := _tags_in(choice)) > len(tags[reference]):
                    tags[reference] = found
            unsettled = [reference for reference in unsettled if len(tags[reference]) < MIN_TAGS]
            if not unsettled:
                break
        for reference in unsettled:
            if not tags[reference]:
                raise self._failure(reference, choices[reference])
        return tags

    def _request(self, reference: str, message: str, attempt: int) -> Request:
        image = MediaRef("image", reference)
        return Request(
            system=self.system_prompt or None,
            parts=(image, message) if message else (image,),
            schema=TAGS_SCHEMA,
            sampling=asked_again(self.sampling, attempt),
        )

    def _failure(self, reference: str, choice: Choice) -> SampleError:
        refused = choice.finish_reason == "refusal"
        what = "The model declined to tag" if refused else "No tags could be read from the answers about"
        tries = f"{self.try_num} {'try' if self.try_num == 1 else 'tries'}"
        hint = " It was cut for its length: raise max_tokens." if choice.finish_reason == "length" else ""
        message = (
            f"{what} {excerpt(reference)} in {tries}. The last answer was: {excerpt(choice.text)}.{hint}"
        )
        kind = "refused" if refused else "unparsable"
        return SampleError(kind, message, media=reference, attempts=self.try_num)


def _tags_in(choice: Choice) -> list[str]:
    if choice.finish_reason == "refusal":
        return []
    return parse_tags(choice.text, cut=choice.finish_reason == "length")
