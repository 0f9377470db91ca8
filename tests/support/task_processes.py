"""Tasks as Airflow runs them: an operator's ``execute`` in a process of its own, forked from one that has imported
everything, to be stopped from outside in any way.

    with start_tasks(environment, folder) as tasks:
        task = tasks.start(source=..., destination=...)
        os.kill(task.pid, signal.SIGKILL)
        assert task.wait() == -signal.SIGKILL
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

_REPOSITORY = Path(__file__).parents[2]


@dataclass
class Task:
    """A task that was started.

    :ivar pid: Its process.
    """

    pid: int
    result: Path
    log: Path
    server: Tasks

    def wait(self) -> int:
        """Wait for its end; returns the exit status, negative for a signal's number."""
        return int(self.server.call({"wait": self.pid})["status"])

    def ended(self) -> bool:
        """Whether it has ended; :meth:`wait` still tells how."""
        return bool(self.server.call({"poll": self.pid})["ended"])

    def returned(self) -> dict[str, Any]:
        """What ``execute`` returned; only after an exit status of 0."""
        return json.loads(self.result.read_text())

    def said(self) -> str:
        """What the task logged, its traceback included."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class Tasks:
    """Starts tasks."""

    def __init__(self, process: subprocess.Popen[str], folder: Path) -> None:
        self._process = process
        self._folder = folder
        self._started = 0

    def start(self, *, operator: str = "ImageTaggingVLMOperator", **parameters: Any) -> Task:
        """Start a task.

        :param operator: Name of the operator's class.
        :param parameters: The operator's.
        """
        self._started += 1
        result = self._folder / f"task-{self._started}.json"
        log = self._folder / f"task-{self._started}.log"
        command = {"operator": operator, "parameters": parameters, "result": str(result), "log": str(log)}
        return Task(self.call({"start": {**command, "number": self._started}})["pid"], result, log, self)

    def run(self, **parameters: Any) -> dict[str, Any]:
        """Start a task, wait for it, and return what it returned."""
        task = self.start(**parameters)
        status = task.wait()
        assert status == 0, f"exit status {status}:\n{task.said()[-4000:]}"
        return task.returned()

    def call(self, command: Mapping[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the process that starts tasks is gone"
        return json.loads(line)


@contextlib.contextmanager
def start_tasks(environment: Mapping[str, str], folder: Path) -> Iterator[Tasks]:
    """Start the process that tasks are forked from; all that are left are killed at the end.

    :param environment: Connections and configuration, on top of this process's environment.
    :param folder: Where logs and results go.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.task_processes"],
            env={**os.environ, **environment},
            cwd=_REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            start_new_session=True,
        )
        try:
            tasks = Tasks(process, folder)
            assert tasks.call({"ready": True}) == {"ready": True}, (folder / "server.log").read_text()
            yield tasks
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe:
                    pipe.close()


def _serve() -> None:
    # As a worker does before it forks a task; connection pools and threads are made only by the tasks.
    for module in ("operators.runners", "runner", "operators.image_tagging", "operators.redrive"):
        importlib.import_module(f"airflow_vlm_provider.{module}")

    ended: dict[int, int] = {}
    for line in sys.stdin:
        command = json.loads(line)
        if "start" in command:
            pid = os.fork()
            if not pid:
                _run_task(command["start"])
            reply: dict[str, Any] = {"pid": pid}
        elif "poll" in command:
            pid = command["poll"]
            found, status = os.waitpid(pid, os.WNOHANG) if pid not in ended else (pid, ended[pid])
            if found:
                ended[pid] = status
            reply = {"ended": bool(found)}
        elif "wait" in command:
            pid = command["wait"]
            status = ended.pop(pid) if pid in ended else os.waitpid(pid, 0)[1]
            reply = {"status": os.waitstatus_to_exitcode(status)}
        else:
            reply = {"ready": True}
        print(json.dumps(reply), flush=True)


def _run_task(command: dict[str, Any]) -> None:
    """What the forked process does; never returns."""
    status = 1
    try:
        log = os.open(command["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        from airflow_vlm_provider.operators import image_tagging, redrive

        classes = {**vars(image_tagging), **vars(redrive)}
        operator = classes[command["operator"]](task_id="tag", **command["parameters"])
        # As Airflow's supervisor does it; whatever execute() makes of it.
        signal.signal(signal.SIGTERM, lambda *_: operator.on_kill())
        result = operator.execute(_context(command["number"]))
        Path(command["result"]).write_text(json.dumps(result))
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _context(number: int) -> dict[str, Any]:
    ti = SimpleNamespace(
        dag_id="tests", task_id="tag", run_id="tests", map_index=-1, try_number=number, xcom_push=print
    )
    return {"ti": ti, "task_instance": ti, "run_id": "tests", "outlet_events": {}}


if __name__ == "__main__":
    _serve()
