"""Tasks with the engine ``vllm``, each in a fresh process as Airflow's are, and an end to the servers that they start.

    with engine_tasks(scratch, environment) as tasks:
        tasks.run([Work(...), Work(...)], at_once=2)

When the block ends, however it does, no task runs any more, and no server of theirs. Should this process be killed,
its servers stop by themselves after :data:`IDLE_SECONDS` without a task.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

from client import measured
from client_ours import CONNECTION, context
from dataset import BENCH, ROOT

sys.path.insert(0, str(ROOT))
from airflow_vlm_provider.engines.vllm_folder import EngineFolder, ServerFolder

TASK_TIMEOUT = 1800.0
STOP_TIMEOUT = 120.0
IDLE_SECONDS = 120
POLL = 0.02


class TaskFailedError(Exception):
    """A task did not do its work; the message says how, and where its log is."""


@dataclass(frozen=True)
class Work:
    """What one task does.

    :param name: Names its log.
    :param engines: Engine folder in which it finds its server, or starts one.
    :param operator: Module and class, below ``airflow_vlm_provider.operators``: ``image_tagging.ImageTagging...``.
    :param parameters: The operator's; several, and it is run so often, one after the other.
    """

    name: str
    engines: Path
    operator: str
    parameters: Sequence[Mapping[str, Any]]


@dataclass
class Done:
    """What a task took; all but ``process_seconds`` of the last time that its operator was run.

    :param seconds: ``execute()``.
    :param attached: Of it, from entering the engine until it had the server's address, and a claim on it.
    :param client: To import and make the HTTP client, which an engine for any endpoint needs.
    :param warm: Whether it was ready before.
    :param load: Tells one load of the model from another.
    :param summary: What ``execute()`` returned.
    :param process_seconds: From the start of the process to its end.
    """

    seconds: float
    attached: float
    client: float
    warm: bool
    load: str
    summary: dict[str, Any]
    process_seconds: float


class EngineTasks:
    """Runs tasks; see :func:`engine_tasks`."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._folder = folder
        self._environment = {
            **os.environ,
            "AIRFLOW_HOME": str(BENCH / "airflow"),
            "AIRFLOW__VLM__ENGINE_IDLE_TIMEOUT": str(IDLE_SECONDS),
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            **environment,
        }
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._engines: set[Path] = set()
        self.done: list[Done] = []

    def run(self, works: Sequence[Work], *, at_once: int) -> list[Done]:
        """Run tasks, so many at a time, and wait for them; returns them in the order in which they ended.

        :raises TaskFailedError: one of them failed; the others are left to :meth:`end`.
        """
        waiting, begun = deque(works), dict[str, float]()
        done: list[Done] = []
        while waiting or self._running:
            while waiting and len(self._running) < at_once:
                work = waiting.popleft()
                begun[work.name] = time.perf_counter()
                self._running[work.name] = self._start(work)
            time.sleep(POLL)
            for name, process in list(self._running.items()):
                seconds = time.perf_counter() - begun[name]
                if process.poll() is None and seconds < TASK_TIMEOUT:
                    continue
                if process.returncode != 0:
                    how = "hangs" if process.returncode is None else f"exit status {process.returncode}"
                    raise TaskFailedError(f"{name}: {how}\n{self._log_tail(name)}")
                del self._running[name]
                result = json.loads(self._result(name).read_text(encoding="utf-8"))
                done.append(Done(**result, process_seconds=seconds))
        return done

    def stop_servers(self, engines: Path) -> None:
        """Stop the servers of an engine folder, and wait until nothing of them is left.

        :raises TaskFailedError: one has not ended in time.
        """
        deadline = time.monotonic() + STOP_TIMEOUT
        for server in EngineFolder(engines).servers():
            # Again and again: one that is being started can't be told yet.
            while _tell_to_stop(server):
                if time.monotonic() > deadline:
                    raise TaskFailedError(f"The server in {server.path} has not ended in {STOP_TIMEOUT:g} s.")
                time.sleep(0.1)
        self._engines.discard(engines)

    def end(self) -> None:
        """Kill the tasks that are left, and stop all servers."""
        for process in self._running.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        self._running.clear()
        # All of them, though one should fail.
        with contextlib.ExitStack() as stack:
            for engines in self._engines:
                stack.callback(self.stop_servers, engines)

    def _start(self, work: Work) -> subprocess.Popen[bytes]:
        self._engines.add(work.engines)
        given = {"operator": work.operator, "parameters": [dict(each) for each in work.parameters]}
        command = [sys.executable, __file__, "--work", json.dumps(given)]
        command += ["--result", str(self._result(work.name))]
        with self._log(work.name).open("wb") as log:
            return subprocess.Popen(
                command,
                env={**self._environment, "AIRFLOW__VLM__ENGINE_DIR": str(work.engines)},
                cwd=self._folder,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _result(self, name: str) -> Path:
        return self._folder / f"{name}.json"

    def _log(self, name: str) -> Path:
        return self._folder / f"{name}.log"

    def _log_tail(self, name: str) -> str:
        return self._log(name).read_text(errors="replace")[-3000:]


@contextlib.contextmanager
def engine_tasks(folder: Path, environment: Mapping[str, str]) -> Iterator[EngineTasks]:
    """Tasks whose logs and results go to a folder; none is left at the end, nor a server.

    :param environment: Environment variables of tasks and servers over this process's own.
    """
    tasks = EngineTasks(folder, environment)
    # Whoever ends this benchmark means what it has started, too.
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        yield tasks
    finally:
        tasks.end()
        signal.signal(signal.SIGTERM, before)


def connection(model: Path, engine_args: Mapping[str, Any], **extra: Any) -> dict[str, str]:
    """The environment variable of a connection to a model in a folder, asked by the engine ``vllm``."""
    extra = {"engine": "vllm", "model": str(model), "engine_args": dict(engine_args), **extra}
    return {f"AIRFLOW_CONN_{CONNECTION.upper()}": json.dumps({"conn_type": "vlm", "extra": extra})}


def _tell_to_stop(server: ServerFolder) -> bool:
    """Tell a server to stop; False when it has no keeper any more, and so is gone."""
    with server.gate():
        server.signal_keeper(signal.SIGTERM)
        return server.has_keeper()


# In a task's process.


@dataclass
class _Attaching:
    attached: float = 0.0
    client: float = 0.0
    warm: bool = False
    load: str = field(default="")


@contextlib.contextmanager
def _watched() -> Iterator[_Attaching]:
    """Measure how the engine gets to its server, by stand-ins within this process."""
    from airflow_vlm_provider.engines.openai import OpenAIEngine
    from airflow_vlm_provider.engines.vllm import VLLMEngine
    from airflow_vlm_provider.engines.vllm_leases import Lease

    seen = _Attaching()
    attach, enter, make_client = Lease.attach, VLLMEngine.__aenter__, OpenAIEngine.__aenter__

    @functools.wraps(attach)
    def watched_attach(lease: Lease, **given: Any) -> Any:
        state = lease.server.read_state()
        attached = attach(lease, **given)
        assert attached is not None
        seen.load = f"{attached.keeper}-{attached.loads}"
        seen.warm = state is not None and state.phase == "ready" and state.keeper == attached.keeper
        return attached

    @functools.wraps(make_client)
    async def timed_client(engine: OpenAIEngine) -> OpenAIEngine:
        begun = time.perf_counter()
        entered = await make_client(engine)
        seen.client = time.perf_counter() - begun
        return entered

    @functools.wraps(enter)
    async def timed_enter(engine: VLLMEngine) -> VLLMEngine:
        begun = time.perf_counter()
        entered = await enter(engine)
        seen.attached = time.perf_counter() - begun - seen.client
        return entered

    with (
        mock.patch.object(Lease, "attach", watched_attach),
        mock.patch.object(OpenAIEngine, "__aenter__", timed_client),
        mock.patch.object(VLLMEngine, "__aenter__", timed_enter),
    ):
        yield seen


def _work(given: Mapping[str, Any], result: Path) -> None:
    """What a task's process does."""
    module, _, name = given["operator"].partition(".")
    operators = importlib.import_module(f"airflow_vlm_provider.operators.{module}")
    for parameters in given["parameters"]:
        operator = getattr(operators, name)(task_id="work", vlm_conn_id=CONNECTION, **parameters)
        with _watched() as attaching, measured() as figures:
            summary = operator.execute(context())
    done = {"seconds": figures.seconds, **asdict(attaching), "summary": summary}
    result.write_text(json.dumps(done), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="One task; started by the benchmarks, never by hand.")
    parser.add_argument("--work", required=True, type=json.loads)
    parser.add_argument("--result", required=True, type=Path)
    options = parser.parse_args()
    _work(options.work, options.result)


if __name__ == "__main__":
    main()
