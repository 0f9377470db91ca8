"""The keeper of one vLLM server: starts it, watches it, starts it again, and stops it when nobody needs it.

A small process of its own (``python -m airflow_vlm_provider.engines.vllm_keeper``), detached from the task that
started it, so that the server outlives tasks. It needs neither Airflow nor vLLM. What it shares with tasks is the
folder (:mod:`airflow_vlm_provider.engines.vllm_folder`); it is stopped by SIGTERM.

Invariants:

- It lives as long as it holds the lock that it was born with, and it runs at most one server.
- The server does not outlive it: a guard, a process that does nothing but wait for the keeper's end, then ends the
  server with all of its processes. Only after that are the keeper's locks free, because the guard holds them, too.
- It stops when there was no lease for the idle time; when there is none and another keeper wants its GPU; and when
  there is none and the worker processes of all that ever were are gone. A pin counts like a lease, but for the last.
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

from airflow_vlm_provider.engines.vllm_folder import EngineFolder, Phase, ServerFolder
from airflow_vlm_provider.engines.vllm_health import Health, is_lasting
from airflow_vlm_provider.engines.vllm_process import (
    ServerProcess,
    free_port,
    kill_session,
    start_guard,
    started_at,
)
from airflow_vlm_provider.engines.vllm_spec import ServerSpec

log = logging.getLogger("vlm.keeper")

TICK = 0.25
# One that was never ready is not loaded over and over; one that was may have bad luck now and then.
FIRST_STARTS = 2
RESTARTS, RESTARTS_WITHIN = 5, 600.0


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


class Keeper:
    """Keeps one server; :meth:`run` returns when it is over.

    :param folder: The worker's engine folder.
    :param server: The server's folder in it, with its spec and a first state.
    """

    def __init__(self, folder: EngineFolder, server: ServerFolder, settings: KeeperSettings) -> None:
        state = server.read_state()
        assert state is not None
        self._state = replace(state, keeper_pid=os.getpid())
        self._folder = folder
        self._server = server
        self._settings = settings
        self._spec = ServerSpec.from_json(server.read_spec())
        self._stop = threading.Event()
        self._process: ServerProcess | None = None
        self._guard = -1
        self._has_gpus = False
        # Worker processes, and None for whoever has none.
        self._owners: set[tuple[int, float] | None] = set()
        self._unused_since = time.monotonic()
        self._restarts: deque[float] = deque()
        self._written = True

    def run(self) -> None:
        """Keep the server until nobody needs it, or it can't be kept."""
        left, started = self._state.server_pid, self._state.server_started
        if left is not None and started_at(left) in (None, started):
            kill_session(left, key=self._spec.key)
        self._enter("waiting", server_pid=None, server_started=None)
        try:
            if self._claim_gpus():
                self._guard = start_guard()
                self._serve()
        finally:
            if self._process is not None:
                self._process.end()

    def stop(self) -> None:
        """Stop as soon as may be; for signal handlers."""
        self._stop.set()

    def _enter(self, phase: Phase, **more: Any) -> None:
        since = self._state.since if phase == self._state.phase else time.time()
        self._state = replace(self._state, phase=phase, since=since, **more)
        self._write()

    def _write(self) -> None:
        try:
            self._server.write_state(self._state)
            self._written = True
        except OSError as error:
            # A full disk may have room again; tasks wait meanwhile.
            self._written = False
            log.error("The state can't be written: %s", error)

    def _claim_gpus(self) -> bool:
        """Wait for the GPUs, in an order that is the same for all; False when it is not worth waiting any more."""
        with contextlib.ExitStack() as wanting:
            for gpu in sorted(self._spec.gpus):
                wanting.enter_context(self._folder.wanting(gpu))
                # Left open: what was claimed is this process's and its guard's to the end.
                while self._folder.claim(gpu) is None:
                    if self._is_over():
                        return False
        self._has_gpus = True
        return True

    def _serve(self) -> None:
        """Have the server run, again and again if need be."""
        api_key, port, starts = secrets.token_urlsafe(32), 0, 0
        while True:
            starts += 1
            port = free_port(port)
            reason, lines = self._run_once(port, api_key)
            if reason is None:
                return
            lasting = self._state.ready_at is None and is_lasting(lines)
            if lasting or not self._may_start_again(starts):
                said = "".join(f"\n  {line}" for line in lines)
                error = f"{reason}. The log is {self._server.log}" + (
                    f"; its last lines:{said}" if said else "."
                )
                self._enter("failed", error=error, lasting=lasting, server_pid=None, server_started=None)
                return
            log.warning("%s; starting it again", reason)
            self._enter("restarting", server_pid=None, server_started=None)
            if self._stop.wait(min(60.0, self._settings.backoff * 2 ** max(0, len(self._restarts) - 1))):
                return

    def _may_start_again(self, starts: int) -> bool:
        if self._state.ready_at is None:
            return starts < FIRST_STARTS
        now = time.monotonic()
        self._restarts.append(now)
        while now - self._restarts[0] > RESTARTS_WITHIN:
            self._restarts.popleft()
        return len(self._restarts) <= RESTARTS

    def _run_once(self, port: int, api_key: str) -> tuple[str | None, Sequence[str]]:
        """Start the server and watch it; returns what was wrong with it, None when it is over, and its last lines."""
        log.info("Starting %s", " ".join(self._spec.argv(port=port)))
        try:
            process = ServerProcess(self._spec, port=port, api_key=api_key, log=self._server.log)
        except OSError as error:
            return "vLLM could not be started", [f"{self._spec.command[0]}: {error.strerror}"]
        self._process = process
        os.write(self._guard, b"%d\n" % process.pid)
        self._enter(
            "starting" if self._state.ready_at is None else "restarting",
            server_pid=process.pid,
            server_started=started_at(process.pid),
            url=f"http://127.0.0.1:{port}",
            api_key=api_key,
            loads=self._state.loads + 1,
        )
        try:
            reason = self._watch(
                process, Health(str(self._state.url), stall_timeout=self._settings.stall_timeout)
            )
        finally:
            self._process = None
            process.end()
        return reason, process.last_lines()

    def _watch(self, process: ServerProcess, health: Health) -> str | None:
        """Watch the server until it is of no more use; returns what is wrong with it, None when it is over."""
        settings = self._settings
        begun = healthy = time.monotonic()
        looked, ready = 0.0, False
        while not self._is_over():
            if (status := process.status()) is not None:
                return _said_of_exit(status, ready)
            now = time.monotonic()
            if now - looked < (settings.health_interval if ready else TICK):
                continue
            looked = now
            if health.look(timeout=min(5.0, settings.health_timeout)):
                healthy = time.monotonic()
                if not ready:
                    ready = True
                    log.info("Ready after %.1f s", healthy - begun)
                    self._enter("ready", ready_at=time.time())
                if stalled := health.stalled():
                    return f"vLLM answers, but its running requests made no progress for {stalled:.0f} s"
            elif ready and now - healthy > settings.health_timeout:
                return f"vLLM gave no sign of health for {now - healthy:.0f} s"
            elif not ready and now - begun > settings.start_timeout:
                return f"vLLM was not ready after {settings.start_timeout:g} s ([vlm] engine_start_timeout)"
        return None

    def _is_over(self) -> bool:
        """Wait a moment; whether the server is to be stopped, which is then decided for good."""
        told = self._stop.wait(TICK)
        if not self._written:
            self._write()
        with self._server.gate():
            holders = self._server.leases()
            pinned = bool(self._server.pins())
            for holder in holders:
                owner = holder["owner"]
                self._owners.add(None if owner is None else (owner["pid"], owner["started"]))
            wanted = self._has_gpus and any(self._folder.is_wanted(gpu) for gpu in self._spec.gpus)
            if holders or pinned:
                self._unused_since = time.monotonic()
                if wanted and self._state.phase == "ready":
                    self._enter("draining")
                elif not wanted and self._state.phase == "draining":
                    self._enter("ready")
            unused = time.monotonic() - self._unused_since
            # Whoever had this started has held a lease since before.
            unneeded = not pinned and (wanted or unused > self._settings.idle_timeout)
            over = told or (not holders and (unneeded or self._is_deserted()))
            if over:
                self._enter("stopping")
        return over

    def _is_deserted(self) -> bool:
        """Whether the workers of all who ever held a lease are gone."""
        return bool(self._owners) and not any(
            owner is None or started_at(owner[0]) == owner[1] for owner in self._owners
        )


def _said_of_exit(status: int, ready: bool) -> str:
    how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"ended with status {status}"
    hint = " (often the kernel's, for lack of memory)" if status == -signal.SIGKILL else ""
    return f"vLLM {how}{hint}{'' if ready else ' before it was ready'}"


def main() -> int:
    """Detach, and keep the server until nobody needs it."""
    parser = argparse.ArgumentParser(description="Keep a vLLM server; started by tasks, never by hand.")
    parser.add_argument("--folder", required=True)
    parser.add_argument("--key", required=True)
    parser.add_argument("--lock", required=True, type=int, help="descriptor of the keeper's lock")
    parser.add_argument("--settings", required=True)
    given = parser.parse_args()
    # Whoever started this waits for the first process alone, and is not the parent of the second.
    if os.fork():
        os._exit(0)
    folder = EngineFolder(given.folder)
    server = folder.server(given.key)
    os.set_inheritable(given.lock, False)
    os.chdir("/")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    keeper = Keeper(folder, server, KeeperSettings(**json.loads(given.settings)))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, lambda *_: keeper.stop())
    try:
        keeper.run()
    except Exception:
        log.exception("The keeper failed")
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
