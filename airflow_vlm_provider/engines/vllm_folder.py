"""The folder through which tasks, keepers and commands on one worker find its vLLM servers.

::

    <folder>/<key>/spec.json      what the server is started with
    <folder>/<key>/state.json     how far it is; with its address and API key, so for this user alone
    <folder>/<key>/server.log     what it prints (server.log.1: what it printed before)
    <folder>/<key>/keeper.lock    locked by the server's keeper for as long as that lives
    <folder>/<key>/keeper.log     what that says
    <folder>/<key>/gate.lock      locked for moments, by whoever decides something
    <folder>/<key>/suspect.lock   locked by a task that asks what may be killing the server
    <folder>/<key>/asking.lock    shared by the tasks that have asked anything else
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
import shutil
import signal
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from airflow_vlm_provider.engines.file_locks import is_file_of, open_file, opened, try_lock, try_open_locked
from airflow_vlm_provider.engines.process_table import started_at
from airflow_vlm_provider.engines.vllm_state import VERSION, ServerState
from airflow_vlm_provider.errors import ConfigError

# Nobody misses the log of a server that was not started for so long.
KEPT_SECONDS = 14 * 24 * 3600.0


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

        :raises ConfigError: it is another user's, or others may write to it.
        """
        self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = self.path.stat()
        # Somebody else could hand out servers of his own.
        if found.st_uid != os.geteuid():
            raise ConfigError(
                f"{self.path} belongs to another user; set [vlm] engine_dir to a folder of the worker's own."
            )
        if found.st_mode & 0o022:
            raise ConfigError(f"{self.path} can be written to by others; take that right away (chmod 700).")
        folder = ServerFolder(self.path / key)
        folder.make()
        return folder

    def tidy(self) -> None:
        """Remove the folders of servers that have not run for :data:`KEPT_SECONDS`."""
        for server in self.servers():
            with contextlib.suppress(OSError):
                if time.time() - server.path.stat().st_mtime > KEPT_SECONDS:
                    server.remove()

    @contextlib.contextmanager
    def wanting(self, gpu: str) -> Iterator[None]:
        """Tell the keeper that has a GPU that another one waits for it."""
        with opened(self._gpu(gpu, "wanted")) as file:
            fcntl.flock(file, fcntl.LOCK_SH)
            yield

    def is_wanted(self, gpu: str) -> bool:
        """Whether a keeper waits for a GPU."""
        with opened(self._gpu(gpu, "wanted")) as file:
            return not try_lock(file)

    def claim(self, gpu: str) -> int | None:
        """Take a GPU; returns a descriptor to be kept open for as long as it is needed, None when another has it."""
        return try_open_locked(self._gpu(gpu, "lock"))

    def is_claim(self, gpu: str, file: int) -> bool:
        """Whether what :meth:`claim` returned still keeps others away: its file may have been deleted."""
        return is_file_of(file, self._gpu(gpu, "lock"))

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

    def make(self) -> None:
        """Make the folder if it is not there."""
        for folder in (self.path, self.path / "leases", self.path / "pins"):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    def remove(self) -> None:
        """Remove the folder, unless somebody uses the server."""
        with self.gate():
            if self.has_keeper() or self.leases() or self.pins():
                return
            # Whoever waits at the gate finds it gone, and makes a new one.
            away = self.path.with_name(f"removed-{uuid.uuid4().hex}")
            self.path.rename(away)
        shutil.rmtree(away, ignore_errors=True)

    def touch(self) -> None:
        """Have everything look new to whoever deletes old files in folders for temporary ones."""
        for path in (self.path.parent, self.path, *self.path.rglob("*"), *self.path.parent.glob("gpus/*")):
            with contextlib.suppress(OSError):
                os.utime(path)

    @contextlib.contextmanager
    def gate(self) -> Iterator[None]:
        """Nobody else decides anything about this server meanwhile."""
        file = self._pass_gate()
        try:
            yield
        finally:
            os.close(file)

    def has_keeper(self) -> bool:
        """Whether a keeper lives. Behind the gate."""
        with opened(self.path / "keeper.lock") as file:
            return not try_lock(file)

    def keeper_lock(self) -> int:
        """Take the lock of the keeper that is about to be started. Behind the gate.

        :raises BlockingIOError: there is one.
        """
        file = try_open_locked(self.path / "keeper.lock")
        if file is None:
            raise BlockingIOError(f"{self.path} has a keeper.")
        return file

    def is_keeper_lock(self, file: int) -> bool:
        """Whether what :meth:`keeper_lock` returned still keeps others away: its file may have been deleted."""
        return is_file_of(file, self.path / "keeper.lock")

    def try_suspect(self) -> int | None:
        """Take the lock of those who ask what may be killing the server; None when somebody has it.

        :return: A descriptor, which holds it until it is closed.
        """
        return try_open_locked(self.path / "suspect.lock")

    def has_suspect(self) -> bool:
        """Whether somebody has that lock."""
        with opened(self.path / "suspect.lock") as file:
            return not try_lock(file, shared=True)

    def try_asking(self, *, shared: bool) -> int | None:
        """Take the lock of those who ask anything else; None when it can't be had.

        :param shared: With them, or else from them all.
        :return: A descriptor, which holds it until it is closed.
        """
        return try_open_locked(self.path / "asking.lock", shared=shared)

    def signal_keeper(self, number: signal.Signals) -> bool:
        """Send the keeper a signal; whether there is one. Behind the gate."""
        state = self.read_state()
        if state is None or state.keeper_pid is None or not self.has_keeper():
            return False
        with contextlib.suppress(ProcessLookupError):
            os.kill(state.keeper_pid, number)
        return True

    def take_lease(self, holder: Mapping[str, Any]) -> tuple[Path, int]:
        """Take a lease, which holds until the descriptor is closed or its process has ended. Behind the gate.

        :param holder: Who takes it, for :meth:`leases`.
        """
        path = self.path / "leases" / uuid.uuid4().hex
        file = open_file(path, os.O_EXCL)
        fcntl.flock(file, fcntl.LOCK_EX)
        # On a full disk it says nothing, and holds all the same.
        with contextlib.suppress(OSError):
            os.write(file, json.dumps(dict(holder)).encode())
        return path, file

    def leases(self) -> list[dict[str, Any]]:
        """Who holds leases; what is left of others is removed. Behind the gate."""
        holders = []
        for path in (self.path / "leases").glob("*"):
            with opened(path) as file:
                if try_lock(file):
                    path.unlink(missing_ok=True)
                    continue
                holder = _parsed(os.pread(file, 65536, 0))
            # A task's children have what it had open; they may live on without it.
            if "pid" not in holder or started_at(holder["pid"]) == holder["started"]:
                holders.append(holder)
        return holders

    def pin(self, name: str, *, until: float) -> None:
        """Have the server kept, though no task uses it. Behind the gate.

        :param name: For what: :meth:`unpin` takes the same.
        :param until: Until when at most, in seconds since the epoch.
        """
        self._write(self._pin(name), {"name": name, "until": until})

    def unpin(self, name: str) -> bool:
        """Take a pin back; whether there was one that has not ended. Behind the gate."""
        found = name in self.pins()
        (self.path / self._pin(name)).unlink(missing_ok=True)
        return found

    def pins(self) -> list[str]:
        """What the server is kept for; what has ended is removed. Behind the gate."""
        names = []
        for path in (self.path / "pins").glob("*"):
            pin = _parsed(path.read_bytes())
            if pin.get("until", 0) > time.time():
                names.append(str(pin["name"]))
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
            data = _parsed((self.path / "state.json").read_bytes())
            return ServerState(**data) if data.pop("version", None) == VERSION else None
        except (FileNotFoundError, TypeError):
            return None

    def state_mark(self) -> tuple[int, int] | None:
        """Changes when anybody touches the state."""
        try:
            found = (self.path / "state.json").stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns

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

    def _pass_gate(self) -> int:
        path = self.path / "gate.lock"
        while True:
            try:
                file = open_file(path)
            except FileNotFoundError:
                self.make()
                continue
            fcntl.flock(file, fcntl.LOCK_EX)
            if is_file_of(file, path):
                return file
            # It was removed with its folder, and is nobody's gate any more.
            os.close(file)

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


def _parsed(text: bytes) -> dict[str, Any]:
    """An object in JSON; empty when it is none, as after a full disk."""
    with contextlib.suppress(ValueError):
        data = json.loads(text)
        if isinstance(data, dict):
            return data
    return {}
