"""How ``gpu.py`` runs a part of itself: to its end, or to the reason why it can't be run here."""

from __future__ import annotations

import os
import signal
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

TIMEOUT = 3600.0


class NotRunError(Exception):
    """A comparison can't be made here; the message says why."""


def run(command: list[str], log: Path, *, environment: Mapping[str, str] | None = None) -> None:
    """Run a part of the benchmark to its end, in a process group of its own, of which nothing is left.

    :raises NotRunError: it failed; the message ends with the last lines of its log.
    """
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", **(environment or {})}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environ, cwd=log.parent, start_new_session=True
        )
        try:
            status: int | None = process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if status != 0:
        lines = log.read_text(errors="replace").splitlines()[-15:]
        raise NotRunError(
            f"{Path(command[1]).name} {'hangs' if status is None else f'ended with {status}'}\n"
            + "\n".join(lines)
        )
