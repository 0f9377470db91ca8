"""The keeper of a server, a fake one, that ends or fails: its server ends with it, and whoever needs one is told or has another."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from airflow_vlm_provider.engines import vllm_leases, vllm_process
from airflow_vlm_provider.engines.process_table import members
from airflow_vlm_provider.engines.vllm_spec import ServerSpec
from airflow_vlm_provider.errors import EngineError
from tests.support.vllm_workers import attach, eventually, guards, is_running, kill

pytestmark = pytest.mark.integration


def test_when_the_keeper_is_killed_its_server_ends_and_the_next_task_has_a_new_one(worker):
    spec = worker.spec()
    lease, attached = attach(worker, spec)
    (start,) = worker.fake.starts()
    os.kill(worker.state(spec).keeper_pid, signal.SIGKILL)
    eventually(lambda: not lease.is_current(attached))
    worker.wait_for_end(spec)
    # Only when all of it has ended is there room for another one.
    assert not is_running(start["pid"])
    assert not is_running(start["engine"])
    # Its key is not left lying around.
    assert worker.state(spec).api_key is None
    again = lease.attach()
    assert again.keeper != attached.keeper
    assert again.loads == 1


def test_a_guard_that_is_killed_is_replaced(worker):
    spec = worker.spec()
    lease, attached = attach(worker, spec)
    (guard,) = eventually(lambda: guards(worker, spec))
    kill(guard)
    (another,) = eventually(lambda: guards(worker, spec))
    assert another != guard
    assert lease.is_current(attached)
    kill(worker.state(spec).keeper_pid)
    eventually(lambda: not worker.left())


@pytest.mark.parametrize("next_one", ["the same", "another"])
def test_keeper_and_guard_killed_together_leave_a_server_that_the_next_keeper_on_the_gpu_ends(
    worker, next_one
):
    spec = worker.spec()
    lease, attached = attach(worker, spec)
    (start,) = worker.fake.starts()
    keeper, (guard,) = worker.state(spec).keeper_pid, guards(worker, spec)
    os.kill(guard, signal.SIGSTOP)
    # As the engine lives on when its API server has ended, and shows nothing of its environment.
    kill(keeper, guard, *((start["pid"],) if next_one == "the same" else ()))
    assert is_running(start["engine"])
    other = spec if next_one == "the same" else worker.spec("other")
    attach(worker, other)
    assert not is_running(start["engine"])
    assert not lease.is_current(attached)


def test_what_stands_where_a_server_once_was_is_not_ended(worker):
    spec = worker.spec()
    innocent = subprocess.Popen(["sleep", "60"], start_new_session=True)
    try:
        server = worker.server(spec)
        state = {"version": 1, "keeper": "x", "phase": "ready", "since": 0, "server_pid": innocent.pid}
        (server.path / "state.json").write_text(json.dumps(state | {"server_output": "pipe:[12]"}))
        attach(worker, spec)
        assert innocent.poll() is None
    finally:
        innocent.kill()
        innocent.wait()


def test_sigterm_to_the_keeper_ends_the_server_and_who_still_needs_it_has_a_new_one(worker):
    spec = worker.spec()
    lease, attached = attach(worker, spec)
    (start,) = worker.fake.starts()
    os.kill(worker.state(spec).keeper_pid, signal.SIGTERM)
    eventually(lambda: not lease.is_current(attached))
    again = lease.attach()
    assert again.keeper != attached.keeper
    assert not is_running(start["pid"])
    assert worker.left() == [worker.fake.starts()[1]["pid"], worker.fake.starts()[1]["engine"]]


def test_a_keeper_that_can_not_start_is_told(worker, monkeypatch):
    monkeypatch.setattr(vllm_leases.sys, "executable", "/bin/false")
    spec = worker.spec()
    with pytest.raises(EngineError, match=r"did not start .*keeper\.log"):
        worker.lease(spec).attach()
    monkeypatch.undo()
    assert not worker.has_keeper(spec)


def test_keepers_that_end_without_a_word_are_not_started_for_ever(worker, monkeypatch):
    monkeypatch.setattr(vllm_leases.sys, "executable", "/bin/true")
    with pytest.raises(EngineError, match="ended 3 times without a word"):
        worker.lease(worker.spec()).attach()


def test_a_keeper_that_fails_is_told_and_not_started_for_ever(worker):
    # No process can be started with this.
    spec = worker.spec(chat_template="a\0b")
    with pytest.raises(
        EngineError, match=r"keeper failed \(ValueError: embedded null byte\); see .*keeper\.log"
    ):
        worker.lease(spec).attach()
    worker.wait_for_end(spec)
    assert worker.state(spec).phase == "failed"
    log = (worker.server(spec).path / "keeper.log").read_text()
    assert log.count("Traceback") == 1


def test_a_keeper_that_fails_takes_its_server_with_it(worker, monkeypatch):
    spec = worker.spec()
    # In the keeper's process, by a module that every Python imports when it starts.
    (worker.path / "site").mkdir()
    (worker.path / "site" / "sitecustomize.py").write_text(
        "import airflow_vlm_provider.engines.vllm_health as health\n"
        "def look(*_, **__): raise RuntimeError('no more threads')\n"
        "health.Health.look = look\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{worker.path / 'site'}:{Path(__file__).parents[2]}")
    with pytest.raises(EngineError, match=r"keeper failed \(RuntimeError: no more threads\)"):
        worker.lease(spec).attach()
    assert len(worker.fake.starts()) <= 1
    assert worker.left() == []


def test_a_server_whose_output_nobody_can_take_is_ended(tmp_path, monkeypatch):
    started = []

    def no_thread(_):
        raise RuntimeError("can't start new thread")

    def tell(output):
        started.append(output)
        monkeypatch.setattr(threading.Thread, "start", no_thread)

    spec = ServerSpec(model="m", gpus=("cpu",), command=("sh", "-c", "sleep 60 & sleep 60"))
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(RuntimeError, match="can't start new thread"):
        vllm_process.ServerProcess(spec, port=1, api_key="k", log=tmp_path / "log", tell=tell)
    assert members(session=None, output=started[0]) == set()
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_keeper_that_is_killed_while_it_starts_a_server_leaves_none(tmp_path):
    program = """
import os, signal, subprocess, sys
from pathlib import Path
from airflow_vlm_provider.engines.vllm_guard import Guard
from airflow_vlm_provider.engines.vllm_process import ServerProcess
from airflow_vlm_provider.engines.vllm_spec import ServerSpec

class Killed(subprocess.Popen):
    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        print(self.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)

guard = Guard(lambda: None)
subprocess.Popen = Killed
spec = ServerSpec(model="m", gpus=("cpu",), command=("sh", "-c", "sleep 60 & sleep 60"))
ServerProcess(spec, port=1, api_key="k", log=Path("log"), tell=guard.watch)
"""
    ended = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL
    eventually(lambda: not members(session=int(ended.stdout), output=None))


def test_signals_that_the_task_does_not_hear_are_heard_by_the_keeper(worker):
    blocked = {signal.SIGTERM, signal.SIGUSR1, signal.SIGCHLD}
    handler = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, blocked)
    try:
        spec = worker.spec()
        lease, _ = attach(worker, spec)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)
        signal.signal(signal.SIGCHLD, handler)
    kill(worker.fake.starts()[0]["pid"])
    eventually(lambda: worker.state(spec).loads == 2 and worker.state(spec).phase == "ready")
    assert "SIGKILL" in (worker.server(spec).path / "keeper.log").read_text()
    lease.release()
    os.kill(worker.state(spec).keeper_pid, signal.SIGTERM)
    worker.wait_for_end(spec)
