"""What happens around a run: signals, timeouts, a hiccup of Airflow itself, and what the task reports."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from airflow.sdk import DAG
from airflow.sdk.exceptions import AirflowException, AirflowFailException
from airflow.sdk.execution_time.timeout import timeout
from PIL import Image

from airflow_vlm_provider import runner
from airflow_vlm_provider.errors import ConfigError, EngineError, ShardError
from airflow_vlm_provider.operators import base, runners
from airflow_vlm_provider.operators.image_tagging import ImageTaggingVLMOperator
from airflow_vlm_provider.progress import Progress
from airflow_vlm_provider.runner import ShardRunner
from tests.support.fakes import ScriptedEngine
from tests.support.images import encode

TAGS = json.dumps({"tags": ["one", "two", "three", "four", "five"]})


@pytest.fixture
def place(tmp_path, monkeypatch):
    source = tmp_path / "in"
    source.mkdir()
    for shard, name in enumerate("ab"):
        rows = []
        for number in range(400):
            # Each another one: what is the same would be asked once.
            colour = (shard, number // 256, number % 256)
            (source / f"{name}{number}.png").write_bytes(encode(Image.new("RGB", (4, 4), colour), "PNG"))
            rows.append(json.dumps({"images": [f"{name}{number}.png"]}))
        (source / f"{name}.jsonl").write_text("\n".join(rows))
    prices = {"prompt_price_per_million": 1, "completion_price_per_million": 2}
    connection = {"conn_type": "vlm", "host": "h", "extra": prices}
    monkeypatch.setenv("AIRFLOW_CONN_VLM_DEFAULT", json.dumps(connection))
    return tmp_path


@pytest.fixture
def make(place, monkeypatch):
    def operator(engine: ScriptedEngine, **given: Any) -> ImageTaggingVLMOperator:
        monkeypatch.setattr(runners, "make_engine", lambda *args, **kwargs: engine)
        given = {"source": str(place / "in"), "destination": str(place / "out"), **given}
        return ImageTaggingVLMOperator(task_id="tag", **given)

    return operator


def context(**more: Any) -> Any:
    ti = SimpleNamespace(dag_id="d", run_id="r", task_id="tag", map_index=-1, try_number=1)
    return {"ti": ti, "outlet_events": {}, **more}


def outputs(place) -> list[str]:
    """What is visible of the shards; answers that were paid for stay beside them, whatever happens."""
    return sorted(path.name for path in (place / "out").glob("*.jsonl"))


def test_a_second_run_counts_everything_as_cached_and_costs_nothing(make, place):
    first = make(ScriptedEngine(lambda about: TAGS)).execute(context())
    assert (first["rows_in"], first["ok"], first["shards"], first["shards_unchanged"]) == (800, 800, 2, 0)
    assert first["cost_usd"] == pytest.approx(800 * (10 * 1 + 2 * 2) / 1e6)
    engine = ScriptedEngine(lambda about: TAGS)
    again = make(engine).execute(context())
    assert engine.asked == []
    assert engine.entered == 0
    assert (again["rows_in"], again["cached"], again["requests"], again["cost_usd"]) == (800, 800, 0, 0.0)


def test_a_task_that_failed_can_run_again(make, place):
    def answer(about: Any) -> str:
        if len(engine.asked) == 1:
            raise EngineError("gone")
        return TAGS

    engine = ScriptedEngine(answer, concurrency=1)
    task = make(engine)
    with pytest.raises(EngineError):
        task.execute(context())
    again = task.execute(context())
    assert (again["ok"] + again["cached"], again["failed"]) == (800, 0)


def test_told_to_stop_before_it_began_it_sends_nothing(make, place):
    engine = ScriptedEngine(lambda about: TAGS)
    task = make(engine)
    task.on_kill()
    with pytest.raises(AirflowException, match="told to stop"):
        task.execute(context())
    assert engine.asked == []


def test_told_to_stop_in_the_middle_it_stops_and_leaves_nothing(make, place):
    engine = ScriptedEngine(lambda about: TAGS, delay=lambda about: 0.2)
    task = make(engine)
    threading.Timer(1.0, task.on_kill).start()
    with pytest.raises(AirflowException, match="told to stop"):
        task.execute(context())
    sent = len(engine.asked)
    time.sleep(0.5)
    assert 0 < sent == len(engine.asked) < 400
    assert outputs(place) == []


@pytest.mark.parametrize("seconds", [0.31, 0.52, 0.73, 1.07])
def test_a_timeout_ends_the_task_wherever_it_comes(make, place, seconds):
    # As Airflow does with `execution_timeout`: an exception out of a signal handler.
    engine = ScriptedEngine(lambda about: TAGS, delay=lambda about: 0.02, concurrency=2)
    task = make(engine)
    with pytest.raises(BaseException) as caught, timeout(seconds):
        task.execute(context())
    assert type(caught.value).__name__ == "AirflowTaskTimeout"
    sent = len(engine.asked)
    assert sent < 800
    time.sleep(0.3)
    assert len(engine.asked) == sent
    assert outputs(place) == []


def test_a_timeout_that_comes_while_rows_are_read_is_not_lost(make, place, monkeypatch):
    begun, plain = 0, Progress.begun

    def alarm(self: Progress) -> None:
        nonlocal begun
        begun += 1
        if begun == 50:
            os.kill(os.getpid(), signal.SIGALRM)
        plain(self)

    monkeypatch.setattr(Progress, "begun", alarm)
    task = make(ScriptedEngine(lambda about: TAGS, delay=lambda about: 0.02, concurrency=2))
    # Where the exception gets lost, nothing would end the task but this.
    guard = threading.Timer(20, task.on_kill)
    guard.start()
    try:
        with pytest.raises(BaseException) as caught, timeout(60):
            task.execute(context())
    finally:
        guard.cancel()
    assert type(caught.value).__name__ == "AirflowTaskTimeout"


def test_a_hiccup_of_the_task_state_store_fails_nobody(make, place, monkeypatch):
    class Down:
        tried = 0

        def set(self, key: str, value: Any) -> None:
            self.tried += 1
            raise RuntimeError("API server: 503")

    monkeypatch.setattr(base, "PROGRESS_SECONDS", 0.1)
    store = Down()
    engine = ScriptedEngine(lambda about: TAGS, delay=lambda about: 0.02)
    assert make(engine).execute(context(task_state_store=store))["ok"] == 800
    assert store.tried > 3


def test_too_many_failures_fail_the_task_after_everything_is_committed(make, place):
    pushed: dict[str, Any] = {}
    engine = ScriptedEngine(lambda about: "I can't say.")
    given = context()
    given["ti"].xcom_push = lambda key, value: pushed.update({key: value})
    with pytest.raises(
        AirflowException, match=r"800 of 800 rows failed \(100.0%\), more than max_error_rate=10.0%"
    ):
        make(engine, try_num=1).execute(given)
    assert outputs(place) == ["a.jsonl", "b.jsonl"]
    assert (pushed["return_value"]["failed"], pushed["return_value"]["rows_out"]) == (800, 800)
    assert make(ScriptedEngine(lambda about: TAGS)).execute(context())["ok"] == 800


def test_a_destination_that_is_the_source_by_a_link_is_refused(make, place):
    (place / "out").symlink_to(place / "in")
    before = (place / "in" / "a.jsonl").read_bytes()
    with pytest.raises((AirflowFailException, ConfigError), match="replaced by their own output"):
        make(ScriptedEngine(lambda about: TAGS)).execute(context())
    assert (place / "in" / "a.jsonl").read_bytes() == before
    assert not (place / "in" / "_vlm").exists()


def test_an_unknown_connection_fails_without_retries(place):
    task = ImageTaggingVLMOperator(
        task_id="tag", source=str(place / "in"), destination=str(place / "out"), vlm_conn_id="no_such"
    )
    with pytest.raises(AirflowFailException, match="no_such"):
        task.execute(context())


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"engine": "bogus"}, "engine='bogus'"),
        ({"max_error_rate": 7}, "max_error_rate=7"),
        ({"try_num": 0}, "try_num"),
        ({"source": "s3://b/x", "destination": "s3://b/x/y"}, "lies inside source"),
    ],
)
def test_a_mapped_operator_is_checked_when_the_dag_is_parsed(given, word):
    with DAG("d"), pytest.raises(ConfigError) as caught:
        ImageTaggingVLMOperator.partial(
            task_id="tag", **{"source": "{{ x }}", "destination": "s3://o", **given}
        )
    assert word in str(caught.value)
    # Should it only be made when its task runs, Airflow must not retry it either.
    assert isinstance(caught.value, AirflowFailException)


def test_a_mapped_operator_that_is_right_can_be_mapped_over_anything():
    with DAG("d") as dag:
        ImageTaggingVLMOperator.partial(task_id="a", destination="s3://o/").expand(
            source=["s3://x/", "s3://y/"]
        )
        ImageTaggingVLMOperator.partial(task_id="b", source="s3://x/").expand_kwargs(
            [{"destination": "s3://o/", "try_num": 2}]
        )
    assert sorted(dag.task_ids) == ["a", "b"]


def test_rows_without_anything_to_ask_about_are_said_to_be_odd(make, place, capsys):
    odd = "Nothing was asked about any of the 800 rows"
    # The field's name is not the dataset's, and a row without images is no error.
    first = make(ScriptedEngine(lambda about: TAGS), image_key="image").execute(context())
    assert (first["ok"], first["requests"], first["failed"]) == (800, 0, 0)
    assert odd in capsys.readouterr().out
    make(ScriptedEngine(lambda about: TAGS)).execute(context())
    make(ScriptedEngine(lambda about: TAGS)).execute(context())
    assert odd not in capsys.readouterr().out, "all of it was answered before"


def test_told_to_stop_while_shards_are_looked_up_it_does_not_wait_for_the_storage(make, place, monkeypatch):
    engine = ScriptedEngine(lambda about: TAGS)
    task, plain = make(engine), ShardRunner.committed
    reached, go_on, looked_up = threading.Event(), threading.Event(), []

    def slow(self: ShardRunner, shard: Any) -> Any:
        looked_up.append(shard.name)
        reached.set()
        assert go_on.wait(30)
        return plain(self, shard)

    monkeypatch.setattr(ShardRunner, "committed", slow)
    monkeypatch.setattr(runner, "LOOKUP_THREADS", 1)

    def stop() -> None:
        assert reached.wait(30)
        task.on_kill()

    stopping = threading.Thread(target=stop)
    stopping.start()
    # Where it is waited for, nothing would end the task but this.
    guard = threading.Timer(20, go_on.set)
    guard.start()
    try:
        with pytest.raises(AirflowException, match="told to stop"):
            task.execute(context())
        assert not go_on.is_set()
    finally:
        guard.cancel()
        go_on.set()
        stopping.join()
    assert (len(looked_up), engine.asked) == (1, [])


def test_what_bound_a_run_is_said_when_some_shards_could_not_be_done_too(make, place, capsys):
    (place / "in" / "c.jsonl.gz").write_bytes(b"no gzip")
    engine = ScriptedEngine(lambda about: TAGS, delay=lambda about: 0.05, concurrency=16)
    with pytest.raises(ShardError, match="1 of 3 shards"):
        make(engine).execute(context())
    assert len(engine.asked) == 800
    assert "What bound the run: engine" in capsys.readouterr().out
