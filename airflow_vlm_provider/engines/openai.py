"""The engine for OpenAI-compatible endpoints: OpenAI, vLLM, SGLang, LiteLLM and whatever speaks like them."""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from airflow_vlm_provider.engines.abilities import Abilities
from airflow_vlm_provider.engines.chat import ResponsePath, build_body, read_answer
from airflow_vlm_provider.engines.client import (
    check_address,
    check_headers,
    check_positive,
    make_client,
    own_headers,
    transport_errors,
)
from airflow_vlm_provider.engines.failures import Diagnosis, PassingError, UnsupportedError, public_url
from airflow_vlm_provider.engines.health import Health, Turn
from airflow_vlm_provider.engines.limits import Limits, TokenEstimate
from airflow_vlm_provider.engines.pressure import FIRST_SIZE
from airflow_vlm_provider.errors import (
    ConfigError,
    EngineError,
    NoVideoError,
    SampleError,
    TransientError,
)
from airflow_vlm_provider.types import Answer, Request

if TYPE_CHECKING:
    from openai import AsyncOpenAI

log = logging.getLogger(__name__)

# The engine writes these itself; a key or an address belongs in the connection, where it is kept secret.
_NOT_MODEL_PARAMS = {"messages", "stream", "api_key", "base_url", "headers", "default_headers"}
# While nothing can be reached, it is tried again at least this often (seconds), to go on soon after it is back.
_LONGEST_WAIT_FOR_CONNECTION = 10.0


