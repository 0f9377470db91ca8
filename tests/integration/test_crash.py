"""Tasks that are stopped at random moments, over and over: nothing lost, nothing doubled, next to nothing paid twice.

The long form is ``make torture``, which sets ``VLM_TORTURE_KILLS``.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time

import pytest

from demo.s3_server import ACCESS_KEY, REGION, SECRET_KEY, start_s3
from tests.support.faulty_proxy import faulty_proxy
from tests.support.stub_endpoint import start_stub
from tests.support.task_processes import start_tasks
from tests.support.torture import (
    IN_FLIGHT,
    WINDOW,
    Dataset,
    Round,
    environment,
    sent,
    torn_segments,
    torture,
)

pytestmark = pytest.mark.integration

KILLS = int(os.environ.get("VLM_TORTURE_KILLS", "8"))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """An S3 server, an endpoint, and something to start tasks with."""
    with start_s3() as s3, start_stub(latency=0.08, jitter=0.08) as stub:
        env = environment(stub.base_url, s3.airflow_connection_json())
        with start_tasks(env, tmp_path_factory.mktemp("tasks")) as tasks:
            yield s3.client(), stub, tasks


def aws_connection(endpoint_url: str) -> str:
    extra = {
        "endpoint_url": endpoint_url,
        "region_name": REGION,
        "config_kwargs": {"retries": {"max_attempts": 2}},
    }
    return json.dumps({"conn_type": "aws", "login": ACCESS_KEY, "password": SECRET_KEY, "extra": extra})


def check(dataset: Dataset, destination: str, undisturbed: str) -> None:
    """The output is the undisturbed run's, byte for byte, and every row is accounted for."""
    assert dataset.output(destination) == dataset.output(undisturbed)
    for manifest in dataset.manifests(destination):
        assert manifest["failed"] == manifest["skipped"] == 0
        assert manifest["rows_in"] == manifest["rows_out"] == manifest["ok"] + manifest["cached"]
    assert sum(each["rows_in"] for each in dataset.manifests(destination)) == dataset.rows
    ids = [
        json.loads(line)["id"] for body in dataset.output(destination).values() for line in body.splitlines()
    ]
    assert len(set(ids)) == len(ids) == dataset.rows


def stop_often(place, name: str, *, times: int, shards: int, rows: int, seed: int, **how) -> Round:
    """Stop tasks so often, in as many rounds as it takes, and see after each that the output is as if nothing had been."""
    client, stub, tasks = place
    rng, total, rounds = random.Random(seed), Round(), 0
    while total.kills < times:
        # Each round has its own pictures: what another round has paid for would be of help.
        dataset = Dataset(client, f"{name}-{rounds}", shards=shards, rows=rows, seed=seed + rounds)
        parameters = dataset.parameters("out")
        done = torture(tasks, stub, parameters, rng=rng, most_kills=times - total.kills, **how)
        # Not before: it would pay for the answers.
        tasks.run(**dataset.parameters("undisturbed"), overwrite=True)
        check(dataset, "out", "undisturbed")
        assert torn_segments(client, dataset.bucket, "out/") == []
        rounds += 1
        total.kills += done.kills
        total.kills_at_work += done.kills_at_work
        total.repeated += done.repeated
    print(f"{total} in {rounds} rounds")
    return total


def test_a_task_that_is_killed_over_and_over_ends_as_if_nothing_had_been(place):
    done = stop_often(place, "kill", times=KILLS, shards=4, rows=60, seed=KILLS)
    assert done.repeated <= done.kills * WINDOW
    assert done.kills_at_work >= KILLS // 2


def test_a_task_that_is_told_to_stop_saves_what_it_paid_for(place):
    done = stop_often(place, "term", times=3, shards=2, rows=120, seed=901, stop=signal.SIGTERM, longest=0.8)
    # Told, and not killed, it has time to save: only what was in flight is lost.
    assert done.repeated <= done.kills * IN_FLIGHT


