"""A task's claim on a vLLM server of its worker: taken from a warm one, or by starting it.

A lease holds until it is released or its process has ended, however. While there is one, the server is kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from airflow_vlm_provider.engines.process_table import started_at
from airflow_vlm_provider.engines.vllm_folder import EngineFolder, ServerFolder
from airflow_vlm_provider.engines.vllm_settings import FIRST_STARTS, KeeperSettings
from airflow_vlm_provider.engines.vllm_spec import ServerSpec, without_secrets
from airflow_vlm_provider.engines.vllm_state import ServerState
from airflow_vlm_provider.errors import ConfigError, EngineError, VLMError

POLL = 0.05
# A keeper is there in a tenth of a second; a busy machine takes longer.
KEEPER_TIMEOUT = 60.0
# Keepers that came to nothing without saying why, one after another.
MAX_LOST = 3
# "airflow worker -- LocalExecutor: ...", "[celeryd: celery@host:MainProcess] -active- (...)", "python /.../airflow ..."
_AIRFLOW = re.compile(r"(^|[\s/\[])(airflow|celery)")
# Whose arguments, or titles ("sshd: airflow@pts/0"), name a user or a session. What they have started is below them.
_SESSIONS = frozenset({"sshd", "sshd-session", "login", "su", "sudo", "runuser", "screen", "tmux"})
KEEPER_LOG_BYTES = 1024 * 1024


@dataclass(frozen=True)
class Attached:
    """What a lease is on.

    :param keeper: Tells the keeper from a later one.
    :param url: Base URL, without ``/v1``.
    :param api_key: What requests are authorized by.
    :param loads: How often the keeper has loaded the model.
    :param tasks: How many had a lease on it then, this one included.
    """

    keeper: str
    url: str
    api_key: str = field(repr=False)
    loads: int
    tasks: int = field(compare=False)


class Lease:
    """A claim on the server of a spec. For one thread at a time.

    :param folder: The worker's engine folder.
    :param spec: What the server is started with, where there is none.
    :param settings: How its keeper is to be, where it is started.
    :param holder: Who claims it, for people: DAG, task, ...
    :param say: Takes what is worth a line of the task's log.
    :raises ConfigError: the engine folder is another user's, or others may write to it.
    :raises EngineError: it can't be used, as on a full disk.
    """

    def __init__(
        self,
        folder: EngineFolder,
        spec: ServerSpec,
        *,
        settings: KeeperSettings,
        holder: Mapping[str, Any],
        say: Callable[[str], None],
    ) -> None:
        self._folder = folder
        self.spec = spec
        """What it is started with."""
        self._settings = settings
        self._holder = {
            **holder,
            "pid": os.getpid(),
            "started": started_at(os.getpid()),
            "owner": worker_process(),
        }
        self._say = say
        self._said = ""
        self._lease: tuple[Path, int] | None = None
        # Whose server it is on, while it is held.
        self._keeper: str | None = None
        try:
            self.server: ServerFolder = folder.server(spec.key)
            """The server's folder."""
        except OSError as error:
            raise _unusable(folder.path, error) from error

    def attach(self, *, stopped: Callable[[], bool] = lambda: False) -> Attached | None:
        """Wait for the server, having it started if need be. Blocks for as long as the model takes to load.

        :param stopped: Whether it is not worth waiting any more; then, None is returned.
        :raises ConfigError: the server can't be started like this.
        :raises EngineError: it can't be started now.
        """
        lost = 0
        try:
            while not stopped():
                claimed = self._claim()
                if claimed is None:
                    self._tell("Waiting for the vLLM server to end, which takes no more tasks.")
                    time.sleep(POLL)
                    continue
                keeper, lock = claimed
                if lock is not None:
                    self._start_keeper(keeper, lock)
                attached = self._wait(keeper, stopped)
                if attached is not None or stopped():
                    return attached
                state = self.server.read_state()
                if state is not None and state.keeper == keeper and state.phase in ("stopping", "stopped"):
                    continue
                lost += 1
                if lost >= MAX_LOST:
                    raise EngineError(
                        f"The keeper of the vLLM server ended {lost} times without a word; see "
                        f"{self.server.path / 'keeper.log'}."
                    )
        except OSError as error:
            self.release()
            raise _unusable(self.server.path, error) from error
        except BaseException:
            self.release()
            raise
        return None

    def is_current(self, attached: Attached) -> bool:
        """Whether the server is still the one that was attached to, and runs. Blocks for a moment."""
        state = self.server.read_state()
        if state is None or (state.keeper, state.loads) != (attached.keeper, attached.loads):
            return False
        return state.phase in ("ready", "draining") and not self._has_ended()

    def _tasks(self) -> int:
        with self.server.gate():
            return len(self.server.leases())

    def _has_ended(self) -> bool:
        """Whether the server has no keeper any more, whatever that has written."""
        with self.server.gate():
            return not self.server.has_keeper()

    def pin(self, name: str, *, until: float) -> None:
        """Have the server kept, though no task uses it; see :meth:`ServerFolder.pin`. While the lease is held."""
        with self.server.gate():
            self.server.pin(name, until=until)

    def unpin(self, name: str) -> bool | None:
        """Take a pin back, and have the server stopped if nobody needs it; whether it is. None when there was no such pin."""
        with self.server.gate():
            if not self.server.unpin(name):
                return None
            if self.server.leases() or self.server.pins():
                return False
            return self.server.signal_keeper(signal.SIGUSR1)

    def release(self) -> None:
        """Give the claim back; nothing happens when there is none."""
        lease, self._lease, self._keeper = self._lease, None, None
        if lease is not None:
            path, file = lease
            path.unlink(missing_ok=True)
            os.close(file)

    def _claim(self) -> tuple[str, int | None] | None:
        """Take a lease on the server of a keeper.

        :return: The keeper's name, and its lock where it is this task's to start; None when it gives no lease.
        :raises ConfigError, EngineError: the one that this lease is on has failed.
        """
        with self.server.gate():
            state = self.server.read_state()
            if state is not None and state.keeper == self._keeper and state.phase == "failed":
                # Another one would begin with as many restarts as this one had, again and again.
                raise self._failure(state)
            if not self.server.has_keeper():
                keeper = uuid.uuid4().hex[:12]
                self._take(keeper)
                self._announce(keeper)
                return keeper, self.server.keeper_lock()
            # Who has a lease already is among those whom the server waits for.
            ended = ("stopping", "stopped", "failed", *(() if self._lease else ("draining",)))
            if state is None or state.phase in ended:
                self.release()
                return None
            self._take(state.keeper)
            return state.keeper, None

    def _take(self, keeper: str) -> None:
        if self._lease is None:
            self._lease = self.server.take_lease(self._holder)
        self._keeper = keeper

    def _failure(self, state: ServerState) -> VLMError:
        return (ConfigError if state.lasting else EngineError)(f"{self.spec.model}: {state.error}")

    def _wait(self, keeper: str, stopped: Callable[[], bool]) -> Attached | None:
        """Wait until this keeper's server is ready; None when the keeper has ended without a word."""
        looked = changed = time.monotonic()
        seen: ServerState | None = None
        ended = False
        while not stopped():
            state = self.server.read_state()
            if state is not None:
                if state.keeper != keeper or state.phase in ("stopping", "stopped"):
                    return None
                if state.phase in ("ready", "draining"):
                    return Attached(keeper, str(state.url), str(state.api_key), state.loads, self._tasks())
                if state.phase == "failed":
                    raise self._failure(state)
                self._tell(_progress(state, self.spec))
            if ended:
                return None
            time.sleep(POLL)
            now = time.monotonic()
            if state != seen or (state is not None and state.phase == "waiting"):
                seen, changed = state, now
            elif now - changed > FIRST_STARTS * self._settings.start_timeout + KEEPER_TIMEOUT:
                raise EngineError(
                    f"Nothing was heard of the vLLM server's keeper for {now - changed:.0f} s: it can't write to "
                    f"{self.server.path}, or does not run; see keeper.log there."
                )
            if now - looked > 1:
                looked = now
                # Once more after that: what it wrote last may say why.
                ended = self._has_ended()
        return None

    def _tell(self, what: str) -> None:
        if what != self._said:
            self._said = what
            self._say(what)

    def _announce(self, keeper: str) -> None:
        """Write down that there will be a keeper. Behind the gate."""
        self.server.write_spec(self.spec.to_json())
        # What is left of an earlier keeper's server is this one's to end.
        earlier = self.server.read_state() or ServerState(keeper, "waiting", 0)
        state = ServerState(
            keeper,
            "waiting",
            time.time(),
            server_pid=earlier.server_pid,
            server_output=earlier.server_output,
        )
        self.server.write_state(state)

    def _start_keeper(self, keeper: str, lock: int) -> None:
        """Start a keeper, which is born with its lock."""
        command = [sys.executable, "-m", "airflow_vlm_provider.engines.vllm_keeper"]
        command += ["--folder", str(self._folder.path.absolute()), "--key", self.server.key]
        command += ["--name", keeper, "--lock", str(lock), "--settings", json.dumps(asdict(self._settings))]
        path = self.server.path / "keeper.log"
        try:
            if path.exists() and path.stat().st_size > KEEPER_LOG_BYTES:
                path.replace(path.with_name("keeper.log.1"))
            with path.open("ab") as log:
                # The first process ends at once; the keeper is its child, and nobody's here.
                subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=without_secrets(),
                    # Where this process is may go away, or hold modules that are not meant.
                    cwd="/",
                    pass_fds=(lock,),
                    start_new_session=True,
                    check=True,
                    timeout=KEEPER_TIMEOUT,
                )
        except subprocess.SubprocessError as error:
            how = "in time" if isinstance(error, subprocess.TimeoutExpired) else f"({error})"
            raise EngineError(f"The keeper of the vLLM server did not start {how}; see {path}.") from error
        finally:
            os.close(lock)


