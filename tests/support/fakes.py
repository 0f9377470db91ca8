"""An engine and a step without a model, for tests of what lies around them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import Any

from airflow_vlm_provider.errors import SampleError
from airflow_vlm_provider.steps.base import StepRun
from airflow_vlm_provider.types import Answer, Choice, Media, MediaRef, Request, Result, Sample, Usage


class CaptionStep:
    """Asks for one caption a row, about its image or else its text; a row that has one is skipped."""

    name = "caption"

    def __init__(self, prompt: str = "Describe.") -> None:
        self.prompt = prompt

    def parameters(self) -> Mapping[str, Any]:
        return {"prompt": self.prompt}

    def process(self, sample: Sample) -> StepRun:
        row = sample.row
        assert row is not None
        if "caption" in row:
            return Result(skipped=True)
        if row.get("break") == "step":
            raise KeyError("a defect of the step")
        about = [MediaRef("image", ref) for ref in row.get("images", [])] or [row["text"]]
        answers = yield [Request(system=None, parts=(each, self.prompt)) for each in about]
        return Result(rows=({**row, "caption": " ".join(answer.choices[0].text for answer in answers)},))


class ScriptedEngine:
    """Answers at once, or after a while, what a function says; counts what it is asked.

    :param answer: From the first part of a request (text, or an image's bytes) to the answer's text; may raise.
    :param delay: From the same to seconds of waiting.
    """

    model = "scripted"

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


def refuse(kind: str = "refused") -> Callable[[Any], str]:
    """An answer that is a sample's own error."""

    def answer(about: Any) -> str:
        raise SampleError(kind, f"no answer about {about}", attempts=1)

    return answer
