"""How far a vLLM server is, as its keeper writes it down for tasks and people."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

VERSION = 1
Phase = Literal["waiting", "starting", "ready", "restarting", "draining", "stopping", "stopped", "failed"]
"""``waiting`` for a GPU; ``draining``: it takes no new tasks, because another server waits for its GPU."""


@dataclass(frozen=True)
class ServerState:
    """How far a server is, as its keeper wrote it.

    :param keeper: Tells one keeper's states from the next one's.
    :param phase: See :data:`Phase`.
    :param since: When it came into that phase, in seconds since the epoch.
    :param keeper_pid: Process of the keeper; None until it runs.
    :param server_pid: Process of the server, which leads a session of its own; None while there is none.
    :param server_output: The pipe that the server's processes print to, by which they are known.
    :param url: Base URL, without ``/v1``.
    :param api_key: What requests are authorized by; only while there is something to authorize.
    :param loads: How often the model was loaded by this keeper.
    :param ready_at: When it was ready last; None before.
    :param error: Why it failed, for a person; None unless it did.
    :param lasting: Whether it would fail in the same way again.
    """

    keeper: str
    phase: Phase
    since: float
    keeper_pid: int | None = None
    server_pid: int | None = None
    server_output: str | None = None
    url: str | None = None
    api_key: str | None = field(default=None, repr=False)
    loads: int = 0
    ready_at: float | None = None
    error: str | None = None
    lasting: bool = False