def test_after_a_kill_at_nine_tenths_at_most_one_tenth_and_a_window_is_asked(place):
    client, stub, tasks = place
    dataset = Dataset(client, "tenth", shards=1, rows=200, seed=102)
    before = sum(sent(stub).values())
    task = tasks.start(**dataset.parameters("out"))
    while sum(sent(stub).values()) < before + 180:
        time.sleep(0.005)
    os.kill(task.pid, signal.SIGKILL)
    assert task.wait() == -signal.SIGKILL
    at_kill = sum(sent(stub).values())
    summary = tasks.run(**dataset.parameters("out"))
    asked = sum(sent(stub).values()) - at_kill
    assert asked <= 20 + WINDOW
    assert (summary["rows_in"], summary["requests"], summary["ok"]) == (200, asked, asked)
    assert summary["cached"] == 200 - asked
    again = sum(sent(stub).values())
    assert tasks.run(**dataset.parameters("out"))["requests"] == 0
    assert sum(sent(stub).values()) == again


def test_two_attempts_alive_at_once_end_with_one_correct_output(place):
    client, stub, tasks = place
    for number in range(3):
        dataset = Dataset(client, f"zombie-{number}", shards=3, rows=40, seed=200 + number)
        zombie = tasks.start(**dataset.parameters("out"))
        time.sleep(0.3 * number)
        retry = tasks.start(**dataset.parameters("out"))
        assert (zombie.wait(), retry.wait()) == (0, 0), zombie.said() + retry.said()
        tasks.run(**dataset.parameters("undisturbed"))
        check(dataset, "out", "undisturbed")
        assert torn_segments(client, dataset.bucket, "out/") == []
        before = sum(sent(stub).values())
        assert tasks.run(**dataset.parameters("out"), overwrite=True)["cached"] == dataset.rows
        assert sum(sent(stub).values()) == before


def test_when_s3_is_cut_off_nothing_more_is_paid_for_than_can_be_saved(place, tmp_path_factory):
    client, stub, _ = place
    dataset = Dataset(client, "partition", shards=2, rows=100, seed=103)
    with faulty_proxy(client.meta.endpoint_url, ()) as proxy:
        env = environment(stub.base_url, aws_connection(proxy.endpoint_url))
        with start_tasks(env, tmp_path_factory.mktemp("cut-off")) as tasks:
            before = sum(sent(stub).values())
            task = tasks.start(**dataset.parameters("out"))
            while sum(sent(stub).values()) < before + 60:
                time.sleep(0.005)
            proxy.stop()
            assert task.wait() == 1, task.said()
            at_end = sum(sent(stub).values()) - before
    tasks_again = place[2]
    paid = sent(stub)
    tasks_again.run(**dataset.parameters("out"))
    repeated = sum(count > paid[image] for image, count in sent(stub).items() if image in paid)
    tasks_again.run(**dataset.parameters("undisturbed"))
    check(dataset, "out", "undisturbed")
    assert at_end <= 60 + 2 * WINDOW
    assert repeated <= WINDOW


def test_when_the_endpoint_is_cut_off_the_next_try_goes_on_from_there(place, tmp_path_factory):
    client, stub, tasks = place
    dataset = Dataset(client, "endpoint", shards=2, rows=60, seed=104)
    before = sum(sent(stub).values())
    task = tasks.start(**dataset.parameters("out"))
    while sum(sent(stub).values()) < before + 40:
        time.sleep(0.005)
    stub.set(faults={"disconnect": 1.0})
    time.sleep(1)
    task_was_stopped = time.monotonic()
    os.kill(task.pid, signal.SIGTERM)
    assert task.wait() == 1
    assert time.monotonic() - task_was_stopped < 30
    stub.set(faults={})
    answered = stub.stats()["by_status"].get("200", 0)
    summary = tasks.run(**dataset.parameters("out"))
    tasks.run(**dataset.parameters("undisturbed"))
    check(dataset, "out", "undisturbed")
    assert summary["cached"] > 0
    assert stub.stats()["by_status"]["200"] - answered == summary["ok"] + dataset.rows