class OpenAIEngine:
    """Asks an OpenAI-compatible endpoint, many requests at a time.

    Either give a ``client``, which stays the caller's to close, or ``base_url``, ``api_key`` and ``headers``.

    :param model: Model that is asked.
    :param client: Ready client; its own retries are not used.
    :param base_url: The endpoint's root, such as ``https://api.openai.com/v1``.
    :param api_key: None for an endpoint that asks for none.
    :param headers: Sent with every request.
    :param name: What messages call the place where address and key are set.
    :param concurrency: Requests in flight at most.
    :param first_window: Requests in flight before anything is known of the endpoint.
    :param requests_per_minute: None is no limit.
    :param tokens_per_minute: Prompt and completion tokens together; None is no limit.
    :param timeout: Seconds per request, from sending to the last byte of the answer.
    :param api_endpoint: Path below the base URL, or a whole URL.
    :param response_path: Where the answers' texts are in a response: see
        :class:`~airflow_vlm_provider.engines.chat.ResponsePath`.
    :param model_params: Merged into every request's body; a request's own sampling comes first.
    :param structured_output: Whether to ask for answers in the request's schema. An endpoint that refuses is
        asked without from then on.
    :param detail: ``detail`` of every image (``low``, ``high``, ``auto``); None leaves it to the endpoint.
    :param max_attempts: Failed attempts after which a request is given up.
    :param outage_timeout: Seconds without any answer after which the endpoint is given up.
    :param before_retry: Awaited before a request that failed is sent again.
    :raises ConfigError: a parameter is out of range, or the address or the key cannot be used.
    """

    def __init__(
        self,
        *,
        model: str,
        client: AsyncOpenAI | None = None,
        base_url: str | None = None,
        api_key: str | None = None,
        headers: Mapping[str, str] | None = None,
        name: str = "openai engine",
        concurrency: int = 32,
        first_window: int = FIRST_SIZE,
        requests_per_minute: float | None = None,
        tokens_per_minute: float | None = None,
        timeout: float = 60.0,
        api_endpoint: str | None = None,
        response_path: str | None = None,
        model_params: Mapping[str, Any] | None = None,
        structured_output: bool = True,
        detail: str | None = None,
        max_attempts: int = 8,
        outage_timeout: float = 120.0,
        before_retry: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        if (client is None) == (base_url is None):
            raise TypeError("Give either client or base_url.")
        check_positive(
            name,
            concurrency=concurrency,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
            timeout=timeout,
            max_attempts=max_attempts,
            outage_timeout=outage_timeout,
        )
        if misplaced := sorted(_NOT_MODEL_PARAMS & set(model_params or {})):
            raise ConfigError(
                f"{name}: model_params cannot hold {', '.join(misplaced)}. Address, key and headers belong in the "
                "connection; messages and streaming are the engine's."
            )
        self.model = model
        self.concurrency = concurrency
        self._given_client = client
        self._base_url = str(client.base_url) if client is not None else str(base_url)
        # A key that was pasted often ends in a line break.
        self._api_key = client.api_key if client is not None else (api_key or "").strip()
        self._headers = dict(headers or {}) if client is None else own_headers(client)
        check_address(name, self._base_url)
        check_headers(name, self._api_key, self._headers)
        self._timeout = timeout
        self._api_endpoint = api_endpoint or "/chat/completions"
        self._path = ResponsePath(response_path)
        self._model_params = dict(model_params or {})
        self._structured_output = structured_output
        self._detail = detail
        self._warned_of_rate_limit = False
        self._url = self._api_endpoint
        if not urlsplit(self._url).scheme:
            self._url = f"{self._base_url.rstrip('/')}/{self._url.lstrip('/')}"
        endpoint = public_url(self._url)
        self._name = name
        secrets = [self._api_key, urlsplit(self._base_url).password or "", *self._headers.values()]
        self._diagnosis = Diagnosis(name=name, endpoint=endpoint, model=model, secrets=secrets)
        self._abilities = Abilities(name=name, endpoint=endpoint, structured=structured_output)
        self._health = Health(
            name=name, endpoint=endpoint, max_attempts=max_attempts, outage_timeout=outage_timeout
        )
        self._limits = Limits(
            concurrency=concurrency,
            first_window=first_window,
            requests_per_minute=requests_per_minute,
            tokens_per_minute=tokens_per_minute,
        )
        self._estimate = TokenEstimate() if tokens_per_minute else None
        self._before_retry = before_retry
        self._backoff = wait_random_exponential(multiplier=1, max=60)
        self._client: AsyncOpenAI | None = None
        self._end: ConfigError | EngineError | None = None

    @property
    def window(self) -> int:
        """See :class:`~airflow_vlm_provider.engines.base.Engine`."""
        return self._limits.window.size

    @property
    def in_flight(self) -> int:
        """See :class:`~airflow_vlm_provider.engines.base.Engine`."""
        return self._limits.pressure.in_flight

    @property
    def pressure(self) -> str | None:
        """See :class:`~airflow_vlm_provider.engines.base.Engine`."""
        return self._limits.sentence()

    def parameters(self) -> Mapping[str, Any]:
        """See :class:`~airflow_vlm_provider.engines.base.Engine`."""
        return {
            "model": self.model,
            "model_params": self._model_params,
            "response_path": self._path.text,
            "structured_output": self._structured_output,
            "detail": self._detail,
        }

    @property
    def takes_video(self) -> bool:
        """See :class:`~airflow_vlm_provider.engines.base.Engine`."""
        return self._abilities.video

    async def __aenter__(self) -> OpenAIEngine:
        for library in ("httpx", "httpx2"):
            # They log a line per request at INFO: hundreds of thousands in the log of one task.
            if logging.getLogger(library).level == logging.NOTSET:
                logging.getLogger(library).setLevel(logging.WARNING)
        self._client = self._given_client or make_client(
            base_url=self._base_url, api_key=self._api_key, timeout=self._timeout, headers=self._headers
        )
        self._limits.watch(self._client, self._url)
        return self

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._give_up(EngineError(f"{self._name}: the engine is closed."))
        client, self._client = self._client, None
        if client is not None and client is not self._given_client:
            await client.close()

    async def ask(self, request: Request) -> Answer:
        """See :class:`~airflow_vlm_provider.engines.base.Engine`."""
        # At once, and not after a wait for a place in the window.
        self._check(request)
        turn = Turn()
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(PassingError),
            stop=lambda state: self._is_spent(_failure(state), turn),
            wait=self._wait,
            sleep=self._limits.sleep,
            reraise=True,
        )
        try:
            return await retrying(self._attempt, request, turn)
        except PassingError as passing:
            failure = passing
        # Raised out here, an exception carries no context: what an HTTP library says may hold secrets.
        if self._end is None and (outage := self._health.given_up(failure)):
            self._give_up(outage)
        self._check(request, turn)
        raise TransientError(
            f"{self._name}: no answer after {turn.sent} attempts; the last failure: {failure}",
            attempts=turn.sent,
        )

    async def _attempt(self, request: Request, turn: Turn) -> Answer:
        refused: set[str] = set()
        if turn.sent and self._before_retry is not None:
            await self._before_retry()
        async with self._limits.window:
            while True:
                await self._limits.permit(self._tokens(request))
                self._check(request, turn)
                body = await build_body(
                    request,
                    model=self.model,
                    model_params=self._model_params,
                    structured=self._abilities.structured,
                    completion_tokens=self._abilities.completion_tokens,
                    detail=self._detail,
                )
                self._health.sending(turn)
                answer = await self._limits.watched(self._send(body, turn))
                if not isinstance(answer, UnsupportedError) or answer.feature in refused:
                    break
                refused.add(answer.feature)
                self._abilities.do_without(answer)
        if isinstance(answer, Exception):
            raise self._judged(answer, turn)
        self._health.succeeded()
        self._abilities.answered(request, answer)
        if self._estimate is not None:
            self._estimate.learn(request, answer.usage)
        return answer

    async def _send(self, body: dict[str, Any], turn: Turn) -> Answer | Exception:
        """Send one HTTP request. A failure is returned, not raised, so that it carries no context."""
        import anyio
        import openai

        if self._client is None:
            raise RuntimeError("Enter the engine first: async with OpenAIEngine(...) as engine.")
        diagnosis = self._diagnosis
        lost: tuple[type[Exception], ...] = (openai.APIConnectionError, OSError, *transport_errors())
        try:
            with anyio.fail_after(self._timeout):
                # cast_to=object returns plain JSON: making models of it costs as much CPU as all else together.
                data: Any = await self._client.post(
                    self._api_endpoint, body=body, cast_to=object, options={"max_retries": 0}
                )
        except openai.APIStatusError as error:
            return diagnosis.of_status(error.status_code, error.response.headers, error.body, body)
        except UnicodeEncodeError as error:
            return SampleError("rejected", f"The prompt holds text that UTF-8 cannot encode: {error.reason}.")
        except json.JSONDecodeError as error:
            return diagnosis.of_content(error.doc, body)
        except UnicodeDecodeError:
            return diagnosis.of_content("bytes that are not UTF-8", body)
        except TimeoutError:
            return PassingError(
                f"{diagnosis.endpoint} gave no answer within {self._timeout:g} s", reason="timeout"
            )
        except lost as error:
            return diagnosis.of_exception(error)
        return self._read(data, body, turn)

    def _read(self, data: Any, sent: Mapping[str, Any], turn: Turn) -> Answer | Exception:
        diagnosis = self._diagnosis
        try:
            if isinstance(data, str):
                # Some gateways call JSON text/plain.
                data = json.loads(data)
            return read_answer(data, path=self._path, model=self.model, requests=turn.sent)
        except PassingError as error:
            return error
        except (LookupError, ValueError, TypeError) as error:
            if self._path.text == ResponsePath.DEFAULT or not isinstance(data, Mapping) or "error" in data:
                return diagnosis.of_content(data, sent)
            return ConfigError(
                f"{self._name}: response_path {self._path.text!r} leads to nothing in the responses of "
                f"{diagnosis.endpoint} ({diagnosis.quote(error)})."
            )

    def _judged(self, error: Exception, turn: Turn) -> Exception:
        """Draw the consequences of a failure for the whole engine; returns what to raise for this request."""
        if isinstance(error, PassingError):
            if error.retry_after is not None:
                self._limits.pause(error.retry_after)
            if error.reason == "rate_limit" and not self._warned_of_rate_limit:
                self._warned_of_rate_limit = True
                log.warning(
                    "%s: %s. Requests are slowed down and asked again; requests_per_minute or a lower "
                    "concurrency avoids this.",
                    self._name,
                    error,
                )
            return error
        if isinstance(error, NoVideoError):
            error.attempts = turn.sent
            error = self._abilities.without_video(error)
        if isinstance(error, UnsupportedError):
            error = ConfigError(
                f"{self._name}: {self._diagnosis.endpoint} does not accept {error.feature} ({error}). Remove it "
                "from model_params."
            )
        elif isinstance(error, SampleError):
            error.attempts = turn.sent
            error = self._health.rejected(error) or error
        if isinstance(error, (ConfigError, EngineError)):
            self._give_up(error)
        return error

    def _tokens(self, request: Request) -> float:
        if self._estimate is None:
            return 0.0
        params = {**self._model_params, **request.sampling}
        return self._estimate.of(request, params.get("max_completion_tokens") or params.get("max_tokens"))

    def _is_spent(self, failure: PassingError, turn: Turn) -> bool:
        return self._health.failed(turn, failure) or self._end is not None

    def _wait(self, state: RetryCallState) -> float:
        failure, seconds = _failure(state), self._backoff(state)
        if failure.retry_after is not None:
            return failure.retry_after + min(seconds, 1.0)
        return min(seconds, _LONGEST_WAIT_FOR_CONNECTION) if failure.reason == "unreachable" else seconds

    def _give_up(self, error: ConfigError | EngineError) -> None:
        """Nothing more is sent: whatever waits fails at once, with the same words."""
        if self._end is None:
            self._end = error
            self._limits.close()

    def _check(self, request: Request, turn: Turn | None = None) -> None:
        """See that there is any use in sending the request."""
        if self._end is not None:
            raise type(self._end)(str(self._end))
        self._abilities.check(request, attempts=turn.sent if turn else 0)


def _failure(state: RetryCallState) -> PassingError:
    assert state.outcome is not None
    failure = state.outcome.exception()
    assert isinstance(failure, PassingError)
    return failure
