"""How patient the keeper of a vLLM server is."""

from __future__ import annotations

from dataclasses import dataclass

# One that was never ready is not loaded over and over; one that was may have bad luck now and then.
FIRST_STARTS = 2


@dataclass(frozen=True)
class KeeperSettings:
    """How patient a keeper is; all in seconds.

    :param idle_timeout: Without a lease for so long, the server is stopped.
    :param start_timeout: So long may the model take to load.
    :param health_interval: Between two looks at its health.
    :param health_timeout: Without a sign of health for so long, the server hangs.
    :param stall_timeout: With requests running, but not a token of progress for so long, its engine hangs.
    :param backoff: Before the first restart; twice as long before each further one, at most a minute.
    """

    idle_timeout: float = 600.0
    start_timeout: float = 1800.0
    health_interval: float = 5.0
    health_timeout: float = 60.0
    stall_timeout: float = 180.0
    backoff: float = 1.0
