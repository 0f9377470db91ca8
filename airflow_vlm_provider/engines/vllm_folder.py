"""The folder through which tasks, keepers and commands on one worker find its vLLM servers.

::

    <folder>/<key>/spec.json      what the server is started with
    <folder>/<key>/state.json     how far it is; with its address and API key, so for this user alone
    <folder>/<key>/server.log     what it prints (server.log.1: what it printed before)
    <folder>/<key>/keeper.lock    locked by the server's keeper for as long as that lives
    <folder>/<key>/gate.lock      locked for moments, by whoever decides something
    <folder>/<key>/leases/<uuid>  one for each task that uses the server, locked by it
    <folder>/<key>/pins/<hash>    one for each DAG run that wants the server kept between its tasks
    <folder>/gpus/<gpu>.lock      locked by the keeper whose server runs on that GPU
    <folder>/gpus/<gpu>.wanted    locked by keepers that wait for it

Invariants:

- What counts is who holds a lock, never what a file says: the kernel releases a lock when its holder dies, however.
- Whether there is a keeper, and who holds leases, is only looked at and changed behind the gate. So no lease is given
  on a server whose keeper has decided to stop it, and no two keepers are started for one key.
- A pin is no lock: it outlives the task that left it. It has an end, and means nothing once all workers are gone.
- Locks are ``flock``'s, which belong to an open file: a keeper is born with the one that its task took for it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

VERSION = 1
Phase = Literal["waiting", "starting", "ready", "restarting", "draining", "stopping", "failed"]
"""``waiting`` for a GPU; ``draining``: it takes no new tasks, because another server waits for its GPU."""


@dataclass(frozen=True)
class ServerState:
    """How far a server is, as its keeper wrote it.

    :param keeper: Tells one keeper's states from the next one's.
    :param phase: See :data:`Phase`.
    :param since: When it came into that phase, in seconds since the epoch.
    :param keeper_pid: Process of the keeper; None until it runs.
    :param server_pid: Process of the server, which leads a session of its own; None while there is none.
    :param server_started: When that process was started, as the kernel has it, to know it from another of its number.
    :param url: Base URL, without ``/v1``.
    :param api_key: What requests are authorized by.
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
    server_started: float | None = None
    url: str | None = None
    api_key: str | None = None
    loads: int = 0
    ready_at: float | None = None
    error: str | None = None
    lasting: bool = False


