"""How a benchmark runs a client: a process of its own, against an endpoint of its own, watched from outside."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path

import psutil
from dataset import BENCH, ROOT

sys.path.insert(0, str(ROOT))
from tests.support.stub_endpoint import start_stub

LATENCY = 0.2  # seconds an answer takes
CAPACITY = 64  # requests served at once, and in flight from each client that can
LIMIT = 900  # seconds after which a client counts as hung


@dataclass(frozen=True)
class Client:
    """A way to tag pictures.

    :param label: Its name in the table.
    :param script: The script beside this one that runs it.
    :param environment: Name and contents of the environment it needs; None is the project's own.
    :param share: The part of the images it gets; less than 1 for one that would take many minutes.
    :param options: More options for the script.
    """

    label: str
    script: str
    environment: tuple[str, Sequence[Sequence[str]]] | None = None
    share: float = 1.0
    options: tuple[str, ...] = ()


@dataclass
class Run:
    """What one client did in one round.

    :param cpu_ms: CPU milliseconds an image, user and system, within the measured part.
    :param process_seconds: From the start of the process to its end.
    :param process_cpu_ms: As ``cpu_ms``, over the whole process: imports, start-up and warm-up included.
    :param peak_mb: Peak memory of its largest process.
    :param stub_cpu_ms: CPU milliseconds an image that the endpoint took.
    :param others: Cores that everything else on the machine kept busy meanwhile.
    """

    images: int
    rate: float
    cpu_ms: float
    process_seconds: float
    process_cpu_ms: float
    peak_mb: float
    stub_cpu_ms: float
    others: float


class ClientError(Exception):
    """A client did not do the whole work; the message says how."""


def busy_seconds() -> float:
    """CPU seconds of all processes since the machine started."""
    times = psutil.cpu_times()
    return float(times.user + times.system + times.nice)


def run(
    client: Client, python: Path, *, images: int, data: Path, latency: float = LATENCY, log_name: str
) -> Run:
    """Start the client against a fresh endpoint, wait for it, and check that it tagged every picture.

    :param latency: Seconds that the endpoint takes for an answer.
    :raises ClientError: It did not.
    """
    log = BENCH / "logs" / f"{log_name}.log"
    log.parent.mkdir(exist_ok=True)
    environ = {**os.environ, "AIRFLOW_HOME": str(BENCH / "airflow"), "PYTHONPATH": str(ROOT)}
    with (
        tempfile.TemporaryDirectory(dir=BENCH, prefix="scratch-") as folder,
        start_stub(latency=latency, capacity=CAPACITY) as stub,
        log.open("w") as output,
    ):
        out, result = Path(folder, "out"), Path(folder, "result.json")
        out.mkdir()
        options: Mapping[str, object] = {
            "base-url": stub.base_url,
            "data": data,
            "out": out,
            "result": result,
            "images": images,
            "in-flight": CAPACITY,
        }
        command = [str(python), str(ROOT / "benchmarks" / client.script), *client.options]
        command += [f"--{name}={value}" for name, value in options.items()]
        endpoint = psutil.Process(stub.pid)
        stub_cpu = sum(endpoint.cpu_times()[:2])
        busy, start = busy_seconds(), time.perf_counter()
        process = subprocess.Popen(
            command, stdout=output, stderr=output, env=environ, cwd=folder, start_new_session=True
        )
        try:
            used = wait(process)
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
        seconds = time.perf_counter() - start
        stub_cpu = sum(endpoint.cpu_times()[:2]) - stub_cpu
        busy = busy_seconds() - busy
        stats = stub.stats()
        if process.returncode or not result.exists():
            raise ClientError(f"exit status {process.returncode}, see {log.relative_to(ROOT)}")
        figures = json.loads(result.read_text())
    answered = len(stats["by_image"])
    if figures["tagged"] != images or answered != images:
        raise ClientError(f"{figures['tagged']} rows tagged and {answered} pictures asked of {images}")
    return Run(
        images=images,
        rate=images / figures["seconds"],
        cpu_ms=1000 * figures["cpu_seconds"] / images,
        process_seconds=seconds,
        process_cpu_ms=1000 * used / images,
        peak_mb=figures["peak_mb"],
        stub_cpu_ms=1000 * stub_cpu / images,
        others=max(0.0, (busy - used - stub_cpu) / seconds),
    )


def wait(process: subprocess.Popen[bytes]) -> float:
    """Wait for a client and return the CPU seconds of it and of its children.

    :raises ClientError: It hangs.
    """
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        # Not Popen.wait(), because it throws the resource usage away.
        pid, status, usage = os.wait4(process.pid, os.WNOHANG)
        if pid:
            process.returncode = os.waitstatus_to_exitcode(status)
            return usage.ru_utime + usage.ru_stime
        time.sleep(0.05)
    raise ClientError(f"not done after {LIMIT} s")


def machine() -> str:
    memory = psutil.virtual_memory().total / 2**30
    packages = ", ".join(f"{name} {version(name)}" for name in ("apache-airflow", "openai"))
    return (
        f"{datetime.now(timezone.utc):%Y-%m-%d %H:%M} UTC, {os.cpu_count()} cores, {memory:.0f} GiB, "
        f"{platform.system()} {platform.machine()}, Python {platform.python_version()}, {packages}"
    )
