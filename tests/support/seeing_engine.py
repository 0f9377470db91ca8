"""An engine that says which pictures it was shown: what it answers is right only if everything before it was."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from airflow_vlm_provider.errors import NoVideoError
from airflow_vlm_provider.types import Answer, Choice, Media, Request
from tests.support.captioning import answer
from tests.support.fakes import ScriptedEngine
from tests.support.videos import numbers

Answers = Callable[[str], "str | Choice"]


class SeeingEngine(ScriptedEngine):
    """Answers with the numbers of the pictures in the order in which it is shown them, or what it reads of captions.

    :param answers: From what it sees to what it answers instead; may raise.
    :param model_takes_video: Whether its model does; if not, it says so when it is first sent one.
    :ivar requests: What was sent, also what could not be answered.
    """

    def __init__(
        self,
        answers: Answers = lambda seen: seen,
        *,
        model_takes_video: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        self.answers = answers
        self.takes_video = True
        self.model_takes_video = model_takes_video
        self.requests: list[Request] = []
        self.turned_away = 0

    @property
    def seen(self) -> list[str]:
        """What it was asked about, sorted."""
        return sorted(saw(request) for request in self.requests)

    async def ask(self, request: Request) -> Answer:
        if "video" in kinds(request) and not self.model_takes_video:
            self.takes_video = False
            self.turned_away += 1
            raise NoVideoError("this model takes no videos")
        self.requests.append(request)
        said = [self.answers(saw(request)) for _ in range(request.n)]
        return answer(said)


def kinds(request: Request) -> list[str]:
    """The kinds of the media in a request."""
    return [part.kind for part in request.parts if isinstance(part, Media)]


def saw(request: Request) -> str:
    """What a request shows: the pictures' numbers, or the numbers in captions that are to be summed up."""
    media = [part for part in request.parts if isinstance(part, Media)]
    if media:
        return "saw " + " ".join(map(str, numbers(media)))
    (text,) = request.parts
    assert isinstance(text, str)
    return "in all " + " ".join(re.findall(r"(?<=: saw ).+|(?<=: in all ).+", text))
