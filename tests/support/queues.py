"""An Airflow with queues: its components, broker, database and workers, each a process of its own as in production.

All of it is on this machine, on free ports and in a folder of its own, and is killed when the ``with`` block ends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import psutil
import pytest

from demo.airflow_instance import AirflowError, AirflowInstance, session_processes

EDGE_EXECUTOR = "airflow.providers.edge3.executors.EdgeExecutor"
_COMPONENTS = ("metadatabase", "scheduler", "dag_processor")
# What a task calls the machine that it ran on: here, all workers are on the same.
_HOSTNAME_MODULE = "import os\n\n\ndef name():\n    return os.environ.get('WORKER_NAME', 'localhost')\n"


def require_command(name: str) -> str:
    """Where a command is; skips the test where it is not. On CI that is a failure."""
    # Debian keeps PostgreSQL's out of the path.
    folders = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    found = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", os.defpath), *map(str, folders)]))
    if found is None:
        reason = f"{name} is not installed: apt-get install redis-server postgresql"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(
    done: Callable[[], object], what: Callable[[], str], timeout: float, interval: float = 0.1
) -> None:
    deadline = time.monotonic() + timeout
    while not done():
        if time.monotonic() > deadline:
            raise AirflowError(f"Waited {timeout:g} s for {what()}")
        time.sleep(interval)


@contextlib.contextmanager
def start_redis(folder: Path) -> Iterator[str]:
    """Run a Redis server; yields its URL."""
    port = free_port()
    command = [require_command("redis-server"), "--port", str(port), "--bind", "127.0.0.1"]
    command += ["--save", "", "--appendonly", "no", "--dir", str(folder)]
    with _running(command, folder / "redis.log") as process:

        def answers() -> bool:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1) as connection:
                connection.sendall(b"PING\r\n")
                return connection.recv(16) == b"+PONG\r\n"
            return False

        wait_for(lambda: process.poll() is not None or answers(), lambda: "Redis", 30)
        yield f"redis://127.0.0.1:{port}/0"


@contextlib.contextmanager
def start_postgres() -> Iterator[str]:
    """Run a PostgreSQL server that is reached by a socket in a folder of its own; yields the database's URL."""
    initdb, postgres = require_command("initdb"), require_command("postgres")
    # Not below pytest's folder: the path of a socket has room for a hundred characters.
    folder = Path(tempfile.mkdtemp(prefix="airflow-vlm-postgres-"))
    try:
        # It refuses to run as root.
        user = "postgres" if os.geteuid() == 0 else None
        if user:
            shutil.chown(folder, user)
        data = str(folder / "data")
        made = [initdb, "--pgdata", data, "--username", "airflow", "--auth", "trust", "--no-sync"]
        subprocess.run(made, user=user, check=True, capture_output=True, cwd=folder)
        # What it holds is of no use after a power cut.
        fast = [
            option
            for name in ("fsync", "synchronous_commit", "full_page_writes")
            for option in ("-c", f"{name}=off")
        ]
        command = [postgres, "-D", data, "-k", str(folder), "-c", "listen_addresses=", *fast]
        with _running(command, folder / "log", user=user, end=signal.SIGINT) as process:

            def answers() -> bool:
                import psycopg2

                with contextlib.suppress(psycopg2.OperationalError):
                    psycopg2.connect(host=str(folder), user="airflow", dbname="postgres").close()
                    return True
                return False

            wait_for(lambda: process.poll() is not None or answers(), lambda: "PostgreSQL", 30)
            yield f"postgresql+psycopg2://airflow@/postgres?host={folder}"
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _running(
    command: list[str], log: Path, *, user: str | None = None, end: int = signal.SIGKILL
) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, user=user, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    try:
        yield process
    finally:
        process.send_signal(end)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        kill_session(process.pid)
        process.wait()


