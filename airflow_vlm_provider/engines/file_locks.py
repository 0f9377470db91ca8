"""Locks between processes: files locked by ``flock``, which the kernel unlocks when their holder ends, however.

Such a lock belongs to the open file, not to the process: it can be handed to another one, and the children of a process
have it, too, until they start another program.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def opened(path: Path) -> Iterator[int]:
    """Open a file, made if it is not there; yields its descriptor."""
    file = open_file(path)
    try:
        yield file
    finally:
        os.close(file)


def open_file(path: Path, flags: int = 0) -> int:
    """Open a file, made if it is not there, for this user alone and without programs that are started."""
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | flags, 0o600)


def try_lock(file: int, *, shared: bool = False) -> bool:
    """Lock an open file, unless somebody has; whether it is locked now.

    :param shared: Others who share it may have it, too.
    """
    try:
        fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def try_open_locked(path: Path, *, shared: bool = False) -> int | None:
    """A descriptor of a file that nobody else can lock until it is closed; None when somebody has.

    :param shared: Others who share it may have it, too.
    """
    file = open_file(path)
    if try_lock(file, shared=shared):
        return file
    os.close(file)
    return None


def is_file_of(file: int, path: Path) -> bool:
    """Whether a path still leads to an open file: what was deleted keeps nobody away."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False
