"""A whole Airflow on this machine for as long as a ``with`` block lasts, for the demo and the system tests.

It is the real thing: ``airflow standalone`` with its scheduler, DAG processor, triggerer and API server, on
ports and in a home folder of its own, so that it neither disturbs nor is disturbed by any other Airflow here.
"""

from __future__ import annotations

import contextlib
import json as jsonlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil  # a dependency of Airflow itself

_COMPONENTS = ("metadatabase", "scheduler", "triggerer", "dag_processor")
_LOG_TAIL_BYTES = 6000
_Params = Mapping[str, str | int | bool]


class AirflowError(RuntimeError):
    """Airflow did not do what was asked of it: it did not come up, answered an error or took too long."""


class AirflowInstance:
    """A running Airflow; :func:`start_airflow` makes one.

    :param home: ``AIRFLOW_HOME``.
    :param url: Base URL of the API server and the UI, without a slash at its end.
    :param env: The environment that all its processes run in.
    :param process: The ``airflow standalone`` process.
    """

    def __init__(
        self, *, home: Path, url: str, env: dict[str, str], process: subprocess.Popen[bytes]
    ) -> None:
        self.home = home
        self.url = url
        self.env = env
        self.process = process
        self.log_dir = home / "logs"
        self.output = home / "standalone.log"

    def api(self, method: str, path: str, json: Any = None, *, params: _Params | None = None) -> Any:
        """Call the public REST API.

        :param path: Path below ``/api/v2``, such as ``dags/tag_images``; with a slash at its beginning, a
            path from the server's root.
        :param json: Request body, if any.
        :param params: Query parameters.
        :return: The parsed answer; None when it is empty.
        :raises AirflowError: the server answered with an error; the message holds its answer.
        """
        url = f"{self.url}{path if path.startswith('/') else f'/api/v2/{path}'}"
        if params:
            url += "?" + urllib.parse.urlencode(params)
        request = urllib.request.Request(
            url,
            method=method,
            data=None if json is None else jsonlib.dumps(json).encode(),
            headers={"Content-Type": "application/json", "Accept": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as response:
                body = response.read()
        except urllib.error.HTTPError as error:
            detail = error.read().decode(errors="replace")
            raise AirflowError(f"{method} {url} answered {error.code}: {detail}") from error
        return jsonlib.loads(body) if body else None

    def cli(self, *args: str, timeout: float = 180) -> str:
        """Run ``airflow <args>`` against this instance.

        :return: What it wrote to its standard output.
        :raises AirflowError: it failed; the message holds what it wrote to its standard error.
        """
        done = subprocess.run(
            [_airflow_executable(), *args],
            env=self.env,
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        if done.returncode:
            raise AirflowError(f"airflow {' '.join(args)} failed ({done.returncode}): {done.stderr[-2000:]}")
        return done.stdout

    def trigger_dag(self, dag_id: str, conf: Mapping[str, Any] | None = None, *, timeout: float = 120) -> str:
        """Unpause a DAG, once it is parsed, and start a run of it now.

        :return: The run's id.
        :raises AirflowError: the DAG did not turn up within ``timeout`` seconds; the message holds the import
            errors.
        """

        def unpaused() -> bool:
            try:
                self.api("PATCH", f"dags/{dag_id}", {"is_paused": False})
            except AirflowError as error:
                if isinstance(error.__cause__, urllib.error.HTTPError) and error.__cause__.code == 404:
                    return False
                raise
            return True

        def why_not() -> str:
            found = self.api("GET", "importErrors")["import_errors"]
            errors = "\n".join(f"{each['filename']}: {each['stack_trace']}" for each in found)
            return f"DAG {dag_id!r} is not there after {timeout:g} s. Import errors: {errors or 'none'}"

        _wait_for(unpaused, timeout, why_not)
        run = self.api("POST", f"dags/{dag_id}/dagRuns", {"logical_date": None, "conf": dict(conf or {})})
        return str(run["dag_run_id"])

    def wait_for_run(self, dag_id: str, run_id: str, *, timeout: float = 300) -> str:
        """Wait until a DAG run has ended.

        :return: Its state, ``success`` or ``failed``.
        :raises AirflowError: it still runs after ``timeout`` seconds; the message holds its tasks' states.
        """
        state = ""

        def ended() -> bool:
            nonlocal state
            state = self.api("GET", f"dags/{dag_id}/dagRuns/{_quote(run_id)}")["state"]
            return state in ("success", "failed")

        def why_not() -> str:
            tasks = {
                f"{each['task_id']}[{each['map_index']}]": each["state"]
                for each in self.task_instances(dag_id, run_id)
            }
            return f"Run {run_id} of {dag_id} is {state} after {timeout:g} s. Tasks: {tasks}"

        _wait_for(ended, timeout, why_not)
        return state

    def task_instances(self, dag_id: str, run_id: str) -> list[dict[str, Any]]:
        """The task instances of a run, mapped ones one by one, as the REST API describes them."""
        path = f"dags/{dag_id}/dagRuns/{_quote(run_id)}/taskInstances"
        found: list[dict[str, Any]] = []
        while True:
            page = self.api("GET", path, params={"limit": 100, "offset": len(found)})
            found += page["task_instances"]
            if len(found) >= page["total_entries"] or not page["task_instances"]:
                return found

    def task_log(
        self, dag_id: str, run_id: str, task_id: str, *, try_number: int = 1, map_index: int = -1
    ) -> str:
        """One attempt's log as the UI shows it, a line of JSON for each event."""
        path = f"dags/{dag_id}/dagRuns/{_quote(run_id)}/taskInstances/{task_id}/logs/{try_number}"
        answer = self.api("GET", path, params={"map_index": map_index, "full_content": "true"})
        return "\n".join(jsonlib.dumps(each, ensure_ascii=False) for each in answer["content"])

    def xcom(
        self, dag_id: str, run_id: str, task_id: str, *, key: str = "return_value", map_index: int = -1
    ) -> Any:
        """The value that a task returned or pushed under ``key``."""
        path = f"dags/{dag_id}/dagRuns/{_quote(run_id)}/taskInstances/{task_id}/xcomEntries/{key}"
        params: _Params = {"map_index": map_index, "deserialize": "false", "stringify": "false"}
        return self.api("GET", path, params=params)["value"]

    def health(self) -> dict[str, str]:
        """The status of each component that does not report ``healthy``; empty when all is well."""
        try:
            report = self.api("GET", "monitor/health")
        except (AirflowError, OSError) as error:
            return {"api-server": str(error)}
        statuses = {name: (report.get(name) or {}).get("status") or "absent" for name in _COMPONENTS}
        return {name: status for name, status in statuses.items() if status != "healthy"}

    def tail(self) -> str:
        """The end of what all components wrote to their output."""
        return self.output.read_bytes()[-_LOG_TAIL_BYTES:].decode(errors="replace")


@contextlib.contextmanager
def start_airflow(
    home: Path,
    *,
    dags_folder: Path,
    env: Mapping[str, str] | None = None,
    executor: str = "LocalExecutor",
    timeout: float = 300,
) -> Iterator[AirflowInstance]:
    """Run ``airflow standalone`` for as long as the block lasts.

    Anyone who reaches its API server is its administrator, so that server listens on the loopback interface
    only.

    :param home: ``AIRFLOW_HOME``: the database, logs and configuration lie there; made where it is missing,
        and reused as it is where it is not.
    :param dags_folder: Where the DAG files are.
    :param env: More environment variables, such as ``AIRFLOW_CONN_...``; they win over those set here.
        Variables of the calling process that begin with ``AIRFLOW`` are not handed on.
    :param executor: ``[core] executor``; the first one has to be a local one.
    :param timeout: How many seconds all components may take to become healthy.
    :raises AirflowError: they did not; the message holds the end of their output.
    """
    home = home.resolve()
    home.mkdir(parents=True, exist_ok=True)
    api_port, worker_log_port, trigger_log_port = _free_ports(3)
    url = f"http://127.0.0.1:{api_port}"
    full_env = {
        **{name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW")},
        # `airflow standalone` looks its components up on the path.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONUNBUFFERED": "1",
        "AIRFLOW_HOME": str(home),
        "AIRFLOW__API__BASE_URL": url,
        "AIRFLOW__API__HOST": "127.0.0.1",
        "AIRFLOW__API__PORT": str(api_port),
        "AIRFLOW__CORE__DAGS_FOLDER": str(dags_folder.resolve()),
        "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{url}/execution/",
        "AIRFLOW__CORE__EXECUTOR": executor,
        "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
        "AIRFLOW__CORE__PARALLELISM": "4",
        "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
        "AIRFLOW__CORE__TEST_CONNECTION": "Enabled",
        "AIRFLOW__DAG_PROCESSOR__BUNDLE_REFRESH_CHECK_INTERVAL": "1",
        "AIRFLOW__DAG_PROCESSOR__PARSING_PROCESSES": "1",
        "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "5",
        "AIRFLOW__LOGGING__TRIGGER_LOG_SERVER_PORT": str(trigger_log_port),
        "AIRFLOW__LOGGING__WORKER_LOG_SERVER_PORT": str(worker_log_port),
        # Seconds. A task fails when the API server answers later than this, as it does on a busy machine.
        "AIRFLOW__WORKERS__EXECUTION_API_TIMEOUT": "60",
        **(env or {}),
    }
    with (home / "standalone.log").open("ab") as output:
        process = subprocess.Popen(
            [_airflow_executable(), "standalone"],
            env=full_env,
            cwd=home,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            # A session of its own tells its processes from all others, also when their parents are gone.
            start_new_session=True,
        )
    instance = AirflowInstance(home=home, url=url, env=full_env, process=process)
    try:
        _wait_until_healthy(instance, timeout)
        yield instance
    finally:
        _stop(process)


def _wait_until_healthy(instance: AirflowInstance, timeout: float) -> None:
    unhealthy: dict[str, str] = {}

    def healthy() -> bool:
        nonlocal unhealthy
        if instance.process.poll() is not None:
            raise AirflowError(
                f"airflow standalone ended with {instance.process.returncode}:\n{instance.tail()}"
            )
        unhealthy = instance.health()
        return not unhealthy

    _wait_for(
        healthy,
        timeout,
        lambda: f"Airflow is not healthy after {timeout:g} s ({unhealthy}):\n{instance.tail()}",
    )


def _stop(process: subprocess.Popen[bytes], patience: float = 20) -> None:
    """End ``airflow standalone`` and everything that came of it.

    A signal to its process group would not do: tasks run in process groups of their own, and an executor's
    workers outlive a scheduler that is killed. They all stay in the session.
    """
    if process.poll() is None:
        # Standalone passes a keyboard interrupt on to its components as an orderly end.
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    deadline = time.monotonic() + patience
    while left := session_processes(process.pid):
        for each in left:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        psutil.wait_procs(left, timeout=1)
        if time.monotonic() > deadline:
            raise AirflowError(f"Could not end these processes of Airflow: {left}")
    process.wait()


def session_processes(session: int) -> list[psutil.Process]:
    """The living processes of a session, for a check that nothing is left of an instance."""
    found = []
    for process in psutil.process_iter(["status"]):
        with contextlib.suppress(OSError):
            if os.getsid(process.pid) == session and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _wait_for(
    done: Callable[[], bool], timeout: float, why_not: Callable[[], str], interval: float = 0.5
) -> None:
    deadline = time.monotonic() + timeout
    while not done():
        if time.monotonic() > deadline:
            raise AirflowError(why_not())
        time.sleep(interval)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        # All are held at once, so that no two are the same.
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _airflow_executable() -> str:
    return str(Path(sys.executable).parent / "airflow")


def _quote(run_id: str) -> str:
    return urllib.parse.quote(run_id, safe="")
