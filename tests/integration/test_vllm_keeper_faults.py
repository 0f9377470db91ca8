"""Keepers and their servers, with a fake vLLM: whatever dies, hangs or lies, one server goes on, or a reason is told."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from dataclasses import asdict
from pathlib import Path

import pytest

from airflow_vlm_provider.engines import vllm_leases, vllm_process
from airflow_vlm_provider.engines.process_table import members, started_at
from airflow_vlm_provider.engines.vllm_folder import EngineFolder
from airflow_vlm_provider.engines.vllm_spec import ServerSpec
from airflow_vlm_provider.errors import ConfigError, EngineError
from tests.support.fake_vllm import FakeVLLM
from tests.support.vllm_workers import eventually, is_running, vllm_worker

pytestmark = pytest.mark.integration


@pytest.fixture
def worker(tmp_path, monkeypatch):
    with vllm_worker(tmp_path, monkeypatch) as made:
        yield made


def attach(worker, spec, **settings):
    lease = worker.lease(spec, **settings)
    attached = lease.attach()
    assert attached is not None
    return lease, attached


def ask(attached):
    """Ask a server for one token."""
    body = json.dumps({"model": "m", "prompt": "slow", "max_tokens": 1}).encode()
    request = urllib.request.Request(f"{attached.url}/v1/completions", body)
    request.add_header("Authorization", f"Bearer {attached.api_key}")
    with contextlib.suppress(OSError, http.client.HTTPException):
        urllib.request.urlopen(request, timeout=30).close()


def kill(*pids):
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    eventually(lambda: not any(is_running(pid) for pid in pids))


def guards(worker, spec):
    """The processes that a keeper has forked: its guard."""
    keeper = worker.state(spec).keeper_pid
    return [pid for pid in worker.keeper_processes() if pid != keeper]


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


def test_a_full_disk_for_its_log_does_not_stop_a_server(worker):
    spec = worker.spec()
    server = worker.server(spec)
    server.log.symlink_to("/dev/full")
    # Far more than a pipe holds.
    worker.fake.control(prints_mb=2, says=["first"])
    lease, attached = attach(worker, spec)
    assert lease.is_current(attached)
    kill(worker.fake.starts()[0]["pid"])
    eventually(lambda: worker.state(spec).loads == 2)
    assert lease.attach() is not None
    # Nor is every line that was lost told in another log.
    assert (server.path / "keeper.log").stat().st_size < 10_000


def test_a_full_disk_for_everything(worker, tmp_path):
    """On a file system of its own that is too small for anything."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k,mode=0700", "tmpfs", str(small)],
        capture_output=True,
        text=True,
    )
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr}")
    try:
        folder = EngineFolder(small)
        spec = worker.spec()

        def lease(spec):
            return vllm_leases.Lease(folder, spec, settings=worker.settings, holder={}, say=lambda _: None)

        first = lease(spec)
        attached = first.attach()
        filler = small / "filler"
        with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        # Who has a server keeps it, and others get it, too, though nothing can be written about them.
        assert first.is_current(attached)
        second = lease(spec)
        assert second.attach() == attached
        with folder.server(spec.key).gate():
            assert len(folder.server(spec.key).leases()) == 2
        second.release()
        # A new one can't be had, and that may pass.
        new = lease(worker.spec("new", gpus="1"))
        with pytest.raises(EngineError, match="No space left on device"):
            new.attach()
        kill(worker.fake.starts()[0]["pid"])
        eventually(lambda: len(worker.fake.starts()) == 2)
        time.sleep(0.5)
        filler.unlink()
        eventually(lambda: not first.is_current(attached))
        assert first.attach().loads == 2
        assert new.attach().loads == 1
        new.release()
        first.release()
        for server in (first.server, new.server):
            with server.gate():
                server.signal_keeper(signal.SIGTERM)
            state = eventually(lambda: (found := server.read_state()) and found.phase == "stopped" and found)  # noqa: B023
            eventually(lambda: not is_running(state.keeper_pid))  # noqa: B023
    finally:
        eventually(lambda: not worker.left())
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_a_state_that_nobody_can_read_is_written_again(worker):
    spec = worker.spec()
    lease, attached = attach(worker, spec)
    path = worker.server(spec).path / "state.json"
    for garbage in (b"\xff\x00{", b"[]", b'{"version": 1, "phase": "ready"}', b'{"version": 99}', b""):
        path.write_bytes(garbage)
        again = worker.lease(spec)
        assert again.attach() == attached
        again.release()
    path.unlink()
    assert worker.lease(spec).attach() == attached
    assert lease.is_current(attached)