class Worker:
    """A worker of one queue, which takes tasks as soon as it is up.

    :ivar name: What its tasks say that they ran on.
    :ivar pid: Its first process.
    """

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name = name
        self.pid = process.pid
        self.log = log
        self._process = process
        self._is_wanted = True

    def check(self) -> None:
        """
        Whether it runs, as far as it is meant to.

        :raises AirflowError: it does not; the message holds the end of its log.
        """
        if self._is_wanted and self._process.poll() is not None:
            raise AirflowError(
                f"The worker {self.name} ended with {self._process.returncode}:\n{_tail(self.log)}"
            )

    def kill(self, *, along_with: Iterable[psutil.Process] = ()) -> None:
        """Kill it with all of its tasks and their supervisors, none of which gets to know.

        :param along_with: What is to be killed in the same moment.
        """
        self._is_wanted = False
        kill([*session_processes(self.pid), *along_with])
        kill_session(self.pid)
        self._process.wait()

    def stop(self, timeout: float = 120) -> None:
        """
        Tell it to stop, and wait until it has.

        :raises AirflowError: it has not in time; the message holds the end of its log, and what still runs.
        """
        self._is_wanted = False
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired as error:
            left = "\n".join(f"{each.pid} {each.cmdline()}" for each in session_processes(self.pid))
            raise AirflowError(
                f"The worker {self.name} has not ended after {timeout:g} s:\n{_tail(self.log)}\n{left}"
            ) from error


class QueuedAirflow:
    """A running Airflow with queues; :func:`start_queued_airflow` makes one."""

    def __init__(self, instance: AirflowInstance, stack: contextlib.ExitStack) -> None:
        self.instance = instance
        self._stack = stack
        self._workers: list[Worker] = []

    def celery_worker(self, name: str, *, queue: str, concurrency: int, env: Mapping[str, str]) -> Worker:
        """Start ``airflow celery worker``."""
        command = ["celery", "worker", "--queues", queue, "--concurrency", str(concurrency)]
        command += ["--celery-hostname", f"{name}@%h", "--pid", str(self.instance.home / f"{name}.pid")]
        command += ["--skip-serve-logs", "--without-gossip", "--without-mingle"]
        return self._start(name, command, {"WORKER_NAME": name, **env})

    def edge_worker(self, name: str, *, queue: str, concurrency: int, env: Mapping[str, str]) -> Worker:
        """Start ``airflow edge worker``, as on a machine of its own: it has no database, and another home."""
        home = self.instance.home.parent / name
        home.mkdir()
        own = {
            "TMPDIR": str(home),
            "AIRFLOW_HOME": str(home),
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{home}/none.db",
            "AIRFLOW__EDGE__API_URL": f"{self.instance.url}/edge_worker/v1/rpcapi",
        }
        command = ["edge", "worker", "--queues", queue, "--concurrency", str(concurrency)]
        return self._start(name, [*command, "--edge-hostname", name], {**own, **env})

    def wait_for(self, done: Callable[[], object], what: str, timeout: float) -> None:
        """Wait until something is true, and all workers run that are meant to."""

        def looked() -> object:
            for worker in self._workers:
                worker.check()
            return done()

        wait_for(looked, lambda: what, timeout)

    def _start(self, name: str, command: list[str], env: Mapping[str, str]) -> Worker:
        log = self.instance.home / f"{name}.log"
        process = self._stack.enter_context(_airflow(self.instance, command, log, env))
        self._workers.append(Worker(name, process, log))
        return self._workers[-1]


