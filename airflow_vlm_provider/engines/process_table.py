"""Processes as the kernel knows them: told apart for good, found by what they belong to, ended for certain.

The number of a process says little by itself, as it is another one's some day. And what belongs to a vLLM server can't
be known by its environment: its engine processes write their titles over it. What they all keep is their session and
the pipe that they print to.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

KILL_SECONDS = 30.0


def started_at(pid: int) -> float | None:
    """When a process was started, to tell it from another of its number; None when there is none that runs.

    On Linux in the kernel's own count, which goes on evenly when somebody sets the clock.
    """
    try:
        # The name before it, in parentheses, may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None if Path("/proc/self").exists() else _created(pid)
    return None if fields[0] in ("Z", "X") else float(fields[19])


def members(*, session: int | None, output: str | None) -> set[int]:
    """The processes that belong to a server, and run.

    :param session: Number of its first process, which leads a session of its own; only while that is known to be its.
    :param output: The pipe that it prints to, as :func:`pipe_name` has it.
    """
    import psutil

    found = set()
    for pid in psutil.pids():
        with contextlib.suppress(OSError):
            if os.getsid(pid) == session or (output and output in _outputs(pid)):
                found.add(pid)
    return {pid for pid in found if started_at(pid) is not None}


def left_members(leader: int, output: str | None) -> set[int]:
    """The same of a server that was started by somebody else, some time ago: its number may be another one's."""
    found = members(session=None, output=output)
    with contextlib.suppress(OSError):
        if any(os.getsid(pid) == leader for pid in found):
            return members(session=leader, output=output)
    return found


def kill_all(find: Callable[[], set[int]], *, timeout: float = KILL_SECONDS) -> set[int]:
    """Kill processes until there are none, as they may make others meanwhile, and what they held is free.

    :param find: Finds them.
    :return: Those that still run after ``timeout`` seconds: the kernel itself waits for something there.
    """
    deadline = time.monotonic() + timeout
    while (found := find()) and time.monotonic() < deadline:
        for pid in found:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return found


def pipe_name(file: int) -> str:
    """What an open pipe is called wherever it is open."""
    return f"pipe:[{os.fstat(file).st_ino}]"


def _outputs(pid: int) -> list[str]:
    names = []
    for number in (1, 2):
        with contextlib.suppress(OSError):
            names.append(str(Path(f"/proc/{pid}/fd/{number}").readlink()))
    return names


def _created(pid: int) -> float | None:
    import psutil

    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.Error:
        return None
