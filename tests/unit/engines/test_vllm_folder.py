"""The folder through which tasks and keepers find each other: locks, leases, pins, and what is left of them."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
import threading
import time

import pytest

from airflow_vlm_provider.engines.file_locks import is_file_of, try_open_locked
from airflow_vlm_provider.engines.process_table import started_at
from airflow_vlm_provider.engines.vllm_folder import EngineFolder
from airflow_vlm_provider.engines.vllm_state import ServerState
from tests.support.vllm_workers import eventually


@pytest.fixture
def folder(tmp_path):
    return EngineFolder(tmp_path / "engines")


@pytest.fixture
def server(folder):
    return folder.server("k")


def holder(**more):
    return {"pid": os.getpid(), "started": started_at(os.getpid()), **more}


def test_a_keeper_has_its_lock_as_long_as_any_process_has_it_open(server):
    with server.gate():
        lock = server.keeper_lock()
    with server.gate():
        assert server.has_keeper()
        with pytest.raises(BlockingIOError):
            server.keeper_lock()
    other = os.dup(lock)
    os.close(lock)
    with server.gate():
        assert server.has_keeper()
    os.close(other)
    with server.gate():
        assert not server.has_keeper()


def test_leases_are_those_that_are_held(server):
    with server.gate():
        path, file = server.take_lease(holder(task_id="a"))
        server.take_lease(holder(task_id="b"))
        assert sorted(each["task_id"] for each in server.leases()) == ["a", "b"]
    os.close(file)
    with server.gate():
        assert [each["task_id"] for each in server.leases()] == ["b"]
    assert not path.exists()


def test_a_lease_whose_holder_could_not_be_written_holds_all_the_same(server, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with server.gate():
        server.take_lease(holder())
        assert server.leases() == [{}]


def test_a_lease_of_a_process_that_is_gone_counts_for_nothing_though_a_child_has_it_open(server):
    with server.gate():
        server.take_lease(holder(started=1.0))
        assert server.leases() == []


def test_a_gate_lets_one_pass_at_a_time(server):
    inside, order = threading.Event(), []

    def second():
        inside.wait()
        with server.gate():
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with server.gate():
        inside.set()
        time.sleep(0.2)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]


def test_who_waits_at_a_gate_that_is_removed_meanwhile_finds_a_new_one(folder, server):
    waiting, passed = threading.Event(), []

    def late():
        waiting.set()
        with server.gate():
            passed.append(
                is_file_of(os.open(server.path / "gate.lock", os.O_RDONLY), server.path / "gate.lock")
            )
            server.write_state(ServerState("a", "waiting", 0))

    thread = threading.Thread(target=late)
    with server.gate():
        thread.start()
        waiting.wait()
        time.sleep(0.2)
        server.path.rename(server.path.with_name("away"))
    thread.join()
    assert passed == [True]
    assert folder.server("k").read_state() == ServerState("a", "waiting", 0)


def test_only_what_nobody_uses_is_removed(folder):
    held, kept, pinned, free = (folder.server(name) for name in ("held", "kept", "pinned", "free"))
    for each in (held, kept, pinned, free):
        each.write_spec({"gpus": []})
    with held.gate():
        _, lease = held.take_lease(holder())
    with kept.gate():
        lock = kept.keeper_lock()
    with pinned.gate():
        pinned.pin("run", until=time.time() + 60)
    for each in (held, kept, pinned, free):
        each.remove()
    assert {each.key for each in folder.servers()} == {"held", "kept", "pinned"}
    os.close(lease)
    os.close(lock)


def test_what_is_new_is_not_tidied_away(folder, server):
    server.write_spec({"gpus": []})
    folder.tidy()
    assert len(folder.servers()) == 1
    os.utime(server.path, (0, 0))
    server.touch()
    folder.tidy()
    assert len(folder.servers()) == 1
    os.utime(server.path, (0, 0))
    folder.tidy()
    assert folder.servers() == []


def test_a_gpu_is_one_keepers(folder):
    folder.server("k")
    claim = folder.claim("0")
    assert claim is not None
    assert folder.claim("0") is None
    assert folder.claim("1") is not None
    assert not folder.is_wanted("0")
    with folder.wanting("0"), folder.wanting("0"):
        assert folder.is_wanted("0")
        assert not folder.is_wanted("1")
    assert not folder.is_wanted("0")
    assert folder.is_claim("0", claim)
    (folder.path / "gpus" / "0.lock").unlink()
    assert not folder.is_claim("0", claim)


def test_pins_end_and_what_can_not_be_read_is_none(server):
    with server.gate():
        server.pin("now", until=time.time() + 60)
        server.pin("past", until=time.time() - 1)
        (server.path / "pins" / "x").write_bytes(b"\xff")
        (server.path / "pins" / "y").write_text("[1]")
        assert server.pins() == ["now"]
        assert len(list((server.path / "pins").iterdir())) == 1
        assert server.unpin("now")
        assert not server.unpin("now")


@pytest.mark.parametrize(
    "garbage", [b"", b"{", b"[]", b"null", b'{"version": 2}', b'{"version": 1, "x": 1}', b"\xff"]
)
def test_a_state_that_can_not_be_read_is_none(server, garbage):
    state = ServerState("k1", "ready", 1.5, api_key="sk", loads=2)
    server.write_state(state)
    assert server.read_state() == state
    assert "sk" not in repr(state)
    (server.path / "state.json").write_bytes(garbage)
    assert server.read_state() is None


def test_what_is_written_is_for_this_user_alone(folder, server):
    server.write_state(ServerState("k1", "ready", 1.5))
    modes = {
        path.name: stat.S_IMODE(path.stat().st_mode)
        for path in (folder.path, server.path, *server.path.iterdir())
    }
    assert modes == {"engines": 0o700, "k": 0o700, "leases": 0o700, "pins": 0o700, "state.json": 0o600}


def test_a_write_that_fails_leaves_the_old_state_and_no_litter(server, monkeypatch):
    server.write_state(ServerState("k1", "ready", 1.5))
    monkeypatch.setattr("json.dump", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        server.write_state(ServerState("k1", "failed", 2.5))
    state = server.read_state()
    assert state is not None
    assert state.phase == "ready"
    assert len(list(server.path.iterdir())) == 3


def test_the_end_of_the_log_begins_with_a_whole_line(server):
    assert server.log_tail() == ""
    server.log.write_text("first\n" + "x" * 50 + "\nlast\n")
    assert server.log_tail(max_bytes=20) == "last\n"
    assert server.log_tail().startswith("first\n")


def test_a_program_that_is_started_does_not_have_the_locks(tmp_path):
    lock = try_open_locked(tmp_path / "lock")
    assert lock is not None
    with subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, close_fds=False
    ) as process:
        os.close(lock)
        # The kernel lets go on who starts a program before it has closed what that is not to have.
        again = eventually(lambda: try_open_locked(tmp_path / "lock"))
        assert process.poll() is None
        process.communicate(b"\n")
    os.close(again)
