"""An S3 server for tests: moto in a process of its own, on a free loopback port."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

REGION = "us-east-1"
ACCESS_KEY = "testing"
SECRET_KEY = "testing"
START_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class S3Server:
    """A running S3 server; it starts empty, and a test makes its own buckets."""

    endpoint_url: str

    def client(self, *, endpoint_url: str | None = None, **config: Any) -> Any:
        """
        Make a boto3 S3 client for this server.

        :param endpoint_url: Another way to the same server, a fault-injecting proxy for one.
        :param config: Settings of ``botocore.config.Config``: timeouts, retries, ...
        """
        import boto3
        from botocore.config import Config

        # A session of its own, so that neither the default session nor the machine's profiles come into it.
        return boto3.session.Session().client(
            "s3",
            endpoint_url=endpoint_url or self.endpoint_url,
            region_name=REGION,
            aws_access_key_id=ACCESS_KEY,
            aws_secret_access_key=SECRET_KEY,
            config=Config(**config),
        )

    def airflow_connection_json(self) -> str:
        """Return the value of ``AIRFLOW_CONN_AWS_DEFAULT`` that leads Airflow's S3Hook here."""
        return json.dumps(
            {
                "conn_type": "aws",
                "login": ACCESS_KEY,
                "password": SECRET_KEY,
                "extra": {"endpoint_url": self.endpoint_url, "region_name": REGION},
            }
        )


@contextlib.contextmanager
def start_s3(*, page_size: int = 1000) -> Iterator[S3Server]:
    """
    Start a server, wait until it answers, and kill it at the end.

    :param page_size: How many keys one response lists; a small number shows pagination without many objects.
    """
    port = _free_port()
    endpoint_url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
            env={**os.environ, "MOTO_S3_DEFAULT_MAX_KEYS": str(page_size)},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        try:
            _wait_until_healthy(process, endpoint_url, log)
            yield S3Server(endpoint_url)
        finally:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_healthy(process: subprocess.Popen[bytes], endpoint_url: str, log: IO[bytes]) -> None:
    # A proxy in the environment must not come between a test and its own loopback server.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        with contextlib.suppress(OSError), opener.open(f"{endpoint_url}/moto-api/", timeout=5):
            return
        time.sleep(0.1)
    log.seek(0)
    raise RuntimeError(f"moto did not start: {log.read().decode(errors='replace')[-2000:]}")
