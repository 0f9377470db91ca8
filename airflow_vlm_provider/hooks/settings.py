"""What a connection of type ``vlm`` says, checked and typed, without its secrets."""

from __future__ import annotations

import difflib
import json
import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

from airflow_vlm_provider.errors import ConfigError

log = logging.getLogger(__name__)

EngineName = Literal["openai", "vllm", "transformers"]
ENGINES: tuple[EngineName, ...] = ("openai", "vllm", "transformers")
FIELDS = (
    "engine",
    "model",
    "max_concurrency",
    "requests_per_minute",
    "tokens_per_minute",
    "timeout",
    "headers",
    "prompt_price_per_million",
    "completion_price_per_million",
    "engine_args",
)
DEFAULT_TIMEOUT = 300.0
"""Seconds. Long, because a request that is given up too early is paid for and then sent again."""

_HEADER_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")


@dataclass(frozen=True, slots=True)
class VLMSettings:
    """The fields of a ``vlm`` connection that are no secrets.

    :param conn_id: The connection's id.
    :param engine: ``openai``, ``vllm`` or ``transformers``.
    :param model: Default model; None leaves it to the operator.
    :param base_url: Where an OpenAI-compatible endpoint answers; None when the connection has no host.
    :param max_concurrency: Requests in flight; None leaves it to the engine.
    :param requests_per_minute: Limit for one task; None for none.
    :param tokens_per_minute: Limit for one task, prompt and completion together; None for none.
    :param timeout: Seconds that one request may take.
    :param prices: US dollars per million prompt and completion tokens; None when unknown.
    :param engine_args: Arguments for vLLM's server or for loading a transformers model, by their own names.
    """

    conn_id: str
    engine: EngineName = "openai"
    model: str | None = None
    base_url: str | None = None
    max_concurrency: int | None = None
    requests_per_minute: float | None = None
    tokens_per_minute: float | None = None
    timeout: float = DEFAULT_TIMEOUT
    prices: tuple[float, float] | None = None
    engine_args: Mapping[str, Any] = field(default_factory=dict)


def parse_settings(
    conn_id: str,
    *,
    host: str | None = None,
    port: int | None = None,
    schema: str | None = None,
    extra: str | None = None,
) -> tuple[VLMSettings, dict[str, str]]:
    """Check the fields of a connection and give them their types.

    Values of extra fields may be strings, as they are in a connection that is written as a URI.

    :return: The settings, and the HTTP headers, which may be secrets.
    :raises ConfigError: a value is not usable; the sentence names connection, field, value and remedy.
    """
    fields = _Fields(conn_id, _load_extra(conn_id, extra))
    engine = fields.text("engine") or "openai"
    if engine not in ENGINES:
        raise fields.error("engine", "is not known", f"Use one of {', '.join(ENGINES)}.")
    settings = VLMSettings(
        conn_id=conn_id,
        engine=engine,
        model=fields.text("model"),
        base_url=_base_url(conn_id, host, port, schema),
        max_concurrency=fields.count("max_concurrency"),
        requests_per_minute=fields.number("requests_per_minute", above_zero=True),
        tokens_per_minute=fields.number("tokens_per_minute", above_zero=True),
        timeout=fields.number("timeout", above_zero=True) or DEFAULT_TIMEOUT,
        prices=fields.prices(),
        engine_args=fields.mapping("engine_args"),
    )
    return settings, fields.headers()


def _load_extra(conn_id: str, extra: str | None) -> dict[str, Any]:
    try:
        loaded = json.loads(extra) if extra and extra.strip() else {}
    except ValueError:
        # Not shown, and not chained: the text may hold headers with keys.
        raise ConfigError(
            f"Connection {conn_id!r}: extra is not valid JSON. Make it an object, such as "
            '{"model": "Qwen/Qwen2.5-VL-7B-Instruct"}.'
        ) from None
    if not isinstance(loaded, dict):
        raise ConfigError(
            f"Connection {conn_id!r}: extra is a JSON {type(loaded).__name__}. Make it an object, such as "
            '{"model": "Qwen/Qwen2.5-VL-7B-Instruct"}.'
        )
    for name in loaded:
        if name not in FIELDS:
            close = difflib.get_close_matches(name, FIELDS, n=1)
            hint = f"did you mean {close[0]!r}?" if close else f"known are {', '.join(FIELDS)}."
            log.warning("Connection %r: extra field %r is not used; %s", conn_id, name, hint)
    return loaded


