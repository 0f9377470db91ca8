"""The Airflow that the demo and the system tests run leaves nothing behind, and says why when it can't start."""

from __future__ import annotations

import os
import socket
import urllib.parse
from pathlib import Path

import psutil
import pytest

from demo.airflow_instance import AirflowError, AirflowInstance, session_processes, start_airflow

pytestmark = pytest.mark.integration

DAG = """
import time

from airflow.sdk import dag, task


@dag(schedule=None)
def lasting():
    @task
    def sleep():
        print("sleeping")
        time.sleep(3600)

    sleep()


lasting()
"""


@pytest.fixture
def dags(tmp_path: Path) -> Path:
    folder = tmp_path / "dags"
    folder.mkdir()
    return folder


def alive(processes: list[psutil.Process]) -> list[psutil.Process]:
    return [each for each in processes if each.is_running() and each.status() != psutil.STATUS_ZOMBIE]


def test_nothing_is_left_when_the_block_ends_in_an_error_with_a_task_running(tmp_path, dags):
    (dags / "lasting.py").write_text(DAG)
    processes: list[psutil.Process] = []
    groups: set[int] = set()

    def use(airflow: AirflowInstance) -> None:
        run_id = airflow.trigger_dag("lasting")
        with pytest.raises(AirflowError, match=r"is running after 20 s. Tasks: .*sleep"):
            airflow.wait_for_run("lasting", run_id, timeout=20)
        with pytest.raises(AirflowError, match="answered 404"):
            airflow.api("GET", "dags/absent")
        with pytest.raises(AirflowError, match="airflow no-such-command failed"):
            airflow.cli("no-such-command")
        processes.extend(session_processes(airflow.process.pid))
        groups.update(os.getpgid(each.pid) for each in processes)
        port = urllib.parse.urlsplit(airflow.url).port
        raise ZeroDivisionError(port)

    with (
        pytest.raises(ZeroDivisionError) as raised,
        start_airflow(tmp_path / "home", dags_folder=dags) as airflow,
    ):
        use(airflow)

    assert len(processes) > 4, "scheduler, DAG processor, triggerer, API server and a task"
    assert len(groups) > 1, "the task is in a process group of its own"
    assert alive(processes) == []
    assert session_processes(airflow.process.pid) == []
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", raised.value.args[0])) != 0


def test_an_airflow_that_ends_at_once_says_why(tmp_path, dags):
    with (
        pytest.raises(AirflowError, match=r"(?s)airflow standalone ended with 1:.*NoSuchExecutor"),
        start_airflow(tmp_path / "home", dags_folder=dags, executor="NoSuchExecutor"),
    ):
        pytest.fail("it cannot have started")


def test_an_airflow_that_does_not_become_healthy_says_what_is_missing_and_is_ended(tmp_path, dags):
    home = tmp_path / "home"

    with (
        pytest.raises(AirflowError, match=r"not healthy after 2 s \(.*api-server"),
        start_airflow(home, dags_folder=dags, timeout=2),
    ):
        pytest.fail("it cannot have started")

    assert alive([each for each in psutil.process_iter() if str(home) in environment(each)]) == []


def environment(process: psutil.Process) -> str:
    try:
        return process.environ().get("AIRFLOW_HOME", "")
    except psutil.Error:
        return ""
