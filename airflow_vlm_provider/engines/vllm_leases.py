"""A task's claim on a vLLM server of its worker: taken from a warm one, or by starting it.

A lease holds until it is released or its process has ended, however. While there is one, the server is kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from airflow_vlm_provider.engines.vllm_folder import EngineFolder, ServerFolder, ServerState
from airflow_vlm_provider.engines.vllm_keeper import KeeperSettings
from airflow_vlm_provider.engines.vllm_spec import ServerSpec, without_secrets
from airflow_vlm_provider.errors import ConfigError, EngineError

POLL = 0.05
# A keeper is there in a tenth of a second; a busy machine takes longer.
KEEPER_TIMEOUT = 60.0
# Keepers that came to nothing without saying why, one after another.
MAX_LOST = 3


@dataclass(frozen=True)
class Attached:
    """What a lease is on.

    :param keeper: Tells the keeper from a later one.
    :param url: Base URL, without ``/v1``.
    :param api_key: What requests are authorized by.
    :param loads: How often the keeper has loaded the model.
    """

    keeper: str
    url: str
    api_key: str
    loads: int


class Lease:
    """A claim on the server of a spec. For one thread at a time.

    :param folder: The worker's engine folder.
    :param spec: What the server is started with, where there is none.
    :param settings: How its keeper is to be, where it is started.
    :param holder: Who claims it, for people: DAG, task, ...
    :param say: Takes what is worth a line of the task's log.
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
        self._spec = spec
        self._settings = settings
        self._holder = {**holder, "pid": os.getpid(), "owner": worker_process()}
        self._say = say
        self._said = ""
        self._lease: tuple[Path, int] | None = None
        self.server: ServerFolder = folder.server(spec.key)
        """The server's folder."""

    def attach(self, *, stopped: Callable[[], bool] = lambda: False) -> Attached | None:
        """Wait for the server, having it started if need be. Blocks for as long as the model takes to load.

        :param stopped: Whether it is not worth waiting any more; then, None is returned.
        :raises ConfigError: the server can't be started like this.
        :raises EngineError: it can't be started now.
        """
        lost = 0
        try:
            while not stopped():
                keeper = self._claim()
                if keeper is None:
                    self._tell("Waiting for the vLLM server to end, which takes no more tasks.")
                    time.sleep(POLL)
                    continue
                attached = self._wait(keeper, stopped)
                if attached is not None or stopped():
                    return attached
                lost += 1
                if lost >= MAX_LOST:
                    raise EngineError(
                        f"The keeper of the vLLM server ended {lost} times without a word; see "
                        f"{self.server.path / 'keeper.log'}."
                    )
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

    def _has_ended(self) -> bool:
        """Whether the server has no keeper any more, whatever that has written."""
        with self.server.gate():
            return not self.server.has_keeper()

    def pin(self, name: str, *, until: float) -> None:
        """Have the server kept, though no task uses it; see :meth:`ServerFolder.pin`. While the lease is held."""
        with self.server.gate():
            self.server.pin(name, until=until)

    def unpin(self, name: str) -> bool:
        """Take a pin back, and stop the server if nobody needs it; whether it is stopped."""
        with self.server.gate():
            pinned = self.server.unpin(name)
            state = self.server.read_state()
            needed = self.server.leases() or self.server.pins()
            if not pinned or needed or state is None or not self.server.has_keeper():
                return False
            if state.keeper_pid is not None:
                os.kill(state.keeper_pid, signal.SIGTERM)
        return True

    def release(self) -> None:
        """Give the claim back; nothing happens when there is none."""
        lease, self._lease = self._lease, None
        if lease is not None:
            path, file = lease
            path.unlink(missing_ok=True)
            os.close(file)

    def _claim(self) -> str | None:
        """Take a lease, and start a keeper where there is none; returns the keeper's name, None when it gives none."""
        with self.server.gate():
            if self.server.has_keeper():
                state = self.server.read_state()
                if state is None or state.phase in ("draining", "stopping", "failed"):
                    self.release()
                    return None
                keeper = state.keeper
                self._take()
            else:
                self._take()
                keeper = self._start_keeper()
        return keeper

    def _take(self) -> None:
        if self._lease is None:
            self._lease = self.server.take_lease(self._holder)

    def _wait(self, keeper: str, stopped: Callable[[], bool]) -> Attached | None:
        """Wait until this keeper's server is ready; None when the keeper has ended without a word."""
        looked = time.monotonic()
        ended = False
        while not stopped():
            state = self.server.read_state()
            if state is None or state.keeper != keeper:
                return None
            if state.phase in ("ready", "draining"):
                return Attached(keeper, str(state.url), str(state.api_key), state.loads)
            if state.phase == "failed":
                raise (ConfigError if state.lasting else EngineError)(f"{self._spec.model}: {state.error}")
            if ended:
                return None
            self._tell(_progress(state, self._spec))
            time.sleep(POLL)
            if time.monotonic() - looked > 1:
                looked = time.monotonic()
                # Once more after that: what it wrote last may say why.
                ended = self._has_ended()
        return None

    def _tell(self, what: str) -> None:
        if what != self._said:
            self._said = what
            self._say(what)

    def _start_keeper(self) -> str:
        """Start a keeper, which is born with its lock. Behind the gate."""
        keeper = uuid.uuid4().hex[:12]
        self.server.write_spec(self._spec.to_json())
        # What is left of an earlier keeper's server is this one's to end.
        earlier = self.server.read_state() or ServerState(keeper, "waiting", 0)
        state = ServerState(
            keeper,
            "waiting",
            time.time(),
            server_pid=earlier.server_pid,
            server_started=earlier.server_started,
        )
        self.server.write_state(state)
        lock = self.server.keeper_lock()
        try:
            command = [sys.executable, "-m", "airflow_vlm_provider.engines.vllm_keeper"]
            command += ["--folder", str(self._folder.path.absolute()), "--key", self.server.key]
            command += ["--lock", str(lock), "--settings", json.dumps(asdict(self._settings))]
            with (self.server.path / "keeper.log").open("ab") as log:
                # The first process ends at once; the keeper is its child, and nobody's here.
                subprocess.run(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env=without_secrets(),
                    pass_fds=(lock,),
                    start_new_session=True,
                    check=True,
                    timeout=KEEPER_TIMEOUT,
                )
        except (subprocess.SubprocessError, OSError) as error:
            raise EngineError(f"The keeper of the vLLM server could not be started: {error}") from error
        finally:
            os.close(lock)
        return keeper


def worker_process() -> dict[str, Any] | None:
    """The worker that this process belongs to: the topmost of Airflow's processes above it, by number and start time.

    None when there is none, as in a script: then a server is only stopped for having been idle.
    """
    import psutil

    found = None
    for process in psutil.Process().parents():
        with contextlib.suppress(psutil.Error):
            if process.pid > 1 and _is_airflow(process.cmdline()):
                found = {"pid": process.pid, "started": process.create_time()}
    return found


def _is_airflow(command: Sequence[str]) -> bool:
    # Some of its processes replace their command line by one sentence ("airflow scheduler -- ...").
    return any(Path(word.split(" ")[0]).name in ("airflow", "celery") for word in command[:3])


def _progress(state: ServerState, spec: ServerSpec) -> str:
    if state.phase == "waiting":
        return f"Waiting for {', '.join(spec.gpus)}, on which another model's tasks still run."
    if state.phase == "restarting":
        return f"vLLM is being started again with {spec.model}."
    return f"Starting vLLM with {spec.model}: {' '.join(spec.argv(port=0))}"
