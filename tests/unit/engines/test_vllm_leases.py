"""Which process a task's lease is held for: the worker, by its command line."""

from __future__ import annotations

import pytest

from airflow_vlm_provider.engines.vllm_leases import is_airflow


@pytest.mark.parametrize(
    "command",
    [
        ["/opt/venv/bin/python", "/opt/venv/bin/airflow", "celery", "worker", "-q", "gpu"],
        ["python", "-m", "airflow", "scheduler"],
        ["/usr/bin/python3", "-m", "celery", "-A", "x", "worker"],
        # As Celery calls its processes, whatever they were started as.
        ["[celeryd: celery@gpu-1:MainProcess] -active- (celery worker -q gpu)", "", ""],
        ["[celeryd: celery@gpu-1:ForkPoolWorker-3]", ""],
        ["airflow worker -- LocalExecutor: <idle>", ""],
        ["airflow supervisor: dag.task", ""],
        ["airflow task supervisor: {...}"],
        ["bash", "/entrypoint", "airflow", "edge", "worker"],
        ["/usr/local/bin/airflow", "celery", "worker"],
    ],
)
def test_workers_are_known(command):
    assert is_airflow(command)


@pytest.mark.parametrize(
    "command",
    [
        [],
        ["bash"],
        ["python", "-m", "pytest", "tests"],
        ["/usr/bin/dumb-init", "--", "/entrypoint"],
        ["vim", "my_airflow.cfg"],
        # Sessions of a user who is called airflow: they may outlive the worker, or the worker them.
        ["sshd: airflow@pts/0", "", ""],
        ["sshd-session: airflow [priv]"],
        ["login -- airflow"],
        ["su", "-", "airflow"],
        ["/usr/bin/sudo", "-u", "airflow", "bash"],
        ["SCREEN", "-S", "airflow"],
        ["python", "script.py", "x", "y", "/opt/airflow"],
    ],
)
def test_others_are_not(command):
    assert not is_airflow(command)
