"""A worker with an engine folder of its own, whose vLLM servers are fakes, and tasks that use them.

    with vllm_worker(tmp_path) as worker:
        with worker.processes() as tasks:
            task = tasks.lease(worker.spec("m"))
            os.kill(task.pid, signal.SIGKILL)

At the end nothing of it may be left running, and nothing that must never be may have been.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from airflow_vlm_provider.engines.vllm import VLLMEngine
from airflow_vlm_provider.engines.vllm_folder import EngineFolder, ServerFolder
from airflow_vlm_provider.engines.vllm_leases import Attached, Lease
from airflow_vlm_provider.engines.vllm_settings import KeeperSettings
from airflow_vlm_provider.engines.vllm_spec import ServerSpec
from airflow_vlm_provider.engines.vllm_state import ServerState
from airflow_vlm_provider.errors import VLMError
from airflow_vlm_provider.types import Request
from tests.support.fake_vllm import FakeVLLM

# A fake needs a fraction of a second for anything; but the machine may be busy.
SETTINGS = KeeperSettings(
    idle_timeout=300, start_timeout=30, health_interval=0.2, health_timeout=20, stall_timeout=30, backoff=0.05
)
TIMEOUT = 40.0
_REPOSITORY = Path(__file__).parents[2]


def eventually(check: Callable[[], Any], *, timeout: float = TIMEOUT) -> Any:
    """Wait until something is true, and return it."""
    deadline = time.monotonic() + timeout
    while not (found := check()):
        assert time.monotonic() < deadline, f"never came true: {check}"
        time.sleep(0.02)
    return found


def is_running(pid: int) -> bool:
    """Whether a process runs, and is none of a fake's that has ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    # It may end while it is read about.
    except (FileNotFoundError, ProcessLookupError):
        return False


def stop_servers(folder: EngineFolder) -> None:
    """Stop all servers of an engine folder, those too that are only about to start."""

    def left() -> bool:
        kept = False
        for server in folder.servers():
            with server.gate():
                server.signal_keeper(signal.SIGTERM)
                kept = server.has_keeper() or kept
        return kept

    eventually(lambda: not left())


