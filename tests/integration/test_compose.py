"""Parts of the compose file that can run without an engine: the bucket's making, and vLLM's reading of its file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from demo.s3_server import ACCESS_KEY, SECRET_KEY, start_s3
from tests.support.compose import compose_file, example_env, filled_env

pytestmark = pytest.mark.integration


def services(**variables: str) -> dict[str, Any]:
    return dict(compose_file({**filled_env(), **variables})["services"])


def test_the_bucket_is_made_once_and_left_alone_afterwards(tmp_path: Path):
    made = services(S3_ACCESS_KEY=ACCESS_KEY, S3_SECRET_KEY=SECRET_KEY)["s3-bucket"]
    with start_s3() as server:
        connection = made["environment"]["AIRFLOW_CONN_AWS_DEFAULT"]
        env = {
            **os.environ,
            "AIRFLOW_HOME": str(tmp_path),
            "AIRFLOW_CONN_AWS_DEFAULT": connection.replace("http://s3:8333", server.endpoint_url),
        }
        _python, *arguments = made["command"]
        for _ in range(2):
            subprocess.run([sys.executable, *arguments], env=env, check=True)
            names = [each["Name"] for each in server.client().list_buckets()["Buckets"]]
            assert names == ["datasets"]
            server.client().put_object(Bucket="datasets", Key="kept", Body=b"")
        assert server.client().list_objects_v2(Bucket="datasets")["KeyCount"] == 1


def test_the_pool_is_there_after_the_migration_and_follows_the_workers_places(tmp_path: Path):
    env = {
        **{name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW")},
        "AIRFLOW_HOME": str(tmp_path),
        "AIRFLOW__CORE__LOAD_EXAMPLES": "false",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    for places in ("4", "6"):
        subprocess.run(
            services(GPU_WORKER_CONCURRENCY=places)["airflow-init"]["command"], env=env, check=True
        )
        told = subprocess.run(
            ["airflow", "pools", "get", "gpu", "--output", "json"],
            env=env,
            check=True,
            stdout=subprocess.PIPE,
        )
        (pool,) = json.loads(told.stdout)
        assert (pool["pool"], pool["slots"]) == ("gpu", places)


def test_vllm_understands_the_external_servers_command(tmp_path: Path):
    pytest.importorskip("vllm", reason="vLLM is not installed here")
    from vllm.entrypoints.cli.serve import cmd_init
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    compose = compose_file(filled_env())
    config = tmp_path / "vllm.yaml"
    config.write_text(compose["configs"]["vllm"]["content"])
    service = compose["services"]["vllm"]
    command = [*service["entrypoint"], *service["command"]]
    words = [str(config) if word == service["configs"][0]["target"] else word for word in command]

    parser = FlexibleArgumentParser()
    subcommands = parser.add_subparsers()
    for each in cmd_init():
        each.subparser_init(subcommands)
    parsed = parser.parse_args(words[1:])

    wanted = json.loads(example_env()["VLM_ENGINE_ARGS"])
    assert parsed.model_tag == example_env()["VLM_MODEL"]
    assert parsed.port == 8000
    assert {name: getattr(parsed, name) for name in wanted} == wanted
