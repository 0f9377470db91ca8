"""Keepers and their servers, with a fake vLLM: whatever dies, hangs or lies, one server goes on, or a reason is told."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest

from airflow_vlm_provider.engines.process_table import started_at
from airflow_vlm_provider.engines.vllm_spec import ServerSpec
from airflow_vlm_provider.errors import ConfigError, EngineError
from tests.support.fake_vllm import FakeVLLM
from tests.support.vllm_workers import attach, eventually, is_running, kill

pytestmark = pytest.mark.integration


def ask(attached):
    """Ask a server for one token."""
    body = json.dumps({"model": "m", "prompt": "slow", "max_tokens": 1}).encode()
    request = urllib.request.Request(f"{attached.url}/v1/completions", body)
    request.add_header("Authorization", f"Bearer {attached.api_key}")
    with contextlib.suppress(OSError, http.client.HTTPException):
        urllib.request.urlopen(request, timeout=30).close()


@pytest.mark.parametrize("whom", ["pid", "engine"])
def test_a_server_that_dies_is_started_again_and_nothing_is_left_of_it(worker, whom):
    spec = worker.spec()
    lease, attached = attach(worker, spec)
    (before,) = worker.fake.starts()
    kill(before[whom])
    eventually(lambda: not lease.is_current(attached))
    again = lease.attach()
    assert again is not None
    assert (again.keeper, again.loads) == (attached.keeper, 2)
    # Whoever asks meanwhile is to find it where it was.
    assert (again.url, again.api_key) == (attached.url, attached.api_key)
    assert sorted(worker.left()) == sorted(worker.fake.starts()[1][name] for name in ("pid", "engine"))


@pytest.mark.parametrize("whom", ["session", "engine", "idle engine"])
def test_a_server_that_hangs_is_replaced(worker, whom):
    spec = worker.spec()
    worker.fake.control(answer_seconds=60 if whom == "engine" else 0)
    lease, attached = attach(worker, spec, health_timeout=2, stall_timeout=3)
    (before,) = worker.fake.starts()
    if whom == "engine":
        # It computes, but nothing comes of it.
        threading.Thread(target=ask, args=(attached,), daemon=True).start()
        time.sleep(0.5)
    os.killpg(before["pid"], signal.SIGSTOP) if whom == "session" else os.kill(
        before["engine"], signal.SIGSTOP
    )
    eventually(lambda: not lease.is_current(attached))
    worker.fake.control()
    assert lease.attach().loads == 2
    assert not is_running(before["pid"])
    assert not is_running(before["engine"])
    log = (worker.server(spec).path / "keeper.log").read_text()
    assert ("no sign of health" if whom == "session" else "has computed nothing") in log


def test_a_server_in_use_that_is_merely_idle_is_left_alone(worker):
    lease, attached = attach(worker, worker.spec(), stall_timeout=2)
    time.sleep(4.5)
    assert lease.is_current(attached)
    # It was asked whether it is there.
    assert worker.fake.asked().count("a") >= 2


def test_a_server_that_answers_slowly_is_left_alone_as_long_as_it_answers(worker):
    worker.fake.control(answer_seconds=0.5)
    spec = worker.spec()
    lease, attached = attach(worker, spec, stall_timeout=3)
    until = time.monotonic() + 4
    while time.monotonic() < until:
        ask(attached)
    assert lease.is_current(attached)


def test_lack_of_memory_while_loading_is_tried_twice_and_no_fault_of_the_author(worker):
    worker.fake.control(killed_by=signal.SIGKILL, says=["loading"])
    spec = worker.spec()
    lease = worker.lease(spec)
    with pytest.raises(EngineError, match="for lack of memory") as caught:
        lease.attach()
    assert "loading" in str(caught.value)
    assert len(worker.fake.starts()) == 2
    worker.wait_for_end(spec)
    assert worker.state(spec).phase == "failed"


def test_what_passes_is_survived(worker):
    worker.fake.control(killed_by=signal.SIGKILL, bad_starts=1)
    assert attach(worker, worker.spec())[1].loads == 2


def test_lack_of_memory_while_running_is_survived(worker):
    spec = worker.spec()
    lease, _ = attach(worker, spec)
    kill(worker.fake.starts()[0]["engine"])
    eventually(lambda: worker.state(spec).loads == 2)
    assert lease.attach().loads == 2


def test_arguments_that_vllm_does_not_know_are_the_authors_fault(worker):
    spec = worker.spec(no_such_thing=3)
    with pytest.raises(ConfigError, match="unrecognized arguments: --no-such-thing=3"):
        worker.lease(spec).attach()
    # Loading it once more would not help.
    assert "starting it again" not in (worker.server(spec).path / "keeper.log").read_text()


def test_what_the_author_did_wrong_is_told_to_all_who_wait(worker):
    worker.fake.control(exits=1, says=["huggingface_hub.errors.RepositoryNotFoundError: 404, no such model"])
    spec = worker.spec()
    found = [worker.attach(worker.lease(spec)) for _ in range(4)]
    for each in found:
        assert isinstance(each.exception(40), ConfigError)
        assert "no such model" in str(each.exception())


def test_a_command_that_is_not_there_is_told(worker):
    spec = ServerSpec(model="m", gpus=("0",), command=("/no/such/vllm", "serve"))
    with pytest.raises(
        ConfigError, match=r"no vLLM on this worker(.|\n)*/no/such/vllm: No such file or directory"
    ):
        worker.lease(spec).attach()


def test_a_start_that_takes_too_long_is_given_up(worker):
    # What it said is not why it ended.
    worker.fake.control(hangs=True, says=["ValueError: no tuned kernel, another one is taken"])
    spec = worker.spec()
    with pytest.raises(EngineError, match=r"not ready after 0.5 s \(\[vlm\] engine_start_timeout\)"):
        worker.lease(spec, start_timeout=0.5).attach()
    assert worker.left() == []


def test_restarts_are_bounded(worker):
    spec = worker.spec()
    lease, _ = attach(worker, spec)
    for loads in range(1, 7):
        eventually(lambda: worker.state(spec).phase == "ready" and worker.state(spec).loads == loads)  # noqa: B023
        kill(worker.fake.starts()[-1]["pid"])
    state = worker.wait_for(spec, "failed")
    assert state.loads == 6
    assert "was ended by SIGKILL" in state.error
    assert not state.lasting
    assert state.api_key is None
    worker.wait_for_end(spec)
    # Who used it is told, and has no other one started, whose restarts would be counted anew.
    with pytest.raises(EngineError, match="was ended by SIGKILL"):
        lease.attach()
    # The next task may have more luck.
    assert worker.lease(spec).attach().loads == 1


def test_a_port_that_somebody_takes_before_the_server_has_it(worker):
    worker.fake.control(bind_seconds=0.7)
    spec = worker.spec()
    found = worker.attach(worker.lease(spec))
    state = worker.wait_for(spec, "starting")
    port = int(state.url.rpartition(":")[2])
    with socket.socket() as thief:
        # By chance nobody gets it.
        with pytest.raises(OSError, match="in use"):
            thief.bind(("127.0.0.1", port))
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        thief.bind(("127.0.0.1", port))
        thief.listen()
        attached = found.result(40)
    assert attached.loads == 2
    assert attached.url != state.url
    assert "Address already in use" in worker.server(spec).log.read_text()


def test_a_port_that_somebody_takes_while_the_server_is_down_is_left_with_the_key(worker):
    spec = worker.spec()
    lease, attached = attach(worker, spec, backoff=1.0)
    (before,) = worker.fake.starts()
    kill(before["pid"], before["engine"])
    with socket.socket() as thief:
        thief.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        thief.bind(("127.0.0.1", before["port"]))
        thief.listen()
        eventually(lambda: not lease.is_current(attached))
        again = lease.attach()
    assert again.loads == 2
    assert again.url != attached.url
    assert again.api_key != attached.api_key


def test_the_start_of_a_process_is_told_by_a_clock_that_nobody_sets():
    with subprocess.Popen(["sleep", "30"]) as process:
        ticks = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
        assert started_at(process.pid) == float(ticks)
        process.kill()
        # Dead, but nobody has taken its status yet.
        eventually(lambda: started_at(process.pid) is None)
    assert started_at(process.pid) is None
    assert FakeVLLM.COMMAND[0] == sys.executable
