"""Servers of a worker, with a fake vLLM: who starts them, who shares them, what they wait for, and when they stop."""

from __future__ import annotations

import os
import signal
import stat
import time
from collections import Counter
from pathlib import Path

import pytest

from tests.support.vllm_workers import eventually, is_running, vllm_worker

pytestmark = pytest.mark.integration


def test_sixteen_tasks_that_start_at_once_share_one_server(worker):
    spec = worker.spec()
    worker.fake.control(load_seconds=0.5)
    with worker.processes() as tasks:
        started = [tasks.lease(spec) for _ in range(16)]
        attached = [task.wait_for("attached") for task in started]
        assert len(worker.fake.starts()) == 1
        assert {each["url"] for each in attached} == {attached[0]["url"]}
        assert {each["loads"] for each in attached} == {1}
        with worker.server(spec).gate():
            leases = worker.server(spec).leases()
        assert {each["pid"] for each in leases} == {task.pid for task in started}


def test_models_on_one_gpu_take_turns_and_nobody_slips_in(worker):
    first, second = worker.spec("first"), worker.spec("second")
    lease = worker.lease(first)
    lease.attach()
    other = worker.lease(second)
    found = worker.attach(other)
    worker.wait_for(first, "draining")
    # A further task of the first model waits behind the second one's.
    late_lease = worker.lease(first)
    late = worker.attach(late_lease)
    eventually(lambda: late_lease.said)
    assert "takes no more tasks" in late_lease.said[0]
    assert worker.state(second).phase == "waiting"
    assert len(worker.fake.starts()) == 1
    lease.release()
    assert found.result(40) is not None
    assert [start["argv"][2] for start in worker.fake.starts()] == ["first", "second"]
    # And now the other way round.
    worker.wait_for(second, "draining")
    assert not late.done()
    other.release()
    assert late.result(40) is not None
    assert [start["argv"][2] for start in worker.fake.starts()] == ["first", "second", "first"]


def test_the_waiting_task_gets_the_gpu_when_the_tasks_before_it_end(worker):
    first, second = worker.spec("first"), worker.spec("second")
    with worker.processes() as tasks:
        one, two = tasks.lease(first), tasks.lease(first)
        one.wait_for("attached")
        two.wait_for("attached")
        other = tasks.lease(second)
        worker.wait_for(first, "draining")
        # One by SIGKILL, one as it should be.
        one.kill()
        time.sleep(0.6)
        assert other.told("attached") is None
        two.release()
        other.wait_for("attached")
        again = tasks.lease(first)
        worker.wait_for(second, "draining")
        other.release()
        assert again.wait_for("attached")["loads"] == 1
    assert [start["argv"][2] for start in worker.fake.starts()] == ["first", "second", "first"]


def test_gpus_are_used_beside_each_other(worker):
    one, two, both = worker.spec("a", gpus="0"), worker.spec("b", gpus="1"), worker.spec("c", gpus="0,1")
    leases = [worker.lease(one), worker.lease(two)]
    assert all(lease.attach() for lease in leases)
    assert sorted(start["gpus"] for start in worker.fake.starts()) == ["0", "1"]
    # Both drain at once, or the second would only begin to when the first had ended.
    found = worker.attach(worker.lease(both))
    worker.wait_for(one, "draining")
    worker.wait_for(two, "draining")
    for lease in leases:
        lease.release()
    assert found.result(40) is not None
    assert worker.fake.starts()[-1]["gpus"] == "0,1"


