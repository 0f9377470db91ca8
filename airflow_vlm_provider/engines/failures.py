"""What an endpoint's failures mean: whose fault each is, told from status, headers, code and wording."""

from __future__ import annotations

import email.utils
import re
import ssl
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal
from urllib.parse import urlsplit

from airflow_vlm_provider.engines import wordings
from airflow_vlm_provider.errors import ConfigError, EngineError, NoVideoError, SampleError

_QUOTED = 500
"""Characters of an endpoint's own words that a message repeats."""

_TRANSIENT = {408, 409, 425, 429}
_SAMPLE = {400, 413, 422}
# By these, too, it is said that a model takes no videos: nobody is there who does, no such media type, and the errors
# of servers that did not expect the question.
_NO_SUCH_INPUT = _SAMPLE | {404, 415, 500, 501}
_READ = 10_000
"""Characters of them that are read: some endpoints repeat the whole request, media and all."""

_SMALLER = "A lower max_pixels makes media smaller, and a lower max_frames takes fewer frames of a video."
_LONGEST_WAIT = 600.0
"""Seconds of ``Retry-After`` that are waited out; beyond, a task's retry is the better place to wait."""

# A transport reports a connection that could not be made by its own class, and which one lies under the client
# (httpx, httpx2, aiohttp) is not this module's business: hence names.
_AIOHTTP_UNCONNECTED = {"ClientConnectorError", "ConnectionTimeoutError"}
_HTTPX_UNCONNECTED = {"ConnectError", "ConnectTimeout"}


