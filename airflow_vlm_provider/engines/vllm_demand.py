"""Who needs a vLLM server: what its keeper goes by when it decides whether to stop it."""

from __future__ import annotations

import time

from airflow_vlm_provider.engines.process_table import started_at
from airflow_vlm_provider.engines.vllm_folder import EngineFolder, ServerFolder


class Demand:
    """Follows who needs a server.

    :param folder: The worker's engine folder.
    :param server: The server's folder in it.
    :param gpus: The GPUs that it is for.
    :param idle_timeout: Seconds for which it is kept while nobody uses it.
    """

    def __init__(
        self, folder: EngineFolder, server: ServerFolder, *, gpus: tuple[str, ...], idle_timeout: float
    ) -> None:
        self._folder = folder
        self._server = server
        self._gpus = gpus
        self._idle_timeout = idle_timeout
        self._unused_since = time.monotonic()
        # Worker processes by number and start, and None for whoever has none.
        self._owners: set[tuple[int, float] | None] = set()
        self.dismissed = False
        """Whether it is to end as soon as nobody uses it; somebody who does until then takes that back."""
        self.used = False
        """Whether tasks held leases on it when that was looked at."""
        self.wanted = False
        """Whether another keeper waited for its GPUs then, and may have them when the last lease has ended.

        Not while it is pinned: the tasks that it is pinned for would wait for its end, and it for them.
        """

    def look(self, *, waiting: bool) -> bool:
        """Whether somebody needs it, or may soon. Behind the gate.

        :param waiting: Whether it still waits for GPUs itself.
        """
        holders, pinned = self._server.leases(), bool(self._server.pins())
        self.used = bool(holders)
        self.wanted = not (waiting or pinned) and any(self._folder.is_wanted(gpu) for gpu in self._gpus)
        for holder in holders:
            owner = holder.get("owner")
            self._owners.add(None if owner is None else (owner["pid"], owner["started"]))
        if holders or pinned:
            self._unused_since = time.monotonic()
        if holders:
            self.dismissed = False
            return True
        if self._is_deserted():
            return False
        # Whoever had its keeper started has held a lease since before.
        idle = time.monotonic() - self._unused_since > self._idle_timeout
        return pinned or not (waiting or self.wanted or idle or self.dismissed)

    def _is_deserted(self) -> bool:
        """Whether the workers of all who ever held a lease are gone."""
        return bool(self._owners) and not any(
            owner is None or started_at(owner[0]) == owner[1] for owner in self._owners
        )
