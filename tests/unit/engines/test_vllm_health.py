"""Whether a server still works, as told by an endpoint that says what the test wants."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from airflow_vlm_provider.engines import vllm_health
from airflow_vlm_provider.engines.vllm_health import Health


class Endpoint:
    """What is answered: ``healthy``, and by engine what runs, how many tokens there are, and perhaps what waits."""

    def __init__(self):
        self.healthy = True
        self.engines = {"0": (0, 0.0)}
        self.answers = True
        self.asked, self.ranks = [], []
        self.deaf = set()
        self.garbage = False
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                if endpoint.garbage:
                    self.wfile.write(b"no such protocol\r\n\r\n")
                    self.close_connection = True
                    return None
                if self.path == "/health":
                    return self.reply(200 if endpoint.healthy else 503)
                lines = [
                    f'vllm:num_requests_running{{engine="{name}"}} {runs}\n'
                    f'vllm:generation_tokens_total{{engine="{name}"}} {tokens}\n'
                    f'vllm:num_requests_waiting{{engine="{name}"}} {sum(waits)}\n'
                    for name, (runs, tokens, *waits) in endpoint.engines.items()
                ]
                return self.reply(200, "".join(lines).encode())

            def do_POST(self):
                endpoint.asked.append((self.path, self.headers["Authorization"]))
                rank = self.headers["X-Data-Parallel-Rank"]
                endpoint.ranks.append(rank)
                if endpoint.answers and rank not in endpoint.deaf:
                    self.reply(400)
                else:
                    endpoint.end.wait(30)

            def reply(self, status, body=b""):
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self.end = threading.Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.end.set()
        self.server.shutdown()
        self.server.server_close()


class Clock:
    def __init__(self):
        self.now = 1000.0

    def monotonic(self):
        return self.now


@pytest.fixture
def endpoint():
    made = Endpoint()
    yield made
    made.close()


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(vllm_health, "time", made)
    return made


@pytest.fixture
def health(endpoint, clock):
    return Health(endpoint.url, api_key="sk", model="m", stall_timeout=100)


def look(health, clock, *, after=0.0, used=True, answers=True):
    """Look later, and now and then until then, and wait for the answer to whatever is asked; whether it is stalled."""
    while True:
        clock.now += min(after, 40.0)
        after -= 40.0
        assert health.look(timeout=10, used=used)
        for thread in threading.enumerate():
            if thread.name == "vlm-question":
                thread.join(5 if answers else 0.1)
        if after <= 0:
            return health.stalled() is not None


def test_a_server_that_is_not_there_or_says_no_is_not_well(endpoint, health):
    assert health.look(timeout=10, used=True)
    endpoint.healthy = False
    assert not health.look(timeout=10, used=True)
    assert not Health("http://127.0.0.1:9", api_key="", model="m", stall_timeout=1).look(timeout=1, used=True)


def test_a_server_that_speaks_no_http_is_not_well(endpoint, health):
    endpoint.garbage = True
    assert not health.look(timeout=10, used=True)


def test_requests_that_run_without_progress_are_a_stall(endpoint, health, clock):
    endpoint.engines["0"] = (3, 10.0)
    endpoint.answers = False
    assert not look(health, clock, answers=False)
    assert not look(health, clock, answers=False, after=90)
    endpoint.engines["0"] = (3, 11.0)
    assert not look(health, clock, answers=False, after=9)
    assert not look(health, clock, answers=False, after=99)
    assert look(health, clock, answers=False, after=2)


def test_one_engine_of_several_that_stalls_is_a_stall(endpoint, health, clock):
    for step in range(4):
        endpoint.engines = {"0": (1, 5.0), "1": (1, float(step))}
        assert look(health, clock, after=40) == (step == 3)


def test_an_engine_that_has_nothing_to_do_is_asked_and_lives_by_its_answer(endpoint, health, clock):
    for _ in range(10):
        assert not look(health, clock, after=40)
    assert endpoint.asked
    assert set(endpoint.asked) == {("/v1/completions", "Bearer sk")}
    # There is no other that could be meant.
    assert set(endpoint.ranks) == {None}


def test_an_engine_that_has_nothing_to_do_and_does_not_answer_hangs(endpoint, health, clock):
    endpoint.answers = False
    assert not look(health, clock, answers=False)
    assert not look(health, clock, answers=False, after=60)
    assert not look(health, clock, answers=False, after=30)
    assert look(health, clock, answers=False, after=11)
    # Once is enough.
    assert len(endpoint.asked) == 1


def test_one_engine_of_several_that_hangs_while_it_seems_to_have_nothing_to_do_is_found(
    endpoint, health, clock
):
    endpoint.deaf = {"1"}
    for step in range(6):
        endpoint.engines = {"0": (1, float(step)), "1": (0, 5.0)}
        if look(health, clock, answers=False, after=20):
            break
        # Asked at the fourth look, it may still answer.
        assert ("1" in endpoint.ranks) == (step >= 3)
    else:
        assert look(health, clock, answers=False, after=20)
    assert set(endpoint.ranks) == {"0", "1"}


def test_one_engine_of_several_that_has_nothing_to_do_and_answers_is_well(endpoint, health, clock):
    for step in range(20):
        endpoint.engines = {"0": (1, float(step)), "1": (0, 5.0)}
        assert not look(health, clock, after=20)
    assert "1" in endpoint.ranks


def test_an_engine_is_not_blamed_for_an_api_server_that_answers_nobody(endpoint, health, clock):
    endpoint.deaf = {"0", "1"}
    for step in range(20):
        endpoint.engines = {"0": (1, float(step)), "1": (0, 5.0)}
        assert not look(health, clock, answers=False, after=20)
    # Each is asked once at a time.
    assert sorted(endpoint.ranks) == ["0", "1"]


def test_a_question_that_came_to_nothing_is_asked_again(endpoint, health, clock, monkeypatch):
    get, lost = health._get, ["/v1/completions"]

    def once_lost(path, *args):
        if path in lost:
            lost.remove(path)
            return None
        return get(path, *args)

    monkeypatch.setattr(health, "_get", once_lost)
    for _ in range(10):
        assert not look(health, clock, after=20)
    assert endpoint.asked


def test_requests_that_only_wait_are_a_stall_too(endpoint, health, clock):
    endpoint.engines["0"] = (0, 10.0, 3)
    assert not look(health, clock, after=40)
    assert look(health, clock, after=101)


def test_who_can_not_be_asked_is_not_blamed_for_its_silence(endpoint, health, clock, monkeypatch):
    def no_thread(**_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(vllm_health, "threading", SimpleNamespace(Thread=no_thread))
    for _ in range(10):
        assert not look(health, clock, after=40)


def test_who_did_not_look_for_long_has_missed_the_signs_of_life(endpoint, health, clock):
    endpoint.engines["0"] = (0, 10.0)
    assert not look(health, clock)
    for _ in range(3):
        clock.now += 1000
        assert health.look(timeout=10, used=True)
        assert health.stalled() is None


def test_an_engine_that_was_taken_away_is_not_missed(endpoint, health, clock):
    endpoint.engines = {"0": (1, 0.0), "1": (1, 0.0)}
    for step in range(10):
        assert not look(health, clock, after=20)
        endpoint.engines = {"0": (1, float(step))}


def test_nothing_is_asked_while_nobody_uses_it(endpoint, health, clock):
    endpoint.answers = False
    for _ in range(5):
        assert not look(health, clock, answers=False, after=60, used=False)
    assert endpoint.asked == []


def test_a_server_that_keeps_its_figures_to_itself_is_not_suspected(endpoint, health, clock):
    endpoint.engines = {}
    endpoint.answers = False
    for _ in range(5):
        assert not look(health, clock, answers=False, after=60)
    assert endpoint.asked == []
