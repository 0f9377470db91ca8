"""The keeper's decisions that don't show from outside, or only by luck."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest

from airflow_vlm_provider.engines import vllm_keeper
from airflow_vlm_provider.engines.vllm_folder import EngineFolder, ServerFolder
from airflow_vlm_provider.engines.vllm_keeper import RESTARTS, RESTARTS_WITHIN, Keeper
from airflow_vlm_provider.engines.vllm_settings import KeeperSettings
from airflow_vlm_provider.engines.vllm_spec import ServerSpec


@pytest.fixture
def keeper(tmp_path):
    def make(*gpus):
        folder = EngineFolder(tmp_path)
        spec = ServerSpec(model="m", gpus=gpus)
        server = folder.server(spec.key)
        server.write_spec(spec.to_json())
        with server.gate():
            lock = server.keeper_lock()
        return Keeper(folder, server, KeeperSettings(), name="k", lock=lock)

    tmp_path.chmod(0o700)
    return make


def test_gpus_are_taken_in_one_order_so_that_no_two_keepers_wait_for_each_other(keeper, monkeypatch):
    orders = []
    for gpus in (("10", "2", "0"), ("0", "2", "10"), ("2", "0", "10")):
        order = []

        def claim(self, gpu, order=order):
            order.append(gpu)
            return 0

        monkeypatch.setattr(EngineFolder, "claim", claim)
        assert keeper(*gpus)._claim_gpus()
        orders.append(order)
    assert orders[0] == orders[1] == orders[2]
    assert len(set(orders[0])) == 3


@pytest.mark.parametrize("waits", [True, False])
def test_who_waits_for_a_gpu_already_may_look_twice_before_a_newcomer_takes_it(keeper, monkeypatch, waits):
    made, done = keeper("0", "1"), []
    claim = EngineFolder.claim
    monkeypatch.setattr(EngineFolder, "claim", lambda self, gpu: done.append(gpu) or claim(self, gpu))
    monkeypatch.setattr(made, "_is_over", lambda: done.append("tick"))
    with made._folder.wanting("1") if waits else contextlib.nullcontext():
        assert made._claim_gpus()
    assert done == [*(["tick"] * 2 if waits else []), "0", "1"]


def test_a_newcomer_that_nobody_needs_any_more_takes_no_gpu(keeper, monkeypatch):
    made = keeper("0")
    monkeypatch.setattr(made, "_is_over", lambda: True)
    with made._folder.wanting("0"):
        assert not made._claim_gpus()
    assert made._gpus == {}


def test_restarts_are_counted_within_a_while_only(keeper, monkeypatch):
    made = keeper("0")
    assert [made._may_start_again(1), made._may_start_again(2)] == [True, False]
    made._state = type(made._state)("k", "ready", 0.0, ready_at=1.0)
    for _ in range(3 * RESTARTS):
        made._ready_seconds += RESTARTS_WITHIN / RESTARTS + 1
        assert made._may_start_again(99)
    for _ in range(RESTARTS):
        last = made._may_start_again(99)
    assert not last


@pytest.mark.parametrize(
    ("load_seconds", "ready_seconds", "loads"),
    [(1, 1, 6), (900, 1, 6), (900, 110, 6), (1, 130, 20), (900, 130, 20)],
)
def test_restarts_are_bounded_by_how_long_the_server_is_ready_and_not_by_how_long_it_loads(
    keeper, monkeypatch, load_seconds, ready_seconds, loads
):
    made, clock, started = keeper("0"), SimpleNamespace(now=1000.0), []

    class Process:
        """A server that dies some time after it was ready."""

        pid, output = 1, "pipe:[1]"

        def __init__(self, *_, **__):
            started.append(clock.now)

        def status(self):
            return 1 if clock.now > started[-1] + load_seconds + ready_seconds else None

        def end(self, *, gently):
            pass

        def last_lines(self):
            return []

    class Health:
        def __init__(self, *_, **__):
            pass

        def look(self, **_):
            return clock.now > started[-1] + load_seconds

        def stalled(self):
            return None

    def is_over():
        clock.now += 0.25
        return len(started) == 20

    monkeypatch.setattr(
        vllm_keeper, "time", SimpleNamespace(monotonic=lambda: clock.now, time=lambda: clock.now)
    )
    monkeypatch.setattr(vllm_keeper, "ServerProcess", Process)
    monkeypatch.setattr(vllm_keeper, "Health", Health)
    monkeypatch.setattr(made, "_is_over", is_over)
    made._guard = SimpleNamespace(watch=lambda *_, **__: None, forget=lambda: None)
    made._serve()
    assert len(started) == loads
    assert (made._state.phase == "failed") == (loads == 6)


def test_a_lack_that_may_pass_stops_no_server(keeper, monkeypatch, caplog):
    made = keeper("0")
    with made._server.gate():
        made._server.take_lease({})
    monkeypatch.setattr(vllm_keeper, "TICK", 0.0)

    def broken(*_):
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patch:
        patch.setattr(ServerFolder, "leases", broken)
        assert [made._is_over(), made._is_over()] == [False, False]
    assert caplog.text.count("Too many open files") == 1
    assert not made._is_over()
    made.stop()
    with monkeypatch.context() as patch:
        patch.setattr(ServerFolder, "leases", broken)
        assert made._is_over()
