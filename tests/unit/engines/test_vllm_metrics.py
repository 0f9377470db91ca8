"""Reading what a vLLM server tells of itself at /metrics."""

from __future__ import annotations

import pytest

from airflow_vlm_provider.engines.vllm_metrics import Metrics, read_engines, read_metrics

TEXT = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="org/m"} 3.0
vllm:num_requests_running{engine="1",model_name="org/m"} 2.0
vllm:num_requests_waiting{engine="0",model_name="org/m"} 10.0
vllm:num_requests_waiting{engine="1",model_name="org/m"} 0.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="org/m",reason="capacity"} 10.0
vllm:kv_cache_usage_perc{engine="0",model_name="org/m"} 0.25
vllm:kv_cache_usage_perc{engine="1",model_name="org/m"} 0.75
vllm:prompt_tokens_total{engine="0",model_name="org/m"} 1.5e+06
vllm:prompt_tokens_total{engine="1",model_name="org/m"} 1.0
vllm:generation_tokens_total{engine="0",model_name="org/m"} 500.0
vllm:iteration_tokens_total_sum{engine="0",model_name="org/m"} 40.0
vllm:iteration_tokens_total_bucket{engine="0",le="+Inf",model_name="org/m"} 7.0
vllm:iteration_tokens_total_count{engine="0",model_name="org/m"} 7.0
vllm:prompt_tokens_created{engine="0",model_name="org/m"} 1.7e+09
vllm:request_prompt_tokens_sum{engine="0",model_name="org/m"} 99.0
http_requests_total{handler="/health"} 9.0
"""


def test_engines_are_told_apart():
    assert read_engines(TEXT) == {
        "0": Metrics(running=3, waiting=10, kv_cache=0.25, progress=1_500_540.0),
        "1": Metrics(running=2, waiting=0, kv_cache=0.75, progress=1.0),
    }


def test_engines_are_added_up_and_the_fullest_cache_counts():
    assert read_metrics(TEXT) == Metrics(running=5, waiting=10, kv_cache=0.75, progress=1_500_541.0)


def test_requests_that_are_deferred_are_told_apart():
    deferred = 'vllm:num_requests_waiting_by_reason{engine="0",model_name="org/m",reason="deferred"} 4.0\n'
    engines = read_engines(TEXT + deferred)
    assert (engines["0"].waiting, engines["0"].deferred) == (10, 4)
    together = read_metrics(TEXT + deferred + deferred.replace('"0"', '"1"').replace("4.0", "3.0"))
    assert together is not None
    assert (together.waiting, together.deferred) == (10, 7)
    # A version that does not tell.
    without = read_metrics("\n".join(line for line in TEXT.splitlines() if "by_reason" not in line))
    assert without is not None
    assert (without.waiting, without.deferred) == (10, 0)


@pytest.mark.parametrize(
    ("running", "waiting", "deferred", "nothing"),
    [(0, 32, 32, True), (1, 31, 31, False), (0, 32, 31, False), (0, 0, 0, False), (0, 2, 0, False)],
)
def test_who_waits_while_nothing_runs_may_wait_for_a_grammar(running, waiting, deferred, nothing):
    metrics = Metrics(running, waiting, 0.0, 0.0, deferred=deferred)
    assert metrics.tells_nothing is nothing


def test_metrics_of_something_else_are_none():
    assert read_metrics("") is None
    assert read_metrics("http_requests_total 9.0\n") is None
    assert read_metrics("<html>not found</html>") is None
    assert read_engines('vllm:prompt_tokens_total{engine="0"} 5\n') == {}


def test_what_is_missing_is_nothing():
    assert read_metrics("vllm:num_requests_running 1\n") == Metrics(1, 0, 0.0, 0.0)
