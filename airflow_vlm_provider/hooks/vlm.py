"""The connection to a vision-language model."""

from __future__ import annotations

import importlib.util
from functools import cached_property
from typing import TYPE_CHECKING, Any

from airflow.sdk import BaseHook
from airflow.sdk.log import mask_secret

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.hooks.settings import VLMSettings, parse_settings

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI

_NO_KEY = "not-needed"
_TEST_TIMEOUT = 15.0
_MODELS_SHOWN = 10
_NO_MODEL = "The connection names no model, so each operator's own is asked."


class VLMHook(BaseHook):
    """
    A vision-language model behind an Airflow connection of type ``vlm``.

    :param vlm_conn_id: The connection's id.
    """

    conn_name_attr = "vlm_conn_id"
    default_conn_name = "vlm_default"
    conn_type = "vlm"
    hook_name = "Vision-language model"

    def __init__(self, vlm_conn_id: str = default_conn_name, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.vlm_conn_id = vlm_conn_id

    @property
    def settings(self) -> VLMSettings:
        """What the connection says, without its secrets.

        :raises ConfigError: a value is not usable; the sentence names connection, field, value and remedy.
        """
        return self._parsed[0]

    @property
    def base_url(self) -> str:
        """Where the endpoint answers, with its path and without a slash at its end: ``https://host:port/v1``.

        :raises ConfigError: the connection has no host.
        """
        if self.settings.base_url is None:
            raise ConfigError(
                f"Connection {self.vlm_conn_id!r} has no host, so there is no endpoint to ask. Set host to "
                "the base URL, such as https://api.openai.com/v1 or http://gpu-1:8000/v1, or choose the "
                "engine vllm or transformers, which need none."
            )
        return self.settings.base_url

    def get_conn(self) -> OpenAI:
        """A client of the endpoint. It does not retry: whoever uses it decides what is worth another try.

        :raises ConfigError: the connection has no host, or one of its values is not usable.
        """
        from openai import OpenAI

        return OpenAI(**self.client_options())

    def get_async_conn(self) -> AsyncOpenAI:
        """An asynchronous client of the endpoint, without retries too.

        :raises ConfigError: the connection has no host, or one of its values is not usable.
        """
        from openai import AsyncOpenAI

        return AsyncOpenAI(**self.client_options())

    def test_connection(self) -> tuple[bool, str]:
        """Ask the endpoint which models it serves; for an engine on the worker, check what can be checked.

        :return: Whether all is well, and a sentence for the person who pressed the button.
        """
        try:
            return self._test_endpoint() if self.settings.engine == "openai" else self._test_local_engine()
        except ConfigError as error:
            return False, str(error)

    def _test_endpoint(self) -> tuple[bool, str]:
        import openai

        prefix, url, model = f"Connection {self.vlm_conn_id!r}", self.base_url, self.settings.model
        timeout = min(self.settings.timeout, _TEST_TIMEOUT)
        try:
            with self.get_conn().with_options(timeout=timeout) as client:
                served = sorted(each.id for each in client.models.list())
        except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
            return False, (
                f"{prefix}: {url} refuses the API key (HTTP {error.status_code}). Check the password field, "
                "or the extra field 'headers' if the key is sent in a header of its own."
            )
        except openai.APITimeoutError:
            return False, (
                f"{prefix}: {url} did not answer within {timeout:g} s. Check host and port, and whether a "
                "firewall lets this machine through."
            )
        except openai.APIConnectionError as error:
            return False, (
                f"{prefix}: {url} cannot be reached ({error.__cause__ or error}). Check host, port and "
                "schema, and that the server runs."
            )
        except openai.APIStatusError as error:
            return False, (
                f"{prefix}: {url}/models answered HTTP {error.status_code}. Check the base URL: that of most "
                "servers ends in /v1."
            )
        except (openai.OpenAIError, AttributeError, TypeError, ValueError):
            # The client hands an answer of another form on as it is, and stumbles over it later.
            served = []
        if not served:
            return False, (
                f"{prefix}: {url}/models did not answer with a list of models. Check the base URL: that of "
                "most servers ends in /v1."
            )
        if model is None:
            return True, f"{prefix}: {url} serves {_some(served)}. {_NO_MODEL}"
        if model not in served:
            return False, (
                f"{prefix}: {url} does not serve the model {model!r} but {_some(served)}. Correct the extra "
                "field 'model'."
            )
        return True, f"{prefix}: {url} serves {model!r}."

    def _test_local_engine(self) -> tuple[bool, str]:
        engine, model = self.settings.engine, self.settings.model
        will_load = f"It will load {model!r}" if model else f"{_NO_MODEL} It will be loaded"
        if importlib.util.find_spec(engine) is not None:
            package = f"The package {engine} is installed where this test ran."
        else:
            package = (
                f"The package {engine} is not installed where this test ran; workers need "
                f"'airflow-provider-vlm[{engine}]'"
            )
            if engine == "vllm":
                package += ", or [vlm] vllm_command to name a vLLM of another environment"
            package += "."
        return True, (
            f"Connection {self.vlm_conn_id!r}: its fields are valid. The engine {engine} runs on the worker, "
            f"so there is no endpoint to ask. {will_load} there, where this test does not look. {package}"
        )

    def client_options(self) -> dict[str, Any]:
        """What a client of the endpoint is made with, by the names that openai's clients use; holds the secrets.

        :raises ConfigError: the connection has no host, or one of its values is not usable.
        """
        _, api_key, headers = self._parsed
        return {
            # The client insists on a key, also for servers that ask for none.
            "api_key": api_key or _NO_KEY,
            "base_url": self.base_url,
            "timeout": self.settings.timeout,
            "max_retries": 0,
            "default_headers": headers,
        }

    @cached_property
    def _parsed(self) -> tuple[VLMSettings, str | None, dict[str, str]]:
        """The settings, the API key and the headers."""
        connection = self.get_connection(self.vlm_conn_id)
        api_key = (connection.password or "").strip() or None
        if api_key:
            # Airflow has masked the password, but not without the line end that a pasted one often has.
            mask_secret(api_key)
        settings, headers = parse_settings(
            self.vlm_conn_id,
            host=connection.host,
            port=connection.port,
            schema=connection.schema,
            extra=connection.extra,
        )
        # Airflow itself masks extra values by their key's name only, and a header can have any name.
        for value in headers.values():
            mask_secret(value)
            scheme, _, credentials = value.partition(" ")
            if scheme.lower() in ("basic", "bearer"):
                mask_secret(credentials.strip())
        return settings, api_key, headers


def _some(models: list[str]) -> str:
    shown = ", ".join(repr(model) for model in models[:_MODELS_SHOWN])
    more = len(models) - _MODELS_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown
