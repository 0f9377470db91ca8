"""The benchmark of warm servers, with a fake vLLM: what it counts, and that nothing is left of what it starts."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.fake_vllm import FakeVLLM
from tests.support.vllm_workers import eventually, is_running

pytestmark = pytest.mark.integration

REPOSITORY = Path(__file__).parents[2]
START_TIMEOUT = 90.0


@pytest.fixture
def fake(tmp_path):
    return FakeVLLM(tmp_path / "fake")


def command(*options: str) -> list[str]:
    script = str(REPOSITORY / "benchmarks" / "warm_engine.py")
    # The fake has one CPU, so that two servers beside each other are none of its.
    return [
        *(sys.executable, script, "--vllm-command", shlex.join(FakeVLLM.COMMAND), "--at-once=1"),
        *("--drawings=2", *options),
    ]


def keepers(fake: FakeVLLM) -> list[int]:
    """Processes that were started with the fake's folder, keepers and tasks."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environment = (path / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        if f"FAKE_VLLM={fake.folder}".encode() in environment and is_running(int(path.name)):
            found.append(int(path.name))
    return found


def test_one_start_for_all_tasks_and_one_for_each(fake):
    done = subprocess.run(
        command("--tasks=3", "--sample=2"),
        env={**os.environ, **fake.environment},
        capture_output=True,
        text=True,
        check=False,
    )
    starts = fake.starts()
    assert len(starts) == 1 + 2, done.stderr
    table = [line.split("|") for line in done.stdout.splitlines() if line.startswith("|")]
    warm, each = table[2:]
    assert (warm[1].strip(), each[1].strip()) == ("warm, 1 task at a time", "a server each, 1 task at a time")
    assert (warm[5].strip(), each[5].strip()) == ("1 in 3", "2 in 2")
    # The fake tells no tags, which is then neither hidden nor fatal.
    assert (warm[9].strip(), each[9].strip()) == ("0 of 6", "0 of 4")
    assert len(fake.asked()) == int(warm[8]) + int(each[8]) > 0
    assert "at least 95% of the tags are right: missed" in done.stdout
    assert done.returncode == 1
    kept = REPOSITORY / done.stdout.splitlines()[-1].removeprefix("Every task: ")
    assert [len(way["done"]) for way in json.loads(kept.read_text())["ways"]] == [3, 2]
    kept.unlink()
    assert keepers(fake) == []
    assert fake.violations() == []


def test_whoever_ends_it_ends_what_it_has_started(fake):
    fake.control(load_seconds=600)
    benchmark = subprocess.Popen(command("--tasks=1"), env={**os.environ, **fake.environment})
    try:
        eventually(fake.starts, timeout=START_TIMEOUT)
        assert len(keepers(fake)) >= 4
        benchmark.send_signal(signal.SIGTERM)
        assert benchmark.wait(60) == 128 + signal.SIGTERM
        assert keepers(fake) == []
    finally:
        benchmark.kill()
        benchmark.wait()
