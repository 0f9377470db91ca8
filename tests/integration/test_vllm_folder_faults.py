"""The folder of a worker's servers, fake ones, on a disk that is full, deleted, filled with garbage, or somebody else's."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict

import pytest

from airflow_vlm_provider.engines import vllm_leases, vllm_process
from airflow_vlm_provider.engines.vllm_folder import EngineFolder
from airflow_vlm_provider.engines.vllm_spec import ServerSpec
from airflow_vlm_provider.errors import ConfigError, EngineError
from tests.support.vllm_workers import attach, eventually, is_running, kill

pytestmark = pytest.mark.integration


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