def test_garbage_from_before_does_not_keep_a_server_from_starting(worker):
    spec = worker.spec()
    server = worker.server(spec)
    for name in ("state.json", "spec.json", "pins/x", "leases/y"):
        (server.path / name).write_bytes(b"\xff{")
    attach(worker, spec)
    assert json.loads((server.path / "spec.json").read_text()) == spec.to_json()


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


def test_a_keeper_whose_folder_is_deleted_stops(worker):
    spec = worker.spec()
    attach(worker, spec)
    shutil.rmtree(worker.folder.path)
    eventually(lambda: not worker.left())
    eventually(lambda: not worker.keeper_processes())
    assert attach(worker, spec)[1].loads == 1


@pytest.mark.parametrize("name", ["keeper.lock", "gpu"])
def test_a_keeper_whose_lock_is_deleted_stops_instead_of_sharing_a_gpu(worker, name):
    spec = worker.spec()
    _, attached = attach(worker, spec)
    path = worker.folder.path / "gpus" / "0.lock" if name == "gpu" else worker.server(spec).path / name
    path.unlink()
    eventually(lambda: not worker.left())
    again = worker.lease(spec).attach()
    assert again.keeper != attached.keeper


def test_a_folder_of_another_user_is_not_used(worker, monkeypatch):
    worker.folder.path.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(ConfigError, match=r"belongs to another user; set \[vlm\] engine_dir"):
        worker.lease(worker.spec())


def test_a_folder_that_others_may_write_to_is_not_used(worker):
    worker.folder.path.mkdir()
    worker.folder.path.chmod(0o777)
    with pytest.raises(ConfigError, match="can be written to by others"):
        worker.lease(worker.spec())


def test_a_folder_that_can_not_be_made_is_told(worker):
    worker.folder.path.write_text("no folder")
    try:
        with pytest.raises(
            EngineError, match=r"engine folder .* can't be used: (Not a directory|File exists)"
        ):
            worker.lease(worker.spec())
    finally:
        worker.folder.path.unlink()


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


def test_the_log_shows_the_last_step_of_a_progress_bar_and_never_the_key(worker):
    spec = worker.spec()
    worker.fake.control(says=["loading:   0%\rloading:  50%\rloading: 100%", "my key is $VLLM_API_KEY"])
    _, attached = attach(worker, spec)
    lines = worker.server(spec).log.read_text().splitlines()
    assert lines[:2] == ["loading: 100%", "my key is ***"]
    assert attached.api_key not in "".join(lines)


def test_a_log_is_kept_small_and_a_line_without_end_does_no_harm(tmp_path, monkeypatch):
    monkeypatch.setattr(vllm_process, "LOG_BYTES", 100_000)
    program = "print('x' * 5_000_000); [print(number, 'y' * 90) for number in range(3000)]; print('last')"
    spec = ServerSpec(model="m", gpus=("cpu",), command=(sys.executable, "-c", program))
    log = tmp_path / "server.log"
    process = vllm_process.ServerProcess(spec, port=1, api_key="k", log=log, tell=lambda _: None)
    eventually(lambda: process.status() is not None)
    process.end(gently=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["server.log", "server.log.1"]
    assert max(path.stat().st_size for path in tmp_path.iterdir()) <= 100_000
    assert log.read_text().endswith("\nlast\n")
    lines = process.last_lines()
    assert len(lines) == vllm_process.KEPT_LINES
    assert lines[-1] == "last"


def test_folders_of_servers_that_have_not_run_for_long_are_removed(worker):
    old, held, new = worker.spec("old"), worker.spec("held", gpus="1"), worker.spec("new")
    worker.settings = type(worker.settings)(**(asdict(worker.settings) | {"idle_timeout": 0.1}))
    for spec in (old, new):
        lease, _ = attach(worker, spec)
        lease.release()
        worker.wait_for_end(spec)
    lease, attached = attach(worker, held)
    for spec in (old, held):
        path = worker.server(spec).path
        os.utime(path, (time.time(), time.time() - 30 * 24 * 3600))
    waiting = worker.lease(new)
    waiting.attach()
    waiting.release()
    worker.wait_for_end(new)
    assert not (worker.folder.path / old.key).exists()
    assert (worker.folder.path / new.key).exists()
    assert lease.is_current(attached)
    # One that was removed while somebody was on the way to it.
    assert attach(worker, old)[1].loads == 1


def test_the_start_of_a_process_is_told_by_a_clock_that_nobody_sets():
    with subprocess.Popen(["sleep", "30"]) as process:
        ticks = Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[19]
        assert started_at(process.pid) == float(ticks)
        process.kill()
        # Dead, but nobody has taken its status yet.
        eventually(lambda: started_at(process.pid) is None)
    assert started_at(process.pid) is None
    assert FakeVLLM.COMMAND[0] == sys.executable
