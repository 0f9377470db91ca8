"""An engine and a step without a model, for tests of what lies around them."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from airflow_vlm_provider.errors import SampleError
from airflow_vlm_provider.steps.base import StepRun
from airflow_vlm_provider.types import (
    Answer,
    Choice,
    Media,
    MediaRef,
    Part,
    Request,
    Result,
    Sample,
    SourceMedia,
    Usage,
)


class CaptionStep:
    """Asks for one caption a row, about its image or else its text; a row that has one is skipped.

    :param suffix: Put behind every caption; no part of what is asked.
    :param useless: An answer that fails its sample.
    """

    name = "caption"
    asking = frozenset({"prompt"})

    def __init__(self, prompt: str = "Describe.", *, suffix: str = "", useless: str = "") -> None:
        self.prompt = prompt
        self.suffix = suffix
        self.useless = useless

    def parameters(self) -> Mapping[str, Any]:
        return {"prompt": self.prompt, "suffix": self.suffix}

    def generated(self) -> Mapping[str, Any]:
        return {"caption": {"type": "string"}}

    def process(self, sample: Sample) -> StepRun:
        row = sample.row
        assert row is not None
        if "caption" in row:
            return Result(skipped=True)
        if row.get("break") == "step":
            raise KeyError("a defect of the step")
        about = [MediaRef("image", ref) for ref in row.get("images", [])] or [row["text"]]
        answers = yield [Request(system=None, parts=(each, self.prompt)) for each in about]
        texts = [answer.choices[0].text for answer in answers]
        if self.useless and self.useless in texts:
            raise SampleError("unparsable", "a useless answer", attempts=len(texts))
        return Result(rows=({**row, "caption": " ".join(texts) + self.suffix},))


class ScriptedEngine:
    """Answers at once, or after a while, what a function says; counts what it is asked.

    :param answer: From the first part of a request (text, or an image's bytes) to the answer's text; may raise.
    :param delay: From the same to seconds of waiting.
    """

    model = "scripted"
    takes_video = True
    pressure: str | None = None

    def __init__(
        self,
        answer: Callable[[Any], str] = lambda about: f"about {about}",
        *,
        delay: Callable[[Any], float] = lambda about: 0.0,
        concurrency: int = 8,
    ) -> None:
        self.answer = answer
        self.delay = delay
        self.concurrency = concurrency
        self.asked: list[Any] = []
        self.sent_at: list[float] = []
        self.in_flight = self.most_in_flight = self.entered = 0
        self._window: asyncio.Semaphore | None = None

    @property
    def window(self) -> int:
        return self.concurrency

    def parameters(self) -> Mapping[str, Any]:
        return {"model": self.model}

    async def __aenter__(self) -> ScriptedEngine:
        self.entered += 1
        self._window = asyncio.Semaphore(self.concurrency)
        return self

    async def __aexit__(self, *exc: object) -> None:
        return None

    async def ask(self, request: Request) -> Answer:
        first = request.parts[0]
        about = first.data if isinstance(first, Media) else first
        assert self._window is not None, "the engine was asked before it was entered"
        async with self._window:
            self.asked.append(about)
            self.sent_at.append(time.monotonic())
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            try:
                await asyncio.sleep(self.delay(about))
                text = self.answer(about)
            finally:
                self.in_flight -= 1
        return Answer((Choice(text),), self.model, Usage(requests=1, prompt_tokens=10, completion_tokens=2))


class FakeMedia:
    """Any reference is its own content, until something else is put behind it; some are missing.

    :ivar content: What stands behind a reference; changing it changes its identity.
    :ivar fetched: References that were fetched, in order.
    """

    remote = False

    def __init__(self) -> None:
        self.content: dict[str, bytes] = {}
        self.fetched: list[str] = []

    def parameters(self) -> Mapping[str, Any]:
        return {"max_pixels": None, "roots": None}

    def answering_parameters(self) -> Mapping[str, Any]:
        return {"max_pixels": None}

    def memory_parameters(self) -> Mapping[str, Any]:
        return self.parameters()

    def fetch(self, ref: MediaRef, *, shard: str, embedded: Mapping[str, bytes]) -> SourceMedia:
        if ref.ref in embedded:
            data = embedded[ref.ref]
            return SourceMedia(ref.kind, ref.ref, data, hashlib.sha256(data).hexdigest())
        self.fetched.append(ref.ref)
        identity = self._identity(ref.ref)
        looked = ((f"file:///{ref.ref}", identity),)
        if identity is None:
            error = SampleError("media_missing", f"there is no {ref.ref}", media=ref.ref)
            error.looked = looked
            raise error
        data = self.content.get(ref.ref, ref.ref.encode())
        return SourceMedia(ref.kind, ref.ref, data, hashlib.sha256(data).hexdigest(), looked)

    def video_parameters(self) -> Mapping[str, Any]:
        return {}

    def probe(self, source: SourceMedia) -> Mapping[str, Any]:
        return {"duration": 10.0, "width": 4, "height": 4, "fps": 25.0}

    def prepare(self, source: SourceMedia, **how: Any) -> Sequence[Part]:
        if source.data.startswith(b"corrupt"):
            raise SampleError("media_corrupt", f"{source.ref} is corrupt", media=source.ref)
        return (Media(source.kind, "image/png", source.data, source.ref),)

    def identities(self, uris: Iterable[str]) -> Iterator[tuple[str, str | None]]:
        for uri in uris:
            yield uri, self._identity(uri.removeprefix("file:///"))

    def _identity(self, ref: str) -> str | None:
        if ref.startswith("missing") and ref not in self.content:
            return None
        return hashlib.sha256(self.content.get(ref, ref.encode())).hexdigest()


def refuse(kind: str = "refused") -> Callable[[Any], str]:
    """An answer that is a sample's own error."""

    def answer(about: Any) -> str:
        raise SampleError(kind, f"no answer about {about}", attempts=1)

    return answer