@contextlib.contextmanager
def start_queued_airflow(
    home: Path, *, dags_folder: Path, env: Mapping[str, str], timeout: float = 180
) -> Iterator[QueuedAirflow]:
    """Run an Airflow whose tasks go to Celery's workers, and to edge workers or into the scheduler's own processes
    where they ask for it.

    :param home: ``AIRFLOW_HOME``; made.
    :param env: More environment variables for all of its processes, workers included.
    :param timeout: How many seconds its components may take to become healthy.
    """
    home.mkdir(parents=True)
    (home / "modules").mkdir()
    (home / "modules" / "worker_name.py").write_text(_HOSTNAME_MODULE)
    url = f"http://127.0.0.1:{free_port()}"
    with contextlib.ExitStack() as stack:
        redis = stack.enter_context(start_redis(home))
        database = stack.enter_context(start_postgres())
        full_env = {
            **{name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW")},
            "PYTHONPATH": str(home / "modules"),
            "PYTHONUNBUFFERED": "1",
            "AIRFLOW_HOME": str(home),
            "AIRFLOW__API__BASE_URL": url,
            "AIRFLOW__API__HOST": "127.0.0.1",
            "AIRFLOW__API__PORT": url.rpartition(":")[2],
            "AIRFLOW__API__WORKERS": "1",
            "AIRFLOW__API_AUTH__JWT_SECRET": "a secret of the tests' own, " * 3,
            "AIRFLOW__CELERY__BROKER_URL": redis,
            "AIRFLOW__CELERY__RESULT_BACKEND": f"db+{database}",
            "AIRFLOW__CORE__DAGS_FOLDER": str(dags_folder),
            "AIRFLOW__CORE__EXECUTION_API_SERVER_URL": f"{url}/execution/",
            "AIRFLOW__CORE__EXECUTOR": f"CeleryExecutor,LocalExecutor,{EDGE_EXECUTOR}",
            "AIRFLOW__CORE__HOSTNAME_CALLABLE": "worker_name.name",
            "AIRFLOW__CORE__LOAD_EXAMPLES": "False",
            # Of each executor; the local one starts so many processes at once.
            "AIRFLOW__CORE__PARALLELISM": "8",
            "AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": "True",
            "AIRFLOW__DAG_PROCESSOR__PARSING_PROCESSES": "1",
            "AIRFLOW__DAG_PROCESSOR__STALE_BUNDLE_CLEANUP_INTERVAL": "0",
            "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": database,
            "AIRFLOW__EDGE__API_ENABLED": "True",
            "AIRFLOW__EDGE__HEARTBEAT_INTERVAL": "2",
            "AIRFLOW__EDGE__JOB_POLL_INTERVAL": "1",
            "AIRFLOW__SCHEDULER__USE_JOB_SCHEDULE": "False",
            # Whose worker is killed is missed soon: a message that was taken but not begun, by Redis and by the
            # scheduler, and a task that ran, by its heartbeats.
            "AIRFLOW__CELERY_BROKER_TRANSPORT_OPTIONS__VISIBILITY_TIMEOUT": "20",
            "AIRFLOW__SCHEDULER__TASK_QUEUED_TIMEOUT": "60",
            "AIRFLOW__SCHEDULER__TASK_QUEUED_TIMEOUT_CHECK_INTERVAL": "5",
            "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "20",
            "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "2",
            # Seconds. A task fails when the API server answers later than this, as it does on a busy machine.
            "AIRFLOW__WORKERS__EXECUTION_API_TIMEOUT": "60",
            **env,
        }
        instance = AirflowInstance(home=home, url=url, env=full_env, process=None)
        instance.cli("db", "migrate")
        logs = {name: home / f"{name}.log" for name in ("api-server", "scheduler", "dag-processor")}
        processes = {name: stack.enter_context(_airflow(instance, [name], logs[name])) for name in logs}
        unhealthy: dict[str, str] = {}

        def healthy() -> bool:
            nonlocal unhealthy
            for name, process in processes.items():
                if process.poll() is not None:
                    raise AirflowError(
                        f"airflow {name} ended with {process.returncode}:\n{_tail(logs[name])}"
                    )
            with contextlib.suppress(OSError):
                report = instance.api("GET", "monitor/health")
                statuses = {name: report[name]["status"] for name in _COMPONENTS}
                unhealthy = {name: status for name, status in statuses.items() if status != "healthy"}
                return not unhealthy
            return False

        wait_for(healthy, lambda: f"Airflow ({unhealthy}); see {home}", timeout)
        yield QueuedAirflow(instance, stack)


def _airflow(
    instance: AirflowInstance, command: list[str], log: Path, env: Mapping[str, str] | None = None
) -> contextlib.AbstractContextManager[subprocess.Popen[bytes]]:
    return _session(
        [str(Path(sys.executable).parent / "airflow"), *command], log, {**instance.env, **(env or {})}
    )


@contextlib.contextmanager
def _session(command: list[str], log: Path, env: Mapping[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    """A process that leads a session, with all that comes of it."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            env=dict(env),
            cwd=log.parent,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        kill_session(process.pid)
        process.wait()


def kill(processes: Sequence[psutil.Process]) -> None:
    """Kill processes, and wait until they have ended."""
    for each in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            each.kill()
    psutil.wait_procs(processes, timeout=1)


def kill_session(leader: int) -> None:
    """Kill all processes of a session."""
    while left := session_processes(leader):
        kill(left)


def _tail(log: Path) -> str:
    return log.read_bytes()[-3000:].decode(errors="replace")
