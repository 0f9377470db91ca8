"""Whether a vLLM server still works.

Its API server answers ``/health`` though its engine process hangs. So what counts besides is whether tokens are
computed: when requests run without progress, or nothing was heard of the engine for long while tasks use it, it is
asked for one token.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request

from airflow_vlm_provider.engines.vllm_metrics import Metrics, read_engines


class Health:
    """Looks after one server.

    :param url: Base URL, without ``/v1``.
    :param api_key: What requests are authorized by.
    :param model: Name that it is served by.
    :param stall_timeout: Seconds without progress after which its engine hangs; after half of them, it is asked.
    """

    def __init__(self, url: str, *, api_key: str, model: str, stall_timeout: float) -> None:
        self._url = url
        self._api_key = api_key
        self._model = model
        self._stall_timeout = stall_timeout
        # By engine: what it had computed when it was seen last, and when it moved.
        self._engines: dict[str, tuple[float, float]] = {}
        self._heard = time.monotonic()
        self._question: threading.Thread | None = None

    def look(self, *, timeout: float, used: bool) -> bool:
        """Whether the server says that it is well.

        :param timeout: Seconds to wait for its answer.
        :param used: Whether tasks use it; while none does, nothing is asked of the engine.
        """
        if self._get("/health", timeout) is None:
            return False
        engines = read_engines(self._get("/metrics", timeout) or "")
        now = time.monotonic()
        moved = [self._has_moved(name, engine, now) for name, engine in engines.items()]
        # Without its metrics, a queue could not be told from a stall.
        if any(moved) or not used or not engines:
            self._heard = now
        elif now - self._heard > self._stall_timeout / 2 and self._question is None:
            self._question = threading.Thread(target=self._ask, daemon=True)
            self._question.start()
        return True

    def stalled(self) -> float | None:
        """For how many seconds nothing was computed though it should have been, if it is too long."""
        now = time.monotonic()
        seconds = max(now - since for since in (self._heard, *(since for _, since in self._engines.values())))
        return seconds if seconds > self._stall_timeout else None

    def _has_moved(self, name: str, engine: Metrics, now: float) -> bool:
        progress, since = self._engines.get(name, (-1.0, now))
        moved = engine.progress != progress
        idle = engine.running + engine.waiting == 0
        self._engines[name] = (engine.progress, now if moved or idle else since)
        return moved

    def _ask(self) -> None:
        """Have one token computed; that it is refused is a sign of life, too."""
        body = {"model": self._model, "prompt": "a", "max_tokens": 1, "temperature": 0}
        if self._get("/v1/completions", self._stall_timeout, body) is not None:
            self._heard = time.monotonic()
        self._question = None

    def _get(self, path: str, timeout: float, body: object = None) -> str | None:
        request = urllib.request.Request(self._url + path)
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
            request.add_header("Authorization", f"Bearer {self._api_key}")
        # The environment's proxies are for other machines.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=timeout) as response:
                text: str = response.read().decode(errors="replace")
                return text
        except urllib.error.HTTPError as error:
            with error:
                return "" if body is not None else None
        except (OSError, ValueError):
            return None
