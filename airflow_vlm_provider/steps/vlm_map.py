"""The general step: any prompt about any row, with its media, and what comes of it in a field."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from airflow_vlm_provider.errors import ConfigError, SampleError
from airflow_vlm_provider.steps.base import StepRun
from airflow_vlm_provider.steps.chunks import SpecialTokens
from airflow_vlm_provider.steps.functions import authors_code, check_function, digest_of, recorded
from airflow_vlm_provider.steps.map_answers import READER_VERSION, read_answer
from airflow_vlm_provider.steps.rows import excerpt, read_references
from airflow_vlm_provider.steps.sampling import RETRY_TEMPERATURE, asked_again, read_sampling
from airflow_vlm_provider.steps.structured import StructuredOutput
from airflow_vlm_provider.steps.templates import fill
from airflow_vlm_provider.types import Answer, FrameSampling, MediaRef, Request, Result, Row, Sample

DEFAULT_STEP_NAME = "vlm_map"
MAX_TOKENS = 512
TRANSPORTS = ("auto", "video", "frames")

Prompt = str | Callable[..., str | None]

_STEP_NAME = re.compile(r"[A-Za-z0-9_-]+")


class VLMMapStep:
    """
    Ask one question about every row and write the answer into a field.

    The media of the row go before the prompt, images before videos, each in its order; a row without media is asked
    about with the prompt alone. A row that has the field already is skipped, unless it is null, and so is one about
    which there is nothing to ask.

    An answer that is of no use (declined, empty, cut, a loop, not what ``output_type`` wants) is asked for again with
    another seed and, where the temperature is 0, with temperature 0.7. When ``try_num`` is used up, the row fails.

    :param prompt: A template, in which ``{field}`` and ``{object.field}`` become the row's values and all other braces
        are left alone; ``text_key`` without special tokens. Or a function of the row, which gets a copy of it and
        returns the prompt, or None where there is nothing to ask.
    :param arguments: Further keyword arguments of the function: JSON values, dates.
    :param version: Stands for the code of the function and of ``output_type``, which else are told by their source.
    :param field: Field of the row that takes the answer.
    :param system_prompt: System prompt; None sends none.
    :param output_type: A pydantic model that answers have to fit; the field takes its values. None takes the text.
    :param sampling_params: Sampling parameters over the defaults ``max_tokens`` 512 and temperature 0, or 1 with
        several answers; see :func:`~airflow_vlm_provider.steps.sampling.read_sampling`.
    :param n: How many answers are drawn by one request; with more than 1 the field takes a list.
    :param try_num: How often it is asked at most, the first time included.
    :param images: Whether images are sent along.
    :param videos: Whether videos are.
    :param fps: Frames that are looked at of every second of a video.
    :param max_frames: Most frames of a video.
    :param transport: ``video`` sends a video as such, ``frames`` as one image for each frame, ``auto`` as the model
        takes it.
    :param step_name: Names the step's folder in the ledger.
    :param text_key: Field of the text, out of which templates leave special tokens.
    :param image_key: Field of the image references: a list, null, or a single reference.
    :param video_key: Field of the video references, likewise.
    :param special_tokens: What stands for media in the text: for an image, a video and a sound, and the end of a chunk.
    :raises ConfigError: a parameter is wrong.
    """

    name = DEFAULT_STEP_NAME
    asking = frozenset(
        {
            *(
                "prompt",
                "arguments",
                "version",
                "system_prompt",
                "schema",
                "sampling",
                "retry_temperature",
                "n",
            ),
            *("images", "videos", "frames", "text_key", "image_key", "video_key", "special_tokens"),
        }
    )

    def __init__(
        self,
        *,
        prompt: Prompt,
        arguments: Mapping[str, Any] | None = None,
        version: str | None = None,
        field: str = "answer",
        system_prompt: str | None = None,
        output_type: type[BaseModel] | None = None,
        sampling_params: Mapping[str, Any] | None = None,
        n: int = 1,
        try_num: int = 3,
        images: bool = True,
        videos: bool = True,
        fps: float = 2.0,
        max_frames: int = 32,
        transport: str = "auto",
        step_name: str = DEFAULT_STEP_NAME,
        text_key: str = "text",
        image_key: str = "images",
        video_key: str = "videos",
        special_tokens: Sequence[str] = SpecialTokens(),
    ) -> None:
        for parameter, value in {
            "text_key": text_key,
            "image_key": image_key,
            "video_key": video_key,
        }.items():
            if not isinstance(value, str) or not value:
                raise ConfigError(f"{parameter} is {value!r}; give the name of a field.")
        if not isinstance(field, str) or field in ("", image_key, video_key):
            raise ConfigError(f"field is {field!r}; give the name of a field that holds no media.")
        if not isinstance(step_name, str) or not _STEP_NAME.fullmatch(step_name):
            raise ConfigError(f"step_name is {step_name!r}; give letters, digits, '-' and '_'.")
        for parameter, text in {"system_prompt": system_prompt, "version": version}.items():
            if text is not None and not isinstance(text, str):
                raise ConfigError(f"{parameter} is {text!r}; give a string, or None.")
        for parameter, number in {"n": n, "try_num": try_num, "max_frames": max_frames}.items():
            if isinstance(number, bool) or not isinstance(number, int) or number < 1:
                raise ConfigError(f"{parameter} is {number!r}; give a whole number from 1 on.")
        if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < float("inf"):
            raise ConfigError(f"fps is {fps!r}; give a number above 0, such as 2.")
        if transport not in TRANSPORTS:
            raise ConfigError(f"transport is {transport!r}; give one of {', '.join(map(repr, TRANSPORTS))}.")
        self.arguments = dict(arguments or {})
        if callable(prompt):
            check_function(prompt, self.arguments, version=version)
        elif not isinstance(prompt, str) or not prompt.strip():
            raise ConfigError(
                f"prompt is {prompt!r}; give a template such as 'Describe {{text}}', or a function."
            )
        self.name = step_name
        self.prompt = prompt
        self.version = version
        self.field = field
        self.system_prompt = system_prompt
        self.output = None if output_type is None else StructuredOutput(output_type)
        defaults = {"temperature": 0 if n == 1 else 1.0, "max_tokens": MAX_TOKENS}
        self.sampling = read_sampling(sampling_params, defaults=defaults)
        if n > 1 and self.sampling.get("temperature") == 0:
            raise ConfigError(
                f"n={n} with temperature 0 would draw the same answer {n} times. Raise temperature in sampling_params "
                "(1.0 is the default then), or set n=1."
            )
        self.n = n
        self.try_num = try_num
        self.images = images
        self.videos = videos
        self.frames = FrameSampling(fps=fps, max_frames=max_frames, transport=transport)  # type: ignore[arg-type]
        self.text_key = text_key
        self.image_key = image_key
        self.video_key = video_key
        self.special_tokens = SpecialTokens.of(tuple(special_tokens))

    def parameters(self) -> Mapping[str, Any]:
        """
        Everything that decides what is asked and written, as JSON values.

        :raises ConfigError: an argument of the function is none.
        """
        return {
            "prompt": self._prompt_identity(),
            "arguments": recorded(self.arguments),
            "version": self.version,
            "field": self.field,
            "system_prompt": self.system_prompt,
            "schema": None if self.output is None else self.output.asked,
            "output_type": self._output_identity(),
            "sampling": dict(self.sampling),
            "retry_temperature": RETRY_TEMPERATURE,
            "n": self.n,
            "try_num": self.try_num,
            "images": self.images,
            "videos": self.videos,
            "frames": {
                "fps": self.frames.fps,
                "max_frames": self.frames.max_frames,
                "transport": self.frames.transport,
            },
            "text_key": self.text_key,
            "image_key": self.image_key,
            "video_key": self.video_key,
            "special_tokens": list(self.special_tokens),
            "reader_version": READER_VERSION,
        }

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> VLMMapStep:
        """
        The step whose :meth:`parameters` these are, as this version of the package reads answers.

        :raises ConfigError: it was made of code, which is not recorded.
        """
        if not isinstance(parameters["prompt"], str) or parameters["schema"] is not None:
            code = "output_type" if isinstance(parameters["prompt"], str) else "function"
            raise ConfigError(
                f"The step was made with a {code}, which can't be made again from what is recorded. Run the operator "
                "that made it, with failed_only=True."
            )
        names = ("prompt", "version", "field", "system_prompt", "n", "try_num", "images", "videos")
        keys = ("text_key", "image_key", "video_key", "special_tokens")
        # The defaults stand in the recorded sampling already: what is not there was removed on purpose.
        sampling = {"temperature": None, "max_tokens": None, **parameters["sampling"]}
        given = {name: parameters[name] for name in (*names, *keys)}
        return cls(sampling_params=sampling, **parameters["frames"], **given)

    def generated(self) -> Mapping[str, Any]:
        """See :class:`~airflow_vlm_provider.steps.base.Step`."""
        value = {"type": "string"} if self.output is None else self.output.written
        return {self.field: value if self.n == 1 else {"type": "array", "items": value}}

    def process(self, sample: Sample) -> StepRun:
        """
        Take one sample from row to row with the answer; the given row is left as it is.

        :raises SampleError: Thrown from the generator: ``malformed_row``, ``unparsable``, ``refused``,
            ``empty_answer``, ``cut_short`` or ``repetitive``.
        """
        row = sample.row
        if row is None:
            raise SampleError("malformed_row", sample.error or "The row could not be read.")
        if row.get(self.field) is not None:
            return Result(skipped=True)
        media = self._media(row)
        prompt = self._text(row)
        if prompt is None or not (media or prompt.strip()):
            return Result(skipped=True)
        answers = yield from self._ask(
            Request(
                system=self.system_prompt or None,
                parts=(*media, prompt) if prompt else media,
                schema=None if self.output is None else self.output.asked,
                completion=prompt,
            )
        )
        return Result(rows=({**row, self.field: answers if self.n > 1 else answers[0]},))

    def _prompt_identity(self) -> Any:
        if isinstance(self.prompt, str):
            return self.prompt
        return {"function": digest_of(self.prompt) if self.version is None else None}

    def _output_identity(self) -> str | None:
        if self.output is None or self.version is not None:
            return None
        try:
            return digest_of(*self.output.classes())
        except ConfigError:  # made by a call, not by a class statement: its schema is all there is to it
            return None

    def _media(self, row: Row) -> tuple[MediaRef, ...]:
        images = read_references(row, self.image_key) if self.images else []
        videos = read_references(row, self.video_key) if self.videos else []
        return (
            *(MediaRef("image", each) for each in images),
            *(MediaRef("video", each, self.frames) for each in videos),
        )

    def _text(self, row: Row) -> str | None:
        if isinstance(self.prompt, str):
            text = row.get(self.text_key)
            if isinstance(text, str):
                row = {**row, self.text_key: self.special_tokens.without(text)}
            return fill(self.prompt, row)
        with authors_code():
            prompt = self.prompt(copy.deepcopy(row), **self.arguments)
        if prompt is not None and not isinstance(prompt, str):
            raise TypeError(f"The prompt's function returned {excerpt(prompt)}; return a string, or None.")
        return prompt

    def _ask(self, request: Request) -> Generator[Sequence[Request], Sequence[Answer], list[Any]]:
        """As many answers as are wanted, each of use."""
        values: list[Any] = []
        fault = SampleError("empty_answer", "The endpoint gives fewer answers than it was asked for.")
        for attempt in range(self.try_num):
            (answer,) = yield [
                Request(
                    system=request.system,
                    parts=request.parts,
                    schema=request.schema,
                    sampling=asked_again(self.sampling, attempt),
                    n=self.n - len(values),
                    completion=request.completion,
                )
            ]
            for choice in answer.choices[: self.n - len(values)]:
                try:
                    values.append(read_answer(choice, self.output))
                except SampleError as error:
                    fault = error
            if len(values) == self.n:
                return values
        had = f" {len(values)} of {self.n} answers could be used." if values else ""
        raise SampleError(
            fault.kind,
            f"{fault.message}{had} ({self.try_num} {'try' if self.try_num == 1 else 'tries'})",
            attempts=self.try_num,
            keys=(answer.key,) if answer.key else (),
        )
