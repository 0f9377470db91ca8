"""The commands for a worker's vLLM servers, and the operators that tie their life to a DAG run, with a fake vLLM."""

from __future__ import annotations

import json
import shlex
import signal
import threading
import time
from types import SimpleNamespace

import pytest
from airflow.cli.cli_parser import get_parser
from airflow.sdk.exceptions import AirflowException, AirflowFailException

from airflow_vlm_provider.cli import engine as cli_engine
from airflow_vlm_provider.operators.engine_servers import StartEngineOperator, StopEngineOperator
from airflow_vlm_provider.operators.engines import engine_config
from tests.support.fake_vllm import FakeVLLM
from tests.support.vllm_workers import eventually, vllm_worker

pytestmark = pytest.mark.integration


@pytest.fixture
def worker(tmp_path, monkeypatch):
    # The commands set it for their own process.
    monkeypatch.setenv("_AIRFLOW_PROCESS_CONTEXT", "")
    monkeypatch.setenv("AIRFLOW_CONN_VLM_DEFAULT", json.dumps({"conn_type": "vlm", "extra": {"model": "m"}}))
    monkeypatch.setenv("AIRFLOW__VLM__VLLM_COMMAND", shlex.join(FakeVLLM.COMMAND))
    with vllm_worker(tmp_path, monkeypatch) as made:
        monkeypatch.setenv("AIRFLOW__VLM__ENGINE_DIR", str(made.folder.path))
        yield made


def airflow(capsys, *words):
    """What a command prints."""
    capsys.readouterr()
    args = get_parser().parse_args(["vlm", "engine", *words])
    args.func(args)
    return capsys.readouterr().out


def servers(capsys, *words):
    return json.loads(airflow(capsys, "list", "-o", "json", *words))


def context(run_id="monday"):
    return {"ti": SimpleNamespace(dag_id="nightly", run_id=run_id, task_id="start")}


def start(**fields):
    return StartEngineOperator(task_id="start", **fields)


def stop(**fields):
    return StopEngineOperator(task_id="stop", **fields)


def test_a_server_is_kept_for_a_run_and_stopped_after_it(worker, capsys):
    result = start().execute(context())
    (server,) = servers(capsys)
    assert result == {"key": server["key"], "loads": 1}
    assert (server["phase"], server["tasks"], server["pins"]) == ("ready", [], ["nightly monday"])
    # For another run, too, which finds it warm.
    assert start().execute(context("tuesday")) == result
    assert stop().execute(context()) == {"key": server["key"], "stopped": False}
    assert servers(capsys)[0]["pins"] == ["nightly tuesday"]
    assert stop().execute(context("tuesday")) == {"key": server["key"], "stopped": True}
    eventually(lambda: servers(capsys) == [])
    assert stop().execute(context("tuesday")) == {"key": server["key"], "stopped": False}
    assert len(worker.fake.starts()) == 1


def test_to_give_back_what_is_kept_on_another_worker_is_warned_of(worker, tmp_path, monkeypatch, capsys):
    warning = (
        "server is kept there until max_hours have passed, or until `airflow vlm engine stop --force KEY`"
    )
    kept = start().execute(context())["key"]
    capsys.readouterr()
    assert stop().execute(context("another run")) == {"key": kept, "stopped": False}
    assert warning in capsys.readouterr().out
    monkeypatch.setenv("AIRFLOW__VLM__ENGINE_DIR", str(tmp_path / "another worker"))
    assert stop().execute(context()) == {"key": kept, "stopped": False}
    assert warning in capsys.readouterr().out

    monkeypatch.setenv("AIRFLOW__VLM__ENGINE_DIR", str(worker.folder.path))
    assert servers(capsys)[0]["pins"] == ["nightly monday"]
    assert stop().execute(context())["stopped"] is True
    assert warning not in capsys.readouterr().out


def test_the_key_is_in_nothing_that_an_operator_returns_or_a_command_prints(worker, capsys):
    result = start().execute(context())
    api_key = worker.fake.starts()[0]["api_key"]
    printed = json.dumps(result) + airflow(capsys, "list") + json.dumps(servers(capsys, "-v"))
    printed += airflow(capsys, "logs", result["key"])
    assert "Application startup complete" in printed
    assert api_key not in printed


def test_a_task_that_is_told_to_stop_waits_no_longer(worker):
    worker.fake.control(load_seconds=3600)
    operator = start()
    threading.Timer(0.5, operator.on_kill).start()
    with pytest.raises(AirflowException, match="told to stop before the server was ready"):
        operator.execute(context())


def test_faults_are_told_by_whose_they_are(worker):
    with pytest.raises(AirflowFailException, match="unrecognized arguments"):
        start(model_params={"no_such_thing": 1}).execute(context())
    worker.fake.control(exits=1, says=["RuntimeError: CUDA error"])
    with pytest.raises(AirflowException, match="CUDA error") as caught:
        start().execute(context())
    assert not isinstance(caught.value, AirflowFailException)


