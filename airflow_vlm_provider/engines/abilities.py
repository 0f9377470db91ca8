"""What an endpoint can do, as far as is known: each refusal is learnt from once, for all requests."""

from __future__ import annotations

import logging

from airflow_vlm_provider.engines.failures import UnsupportedError
from airflow_vlm_provider.errors import NoVideoError, SampleError
from airflow_vlm_provider.types import Answer, Media, Request

log = logging.getLogger(__name__)


class Abilities:
    """Starts from the belief that the endpoint can do everything.

    :param name: What messages call the engine's connection.
    :param endpoint: URL that is asked, without credentials.
    :param structured: Whether to ask for answers in a JSON schema at all.
    """

    structured: bool
    """Whether answers are asked for in the request's schema."""

    completion_tokens: bool
    """Whether ``max_tokens`` goes by its newer name, ``max_completion_tokens``."""

    video: bool
    """Whether a video may be sent as such."""

    def __init__(self, *, name: str, endpoint: str, structured: bool) -> None:
        self.structured = structured
        self.completion_tokens = False
        self.video = True
        self._name = name
        self._endpoint = endpoint
        self._has_seen_video = False
        self._warned_of_candidates = False

    def check(self, request: Request, *, attempts: int) -> None:
        """See that a request can be sent as it is.

        :param attempts: How often it was sent before.
        :raises NoVideoError: it holds a video, and the model takes none.
        """
        if not self.video and _holds_video(request):
            raise NoVideoError(
                f"{self._name}: the model behind {self._endpoint} takes no videos.", attempts=attempts
            )

    def do_without(self, refusal: UnsupportedError) -> None:
        """Do without what was refused, or say it in another way, from now on."""
        if refusal.feature == "max_tokens":
            self.completion_tokens = True
        elif self.structured:
            self.structured = False
            self._warn(
                "%s: %s does not constrain answers to a JSON schema (%s); from here on they are free text.",
                refusal,
            )

    def without_video(self, refusal: NoVideoError) -> NoVideoError | SampleError:
        """Do without videos from now on; returns what to raise for the request that was refused."""
        if self._has_seen_video:
            # A model that has spoken of a video takes videos: there is something about this one.
            return SampleError("rejected", f"{self._endpoint} rejects the video: {refusal}")
        if self.video:
            self.video = False
            self._warn("%s: %s takes no videos (%s).", refusal)
        return refusal

    def answered(self, request: Request, answer: Answer) -> None:
        """Learn from an answer."""
        self._has_seen_video = self._has_seen_video or _holds_video(request)
        if len(answer.choices) < request.n and not self._warned_of_candidates:
            self._warned_of_candidates = True
            log.warning(
                "%s: asked for %d candidates, %s gave %d; it may not know the parameter 'n'.",
                self._name,
                request.n,
                self._endpoint,
                len(answer.choices),
            )

    def _warn(self, sentence: str, refusal: Exception) -> None:
        log.warning(sentence, self._name, self._endpoint, refusal)


def _holds_video(request: Request) -> bool:
    return any(isinstance(part, Media) and part.kind == "video" for part in request.parts)
