"""Whether a vLLM server still works, and what its last words mean."""

from __future__ import annotations

import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterable

from airflow_vlm_provider.engines.vllm_metrics import read_metrics

# What no further start mends: arguments that vLLM does not know or take, and models that are not there.
_LASTING = re.compile(
    r"error: (argument|unrecognized arguments|the following arguments)"
    r"|No such file or directory|No module named|command not found"
    r"|is not a (local folder|valid model identifier)|Repository Not Found|RepositoryNotFoundError|GatedRepoError"
    r"|LocalEntryNotFoundError|Can't load the configuration"
    r"|ValidationError|ValueError: |not supported for now|NotImplementedError"
)
# Lack of memory is told by a ValueError, too, but another moment may have more of it.
_PASSING = re.compile(
    r"out of memory|Free memory on device|No available memory|larger than the available KV cache",
    re.IGNORECASE,
)


def is_lasting(lines: Iterable[str]) -> bool:
    """Whether a server that ended with these lines would end like this again."""
    text = "\n".join(lines)
    return _LASTING.search(text) is not None and _PASSING.search(text) is None


class Health:
    """Looks after one server.

    :param url: Base URL, without ``/v1``.
    :param stall_timeout: Seconds without progress after which running requests count as stalled.
    """

    def __init__(self, url: str, *, stall_timeout: float) -> None:
        self._url = url
        self._stall_timeout = stall_timeout
        self._progress = -1.0
        self._progressed = time.monotonic()

    def look(self, *, timeout: float) -> bool:
        """Whether the server says that it is well.

        :param timeout: Seconds to wait for its answer.
        """
        if self._get("/health", timeout) is None:
            return False
        metrics = read_metrics(self._get("/metrics", timeout) or "")
        if metrics is None or metrics.progress != self._progress or metrics.running + metrics.waiting == 0:
            self._progress = -1.0 if metrics is None else metrics.progress
            self._progressed = time.monotonic()
        return True

    def stalled(self) -> float | None:
        """For how many seconds running requests have made no progress, if it is too long."""
        seconds = time.monotonic() - self._progressed
        return seconds if seconds > self._stall_timeout else None

    def _get(self, path: str, timeout: float) -> str | None:
        # Neither path asks for the key. The environment's proxies are for other machines.
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(self._url + path, timeout=timeout) as response:
                text: str = response.read().decode(errors="replace")
                return text
        except (urllib.error.URLError, OSError, ValueError):
            return None
