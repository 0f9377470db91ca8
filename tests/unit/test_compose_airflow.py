"""What the compose file says to Airflow (settings, commands, connections, queues), read back by the installed Airflow itself."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import shlex
import subprocess
from typing import Any

import pytest
from airflow.cli import cli_parser
from airflow.configuration import conf
from airflow.models import Connection
from airflow.sdk import DAG
from fastapi import FastAPI
from fastapi.testclient import TestClient

from airflow_vlm_provider.engines.vllm_spec import ServerSpec
from airflow_vlm_provider.hooks.settings import VLMSettings, parse_settings
from airflow_vlm_provider.hooks.vlm import VLMHook
from airflow_vlm_provider.operators.placement import PlacedOperator
from tests.support.compose import (
    AIRFLOW,
    AS_IT_IS,
    REPOSITORY,
    compose_file,
    example_env,
    filled_env,
)
from tests.unit.test_dockerfile import installed

COMMANDS = [
    "airflow-apiserver",
    "airflow-scheduler",
    "airflow-dag-processor",
    "airflow-triggerer",
    "airflow-init",
    "worker",
    "gpu-worker",
]


SETTINGS = sorted(
    {
        (name, setting)
        for name in AIRFLOW
        for setting in AS_IT_IS["services"][name]["environment"]
        if setting.startswith("AIRFLOW__")
    }
)


def commands(service: dict[str, Any]) -> list[list[str]]:
    """The commands of Airflow's that a service runs, one after the other, in words."""
    match service["command"]:
        case str(line):
            return [shlex.split(line)]
        case ["bash", "-c", script]:
            lines = [shlex.split(line) for line in script.split("&&")]
            assert all(words[0] == "airflow" for words in lines), script
            return [words[1:] for words in lines]
        case other:
            raise AssertionError(f"This form of a command is not known here: {other}")


def needs_celery(setting_or_command: str) -> None:
    if (
        "celery" in setting_or_command.lower()
        and importlib.util.find_spec("airflow.providers.celery") is None
    ):
        pytest.skip(
            "apache-airflow-providers-celery is not installed here: Airflow does not know what is Celery's"
        )


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, Any]]:
    """The services, with the variables of a filled .env."""
    return dict(compose_file(filled_env())["services"])


@pytest.fixture(scope="module")
def known_settings() -> dict[str, dict[str, Any]]:
    """Every setting that Airflow and its providers know, by section and name."""
    return {section: each["options"] for section, each in conf.configuration_description.items()}


@pytest.mark.parametrize(("service", "name"), SETTINGS)
def test_airflow_knows_the_setting_and_its_value_fits(services, known_settings, service, name):
    needs_celery(name)
    section, option = name.removeprefix("AIRFLOW__").lower().split("__")
    assert option in known_settings.get(section, {}), f"[{section}] {option} is no setting of Airflow's"
    value = services[service]["environment"][name]
    assert isinstance(value, str), "in YAML, a boolean or number without quotes is changed on its way"
    match known_settings[section][option]["type"]:
        case "boolean":
            assert value in ("true", "false")
        case "integer":
            int(value)
        case "float":
            float(value)
        case kind:
            assert kind == "string"


@pytest.mark.parametrize("name", COMMANDS)
def test_airflow_understands_the_command(services, name):
    needs_celery(str(services[name]["command"]))

    for words in commands(services[name]):
        assert callable(cli_parser.get_parser().parse_args(words).func)


def test_no_command_of_airflows_is_left_out():
    assert set(COMMANDS) == set(AIRFLOW) - {"s3-bucket"}


@pytest.mark.parametrize("name", ["airflow-dag-processor", "airflow-triggerer"])
def test_airflow_understands_the_health_check(services, name):
    kind, command, *arguments = services[name]["healthcheck"]["test"]
    assert (kind, command) == ("CMD", "airflow")

    parsed = cli_parser.get_parser().parse_args(arguments)

    # Both jobs are those of the command that the service runs.
    assert parsed.job_type.removesuffix("Job").lower() == services[name]["command"].replace("-", "")