def _base_url(conn_id: str, host: str | None, port: int | None, schema: str | None) -> str | None:
    host, schema = (host or "").strip(), (schema or "").strip()
    if not host:
        return None
    if "://" not in host:
        if schema.lower() not in ("", "http", "https"):
            raise ConfigError(
                f"Connection {conn_id!r}: schema={schema!r} is not a scheme for requests. Use http or https, "
                "or put the whole base URL into host."
            )
        return f"{schema.lower() or 'https'}://{host}{f':{port}' if port else ''}/v1"
    parts = urlsplit(host)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ConfigError(
            f"Connection {conn_id!r}: host is not an HTTP base URL. Write it like https://api.openai.com/v1."
        )
    if parts.username or parts.password:
        raise ConfigError(
            f"Connection {conn_id!r}: host holds a user name or password, and host is shown in clear. Put "
            "the key into the password field, or an Authorization header into the extra field 'headers'."
        )
    # Airflow takes `vlm://http://gpu-1:8000/v1` apart: port and path arrive beside a host that is a URL.
    if port and parts.port != port:
        if parts.port:
            raise ConfigError(
                f"Connection {conn_id!r}: port={port} contradicts host={host!r}. Leave the port field empty."
            )
        parts = parts._replace(netloc=f"{parts.netloc}:{port}")
    if schema.lower() not in ("", "http", "https") and parts.path in ("", "/"):
        parts = parts._replace(path=f"/{schema}")
    return parts.geturl()


class _Fields:
    """The extra fields of one connection, and the sentences about what is wrong with them."""

    def __init__(self, conn_id: str, values: Mapping[str, Any]) -> None:
        self.conn_id = conn_id
        # The form sends null for a field that was left empty, and some secrets backends an empty string.
        self.values = {name: value for name, value in values.items() if value is not None and value != ""}

    def error(self, name: str, what: str, remedy: str) -> ConfigError:
        return ConfigError(
            f"Connection {self.conn_id!r}: extra field {name}={self.values.get(name)!r} {what}. {remedy}"
        )

    def text(self, name: str) -> str | None:
        value = self.values.get(name)
        if value is not None and not isinstance(value, str):
            raise self.error(name, "is not a string", "Put it in quotes.")
        return (value or "").strip() or None

    def number(self, name: str, *, above_zero: bool) -> float | None:
        value = self.values.get(name)
        if value is None:
            return None
        bound = "above 0" if above_zero else "of at least 0"
        try:
            number = math.nan if isinstance(value, bool) else float(value)
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number) or number < 0 or (above_zero and number == 0):
            raise self.error(name, f"is not a number {bound}", "Write it without a unit, or leave it out.")
        return number

    def count(self, name: str) -> int | None:
        number = self.number(name, above_zero=True)
        if number is not None and not number.is_integer():
            raise self.error(name, "is not a whole number", "Use 1 or more, or leave it out.")
        return None if number is None else int(number)

    def prices(self) -> tuple[float, float] | None:
        names = ("prompt_price_per_million", "completion_price_per_million")
        prompt, completion = (self.number(name, above_zero=False) for name in names)
        if prompt is None and completion is None:
            return None
        if prompt is None or completion is None:
            given, missing = names if completion is None else names[::-1]
            raise self.error(
                given, f"is given without {missing}", "Give both (0 for what is free), or neither."
            )
        return prompt, completion

    def mapping(self, name: str) -> dict[str, Any]:
        value = self.values.get(name, {})
        if isinstance(value, str):
            try:
                value = json.loads(value)
            except ValueError:
                value = None
        if not isinstance(value, dict):
            # Its value may be a secret: it is not shown.
            raise ConfigError(
                f"Connection {self.conn_id!r}: extra field {name} is not a JSON object. "
                f'Write it as {{"name": "value"}}.'
            )
        return value

    def headers(self) -> dict[str, str]:
        headers = {}
        for name, value in self.mapping("headers").items():
            where = f"Connection {self.conn_id!r}: extra field headers: the value of {name!r}"
            if not _HEADER_NAME.fullmatch(name):
                raise ConfigError(
                    f"Connection {self.conn_id!r}: extra field headers: {name!r} is not the name of an HTTP "
                    "header. Use letters, digits and hyphens."
                )
            if not isinstance(value, str):
                raise ConfigError(f"{where} is not a string. Put it in quotes.")
            if not value.isascii() or not value.isprintable():
                raise ConfigError(
                    f"{where} holds characters that HTTP does not allow, such as a line end. Remove them."
                )
            # One spelling, whatever the connection's, because the client sends an Authorization of its own
            # and would otherwise send both.
            headers["Authorization" if name.lower() == "authorization" else name] = value.strip()
        return headers