class EngineFolder:
    """The servers of one worker.

    :param path: The folder; made when it is first needed, for this user alone.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)

    def servers(self) -> list[ServerFolder]:
        """All servers that ever were here."""
        if not self.path.is_dir():
            return []
        return [ServerFolder(each) for each in sorted(self.path.iterdir()) if (each / "spec.json").is_file()]

    def server(self, key: str) -> ServerFolder:
        """The folder of one server, made if it is not there.

        :raises PermissionError: it is another user's.
        """
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if self.path.stat().st_uid != os.geteuid():
            # Somebody who made it beforehand could hand out servers of his own.
            raise PermissionError(
                f"{self.path} belongs to another user; set [vlm] engine_dir to a folder of your own."
            )
        folder = self.path / key
        for name in ("leases", "pins"):
            (folder / name).mkdir(mode=0o700, parents=True, exist_ok=True)
        return ServerFolder(folder)

    @contextlib.contextmanager
    def wanting(self, gpu: str) -> Iterator[None]:
        """Tell the keeper that has a GPU that another one waits for it."""
        with _opened(self._gpu(gpu, "wanted")) as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            yield

    def is_wanted(self, gpu: str) -> bool:
        """Whether a keeper waits for a GPU."""
        with _opened(self._gpu(gpu, "wanted")) as file:
            return not _try_lock(file)

    def claim(self, gpu: str) -> int | None:
        """Take a GPU; returns a descriptor to be kept open for as long as it is needed, None when another has it."""
        file = os.open(self._gpu(gpu, "lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if _try_lock(file):
            return file
        os.close(file)
        return None

    def _gpu(self, gpu: str, suffix: str) -> Path:
        (self.path / "gpus").mkdir(mode=0o700, parents=True, exist_ok=True)
        return self.path / "gpus" / f"{gpu.replace('/', '_')}.{suffix}"


class ServerFolder:
    """One server's folder.

    :param path: The folder, which is there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.key = path.name
        self.log = path / "server.log"

    @contextlib.contextmanager
    def gate(self) -> Iterator[None]:
        """Nobody else decides anything about this server meanwhile."""
        with _opened(self.path / "gate.lock") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def has_keeper(self) -> bool:
        """Whether a keeper lives. Behind the gate."""
        with _opened(self.path / "keeper.lock") as file:
            return not _try_lock(file)

    def keeper_lock(self) -> int:
        """Take the lock of the keeper that is about to be started. Behind the gate.

        :raises BlockingIOError: there is one.
        """
        file = os.open(self.path / "keeper.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not _try_lock(file):
            os.close(file)
            raise BlockingIOError(f"{self.path} has a keeper.")
        return file

    def take_lease(self, holder: Mapping[str, Any]) -> tuple[Path, int]:
        """Take a lease, which holds until the descriptor is closed or its process has ended. Behind the gate.

        :param holder: Who takes it, for :meth:`leases`.
        """
        path = self.path / "leases" / uuid.uuid4().hex
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        fcntl.flock(file, fcntl.LOCK_EX)
        os.write(file, json.dumps(dict(holder)).encode())
        return path, file

    def leases(self) -> list[dict[str, Any]]:
        """Who holds leases; what is left of others is removed. Behind the gate."""
        holders: list[dict[str, Any]] = []
        for path in (self.path / "leases").iterdir():
            with _opened(path) as file:
                if _try_lock(file):
                    path.unlink(missing_ok=True)
                    continue
                with contextlib.suppress(ValueError):
                    holders.append(json.loads(os.pread(file, 65536, 0)))
        return holders

    def pin(self, name: str, *, until: float) -> None:
        """Have the server kept, though no task uses it. Behind the gate.

        :param name: For what: :meth:`unpin` takes the same.
        :param until: Until when at most, in seconds since the epoch.
        """
        self._write(self._pin(name), {"name": name, "until": until})

    def unpin(self, name: str) -> bool:
        """Take a pin back; whether there was one. Behind the gate."""
        path = self.path / self._pin(name)
        found = path.exists()
        path.unlink(missing_ok=True)
        return found

    def pins(self) -> list[str]:
        """What the server is kept for; what has ended is removed. Behind the gate."""
        names = []
        for path in (self.path / "pins").glob("*"):
            pin = json.loads(path.read_bytes())
            if pin["until"] > time.time():
                names.append(pin["name"])
            else:
                path.unlink(missing_ok=True)
        return names

    def write_spec(self, spec: Mapping[str, Any]) -> None:
        """Note what the server is started with."""
        self._write("spec.json", dict(spec))

    def read_spec(self) -> dict[str, Any]:
        """What the server is started with."""
        spec: dict[str, Any] = json.loads((self.path / "spec.json").read_bytes())
        return spec

    def write_state(self, state: ServerState) -> None:
        """Note how far the server is."""
        self._write("state.json", {"version": VERSION, **asdict(state)})

    def read_state(self) -> ServerState | None:
        """How far the server is, or was when its last keeper ended; None when nothing is known."""
        try:
            data = json.loads((self.path / "state.json").read_bytes())
        except FileNotFoundError:
            return None
        if data.pop("version") != VERSION:
            return None
        return ServerState(**data)

    def log_tail(self, *, max_bytes: int = 4000) -> str:
        """The end of what the server has printed, in whole lines."""
        try:
            with self.log.open("rb") as file:
                size = file.seek(0, os.SEEK_END)
                file.seek(max(0, size - max_bytes))
                tail = file.read()
        except FileNotFoundError:
            return ""
        if size > max_bytes:
            tail = tail[tail.find(b"\n") + 1 :]
        return tail.decode(errors="replace")

    @staticmethod
    def _pin(name: str) -> str:
        return f"pins/{hashlib.sha256(name.encode()).hexdigest()[:16]}"

    def _write(self, name: str, data: Mapping[str, Any]) -> None:
        # Whoever reads sees the whole old one or the whole new one.
        file, path = tempfile.mkstemp(prefix="new-", dir=self.path)
        try:
            with os.fdopen(file, "w") as stream:
                json.dump(data, stream)
            Path(path).replace(self.path / name)
        except BaseException:
            Path(path).unlink(missing_ok=True)
            raise


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[int]:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        yield file
    finally:
        os.close(file)


def _try_lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
