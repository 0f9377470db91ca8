"""Queues of their own for the GPU: Celery's, with Redis and PostgreSQL, and edge workers. Everything is a real process.

The machine has no GPU: vLLM runs on its CPU with the demo model, and where workers are killed, a stand-in takes its
place that starts at once and keeps account of what it is asked.
"""

from __future__ import annotations

import json
import random
import shlex
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from airflow_vlm_provider.engines.vllm_folder import EngineFolder
from demo.airflow_instance import session_processes
from demo.drawings import draw
from demo.s3_server import start_s3
from tests.support.fake_vllm import FakeVLLM
from tests.support.queues import QueuedAirflow, Worker, kill, start_queued_airflow
from tests.support.vllm_server import require_vllm
from tests.system.conftest import REPOSITORY, Deployment, tags
from tests.system.queue_dags.gpu_queue import GROUPS

pytestmark = pytest.mark.system

# One command for both: a worker knows only one.
VLLM = """#!/bin/sh
case "$*" in
    *fake-vlm*) exec {python} {fake} "$@" ;;
    *) exec {python} -m vllm.entrypoints.openai.api_server "$@" ;;
esac
"""
DEMO_ENGINE_ARGS = {
    "enforce_eager": True,
    "max_model_len": 1024,
    "limit_mm_per_prompt": {"image": 1, "video": 0},
}
# What every task would import by itself, a second of its time or two.
PRELOADED = [
    "airflow.sdk.execution_time.task_runner",
    "airflow.dag_processing.dagbag",
    "airflow.providers.amazon.aws.hooks.s3",
    "airflow_vlm_provider.operators.runners",
    "airflow_vlm_provider.operators.image_tagging",
    "airflow_vlm_provider.operators.vlm_map",
    "boto3",
    "openai",
    "pyarrow",
]
ROWS = 24
IN_FLIGHT = 2
# Few, so that what a kill may cost is much less than what a test asks for.
FLUSH_ANSWERS = 4


@dataclass
class Machine:
    """What workers find on the machine that they are meant to be: its vLLM, and what is left of it by others.

    :ivar env: Environment variables of its workers.
    """

    folder: Path
    fake: FakeVLLM
    env: Mapping[str, str]

    def processes(self) -> list[psutil.Process]:
        """All that runs of keepers, servers and their engines."""
        found = []
        for process in psutil.process_iter(["cmdline", "status"]):
            if str(self.folder) in " ".join(process.info["cmdline"] or []):
                found.append(process)
        sessions = {start["pid"] for start in self.fake.starts()}
        states = [server.read_state() for server in EngineFolder(self.folder).servers()]
        sessions |= {state.server_pid for state in states if state and state.server_pid}
        return [*found, *(process for session in sessions for process in session_processes(session))]

    def asked_of_groups(self) -> Counter[str]:
        """How many requests there were from each group of rows; see :func:`upload`."""
        return Counter(prompt.removeprefix("What is row ").partition("-")[0] for prompt in self.fake.asked())

    def owners(self) -> set[int]:
        """The processes that the servers' users call their workers."""
        found = set()
        for server in EngineFolder(self.folder).servers():
            with server.gate():
                found |= {lease["owner"]["pid"] for lease in server.leases()}
        return found


def machine(root: Path, name: str) -> Machine:
    folder, fake = root / f"{name}-engines", FakeVLLM(root / f"{name}-fake")
    fake.control(answer_seconds=0.3)
    env = {"AIRFLOW__VLM__ENGINE_DIR": str(folder), "VLLM_CPU_KVCACHE_SPACE": "1", **fake.environment}
    return Machine(folder, fake, env)


