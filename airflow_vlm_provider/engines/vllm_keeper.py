"""The keeper of one vLLM server: starts it, watches it, starts it again, and stops it when nobody needs it.

A small process of its own (``python -m airflow_vlm_provider.engines.vllm_keeper``), detached from the task that
started it, so that the server outlives tasks. It needs neither Airflow nor vLLM. What it shares with tasks is the
folder (:mod:`airflow_vlm_provider.engines.vllm_folder`); it is stopped by SIGTERM.

Invariants:

- It lives as long as it holds the lock that it was born with, and it runs at most one server. Should the files of its
  locks be deleted, others are not kept away any more, and it stops.
- The server does not outlive it: see :mod:`airflow_vlm_provider.engines.vllm_guard`. Only when the server has ended are
  the keeper's locks free. Should keeper and guard be killed together, the next keeper on a GPU ends what is left there.
- It stops when there was no lease for the idle time; when there is none and another keeper wants its GPU; when there is
  none and the worker processes of all that ever were are gone; and when it waits for a GPU for nobody. A pin counts
  like a lease, but where the workers are gone.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import secrets
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from airflow_vlm_provider.engines.process_table import kill_all, left_members
from airflow_vlm_provider.engines.vllm_demand import Demand
from airflow_vlm_provider.engines.vllm_folder import EngineFolder, ServerFolder
from airflow_vlm_provider.engines.vllm_guard import Guard
from airflow_vlm_provider.engines.vllm_health import Health
from airflow_vlm_provider.engines.vllm_last_words import is_lasting, quote, remedy, said_of_exit
from airflow_vlm_provider.engines.vllm_process import Port, ServerProcess
from airflow_vlm_provider.engines.vllm_settings import FIRST_STARTS, KeeperSettings
from airflow_vlm_provider.engines.vllm_spec import ServerSpec
from airflow_vlm_provider.engines.vllm_state import Phase, ServerState

log = logging.getLogger("vlm.keeper")

TICK = 0.25
# In so many seconds of being ready: with the time that it takes to load, a large model could be loaded for ever.
RESTARTS, RESTARTS_WITHIN = 5, 600.0
# Long before anybody deletes old files in folders for temporary ones.
TOUCH_SECONDS = 3600.0


@dataclass(frozen=True)
class _End:
    """How a server ended that was still needed.

    :param reason: What was wrong with it, as a sentence without its stop.
    :param lines: What it said last.
    :param lasting: Whether a further start would end like this.
    """

    reason: str
    lines: Sequence[str]
    lasting: bool


class Keeper:
    """Keeps one server; :meth:`run` returns when it is over.

    :param folder: The worker's engine folder.
    :param server: The server's folder in it, with its spec.
    :param name: Tells this keeper's states from others'.
    :param lock: Descriptor of the keeper's lock, which this process was born with.
    """

    def __init__(
        self, folder: EngineFolder, server: ServerFolder, settings: KeeperSettings, *, name: str, lock: int
    ) -> None:
        self._folder = folder
        self._server = server
        self._settings = settings
        self._lock = lock
        self._spec = ServerSpec.from_json(server.read_spec())
        self._state = ServerState(name, "waiting", time.time(), keeper_pid=os.getpid())
        # What the state's file is like as long as nobody else touches it.
        self._mark: tuple[int, int] | None = None
        self._written = self._decided = True
        self._deposed = False
        self._stop = threading.Event()
        self._demand = Demand(folder, server, gpus=self._spec.gpus, idle_timeout=settings.idle_timeout)
        self._process: ServerProcess | None = None
        self._guard: Guard | None = None
        # By GPU, the descriptor that holds its lock.
        self._gpus: dict[str, int] = {}
        self._touched = time.monotonic()
        # How long the server has been ready, all its runs together; and how long it had been at each restart.
        self._ready_seconds = 0.0
        self._restarts: deque[float] = deque()

    def run(self) -> None:
        """Keep the server until nobody needs it, or it can't be kept."""
        try:
            self._keep()
        except Exception as error:
            # Of processes, threads or ports there may be enough when a task tries again, but not at once.
            log.exception("The keeper failed")
            said = f"The server's keeper failed ({type(error).__name__}: {error}); see {self._server.path / 'keeper.log'}."
            self._enter("failed", error=said, lasting=False)
        finally:
            phase: Phase = "failed" if self._state.phase == "failed" else "stopped"
            self._enter(phase, url=None, api_key=None, server_pid=None, server_output=None)

    def _keep(self) -> None:
        self._end_left(self._server)
        self._enter("waiting")
        try:
            if self._claim_gpus():
                self._guard = Guard(self._last_words)
                self._end_orphans()
                self._serve()
        finally:
            if self._process is not None:
                self._process.end(gently=False)

    def stop(self) -> None:
        """Stop as soon as may be; for signal handlers."""
        self._stop.set()

    def dismiss(self) -> None:
        """Stop as soon as nobody uses the server; for signal handlers."""
        self._demand.dismissed = True

    def _enter(self, phase: Phase, **more: Any) -> None:
        if phase != self._state.phase:
            log.info("%s", phase)
            more["since"] = time.time()
        self._state = replace(self._state, phase=phase, **more)
        self._write()

    def _write(self) -> None:
        if self._deposed:
            return
        try:
            self._server.write_state(self._state)
            self._mark, self._written = self._server.state_mark(), True
        except OSError as error:
            # A full disk may have room again; tasks wait meanwhile.
            if self._written:
                log.error("The state can't be written: %s", error)
            self._written = False

    def _last_words(self) -> None:
        """What the guard writes when this process was killed: tasks are to come back when the lock is free."""
        state = self._server.read_state()
        if (
            state is not None
            and state.keeper == self._state.keeper
            and state.phase not in ("failed", "stopped")
        ):
            self._server.write_state(replace(state, phase="stopping", url=None, api_key=None))

    def _claim_gpus(self) -> bool:
        """Wait for the GPUs, in an order that is the same for all; False when it is not worth waiting any more."""
        gpus = sorted(self._spec.gpus)
        if any(self._folder.is_wanted(gpu) for gpu in gpus):
            # Who waits already looks once in a tick: should they be free just now, it comes first.
            for _ in range(2):
                if self._is_over():
                    return False
        with contextlib.ExitStack() as wanting:
            for gpu in gpus:
                wanting.enter_context(self._folder.wanting(gpu))
            for gpu in gpus:
                # Left open: what was claimed is this process's and its guard's to the end.
                while (file := self._folder.claim(gpu)) is None:
                    if self._is_over():
                        return False
                self._gpus[gpu] = file
        return True

    def _end_orphans(self) -> None:
        """End servers on these GPUs whose keeper was killed together with its guard."""
        for server in self._folder.servers():
            if server.path == self._server.path:
                continue
            with contextlib.suppress(OSError, ValueError), server.gate():
                if not server.has_keeper() and set(server.read_spec()["gpus"]) & set(self._gpus):
                    self._end_left(server)

    @staticmethod
    def _end_left(server: ServerFolder) -> None:
        state = server.read_state()
        if state is not None and state.server_pid is not None:
            leader, output = state.server_pid, state.server_output
            kill_all(lambda: left_members(leader, output))

    def _serve(self) -> None:
        """Have the server run, again and again if need be."""
        port, api_key, starts = Port(), secrets.token_urlsafe(32), 0
        while True:
            starts += 1
            end = self._run_once(port.number, api_key)
            if end is None:
                return
            lasting = self._state.ready_at is None and end.lasting
            if lasting or not self._may_start_again(starts):
                said = "".join(f"\n  {line}" for line in quote(end.lines))
                reason = ". ".join(filter(None, (end.reason, remedy(end.lines))))
                error = f"{reason}. Its log is {self._server.log}" + (f"; it said:{said}" if said else ".")
                self._enter("failed", error=error, lasting=lasting)
                return
            log.warning("%s; starting it again", end.reason)
            self._enter("restarting", server_pid=None, server_output=None)
            if not self._pause(self._settings.backoff * 2 ** max(0, len(self._restarts) - 1)):
                return
            if self._state.ready_at is None or not port.is_free():
                # Somebody else listens there, and may be sent the key until all tasks know.
                port.close()
                port, api_key = Port(), secrets.token_urlsafe(32)

    def _may_start_again(self, starts: int) -> bool:
        if self._state.ready_at is None:
            return starts < FIRST_STARTS
        self._restarts.append(self._ready_seconds)
        while self._ready_seconds - self._restarts[0] > RESTARTS_WITHIN:
            self._restarts.popleft()
        return len(self._restarts) <= RESTARTS

    def _pause(self, seconds: float) -> bool:
        """Wait, at most a minute; False when the server is not needed any more."""
        until = time.monotonic() + min(60.0, seconds)
        while time.monotonic() < until:
            if self._is_over():
                return False
        return True

    def _run_once(self, port: int, api_key: str) -> _End | None:
        """Start the server and watch it until it ends; returns how it did, None when it is not needed any more."""
        assert self._guard is not None
        log.info("Starting %s", " ".join(self._spec.argv(port=port)))
        try:
            process = ServerProcess(
                self._spec, port=port, api_key=api_key, log=self._server.log, tell=self._guard.watch
            )
        except OSError as error:
            self._guard.forget()
            lines = [f"{self._spec.command[0]}: {error.strerror}"]
            return _End("vLLM could not be started", lines, is_lasting(lines))
        self._process = process
        self._guard.watch(process.output, leader=process.pid)
        self._enter(
            "starting" if self._state.ready_at is None else "restarting",
            server_pid=process.pid,
            server_output=process.output,
            url=f"http://127.0.0.1:{port}",
            api_key=api_key,
            loads=self._state.loads + 1,
        )
        health = Health(
            str(self._state.url),
            api_key=api_key,
            model=self._spec.model,
            stall_timeout=self._settings.stall_timeout,
        )
        reason: str | None = "The keeper failed"
        try:
            reason = self._watch(process, health)
            if reason is not None:
                # Tasks are to know it before all of its processes have ended.
                self._enter("restarting")
        finally:
            process.end(gently=reason is None)
            self._process = None
            self._guard.forget()
        if reason is None:
            return None
        lines, status = process.last_lines(), process.status()
        # Who was killed did not come to say why.
        return _End(reason, lines, status is not None and status > 0 and is_lasting(lines))

    def _watch(self, process: ServerProcess, health: Health) -> str | None:
        """Watch the server until it is of no more use; returns what is wrong with it, None when it is over."""
        settings = self._settings
        begun = healthy = ready_since = time.monotonic()
        looked, ready, ready_before = 0.0, False, self._ready_seconds
        while not self._is_over():
            if (status := process.status()) is not None:
                return said_of_exit(status, ready=ready)
            now = time.monotonic()
            if now - looked < (settings.health_interval if ready else TICK):
                continue
            looked = now
            if health.look(timeout=min(5.0, settings.health_timeout), used=self._demand.used):
                healthy = time.monotonic()
                if not ready:
                    ready, ready_since = True, healthy
                    log.info("Ready after %.1f s", healthy - begun)
                    self._enter("ready", ready_at=time.time())
                self._ready_seconds = ready_before + healthy - ready_since
                if stalled := health.stalled():
                    return f"vLLM answers, but has computed nothing for {stalled:.0f} s though it should have"
            elif ready and now - healthy > settings.health_timeout:
                return f"vLLM gave no sign of health for {now - healthy:.0f} s"
            elif not ready and now - begun > settings.start_timeout:
                return f"vLLM was not ready after {settings.start_timeout:g} s ([vlm] engine_start_timeout)"
        return None

    def _is_over(self) -> bool:
        """Wait a moment; whether the server is to be stopped, which is then decided for good."""
        told = self._stop.wait(TICK)
        if self._guard is not None:
            self._guard.renew()
        if not self._server.is_keeper_lock(self._lock):
            log.error("The file of the keeper's lock was deleted: another one may be started")
            self._deposed = True
            return True
        try:
            with self._server.gate():
                over = self._decide(told=told)
            self._decided = True
        except OSError as error:
            # Of open files, or of room on the disk, there may be enough again.
            if self._decided:
                log.error("Who needs the server can't be seen: %s", error)
            self._decided, over = False, told
        if time.monotonic() - self._touched > TOUCH_SECONDS:
            self._touched = time.monotonic()
            self._server.touch()
        return over

    def _decide(self, *, told: bool) -> bool:
        """Whether the server is to be stopped. Behind the gate."""
        if lost := [gpu for gpu, file in self._gpus.items() if not self._folder.is_claim(gpu, file)]:
            log.error("The files of the locks of %s were deleted: others may use them", ", ".join(lost))
            told = True
        needed = self._demand.look(waiting=len(self._gpus) < len(self._spec.gpus))
        over = told or not needed
        if over:
            self._enter("stopping")
        elif self._state.phase in ("ready", "draining") and self._is_draining() != self._demand.wanted:
            self._enter("draining" if self._demand.wanted else "ready")
        elif not self._written or self._mark != self._server.state_mark():
            self._write()
        return over

    def _is_draining(self) -> bool:
        return self._state.phase == "draining"


def main() -> int:
    """Detach, and keep the server until nobody needs it."""
    parser = argparse.ArgumentParser(description="Keep a vLLM server; started by tasks, never by hand.")
    parser.add_argument("--folder", required=True)
    parser.add_argument("--key", required=True)
    parser.add_argument("--name", required=True)
    parser.add_argument("--lock", required=True, type=int, help="descriptor of the keeper's lock")
    parser.add_argument("--settings", required=True)
    given = parser.parse_args()
    # Whoever started this waits for the first process alone, and is not the parent of the second.
    if os.fork():
        os._exit(0)
    folder = EngineFolder(given.folder)
    server = folder.server(given.key)
    os.set_inheritable(given.lock, False)
    # What the task did not want to hear of is not what this process and its server may miss.
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    settings = KeeperSettings(**json.loads(given.settings))
    keeper = Keeper(folder, server, settings, name=given.name, lock=given.lock)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: keeper.stop())
    signal.signal(signal.SIGUSR1, lambda *_: keeper.dismiss())
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    keeper.run()
    folder.tidy()
    return 0


if __name__ == "__main__":
    sys.exit(main())
