"""Captioning steps driven by hand, and an engine that answers with candidates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from airflow_vlm_provider.types import Answer, Choice, Media, Probe, Request, Result, Sample, Usage
from tests.support.fakes import ScriptedEngine

Says = Callable[[Request], "str | Choice | Answer | Sequence[str | Choice]"]

IMAGE, VIDEO, AUDIO, EOC = "<__dj__image>", "<__dj__video>", "<__dj__audio>", "<|__dj__eoc|>"
REFUSAL = "I'm sorry, but I can't assist with that request."
LOOP = "A cat and a dog and a cat " + "and a dog and a cat " * 10


def answer(said: Any, *, key: str = "") -> Answer:
    """An answer of one choice or several, each a text or a choice."""
    if isinstance(said, Answer):
        return said
    choices = [said] if isinstance(said, str | Choice) else said
    return Answer(
        tuple(each if isinstance(each, Choice) else Choice(each) for each in choices),
        "m",
        Usage(requests=1, prompt_tokens=10, completion_tokens=2),
        key=key,
    )


def sample(row: Any) -> Sample:
    return Sample(index=0, line=1, row=row)


def drive(step: Any, row: Any, says: Says) -> tuple[list[list[Request | Probe]], Result]:
    """Run a step on a row: the rounds of requests that it asked, and what came of it."""
    run = step.process(sample(row))
    asked: list[list[Request | Probe]] = []
    answers = None
    try:
        while True:
            asked.append(list(run.send(answers)))
            answers = [answer(says(request)) for request in asked[-1]]
    except StopIteration as end:
        return asked, end.value


def texts(result: Result, key: str = "text") -> list[str]:
    return [row[key] for row in result.rows]


class CandidateEngine(ScriptedEngine):
    """Answers each request with as many candidates as it asks for.

    :param says: From the first part of a request (text, or a medium's bytes) and the candidate's number to its text;
        may raise.
    """

    def __init__(self, says: Callable[[Any, int], str | Choice] | None = None, **options: Any) -> None:
        super().__init__(**options)
        self.says = says or (lambda about, number: f"{about.decode()} {number}")
        self.requests: list[Request] = []

    async def ask(self, request: Request) -> Answer:
        first = request.parts[0]
        about = first.data if isinstance(first, Media) else first
        self.asked.append(about)
        self.requests.append(request)
        return answer([self.says(about, number) for number in range(request.n)])