def test_health_checks_over_http_ask_the_port_that_the_service_has(services):
    scheduler = conf.get("scheduler", "scheduler_health_check_server_port")
    assert f":{scheduler}/health" in services["airflow-scheduler"]["healthcheck"]["test"][-1]
    assert services["airflow-scheduler"]["environment"]["AIRFLOW__SCHEDULER__ENABLE_HEALTH_CHECK"] == "true"
    api = conf.get("api", "port")
    assert f":{api}/api/v2/" in services["airflow-apiserver"]["healthcheck"]["test"][-1]
    assert services["airflow-apiserver"]["ports"][0].endswith(f":{api}")
    assert (
        f":{api}/execution/" in services["worker"]["environment"]["AIRFLOW__CORE__EXECUTION_API_SERVER_URL"]
    )
    port = services["vllm"]["command"][services["vllm"]["command"].index("--port") + 1]
    assert f":{port}/health" in services["vllm"]["healthcheck"]["test"][-1]
    assert f"//vllm:{port}/v1" in services["worker"]["environment"]["AIRFLOW_CONN_VLM_EXTERNAL"]


@pytest.mark.parametrize("name", ["worker", "gpu-worker"])
def test_a_workers_health_check_asks_that_worker(services, name):
    command = shlex.split(services[name]["command"])
    called = command[command.index("--celery-hostname") + 1]

    assert services[name]["healthcheck"]["test"][-1].endswith(called.replace("%h", "$HOSTNAME"))


def test_each_queue_has_its_worker(services):
    def queue(name: str) -> str:
        command = shlex.split(services[name]["command"])
        return command[command.index("--queues") + 1]

    assert queue("worker") == conf.get("operators", "default_queue")
    for name in AIRFLOW:
        assert queue("gpu-worker") == services[name]["environment"]["AIRFLOW__VLM__GPU_QUEUE"], name


@pytest.mark.parametrize("places", [None, "7"])
def test_the_pool_of_the_gpu_has_a_slot_for_each_place_of_its_worker(places):
    needs_celery("celery")
    services = compose_file({**filled_env(), **({"GPU_WORKER_CONCURRENCY": places} if places else {})})[
        "services"
    ]
    parse = cli_parser.get_parser().parse_args
    worker = parse(*commands(services["gpu-worker"]))

    migration, made = (parse(words) for words in commands(services["airflow-init"]))

    # What waits for a place of the worker's in its queue is failed after a while, what waits for a slot is not.
    assert (migration.subcommand, made.subcommand) == ("migrate", "set")
    assert int(made.slots) == worker.concurrency == int(places or example_env()["GPU_WORKER_CONCURRENCY"])
    for name in AIRFLOW:
        assert services[name]["environment"]["AIRFLOW__VLM__GPU_POOL"] == made.pool, name