def _unusable(path: Path, error: OSError) -> EngineError:
    return EngineError(f"The engine folder {path} can't be used: {error.strerror}.")


def worker_process() -> dict[str, Any] | None:
    """The worker that this process belongs to: the topmost of Airflow's processes above it, by number and start time.

    None when there is none, as in a script: then a server is only stopped for having been idle.
    """
    import psutil

    found = None
    for process in psutil.Process().parents():
        with contextlib.suppress(psutil.Error):
            started = started_at(process.pid)
            if process.pid > 1 and started is not None and is_airflow(process.cmdline()):
                found = {"pid": process.pid, "started": started}
    return found


def is_airflow(command: Sequence[str]) -> bool:
    """Whether a command line is one of Airflow's processes, those too that put a sentence in its place.

    Who is taken for a worker and is none only has the server kept for its idle time; not to know one would end the server
    with each task.
    """
    title = " ".join(command[:4])
    program = re.split(r"[:\s]", title, maxsplit=1)[0].rpartition("/")[2].lower()
    return program not in _SESSIONS and _AIRFLOW.search(title) is not None


def _progress(state: ServerState, spec: ServerSpec) -> str:
    if state.phase == "waiting" and time.time() - state.since > 1:
        return (
            f"Waiting for {', '.join(spec.gpus)}, on which another model's server runs: for its tasks to end, or for the "
            "DAG run that keeps it. `airflow vlm engine list` on the worker shows them."
        )
    if state.phase == "restarting":
        return f"vLLM is being started again with {spec.model}."
    return f"Starting vLLM with {spec.model}: {' '.join(spec.argv(port=0))}"