def test_keepers_that_want_overlapping_gpus_do_not_wait_for_each_other_for_ever(worker, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    specs = [worker.spec("a", gpus="0,1"), worker.spec("b", gpus="1,2"), worker.spec("c", gpus="2,0")]
    with worker.processes() as tasks:
        left = [tasks.lease(spec) for spec in specs]
        while left:
            ready = eventually(lambda: [task for task in left if task.told("attached")])
            for task in ready:
                task.release()
                left.remove(task)
    assert sorted(start["argv"][2] for start in worker.fake.starts()) == ["a", "b", "c"]


def test_a_keeper_that_waits_for_nobody_any_more_lets_the_warm_server_be(worker):
    first, second = worker.spec("first"), worker.spec("second")
    lease = worker.lease(first)
    lease.attach()
    with worker.processes() as tasks:
        task = tasks.lease(second)
        worker.wait_for(first, "draining")
        task.kill()
        worker.wait_for_end(second)
    worker.wait_for(first, "ready")
    assert worker.state(first).loads == 1


def test_a_lease_ends_with_its_task_even_if_a_child_lives_on(worker):
    spec = worker.spec()
    with worker.processes() as tasks:
        task = tasks.lease(spec, forks=True, idle_timeout=0.5)
        child = task.wait_for("child")
        try:
            time.sleep(0.8)
            assert worker.state(spec).phase == "ready"
            task.kill()
            assert is_running(child)
            worker.wait_for_end(spec)
        finally:
            os.kill(child, signal.SIGKILL)


def test_an_idle_server_stops_and_a_leased_one_stays(worker):
    spec = worker.spec()
    lease = worker.lease(spec, idle_timeout=0.5)
    lease.attach()
    time.sleep(1.2)
    assert worker.state(spec).phase == "ready"
    lease.release()
    worker.wait_for_end(spec)
    state = worker.state(spec)
    assert (state.phase, state.loads) == ("stopped", 1)
    # Nobody can ask with the key any more, and it is not left lying around.
    assert (state.api_key, state.url, state.server_pid) == (None, None, None)
    api_key = worker.fake.starts()[0]["api_key"]
    files = [path.read_text() for path in worker.server(spec).path.rglob("*") if path.is_file()]
    assert not any(api_key in text for text in files)


def test_the_next_task_gets_a_server_that_is_there_or_a_new_one_but_none_that_stops(worker):
    spec = worker.spec()
    for number in range(6):
        lease = worker.lease(spec, idle_timeout=0.01)
        attached = lease.attach()
        assert attached is not None
        assert lease.is_current(attached)
        time.sleep(0.3)
        assert lease.is_current(attached)
        lease.release()
        # Sooner and later than the keeper looks, in the hope to meet it.
        time.sleep(0.05 * number)


def test_a_server_is_not_stopped_while_somebody_decides_whether_to_use_it(worker):
    spec = worker.spec()
    lease = worker.lease(spec, idle_timeout=0.3)
    lease.attach()
    lease.release()
    server = worker.server(spec)
    with server.gate():
        # As of now it may be leased, however long that takes.
        phase = worker.state(spec).phase
        time.sleep(1)
        _, file = server.take_lease({})
    assert phase == "ready"
    time.sleep(0.8)
    assert worker.state(spec).phase == "ready"
    os.close(file)
    worker.wait_for_end(spec)


def test_a_pin_keeps_a_server_without_tasks_and_the_end_of_the_pin_ends_it(worker):
    spec = worker.spec()
    lease = worker.lease(spec, idle_timeout=0.3)
    lease.attach()
    lease.pin("a run", until=time.time() + 60)
    lease.pin("another", until=time.time() + 60)
    lease.release()
    time.sleep(1)
    assert worker.state(spec).phase == "ready"
    assert not lease.unpin("a run")
    assert not lease.unpin("a run")
    assert lease.unpin("another")
    worker.wait_for_end(spec)
    assert worker.state(spec).phase == "stopped"


def test_a_pin_has_an_end(worker):
    spec = worker.spec()
    lease = worker.lease(spec, idle_timeout=0.3)
    lease.attach()
    until = time.time() + 1
    lease.pin("a run", until=until)
    lease.release()
    worker.wait_for_end(spec)
    assert time.time() >= until


def test_who_is_not_done_keeps_the_server_that_another_run_gives_back(worker):
    spec = worker.spec()
    lease, other = worker.lease(spec), worker.lease(spec)
    attached = lease.attach()
    lease.pin("a run", until=time.time() + 60)
    other.attach()
    lease.release()
    assert not lease.unpin("a run")
    # Told to go as soon as nobody uses it, while somebody does.
    os.kill(worker.state(spec).keeper_pid, signal.SIGUSR1)
    time.sleep(0.8)
    assert other.is_current(attached)
    other.release()
    time.sleep(0.8)
    assert worker.state(spec).phase == "ready"


def test_the_tasks_of_the_run_that_pinned_a_server_are_not_kept_waiting_by_another_model(worker):
    first, second = worker.spec("first"), worker.spec("second")
    lease = worker.lease(first)
    lease.attach()
    lease.pin("a run", until=time.time() + 60)
    lease.release()
    found = worker.attach(worker.lease(second))
    worker.wait_for(second, "waiting")
    time.sleep(0.6)
    # Else they would wait for its end, and that for theirs.
    assert lease.attach() is not None
    lease.release()
    lease.unpin("a run")
    assert found.result(40) is not None


def test_the_server_stops_at_once_when_the_worker_has_ended(worker):
    spec = worker.spec()
    with worker.processes(airflow=True) as tasks:
        task = tasks.lease(spec)
        task.wait_for("attached")
        with worker.server(spec).gate():
            (holder,) = worker.server(spec).leases()
        assert holder["owner"]["pid"] == tasks.pid
        task.release()
        time.sleep(0.8)
        assert worker.state(spec).phase == "ready"
    worker.wait_for_end(spec)


def test_a_task_that_outlives_its_worker_keeps_the_server_until_it_ends(worker):
    spec = worker.spec()
    with worker.processes(airflow=True) as tasks:
        task = tasks.lease(spec)
        task.wait_for("attached")
        os.kill(tasks.pid, signal.SIGKILL)
        eventually(lambda: not is_running(tasks.pid))
        time.sleep(0.8)
        assert worker.state(spec).phase == "ready"
        task.release()
        worker.wait_for_end(spec)


def test_a_second_worker_keeps_the_server_that_the_first_one_had_started(worker):
    spec = worker.spec()
    with worker.processes(airflow=True) as tasks:
        with worker.processes(airflow=True) as others:
            for each in (tasks, others):
                task = each.lease(spec)
                task.wait_for("attached")
                # So long that the keeper has seen it.
                time.sleep(0.6)
                task.release()
        time.sleep(0.8)
        assert worker.state(spec).phase == "ready"
    worker.wait_for_end(spec)
    assert len(worker.fake.starts()) == 1


def test_a_script_without_a_worker_leaves_its_server_to_the_idle_timeout(worker):
    spec = worker.spec()
    with worker.processes() as tasks:
        task = tasks.lease(spec)
        task.wait_for("attached")
        with worker.server(spec).gate():
            (holder,) = worker.server(spec).leases()
        assert holder["owner"] is None
        task.release()
    time.sleep(0.8)
    assert worker.state(spec).phase == "ready"


def test_what_is_on_disk_is_for_this_user_alone_whatever_the_umask(worker):
    old = os.umask(0)
    try:
        lease = worker.lease(worker.spec())
        lease.attach()
    finally:
        os.umask(old)
    modes = Counter()
    for path in [worker.folder.path, *worker.folder.path.rglob("*")]:
        if path.name not in ("server.log", "keeper.log"):
            modes[path.is_dir(), stat.S_IMODE(path.stat().st_mode)] += 1
    # The logs are behind folders that nobody else may enter.
    assert set(modes) == {(True, 0o700), (False, 0o600)}


def test_the_key_is_in_no_command_line_and_no_log(worker):
    worker.fake.control(says=["starting"])
    spec = worker.spec()
    lease = worker.lease(spec)
    attached = lease.attach()
    assert attached is not None
    assert worker.fake.starts()[0]["api_key"] == attached.api_key
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_text(errors="replace"))
        except OSError:
            continue
    assert any("fake_vllm" in line for line in lines)
    assert not any(attached.api_key in line for line in lines)
    for name in ("server.log", "keeper.log", "spec.json"):
        assert attached.api_key not in (worker.server(spec).path / name).read_text()
    assert attached.api_key not in repr(worker.state(spec))
    assert attached.api_key not in repr(attached)


