"""The worker's own vLLM server, with a real vLLM and the demo model: shared, killed, and gone without a trace.

One server is enough for all of it, as it takes minutes to start on a small machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import urllib.request
from pathlib import Path

import pytest

from airflow_vlm_provider.engines.process_table import members
from airflow_vlm_provider.engines.vllm_folder import EngineFolder
from airflow_vlm_provider.engines.vllm_metrics import read_metrics
from demo.drawings import draw
from tests.support.task_processes import start_tasks
from tests.support.vllm_server import BLOCK_SIZE, require_vllm
from tests.support.vllm_workers import eventually, is_running, stop_servers

pytestmark = [pytest.mark.integration, pytest.mark.timeout(1800)]

MODEL = Path(__file__).parents[2] / "demo" / "model"
PICTURES = 24


def make_shard(folder, seed, count):
    """A shard of drawings, and the tags that each of them should get."""
    folder.mkdir()
    rng = random.Random(seed)
    drawings = [draw(rng) for _ in range(count)]
    rows = []
    for number, drawing in enumerate(drawings):
        (folder / f"{number}.png").write_bytes(drawing.encode("PNG"))
        rows.append(json.dumps({"images": [f"{number}.png"], "text": ""}))
    (folder / "a.jsonl").write_text("\n".join(rows))
    return [drawing.tags for drawing in drawings]


def tags_of(folder):
    rows = [json.loads(line) for line in (folder / "a.jsonl").read_text().splitlines()]
    return [row["__dj__meta__"]["image_tags"][0] for row in rows]


def share_of_right(found, expected):
    return sum(one == other for one, other in zip(found, expected, strict=True)) / len(expected)


def progress(state):
    """Tokens that the server has computed."""
    with urllib.request.urlopen(f"{state.url}/metrics", timeout=10) as response:
        return read_metrics(response.read().decode()).progress


def is_kept(server):
    with server.gate():
        return server.has_keeper()


@pytest.fixture
def engines(tmp_path):
    yield tmp_path / "engines"
    stop_servers(EngineFolder(tmp_path / "engines"))


def test_tasks_share_a_server_that_survives_its_death_and_ends_with_its_keeper(tmp_path, engines):
    require_vllm()
    args = {
        "enforce_eager": True,
        "max_model_len": 1024,
        "max_num_seqs": 16,
        "limit_mm_per_prompt": {"image": 4, "video": 2},
        "block_size": BLOCK_SIZE,
    }
    extra = {"engine": "vllm", "model": str(MODEL), "engine_args": args, "max_concurrency": 8}
    environment = {
        "AIRFLOW_CONN_VLM_DEFAULT": json.dumps({"conn_type": "vlm", "extra": extra}),
        "AIRFLOW__VLM__ENGINE_DIR": str(engines),
        "CUDA_VISIBLE_DEVICES": "",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "HF_HUB_OFFLINE": "1",
    }
    expected = {name: make_shard(tmp_path / name, seed, PICTURES) for seed, name in enumerate("ab")}
    expected["c"] = make_shard(tmp_path / "c", 3, 8 * PICTURES)
    with start_tasks(environment, tmp_path / "tasks") as tasks:

        def start(name, source):
            return tasks.start(source=str(tmp_path / source), destination=str(tmp_path / f"{name}-out"))

        # Two at once, neither of which finds a server.
        both = [start("a", "a"), start("b", "b")]
        for task, name in zip(both, "ab", strict=True):
            assert task.wait() == 0, task.said()
            assert task.returned()["ok"] == PICTURES
            assert share_of_right(tags_of(tmp_path / f"{name}-out"), expected[name]) >= 0.9
        (server,) = EngineFolder(engines).servers()
        state = server.read_state()
        assert state.phase == "ready"
        assert state.loads == 1
        key = state.api_key

        # In the middle of a task; what it sends is not answered for a while.
        done = progress(state)
        task = start("c", "c")
        eventually(lambda: progress(state) > done + 1000 or task.ended())
        before = members(session=state.server_pid, output=state.server_output)
        # What computes, as by the kernel's hand for lack of memory; its API server lives on, and has to notice.
        (engine,) = [pid for pid in before if "EngineCore" in Path(f"/proc/{pid}/cmdline").read_text()]
        assert engine != state.server_pid
        os.kill(engine, signal.SIGKILL)
        assert task.wait() == 0, task.said()
        assert "requests are asked again" in task.said()
        assert task.returned()["ok"] == 8 * PICTURES
        assert share_of_right(tags_of(tmp_path / "c-out"), expected["c"]) >= 0.9
        again = server.read_state()
        assert (again.keeper, again.loads) == (state.keeper, 2)
        assert not any(is_running(pid) for pid in before)

    files = [
        server.log,
        server.path / "keeper.log",
        server.path / "spec.json",
        *(tmp_path / "tasks").glob("*.log"),
    ]
    assert not any(key in path.read_text(errors="replace") for path in files)
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            lines.append(path.read_text(errors="replace"))
    assert any("vllm" in line for line in lines)
    assert not any(key in line for line in lines)

    # Nobody is left to end it but the guard.
    alive = members(session=again.server_pid, output=again.server_output)
    assert len(alive) >= 2
    os.kill(again.keeper_pid, signal.SIGKILL)
    eventually(lambda: not any(is_running(pid) for pid in alive))
    eventually(lambda: not members(session=again.server_pid, output=again.server_output))
    # The guard sees that all have ended before it ends itself, and frees the keeper's lock.
    eventually(lambda: not is_kept(server))
