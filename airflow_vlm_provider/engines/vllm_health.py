"""Whether a vLLM server still works.

Its API server answers ``/health`` though an engine process of it hangs. So what counts besides is whether tokens are
computed: when requests run without progress, or nothing was heard of an engine for long while tasks use the server, it is
asked for one token. Of several engines (data parallel) each is asked by its rank, which vLLM takes in a header.

A server that is merely busy must not be taken for one that hangs: an engine that alone gives no answer is only blamed when
the others have answered the same question meanwhile, so that it is not the API server that is slow.
"""

from __future__ import annotations

import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass

from airflow_vlm_provider.engines.vllm_metrics import Metrics, read_engines


@dataclass
class _Engine:
    """What is known of an engine, by the clock.

    :param easy: When it last had nothing to do, or had computed something.
    :param heard: When it last had computed something, or answered, or nobody used it.
    :param asked: Since when it is asked for a token; None while it is not.
    :param answered: When it last answered.
    """

    easy: float
    heard: float
    answered: float
    progress: float = -1.0
    asked: float | None = None


class Health:
    """Looks after one server.

    :param url: Base URL, without ``/v1``.
    :param api_key: What requests are authorized by.
    :param model: Name that it is served by.
    :param stall_timeout: Seconds without progress after which an engine hangs; after half of them, it is asked.
    """

    def __init__(self, url: str, *, api_key: str, model: str, stall_timeout: float) -> None:
        self._url = url
        self._api_key = api_key
        self._model = model
        self._stall_timeout = stall_timeout
        self._engines: dict[str, _Engine] = {}
        self._looked = time.monotonic()

    def look(self, *, timeout: float, used: bool) -> bool:
        """Whether the server says that it is well.

        :param timeout: Seconds to wait for its answer.
        :param used: Whether tasks use it; while none does, nothing is asked of the engines.
        """
        if self._get("/health", timeout) is None:
            return False
        found = read_engines(self._get("/metrics", timeout) or "")
        now = time.monotonic()
        # Without its metrics, a queue could not be told from a stall: who is not among them is not judged.
        # Whoever has not looked for so long, as in a container that was paused, has missed the signs of life, too.
        known = self._engines if now - self._looked <= self._stall_timeout / 2 else {}
        self._looked = now
        self._engines = {name: known.get(name) or _Engine(now, now, now) for name in found}
        for name, metrics in found.items():
            self._note(self._engines[name], metrics, now, used=used)
        if any(now - each.heard > self._stall_timeout / 2 for each in self._engines.values()):
            for name, engine in self._engines.items():
                if engine.asked is None:
                    self._start_asking(name, engine, now)
        return True

    def stalled(self) -> float | None:
        """For how many seconds nothing was computed though it should have been, if it is too long."""
        now = time.monotonic()
        engines = list(self._engines.values())
        hanging = [now - each.easy for each in engines if now - each.easy > self._stall_timeout]
        silent = [each for each in engines if now - each.heard > self._stall_timeout]
        others = [each.answered for each in engines if each not in silent]
        hanging += [
            now - each.heard
            for each in silent
            if not others or (each.asked is not None and max(others) > each.asked)
        ]
        return max(hanging, default=None)

    @staticmethod
    def _note(engine: _Engine, metrics: Metrics, now: float, *, used: bool) -> None:
        moved = metrics.progress != engine.progress
        engine.progress = metrics.progress
        if moved or metrics.running + metrics.waiting == 0:
            engine.easy = now
        if moved or not used:
            engine.heard = now

    def _start_asking(self, name: str, engine: _Engine, now: float) -> None:
        engine.asked = now
        rank = name if len(self._engines) > 1 else None
        try:
            threading.Thread(target=self._ask, args=(engine, rank), daemon=True, name="vlm-question").start()
        except RuntimeError:
            # There is none to be had: who can't be asked is not blamed for its silence.
            engine.asked, engine.heard = None, now

    def _ask(self, engine: _Engine, rank: str | None) -> None:
        """Have one token computed; that it is refused is a sign of life, too."""
        body = {"model": self._model, "prompt": "a", "max_tokens": 1, "temperature": 0}
        if self._get("/v1/completions", self._stall_timeout, body, rank) is not None:
            engine.heard = engine.answered = time.monotonic()
        engine.asked = None

    def _get(self, path: str, timeout: float, body: object = None, rank: str | None = None) -> str | None:
        request = urllib.request.Request(self._url + path)
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
            request.add_header("Authorization", f"Bearer {self._api_key}")
        if rank is not None:
            request.add_header("X-Data-Parallel-Rank", rank)
        # The environment's proxies are for other machines.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=timeout) as response:
                text: str = response.read().decode(errors="replace")
                return text
        except urllib.error.HTTPError as error:
            with error:
                return "" if body is not None else None
        except (OSError, ValueError, http.client.HTTPException):
            return None
