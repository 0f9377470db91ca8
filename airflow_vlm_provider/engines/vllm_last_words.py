"""What a vLLM server said before it ended: what of it is worth quoting, and whether a further start would end alike."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence

QUOTED_LINES = 25
_QUOTED_CHARACTERS = 400
# "(EngineCore pid=1) ERROR 11-20 10:00:00 [core.py:1] ": of whom a line is, and whence.
_PREFIX = re.compile(r"^(\([\w ]+ pid=\d+\) )?([A-Z]+ [\d-]+ [\d:]+ \[[\w.]+:\d+\] )?")
_REMARK = re.compile(r"^(\([\w ]+ pid=\d+\) )?(DEBUG|INFO|WARNING)\b")
_TRACEBACK = re.compile(r"^(Traceback \(most recent|\s+File |\s{4}|\s*[~^]+\s*$|usage: )")
_ERROR = re.compile(r"^([\w.]*(Error|Exception|Interrupt|NotFound)\b.*|[\w. -]+: error: .*)")

# What no further start mends: arguments that vLLM does not know or take, and models that are not there.
_LASTING = re.compile(
    r"error: (argument|unrecognized arguments|the following arguments|ambiguous option)"
    r"|No such file or directory|No module named|command not found|Permission denied|Exec format error"
    r"|is not a (local folder|valid model identifier)|Repo id must be|RepositoryNotFoundError|GatedRepoError"
    r"|RevisionNotFoundError|LocalEntryNotFoundError|Can't load the configuration"
    r"|ValidationError|ValueError: |not supported for now|NotImplementedError"
)
# Lack of memory and of network come under the same names, too, but another moment may have more of them.
_PASSING = re.compile(
    r"out of memory|Free memory on device|No available memory|larger than the available KV cache"
    r"|check your internet connection|Connection (error|refused|reset)|Temporary failure|Max retries exceeded"
    r"|timed out|No space left",
    re.IGNORECASE,
)
# Its package is not there, or the command that was to start it.
_NO_VLLM = re.compile(r"No module named '?vllm(?![\w.])|^\S+: No such file or directory$", re.MULTILINE)


def is_lasting(lines: Sequence[str]) -> bool:
    """Whether a server that ended by itself with these lines would end like this again."""
    text = "\n".join(line for line in lines if not _REMARK.match(line))
    return _LASTING.search(text) is not None and _PASSING.search(text) is None


def quote(lines: Sequence[str]) -> list[str]:
    """The lines that a person wants to see: what went wrong first, and the last ones, without traceback's frames."""
    told = [_PREFIX.sub("", line) for line in lines]
    told = [line for line in told if line.strip() and not _TRACEBACK.match(line)]
    errors = list(dict.fromkeys(line for line in told if _ERROR.match(line)))[:5]
    rest = [line for line in told if line not in errors][len(errors) - QUOTED_LINES :]
    # In the order in which they were said.
    wanted = {*errors, *rest}
    kept = [line for line in dict.fromkeys(told) if line in wanted]
    return [line[:_QUOTED_CHARACTERS] for line in kept]


def remedy(lines: Sequence[str]) -> str | None:
    """What mends it, as a sentence, where that is Airflow's to know and not vLLM's."""
    if _NO_VLLM.search("\n".join(lines)) is None:
        return None
    return (
        "There is no vLLM on this worker. Have the task run on one that has it, by the operator's engine='vllm' and "
        "[vlm] gpu_queue, or by its queue; or name in [vlm] vllm_command where it is"
    )


def said_of_exit(status: int, *, ready: bool) -> str:
    """How a server ended, as a sentence without its stop.

    :param status: As :mod:`subprocess` has it.
    :param ready: Whether it was ready before.
    """
    how = f"ended with status {status}"
    if status < 0:
        names = {int(each): each.name for each in signal.Signals}
        how = f"was ended by {names.get(-status, f'signal {-status}')}"
    hint = " (often the kernel's, for lack of memory)" if status == -signal.SIGKILL else ""
    return f"vLLM {how}{hint}{'' if ready else ' before it was ready'}"