@pytest.mark.parametrize(
    ("database", "healthy"),
    [("healthy", True), ("unhealthy", False)],
)
def test_an_api_server_without_its_database_is_not_healthy(
    services, monkeypatch, tmp_path, database, healthy
):
    from airflow.api_fastapi.core_api.routes.public import monitor

    answered = {
        "metadatabase": {"status": database},
        **{
            name: {"status": "healthy", f"latest_{name}_heartbeat": None}
            for name in ("scheduler", "triggerer", "dag_processor")
        },
    }
    monkeypatch.setattr(monitor, "get_airflow_health", lambda: answered)
    app = FastAPI()
    app.include_router(monitor.monitor_router, prefix="/api/v2")
    answer = TestClient(app).get("/api/v2/monitor/health")
    assert answer.status_code == 200
    (tmp_path / "answer").write_text(answer.text)
    (tmp_path / "curl").write_text(f"#!/bin/sh\nexec cat '{tmp_path}/answer'\n")
    (tmp_path / "curl").chmod(0o755)

    kind, *words = services["airflow-apiserver"]["healthcheck"]["test"]
    found = subprocess.run(
        ["sh", "-c", *words] if kind == "CMD-SHELL" else words,
        env={"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        check=False,
    )
    assert (found.returncode == 0) is healthy


DAGS = sorted((REPOSITORY / "dags").glob("*.py"))


@pytest.fixture
def parsed_dag(request, services, monkeypatch) -> DAG:
    """A DAG as the stack's DAG processor parses it."""
    for name, value in services["airflow-dag-processor"]["environment"].items():
        if name.startswith("AIRFLOW__VLM__"):
            monkeypatch.setenv(name, value)
    return runpy.run_path(str(request.param))["dag"]


@pytest.mark.parametrize("parsed_dag", DAGS, ids=lambda path: path.stem, indirect=True)
def test_the_dags_run_where_their_engine_is(services, parsed_dag):
    asking = [each for each in parsed_dag.tasks if issubclass(operator_class(each), PlacedOperator)]
    assert asking
    for each in asking:
        arguments = each.partial_kwargs if each.is_mapped else vars(each)
        asked = vlm_settings(services, arguments.get("vlm_conn_id") or VLMHook.default_conn_name)
        if (engine := arguments.get("engine") or asked.engine) == "openai":
            continue
        environment = services["gpu-worker"]["environment"]
        assert each.queue == environment["AIRFLOW__VLM__GPU_QUEUE"], each.task_id
        assert each.pool == environment["AIRFLOW__VLM__GPU_POOL"], each.task_id
        # vLLM is what the image begins with.
        assert engine == "vllm" or engine in installed("gpu"), each.task_id


def operator_class(task: Any) -> type:
    return task.operator_class if task.is_mapped else type(task)


def connection(services: dict[str, dict[str, Any]], conn_id: str) -> Connection:
    return Connection(
        conn_id=conn_id, **json.loads(services["worker"]["environment"][f"AIRFLOW_CONN_{conn_id.upper()}"])
    )


def vlm_settings(services: dict[str, dict[str, Any]], conn_id: str) -> VLMSettings:
    found = connection(services, conn_id)
    assert found.conn_type == "vlm"
    settings, _ = parse_settings(
        conn_id, host=found.host, port=found.port, schema=found.schema, extra=found.extra
    )
    return settings


def test_the_default_connection_has_the_worker_start_vllm(services):
    settings = vlm_settings(services, "vlm_default")

    assert (settings.engine, settings.model) == ("vllm", example_env()["VLM_MODEL"])
    assert settings.engine_args == json.loads(example_env()["VLM_ENGINE_ARGS"])
    spec = ServerSpec(model=settings.model, gpus=("0",), args=settings.engine_args, command=("vllm", "serve"))
    assert "--max-model-len 16384" in " ".join(spec.argv(port=1)).replace("=", " ")


@pytest.mark.parametrize("arguments", ["{}", '{"tensor_parallel_size": 2, "dtype": "bfloat16"}'])
def test_engine_arguments_of_ones_own_fit_in(arguments):
    services = compose_file({**filled_env(), "VLM_ENGINE_ARGS": arguments})["services"]

    assert vlm_settings(services, "vlm_default").engine_args == json.loads(arguments)


def test_the_other_connections_lead_to_the_services(services):
    external = vlm_settings(services, "vlm_external")
    assert (external.engine, external.base_url) == ("openai", "http://vllm:8000/v1")
    assert connection(services, "vlm_external").password == services["vllm"]["environment"]["VLLM_API_KEY"]
    aws = connection(services, "aws_default")
    assert aws.extra_dejson["endpoint_url"] == "http://s3:8333"
    assert aws.login == services["s3"]["environment"]["AWS_ACCESS_KEY_ID"]
    assert aws.password == services["s3"]["environment"]["AWS_SECRET_ACCESS_KEY"]


def test_all_of_airflow_has_the_same_settings_but_for_a_few(services):
    own = {
        "gpu-worker": {"AIRFLOW__VLM__ENGINE_IDLE_TIMEOUT", "HF_TOKEN"},
        "worker": {"DUMB_INIT_SETSID"},
        "airflow-apiserver": {"AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE"},
        "airflow-scheduler": {"AIRFLOW__SCHEDULER__ENABLE_HEALTH_CHECK"},
    }
    shared = services["airflow-triggerer"]["environment"]
    for name in AIRFLOW:
        environment = services[name]["environment"]
        assert {key: value for key, value in environment.items() if key not in own.get(name, ())} == shared, (
            name
        )


def test_what_is_copied_into_the_example_server_is_json_for_vllm():
    config = compose_file(filled_env())["configs"]["vllm"]["content"]

    assert json.loads(config) == json.loads(example_env()["VLM_ENGINE_ARGS"])
    assert AS_IT_IS["services"]["vllm"]["configs"][0]["target"] in AS_IT_IS["services"]["vllm"]["command"]