@dataclass
class Queues:
    """An Airflow with queues, a bucket, and machines with a vLLM."""

    airflow: QueuedAirflow
    deployment: Deployment
    root: Path
    machines: list[Machine]

    def machine(self, name: str) -> Machine:
        self.machines.append(machine(self.root, name))
        return self.machines[-1]

    def wait_for_success(self, dag_id: str, run_id: str, timeout: float = 200) -> list[dict[str, Any]]:
        """Wait for the end of a run; returns its task instances."""
        path = f"dags/{dag_id}/dagRuns/{run_id}"
        instance = self.airflow.instance
        self.airflow.wait_for(
            lambda: instance.api("GET", path)["state"] in ("success", "failed"), f"{dag_id} {run_id}", timeout
        )
        tasks = instance.task_instances(dag_id, run_id)
        assert {each["state"] for each in tasks} == {"success"}, tasks
        return tasks

    def wait_for_the_middle_of_a_task(self, machine: Machine, *, done: int = 0) -> None:
        """Wait until a task is in its middle, and others have asked all of their questions."""

        def found() -> bool:
            asked = machine.asked_of_groups().values()
            in_the_middle = any(ROWS // 3 <= each <= ROWS * 2 // 3 for each in asked)
            return in_the_middle and sum(each >= ROWS for each in asked) >= done

        self.airflow.wait_for(found, f"the middle of a task, {done} others done", 150)

    def nothing_is_left_of(self, machine: Machine, timeout: float = 30) -> None:
        self.airflow.wait_for(lambda: not machine.processes(), f"the end of {machine.processes()}", timeout)


@pytest.fixture(scope="module")
def queues(tmp_path_factory) -> Iterator[Queues]:
    root = tmp_path_factory.mktemp("queues")
    shutil.copytree(Path(__file__).parent / "queue_dags", root / "dags")
    command = root / "vllm.sh"
    command.write_text(VLLM.format(python=shlex.quote(sys.executable), fake=shlex.quote(FakeVLLM.COMMAND[1])))
    demo = {"model": str(REPOSITORY / "demo" / "model"), "engine_args": DEMO_ENGINE_ARGS}
    machines: list[Machine] = []
    with start_s3() as s3:
        env = {
            "AIRFLOW_CONN_AWS_DEFAULT": s3.airflow_connection_json(),
            "AIRFLOW_CONN_VLM_DEMO": json.dumps({"conn_type": "vlm", "extra": demo}),
            "AIRFLOW_CONN_VLM_FAKE": json.dumps({"conn_type": "vlm", "extra": {"model": "fake-vlm"}}),
            "AIRFLOW__CELERY__EXTRA_CELERY_CONFIG": json.dumps({"imports": PRELOADED}),
            "AIRFLOW__VLM__GPU_POOL": "gpu",
            "AIRFLOW__VLM__GPU_QUEUE": "gpu",
            "AIRFLOW__VLM__JOURNAL_FLUSH_ANSWERS": str(FLUSH_ANSWERS),
            "AIRFLOW__VLM__VLLM_COMMAND": f"sh {command}",
            "HF_HUB_OFFLINE": "1",
            # Several tasks share this machine's cores.
            "OMP_NUM_THREADS": "1",
        }
        client = s3.client()
        client.create_bucket(Bucket="users")
        try:
            with start_queued_airflow(root / "home", dags_folder=root / "dags", env=env) as airflow:
                airflow.instance.api("POST", "pools", {"name": "gpu", "slots": 4, "include_deferred": False})
                deployment = Deployment(airflow.instance, client, stub=None, start=None)
                yield Queues(airflow, deployment, root, machines)
        finally:
            for each in machines:
                kill(each.processes())


@pytest.fixture(scope="module")
def default_worker(queues: Queues) -> Worker:
    return queues.airflow.celery_worker("default-1", queue="default", concurrency=1, env={})


@pytest.fixture(scope="module")
def gpu_machine(queues: Queues, default_worker: Worker) -> Machine:
    return queues.machine("gpu")


def test_sixteen_tasks_share_one_vllm(queues: Queues, gpu_machine: Machine):
    require_vllm()
    drawings = []
    for shard in range(GROUPS):
        rows = []
        for row in range(3):
            drawings.append(draw(random.Random(f"{shard} {row}")))
            queues.deployment.put("users", f"tag/images/{shard:02}-{row}.png", drawings[-1].encode("PNG"))
            rows.append(json.dumps({"images": [f"images/{shard:02}-{row}.png"], "text": ""}))
        queues.deployment.put("users", f"tag/part-{shard:02}.jsonl", "\n".join(rows).encode())

    run_id = queues.deployment.run("tag", "tag/", wait=False)
    worker = queues.airflow.celery_worker("gpu-1", queue="gpu", concurrency=4, env=gpu_machine.env)
    tasks = queues.wait_for_success("tag", run_id, timeout=400)

    assert where(tasks) == {
        "plan": {("default-1", "default", "default_pool"): 1},
        "tag": {("gpu-1", "gpu", "gpu"): GROUPS},
    }
    (server,) = EngineFolder(gpu_machine.folder).servers()
    assert server.read_state().loads == 1
    assert (server.path / "keeper.log").read_text().count("Starting ") == 1
    found = [
        row
        for shard in range(GROUPS)
        for row in queues.deployment.rows("users", f"out/tag/part-{shard:02}.jsonl")
    ]
    right = [tags(row) == [drawing.tags] for row, drawing in zip(found, drawings, strict=True)]
    assert sum(right) >= 0.95 * len(drawings)

    worker.stop()
    queues.nothing_is_left_of(gpu_machine)


def test_a_killed_celery_worker_costs_at_most_a_window_of_each_of_its_tasks(
    queues: Queues, gpu_machine: Machine
):
    prompts = upload(queues, "ask/", groups=GROUPS)
    worker = queues.airflow.celery_worker("gpu-1", queue="gpu", concurrency=4, env=gpu_machine.env)
    run_id = queues.deployment.run("ask", "ask/", wait=False)
    queues.wait_for_the_middle_of_a_task(gpu_machine)
    assert len(gpu_machine.fake.starts()) == 1
    # By this the keeper knows, whichever of the worker's processes come and go, that it is still there.
    assert gpu_machine.owners() == {worker.pid}

    queues.wait_for_the_middle_of_a_task(gpu_machine, done=random.randint(1, 6))
    worker.kill()
    queues.nothing_is_left_of(gpu_machine)
    assert len(set(gpu_machine.fake.asked())) < len(prompts)
    worker = queues.airflow.celery_worker("gpu-1", queue="gpu", concurrency=4, env=gpu_machine.env)
    tasks = queues.wait_for_success("ask", run_id)

    assert where(tasks) == {
        "plan": {("default-1", "default", "default_pool"): 1},
        "ask": {("gpu-1", "gpu", "gpu"): GROUPS},
    }
    nothing_is_lost_and_nothing_paid_twice(queues, gpu_machine, "ask/", prompts)
    worker.stop()
    queues.nothing_is_left_of(gpu_machine)


def test_a_killed_edge_worker_costs_at_most_a_window_of_each_of_its_tasks(queues: Queues):
    edge = queues.machine("edge")
    prompts = upload(queues, "edge/", groups=GROUPS)
    worker = queues.airflow.edge_worker("edge-1", queue="gpu", concurrency=4, env=edge.env)
    run_id = queues.deployment.run("ask_at_the_edge", "edge/", wait=False)
    queues.wait_for_the_middle_of_a_task(edge)
    assert len(edge.fake.starts()) == 1
    assert edge.owners() == {worker.pid}

    queues.wait_for_the_middle_of_a_task(edge, done=random.randint(1, 6))
    # The whole machine is gone, with its server and that one's keeper.
    worker.kill(along_with=edge.processes())
    assert edge.processes() == []
    assert len(set(edge.fake.asked())) < len(prompts)
    worker = queues.airflow.edge_worker("edge-2", queue="gpu", concurrency=4, env=edge.env)
    tasks = queues.wait_for_success("ask_at_the_edge", run_id)

    assert {each["executor"] for each in tasks if each["task_id"] == "plan"} == {"LocalExecutor"}
    assert {each["executor"] for each in tasks if each["task_id"] == "ask"} == {"EdgeExecutor"}
    ran = where(tasks)
    assert ran["plan"] == {("localhost", "default", "default_pool"): 1}
    assert set(ran["ask"]) <= {("edge-1", "gpu", "gpu"), ("edge-2", "gpu", "gpu")}
    assert ran["ask"].total() == GROUPS
    nothing_is_lost_and_nothing_paid_twice(queues, edge, "edge/", prompts)
    worker.stop()
    queues.nothing_is_left_of(edge)


def upload(queues: Queues, prefix: str, *, groups: int) -> list[str]:
    """Upload shards, one for each group; returns what will be asked about their rows."""
    picture = draw(random.Random(1), side=32).encode("PNG")
    prompts = []
    for shard in range(groups):
        rows = []
        for row in range(ROWS):
            # The same picture under each name: what tells the requests apart is their text.
            queues.deployment.put("users", f"{prefix}images/{shard:02}-{row:02}.png", picture)
            rows.append({"images": [f"images/{shard:02}-{row:02}.png"], "text": f"row {shard:02}-{row:02}"})
            prompts.append(f"What is {rows[-1]['text']}?")
        body = "\n".join(map(json.dumps, rows)).encode()
        queues.deployment.put("users", f"{prefix}part-{shard:02}.jsonl", body)
    return prompts


def where(tasks: list[dict[str, Any]]) -> dict[str, Counter[tuple[str, str, str]]]:
    """Where the tasks ran: worker, queue and pool of each."""
    found: dict[str, Counter[tuple[str, str, str]]] = {}
    for each in tasks:
        found.setdefault(each["task_id"], Counter())[each["hostname"], each["queue"], each["pool"]] += 1
    return found


def nothing_is_lost_and_nothing_paid_twice(
    queues: Queues, machine: Machine, prefix: str, prompts: list[str]
) -> None:
    """What has to hold when a worker was killed once."""
    assert set(machine.fake.asked()) == set(prompts)
    # Of each task, killed or not: more than all of them together may not hide that one of them lost everything.
    assert max(machine.asked_of_groups().values()) <= ROWS + IN_FLIGHT + FLUSH_ANSWERS
    # One for each life of the worker.
    assert len(machine.fake.starts()) == 2
    assert machine.fake.violations() == []
    rows = [
        row
        for key in sorted(queues.deployment.keys("users", f"out/{prefix}part-"))
        for row in queues.deployment.rows("users", key)
    ]
    assert [row["answer"].partition(": ")[2] for row in rows] == prompts
