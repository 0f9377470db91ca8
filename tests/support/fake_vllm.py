"""Stands in for vLLM's OpenAI-compatible server: starts in a fraction of a second, and fails in every way on demand.

It is run as a command (``python fake_vllm.py --model ...``), with the flags that ``vllm`` would be given, and like vLLM
it computes in a second process, asks for ``VLLM_API_KEY``, and tells of itself at ``/metrics``. The folder that
``FAKE_VLLM`` names is where it is told what to do and leaves what it did; see :class:`FakeVLLM` for the test's side.

    control.json   what to do from now on, see :data:`DEFAULTS`
    starts         a line of JSON for each start
    asked          a line for each request that was computed
    violations     what must never be: two servers on one GPU, or for one key
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import json
import os
import signal
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

DEFAULTS: dict[str, Any] = {
    "load_seconds": 0.0,
    # Per request; the engine computes any number at once.
    "answer_seconds": 0.0,
    # Printed at the start, before anything else happens.
    "says": [],
    # Megabytes printed, in lines, after that.
    "prints_mb": 0,
    # At the start: exit with this status, or by this signal.
    "exits": None,
    "killed_by": None,
    # So many starts end like that; the next one is well. None: all do.
    "bad_starts": None,
    # The start never comes to an end.
    "hangs": False,
    # The engine dies of a request that holds this text.
    "poison": None,
    # It serves a model that takes no videos.
    "no_video": False,
    # Time for somebody else to take the port, in seconds.
    "bind_seconds": 0.0,
}


class FakeVLLM:
    """What a test does with the fake: tell it what to do, and read what it did.

    :param folder: Its folder.
    """

    COMMAND = (sys.executable, str(Path(__file__).resolve()))

    def __init__(self, folder: Path) -> None:
        folder.mkdir(exist_ok=True)
        self.folder = folder
        self.environment = {"FAKE_VLLM": str(folder)}

    def control(self, **what: Any) -> None:
        """Have it behave like this from now on; what is not given is as by default."""
        unknown = set(what) - set(DEFAULTS)
        assert not unknown, unknown
        new = self.folder / f"control-{threading.get_ident()}"
        new.write_text(json.dumps(what))
        new.replace(self.folder / "control.json")

    def starts(self) -> list[dict[str, Any]]:
        """All starts: ``argv``, ``pid``, ``engine`` (process), ``gpus``, ``key`` (of all but the port), ``api_key``, ``port``..."""
        return [json.loads(line) for line in self._lines("starts")]

    def asked(self) -> list[str]:
        """The texts of all requests that were computed."""
        return [json.loads(line) for line in self._lines("asked")]

    def violations(self) -> list[str]:
        """What must never be."""
        return self._lines("violations")

    def _lines(self, name: str) -> list[str]:
        path = self.folder / name
        # A line that is being written has no end yet.
        return [line for line in path.read_text().split("\n")[:-1] if line] if path.exists() else []


def _note(name: str, value: Any) -> None:
    line = (json.dumps(value) + "\n").encode()
    file = os.open(_folder() / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.write(file, line)
    os.close(file)


def _folder() -> Path:
    return Path(os.environ["FAKE_VLLM"])


def _control() -> dict[str, Any]:
    try:
        return {**DEFAULTS, **json.loads((_folder() / "control.json").read_text())}
    except FileNotFoundError:
        return DEFAULTS


def _hold(what: str) -> None:
    """Have it for as long as this process lives, as an engine has its GPU's memory."""
    file = os.open(_folder() / f"{what}.held", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        _note("violations", f"two servers with {what}")
        print("torch.OutOfMemoryError: CUDA out of memory.", flush=True)
        os._exit(1)


class Engine:
    """The process that computes, as the API server sees it."""

    def __init__(self) -> None:
        here, there = socket.socketpair()
        self.pid = os.fork()
        if not self.pid:
            here.close()
            _compute(there)
        there.close()
        self._socket = here
        self._lock = threading.Lock()
        self._answers: dict[int, threading.Event] = {}
        self._numbers = 0
        self.dead = threading.Event()
        self.stopping = False
        self.running = 0
        self.tokens = 0
        threading.Thread(target=self._read, daemon=True).start()

    def stop(self) -> None:
        """Break off all that is computed, as vLLM does when it is told to stop."""
        self.stopping = True
        with self._lock:
            for each in self._answers.values():
                each.set()

    def ask(self, text: str) -> str | None:
        """Have an answer computed; why it ended, or None when the engine died instead."""
        with self._lock:
            self._numbers += 1
            number = self._numbers
            done = self._answers[number] = threading.Event()
        try:
            self._socket.sendall(json.dumps([number, text]).encode() + b"\n")
        except OSError:
            self.dead.set()
        done.wait()
        if self.dead.is_set():
            return None
        return "abort" if self.stopping else "stop"

    def _read(self) -> None:
        for line in self._socket.makefile("rb"):
            what, number = json.loads(line)
            with self._lock:
                if what == "running":
                    # As in vLLM, what is known of its queue is what the engine last said.
                    self.running = number
                else:
                    self.tokens += 10
                    self._answers.pop(number).set()
        self.dead.set()
        with self._lock:
            for each in self._answers.values():
                each.set()


def _compute(api: socket.socket) -> None:
    """What the engine's process does; never returns."""
    try:
        # As vLLM's, which spoils the environment that the process shows to others.
        import setproctitle

        setproctitle.setproctitle("FAKE::EngineCore")
        lock = threading.Lock()
        running = 0

        def say(what: str, number: int) -> None:
            api.sendall(json.dumps([what, number]).encode() + b"\n")

        def one(number: int, text: str) -> None:
            nonlocal running
            with lock:
                running += 1
                say("running", running)
            control = _control()
            if control["poison"] and control["poison"] in text:
                print("torch.AcceleratorError: CUDA error: an illegal memory access", flush=True)
                os._exit(1)
            time.sleep(control["answer_seconds"])
            _note("asked", text)
            with lock:
                running -= 1
                say("running", running)
                say("done", number)

        for line in api.makefile("rb"):
            threading.Thread(target=one, args=json.loads(line), daemon=True).start()
        # vLLM's engine does not end with its API server, either.
        while True:
            signal.pause()
    finally:
        os._exit(1)


class Handler(BaseHTTPRequestHandler):
    """Answers like vLLM, as far as we ask."""

    protocol_version = "HTTP/1.1"
    engine: Engine
    model: str

    def do_GET(self) -> None:
        if self.path == "/health":
            self._send(503 if self.engine.dead.is_set() else 200, b"")
        elif self.path == "/metrics":
            labels = f'{{engine="0",model_name="{self.model}"}}'
            engine = self.engine
            self._send(
                200,
                "# TYPE vllm:num_requests_running gauge\n"
                f"vllm:num_requests_running{labels} {float(engine.running)}\n"
                f"vllm:num_requests_waiting{labels} 0.0\n"
                f"vllm:kv_cache_usage_perc{labels} 0.125\n"
                f"vllm:prompt_tokens_total{labels} {float(engine.tokens)}\n"
                f"vllm:generation_tokens_total{labels} {float(engine.tokens)}\n".encode(),
            )
        elif self._may() and self.path == "/v1/models":
            self._json(200, {"data": [{"id": self.model}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._may():
            return
        if body["model"] != self.model:
            self._json(404, {"error": {"message": f"The model {body['model']} does not exist.", "code": 404}})
            return
        if _control()["no_video"] and "video_url" in json.dumps(body):
            error = {"message": "At most 0 video(s) may be provided in one prompt.", "code": 400}
            self._json(400, {"error": error})
            return
        text = body.get("prompt") or _text(body["messages"])
        reason = self.engine.ask(text)
        if reason is None:
            self._json(500, {"error": {"message": "EngineCore encountered an issue.", "code": 500}})
            return
        key = "text" if "prompt" in body else "message"
        said = f"pid {os.getpid()}: {text}"
        said = said if reason == "stop" else said[: len(said) // 2]
        choice = {"index": 0, "finish_reason": reason, key: said if key == "text" else {"content": said}}
        usage = {"prompt_tokens": 10, "completion_tokens": 10, "total_tokens": 20}
        self._json(200, {"id": "x", "model": self.model, "choices": [choice], "usage": usage})

    def _may(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {os.environ['VLLM_API_KEY']}":
            return True
        self._json(401, {"error": "Unauthorized"})
        return False

    def _json(self, status: int, value: Any) -> None:
        self._send(status, json.dumps(value).encode())

    def _send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        print("INFO:", format % args, flush=True)


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024


def _text(messages: list[dict[str, Any]]) -> str:
    content = messages[-1]["content"]
    if isinstance(content, str):
        return content
    return " ".join(part["text"] for part in content if part["type"] == "text")


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="api_server.py")
    for flag in ("--model", "--served-model-name", "--host", "--revision", "--dtype", "--quantization"):
        parser.add_argument(flag)
    for flag in ("--port", "--tensor-parallel-size", "--max-model-len", "--max-num-seqs"):
        parser.add_argument(flag, type=int)
    parser.add_argument("--enforce-eager", action=argparse.BooleanOptionalAction)
    parser.add_argument("--limit-mm-per-prompt", type=json.loads)
    return parser.parse_args()


def main() -> None:
    """Serve until SIGTERM."""
    args = _parse()
    control = _control()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    for line in control["says"]:
        print(os.path.expandvars(line), flush=True)
    for number in range(control["prints_mb"] * 10_000):
        print(f"{number:8} {'x' * 90}", flush=False)
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "cpu")
    what = [word for word in sys.argv if word != str(args.port)]
    key = hashlib.sha256(json.dumps([what, gpus]).encode()).hexdigest()[:16]
    earlier = len(FakeVLLM(_folder()).starts())
    start = {"argv": sys.argv, "pid": os.getpid(), "gpus": gpus, "key": key, "port": args.port}
    start |= {"api_key": os.environ["VLLM_API_KEY"], "environment": dict(os.environ), "cwd": str(Path.cwd())}
    bad = control["bad_starts"] is None or earlier < control["bad_starts"]
    if bad and (control["exits"] is not None or control["killed_by"] is not None or control["hangs"]):
        _note("starts", start)
        if control["hangs"]:
            time.sleep(3600)
        if control["killed_by"] is not None:
            os.kill(os.getpid(), control["killed_by"])
        sys.exit(control["exits"])
    # Before the engine, which would have the address open, too.
    time.sleep(control["bind_seconds"])
    for gpu in gpus.split(","):
        _hold(f"gpu-{gpu}")
    _hold(f"key-{key}")
    engine = Engine()
    _note("starts", start | {"engine": engine.pid})
    Handler.engine, Handler.model = engine, args.served_model_name

    def stop() -> None:
        engine.stop()
        # Time for those who wait to be told.
        time.sleep(0.2)
        os._exit(0)

    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=stop).start())
    time.sleep(control["load_seconds"])
    server = Server((args.host, args.port), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print("INFO:     Application startup complete.", flush=True)
    engine.dead.wait()
    # Time for those who wait to be told.
    time.sleep(0.1)
    print("ERROR: EngineDeadError: EngineCore encountered an issue. See stack trace above.", flush=True)
    os._exit(1)


if __name__ == "__main__":
    main()