class PassingError(Exception):
    """A failure that may not happen again: worth another attempt.

    :param reason: ``unreachable`` (no connection was made), ``rate_limit``, ``timeout``, or ``other``.
    :param retry_after: Seconds that the endpoint asked to wait; None when it did not say.
    """

    def __init__(
        self,
        message: str,
        *,
        reason: Literal["unreachable", "rate_limit", "timeout", "other"] = "other",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after = retry_after


class UnsupportedError(Exception):
    """The endpoint refuses something that the request can do without, or say in another way."""

    def __init__(self, feature: Literal["response_format", "max_tokens"], message: str) -> None:
        super().__init__(message)
        self.feature = feature


class Diagnosis:
    """Turns what came back from one endpoint into the exception to raise.

    :param name: What messages call the engine's connection.
    :param endpoint: URL that is asked, without credentials.
    :param model: The model that is asked.
    :param secrets: Texts that no message may hold.
    """

    def __init__(self, *, name: str, endpoint: str, model: str, secrets: Iterable[str] = ()) -> None:
        self.name = name
        self.endpoint = endpoint
        self.model = model
        # Longest first: a secret may be part of another one.
        self._secrets = sorted({secret for secret in secrets if len(secret) > 3}, key=len, reverse=True)

    def quote(self, text: object) -> str:
        """The endpoint's words, fit for a message: one line, not too long, without secrets."""
        quoted = str(text)
        for secret in self._secrets:
            quoted = quoted.replace(secret, "***")
        quoted = " ".join(quoted.split())
        return quoted if len(quoted) <= _QUOTED else f"{quoted[:_QUOTED]}..."

    def of_status(
        self, status: int, headers: Mapping[str, str], body: object, sent: Mapping[str, Any]
    ) -> Exception:
        """Judge an HTTP error.

        :param body: The response's JSON or text.
        :param sent: The request's body.
        """
        message, code, param = _fields(body)
        message = message[:_READ]
        words = f"{code} {message}"
        quoted = self.quote(message)
        if status == 429 and wordings.NO_CREDIT.search(words):
            return ConfigError(
                f"{self.name}: the account behind the API key has no credit left ({quoted}). Check its plan and "
                "billing, or set another key as the connection's password."
            )
        if status in _NO_SUCH_INPUT and "video_url" in _media(sent) and wordings.says_no_video(words):
            return NoVideoError(quoted)
        if status in _TRANSIENT or status >= 500:
            return self._passing(status, headers, quoted)
        if status in (401, 403):
            return ConfigError(
                f"{self.name}: {self.endpoint} denies access (status {status}: {quoted}). Set the connection's "
                "password to an API key that may use this model."
            )
        if status == 404 or (status in _SAMPLE and wordings.NO_MODEL.search(words)):
            return self._not_found(words, quoted)
        if status in _SAMPLE:
            return self._of_request(status, words, param, quoted, sent)
        return ConfigError(f"{self.name}: {self.endpoint} refuses requests (status {status}: {quoted}).")

    def of_exception(self, error: BaseException) -> Exception:
        """Judge a request that ended without a response: no connection, a reset, a timeout."""
        chain = list(_chain(error))
        detail = self.quote(f"{type(chain[-1]).__name__}: {chain[-1]}".rstrip(": "))
        if any(isinstance(link, ssl.SSLCertVerificationError) for link in chain):
            return ConfigError(
                f"{self.name}: the certificate of {self.endpoint} cannot be verified ({detail}). Install its "
                "authority's certificate on the worker and name it in SSL_CERT_FILE."
            )
        if _is_unconnected(chain):
            return PassingError(f"{self.endpoint} cannot be reached ({detail})", reason="unreachable")
        return PassingError(f"the connection to {self.endpoint} broke ({detail})")

    def of_content(self, content: object, sent: Mapping[str, Any]) -> Exception:
        """Judge a 200 that holds no answer: cut short, a proxy's page, an error in disguise.

        :param sent: The request's body.
        """
        if isinstance(content, Mapping) and content.get("error"):
            error = content["error"]
            code = error.get("code") if isinstance(error, Mapping) else None
            status = code if isinstance(code, int) and 400 <= code < 600 else 500
            return self.of_status(status, {}, error, sent)
        return PassingError(
            f"{self.endpoint} answered with something that is no answer: {self.quote(content)!r}"
        )

    def _passing(self, status: int, headers: Mapping[str, str], quoted: str) -> Exception:
        wait = retry_after(headers)
        if wait is not None and wait > _LONGEST_WAIT:
            return EngineError(
                f"{self.name}: {self.endpoint} asks to come back in {wait:.0f} s (status {status}: {quoted}), and "
                f"a task waits {_LONGEST_WAIT:.0f} s at most. Set the task's retry_delay to longer than that."
            )
        return PassingError(
            f"{self.endpoint} answered with status {status}: {quoted}",
            reason="rate_limit" if status == 429 else "other",
            retry_after=wait,
        )

    def _not_found(self, words: str, quoted: str) -> ConfigError:
        if wordings.NO_MODEL.search(words):
            return ConfigError(
                f"{self.name}: {self.endpoint} has no model {self.model!r} ({quoted}). Set 'model' to one of those "
                "that GET /v1/models lists."
            )
        return ConfigError(
            f"{self.name}: there is nothing at {self.endpoint} ({quoted}). Check the connection's host and port, "
            "and the path: the base URL of most endpoints ends in /v1."
        )

    def _of_request(
        self, status: int, words: str, param: str, quoted: str, sent: Mapping[str, Any]
    ) -> Exception:
        if "max_completion_tokens" in words and "max_tokens" in sent and not wordings.TOO_LONG.search(words):
            return UnsupportedError("max_tokens", quoted)
        if "response_format" in sent and (
            wordings.SCHEMA.search(words) or param.startswith("response_format")
        ):
            return UnsupportedError("response_format", quoted)
        rejected = SampleError("rejected", f"{self.endpoint} rejects the request (status {status}): {quoted}")
        if wordings.TOO_LONG.search(words) or wordings.TOO_MANY.search(words) or status == 413:
            remedy = f" {_SMALLER}" if _media(sent) else ""
            return SampleError("rejected", f"{rejected.message.rstrip('.')}.{remedy}")
        if wordings.NO_VISION.search(words):
            return ConfigError(
                f"{self.name}: the model {self.model!r} does not take such media ({quoted}). Set 'model' to a "
                "vision-language model."
            )
        if wordings.REFUSED.search(words):
            return SampleError("refused", f"{self.endpoint} refuses the content (status {status}): {quoted}")
        if wordings.BAD_MEDIA.search(words):
            return rejected
        named = _named_parameter(words, param, sent)
        if named or (wordings.BAD_PARAMETER.search(words) and "messages" not in f"{param} {words}"):
            subject = f"the parameter {named!r}" if named else "a parameter"
            return ConfigError(
                f"{self.name}: {self.endpoint} does not accept {subject} ({quoted}). Remove or change it where "
                "it is set: the operator's sampling parameters or model_params."
            )
        return rejected


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, from ``retry-after-ms`` or ``Retry-After`` in seconds or as a date."""
    try:
        if milliseconds := headers.get("retry-after-ms"):
            return max(0.0, float(milliseconds) / 1000)
        value = headers.get("retry-after")
        if value is None:
            return None
        if value.replace(".", "", 1).isdecimal():
            return float(value)
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except (ValueError, TypeError):
        return None


def public_url(url: str) -> str:
    """The URL without user, password and query, which may hold secrets."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def _fields(body: object) -> tuple[str, str, str]:
    """Message, code with type, and parameter of an error, in any of the shapes that endpoints use."""
    if isinstance(body, Mapping):
        inner = body.get("error", body)
        if not isinstance(inner, Mapping):
            return str(inner), "", ""
        message = inner.get("message") or inner.get("detail") or inner
        kinds = f"{inner.get('code') or ''} {inner.get('type') or ''}"
        return str(message), kinds, str(inner.get("param") or "")
    return str(body or "no message"), "", ""


def _media(sent: Mapping[str, Any]) -> set[str]:
    """The types of the media that a body holds: ``image_url``, ``video_url``."""
    contents = [message["content"] for message in sent.get("messages", ())]
    return {part["type"] for content in contents if isinstance(content, list) for part in content} - {"text"}


def _named_parameter(words: str, param: str, sent: Mapping[str, Any]) -> str | None:
    """The parameter that a refusal is about; None when it is about the messages or does not say."""
    top = re.split(r"[.\[]", param)[0]
    if top:
        return top if top != "messages" else None
    for name in sent:
        # Short names are words, too ("stop", "n"): they have to stand in quotes.
        plain = rf"|\b{name}\b" if "_" in name or len(name) > 5 else ""
        if name not in ("messages", "model") and re.search(rf"['\"`]{name}['\"`]{plain}", words):
            return name
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    seen: set[int] = set()
    while link is not None and id(link) not in seen:
        seen.add(id(link))
        yield link
        link = link.__cause__ or link.__context__


def _is_unconnected(chain: Iterable[BaseException]) -> bool:
    kinds = [kind for link in chain for kind in type(link).__mro__]
    # What aiohttp says counts when it is there: its adapter reports every lost connection as ConnectTimeout.
    if any(kind.__module__.startswith("aiohttp") for kind in kinds):
        return any(kind.__name__ in _AIOHTTP_UNCONNECTED for kind in kinds)
    return any(kind.__name__ in _HTTPX_UNCONNECTED for kind in kinds)