def test_stop_leaves_servers_in_use_alone_unless_forced(worker, capsys):
    config = engine_config()
    operator = start()
    lease = operator._engine(context()).make_lease()
    assert config.folder == str(worker.folder.path)
    attached = lease.attach()
    (server,) = servers(capsys)
    assert [task["task_id"] for task in server["tasks"]] == ["start"]
    with pytest.raises(SystemExit, match="Tasks use"):
        airflow(capsys, "stop")
    assert lease.is_current(attached)
    assert airflow(capsys, "stop", "--force", server["key"][:6]) == f"{server['key']} stopped\n"
    assert worker.left() == []
    lease.release()
    assert "none to stop" in airflow(capsys, "stop")
    assert servers(capsys) == []
    assert [each["phase"] for each in servers(capsys, "-v")] == ["stopped"]


def test_a_server_that_is_merely_warm_is_stopped_and_one_that_is_kept_for_a_run_if_forced(worker, capsys):
    kept = start().execute(context())["key"]
    warm = worker.lease(worker.spec("other", gpus="1"))
    warm.attach()
    warm.release()
    assert airflow(capsys, "stop", warm.server.key) == f"{warm.server.key} stopped\n"
    with pytest.raises(SystemExit, match=f"{kept}, or DAG runs keep it"):
        airflow(capsys, "stop")
    assert airflow(capsys, "stop", "--force") == f"{kept} stopped\n"


def test_to_stop_by_force_has_worked_though_tasks_have_it_started_again(worker, capsys):
    leases = [start()._engine(context()).make_lease() for _ in range(6)]
    attached = leases[0].attach()
    end = threading.Event()

    def go_on(lease):
        found = lease.attach(stopped=end.is_set)
        while found is not None and not end.wait(0.02):
            if not lease.is_current(found):
                found = lease.attach(stopped=end.is_set)
        lease.release()

    threads = [threading.Thread(target=go_on, args=(lease,), daemon=True) for lease in leases]
    for thread in threads:
        thread.start()
    try:
        eventually(lambda: len(servers(capsys)[0]["tasks"]) == 6)
        key = leases[0].server.key
        assert airflow(capsys, "stop", "--force") == f"{key} stopped\n"
        assert not leases[0].is_current(attached)
        again = eventually(lambda: (state := leases[0].server.read_state()).phase == "ready" and state)
        assert again.keeper != attached.keeper
    finally:
        end.set()
        for thread in threads:
            thread.join(20)


def test_that_a_task_has_come_meanwhile_is_told_and_not_waited_out(worker, capsys, monkeypatch):
    lease, late = (start()._engine(context()).make_lease() for _ in range(2))
    attached = lease.attach()
    lease.release()

    def nobody_yet(_):
        late.attach()
        return False

    monkeypatch.setattr(cli_engine, "_is_in_use", nobody_yet)
    with pytest.raises(SystemExit, match=f"Tasks or DAG runs have come to {lease.server.key} meanwhile"):
        airflow(capsys, "stop")
    assert late.is_current(attached)
    late.release()


def test_the_log_of_a_server_that_waits_for_its_gpu_is_followed_once_it_is_there(worker, capsys):
    first, second = worker.lease(worker.spec("first")), worker.lease(worker.spec("second"))
    first.attach()
    found = worker.attach(second)
    worker.wait_for(worker.spec("second"), "waiting")
    assert not second.server.log.exists()
    printed = []

    def follow():
        printed.append(airflow(capsys, "logs", "-f", second.server.key))

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    time.sleep(0.8)
    first.release()
    assert found.result(40) is not None
    second.release()
    with second.server.gate():
        second.server.signal_keeper(signal.SIGTERM)
    thread.join(20)
    assert "Application startup complete" in printed[0]


def test_a_log_is_followed_over_its_new_beginning_until_the_server_ends(worker, capsys):
    result = start().execute(context())
    server = worker.folder.server(result["key"])
    lines = []

    def follow():
        lines.append(airflow(capsys, "logs", "-f", "-n", "1", result["key"]))

    thread = threading.Thread(target=follow, daemon=True)
    thread.start()
    time.sleep(0.8)
    server.log.rename(server.log.with_name("server.log.1"))
    server.log.write_text("a new beginning\n")
    time.sleep(1.2)
    stop().execute(context())
    thread.join(20)
    assert "a new beginning" in lines[0]


def test_what_is_not_there_is_told(worker, capsys):
    assert "No vLLM server runs here" in airflow(capsys, "list")
    with pytest.raises(SystemExit, match="'abc' is not known here"):
        airflow(capsys, "stop", "abc")