def test_a_server_sees_nothing_of_airflows_and_only_its_gpus(worker, monkeypatch):
    for name in (
        "AIRFLOW__CORE__FERNET_KEY",
        "AIRFLOW_CONN_X",
        "_AIRFLOW__STARTUP_MSG",
        "__AIRFLOW_SUPERVISOR_FD",
    ):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("HF_TOKEN", "for downloads")
    worker.lease(worker.spec(gpus="1")).attach()
    environment = worker.fake.starts()[0]["environment"]
    assert [name for name in environment if "AIRFLOW" in name] == []
    assert (environment["HF_TOKEN"], environment["CUDA_VISIBLE_DEVICES"]) == ("for downloads", "1")


def test_a_folder_with_spaces_and_no_home_and_a_task_whose_folder_is_gone(tmp_path, monkeypatch):
    path = tmp_path / "a folder with 'quotes' and späces"
    path.mkdir()
    monkeypatch.delenv("HOME", raising=False)
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with vllm_worker(path, monkeypatch) as worker:
        assert worker.lease(worker.spec("a model/with spaces")).attach() is not None
        (start,) = worker.fake.starts()
        assert start["argv"][1:3] == ["--model", "a model/with spaces"]
        assert start["cwd"] == "/"
        monkeypatch.chdir(tmp_path)


def test_a_warm_server_is_had_without_another_load(worker):
    spec = worker.spec()
    first = worker.lease(spec)
    first.attach()
    begun = time.perf_counter()
    second = worker.lease(spec)
    attached = second.attach()
    print(f"attached to a warm server in {time.perf_counter() - begun:.4f} s")
    assert attached is not None
    assert attached.loads == 1
    assert len(worker.fake.starts()) == 1