@dataclass
class VLLMWorker:
    """A worker.

    :ivar folder: Its engine folder.
    :ivar fake: What its servers are told.
    """

    path: Path
    fake: FakeVLLM
    settings: KeeperSettings = SETTINGS
    ended: threading.Event = field(default_factory=threading.Event)

    @property
    def folder(self) -> EngineFolder:
        return EngineFolder(self.path / "engines")

    def spec(self, model: str = "m", *, gpus: str = "0", **args: Any) -> ServerSpec:
        """What a server is started with."""
        return ServerSpec(model=model, gpus=tuple(gpus.split(",")), args=args, command=FakeVLLM.COMMAND)

    def lease(self, spec: ServerSpec, **settings: Any) -> Lease:
        """A claim of this process on a server, not taken yet."""
        said: list[str] = []
        lease = Lease(
            self.folder, spec, settings=replace(self.settings, **settings), holder={}, say=said.append
        )
        lease.said = said  # type: ignore[attr-defined]
        return lease

    def attach(self, lease: Lease) -> Future[Attached | None]:
        """Have a lease taken by a thread, as it takes its time."""
        found: Future[Attached | None] = Future()

        def take() -> None:
            try:
                found.set_result(lease.attach(stopped=self.ended.is_set))
            except BaseException as error:
                found.set_exception(error)

        threading.Thread(target=take, daemon=True).start()
        return found

    def engine(
        self, model: str = "m", *, gpus: str = "0", settings: Any = None, **options: Any
    ) -> VLLMEngine:
        """The engine of a task in this process."""
        return VLLMEngine(
            model=model,
            folder=self.folder.path,
            gpus=gpus,
            command=FakeVLLM.COMMAND,
            settings=replace(self.settings, **(settings or {})),
            **options,
        )

    def server(self, spec: ServerSpec) -> ServerFolder:
        return self.folder.server(spec.key)

    def state(self, spec: ServerSpec) -> ServerState:
        """How far a server is."""
        state = self.server(spec).read_state()
        assert state is not None
        return state

    def has_keeper(self, spec: ServerSpec) -> bool:
        server = self.server(spec)
        with server.gate():
            return server.has_keeper()

    def wait_for(self, spec: ServerSpec, phase: str) -> ServerState:
        """Wait until a server is in a phase."""

        def look() -> ServerState | None:
            state = self.server(spec).read_state()
            return state if state is not None and state.phase == phase else None

        found: ServerState = eventually(look)
        return found

    def wait_for_end(self, spec: ServerSpec) -> None:
        """Wait until a server has no keeper any more."""
        eventually(lambda: not self.has_keeper(spec))

    def left(self) -> list[int]:
        """Processes of servers that run."""
        pids = [pid for start in self.fake.starts() for pid in (start["pid"], start.get("engine")) if pid]
        return [pid for pid in pids if is_running(pid)]

    def keeper_processes(self) -> list[int]:
        """Keepers and their guards."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                words = (path / "cmdline").read_bytes().decode().split("\0")
                if str(self.folder.path) in words and is_running(int(path.name)):
                    found.append(int(path.name))
        return found

    def end(self) -> None:
        """Stop all servers; nothing may be left."""
        self.ended.set()
        try:
            stop_servers(self.folder)
            eventually(lambda: not self.keeper_processes())
            assert self.left() == []
        finally:
            for pid in self.keeper_processes() + self.left():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        assert self.fake.violations() == []

    @contextlib.contextmanager
    def processes(self, *, airflow: bool = False, asking: bool = False) -> Iterator[TaskProcesses]:
        """A process whose children are tasks, as of an Airflow worker; those that are left are killed at the end.

        :param airflow: Whether its command line looks like one of Airflow's.
        :param asking: Whether they will ask something, for which it imports what takes long beforehand.
        """
        name = self.path / ("airflow" if airflow else "script")
        if not name.exists():
            shutil.copy(__file__, name)
        with (self.path / "processes.log").open("a") as log:
            process = subprocess.Popen(
                [sys.executable, str(name), "asking" if asking else "leasing"],
                env={**os.environ, "PYTHONPATH": str(_REPOSITORY)},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
        tasks = TaskProcesses(self, process)
        try:
            yield tasks
        finally:
            process.kill()
            process.wait()
            for task in tasks.started:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(task.pid, signal.SIGKILL)
            for pipe in (process.stdin, process.stdout):
                assert pipe is not None
                pipe.close()


def kill(*pids: int) -> None:
    """Kill processes, and wait until they have ended."""
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: not any(is_running(pid) for pid in pids))


def attach(worker: VLLMWorker, spec: ServerSpec, **settings: Any) -> tuple[Lease, Attached]:
    """A lease on a server that is ready."""
    lease = worker.lease(spec, **settings)
    attached = lease.attach()
    assert attached is not None
    return lease, attached


def guards(worker: VLLMWorker, spec: ServerSpec) -> list[int]:
    """The processes that a keeper has forked: its guard."""
    keeper = worker.state(spec).keeper_pid
    return [pid for pid in worker.keeper_processes() if pid != keeper]


@contextlib.contextmanager
def vllm_worker(path: Path, monkeypatch: pytest.MonkeyPatch, *, gpus: str = "0,1") -> Iterator[VLLMWorker]:
    """A worker with these GPUs; all its servers are stopped at the end."""
    worker = VLLMWorker(path, FakeVLLM(path / "fake"))
    for name, value in worker.fake.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    try:
        yield worker
    finally:
        worker.end()


@dataclass
class TaskProcess:
    """A task in a process of its own."""

    pid: int
    notes: Path

    def said(self) -> list[dict[str, Any]]:
        return (
            [json.loads(line) for line in self.notes.read_text().splitlines()] if self.notes.exists() else []
        )

    def told(self, what: str) -> Any:
        """What it noted under this name, if it has."""
        return next((each[what] for each in self.said() if what in each), None)

    def wait_for(self, what: str) -> Any:
        """Wait until it has noted something under this name."""

        def look() -> Any:
            if (error := self.told("error")) and what != "error":
                raise AssertionError(error)
            return self.told(what)

        return eventually(look)

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        eventually(lambda: not is_running(self.pid))

    def release(self) -> None:
        """Have it give its lease back, and end."""
        os.kill(self.pid, signal.SIGTERM)
        eventually(lambda: not is_running(self.pid))


class TaskProcesses:
    """Starts tasks."""

    def __init__(self, worker: VLLMWorker, process: subprocess.Popen[str]) -> None:
        self.pid = process.pid
        self.started: list[TaskProcess] = []
        self._worker = worker
        self._process = process

    def lease(self, spec: ServerSpec, *, forks: bool = False, **settings: Any) -> TaskProcess:
        """A task that takes a lease, notes what is ``attached``, and keeps it until it is told otherwise.

        :param forks: Whether it then forks a ``child``, which does nothing and does not end by itself.
        """
        return self._start({"do": "lease", "forks": forks}, spec, settings)

    def ask(self, spec: ServerSpec, texts: Sequence[str], **settings: Any) -> TaskProcess:
        """A task that asks all of these at once, and notes its ``answers``."""
        return self._start({"do": "ask", "texts": list(texts)}, spec, settings)

    def _start(self, what: dict[str, Any], spec: ServerSpec, settings: Mapping[str, Any]) -> TaskProcess:
        worker = self._worker
        notes = worker.path / f"task-{time.monotonic_ns()}"
        what |= {"spec": spec.to_json(), "folder": str(worker.folder.path), "notes": str(notes)}
        what["settings"] = asdict(replace(worker.settings, **settings))
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(what) + "\n")
        self._process.stdin.flush()
        task = TaskProcess(int(self._process.stdout.readline()), notes)
        self.started.append(task)
        return task


def _work() -> None:
    """The process that tasks are forked from."""
    if sys.argv[1] == "asking":
        import openai  # noqa: F401

    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    for line in sys.stdin:
        pid = os.fork()
        if not pid:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _task(json.loads(line))
        print(pid, flush=True)


def _task(what: dict[str, Any]) -> None:
    """What a forked process does; never returns."""

    def note(**values: Any) -> None:
        with Path(what["notes"]).open("a") as file:
            file.write(json.dumps(values) + "\n")

    try:
        spec, settings = ServerSpec.from_json(what["spec"]), KeeperSettings(**what["settings"])
        begun = time.monotonic()
        if what["do"] == "lease":
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
            lease = Lease(
                EngineFolder(what["folder"]), spec, settings=settings, holder={}, say=lambda _: None
            )
            attached = lease.attach()
            assert attached is not None
            note(attached=asdict(attached), seconds=time.monotonic() - begun)
            if what["forks"]:
                child = os.fork()
                if not child:
                    signal.pause()
                note(child=child)
            signal.sigwait({signal.SIGTERM})
            lease.release()
        else:
            asyncio.run(_ask(what, spec, settings, note))
    except BaseException as error:
        note(error=f"{type(error).__name__}: {error}")
        traceback.print_exc()
    finally:
        os._exit(0)


async def _ask(
    what: dict[str, Any], spec: ServerSpec, settings: KeeperSettings, note: Callable[..., None]
) -> None:
    engine = VLLMEngine(
        model=spec.model,
        folder=what["folder"],
        engine_args=dict(spec.args),
        gpus=",".join(spec.gpus),
        command=spec.command,
        settings=settings,
    )
    async with engine:
        note(attached=True)
        answers = await asyncio.gather(
            *(engine.ask(Request(system=None, parts=(text,))) for text in what["texts"]),
            return_exceptions=True,
        )
    note(
        answers=[
            f"{type(each).__name__}: {each}" if isinstance(each, VLMError) else each.choices[0].text
            for each in answers
        ]
    )


if __name__ == "__main__":
    _work()
