"""The compose file, checked without an engine: against Compose's own schema, and for what a reader relies on."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.compose import (
    AIRFLOW,
    AS_IT_IS,
    COMPOSE_FILE,
    REPOSITORY,
    VariableMissingError,
    compose_file,
    example_env,
    filled_env,
    interpolated,
    variables_used,
)

SECRETS = {
    "POSTGRES_PASSWORD",
    "REDIS_PASSWORD",
    "S3_ACCESS_KEY",
    "S3_SECRET_KEY",
    "AIRFLOW_JWT_SECRET",
    "AIRFLOW_API_SECRET_KEY",
    "AIRFLOW_FERNET_KEY",
    "EXTERNAL_VLLM_API_KEY",
}
GPU_SERVICES = {"gpu-worker", "vllm"}
ONE_TIME = {"airflow-init", "s3-bucket"}
NAMES = sorted(AS_IT_IS["services"])


@pytest.fixture(scope="module")
def services() -> dict[str, dict[str, Any]]:
    """The services, with the variables of a filled .env."""
    return dict(compose_file(filled_env())["services"])


def assert_compose_takes(path: Path) -> None:
    schema = ["--builtin-schema", "vendor.compose-spec"]
    check = subprocess.run(
        [sys.executable, "-m", "check_jsonschema", *schema, str(path)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert check.returncode == 0, check.stdout + check.stderr


def test_it_is_what_compose_takes():
    assert_compose_takes(COMPOSE_FILE)


def test_a_second_service_with_a_gpu_gets_another_one_as_the_page_says(tmp_path):
    page = (REPOSITORY / "docs" / "docker.md").read_text()
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    text, service = COMPOSE_FILE.read_text(), "  vllm:\n    <<: *gpu\n"
    assert service in text
    changed = text.replace(service, block)
    (tmp_path / "docker-compose.yaml").write_text(changed)

    assert_compose_takes(tmp_path / "docker-compose.yaml")

    reserved = {
        name: each["deploy"]["resources"]["reservations"]["devices"]
        for name, each in yaml.safe_load(changed)["services"].items()
        if name in GPU_SERVICES
    }
    assert [each.get("device_ids") for each in reserved["vllm"]] == [["1"]]
    # Docker takes one of the two, not both.
    assert [sorted({"count", "device_ids"} & set(each)) for (each,) in reserved.values()] == [
        ["count"],
        ["device_ids"],
    ]


# ------------------------------------------------------------------------------------------------ variables and secrets


def test_the_example_names_the_variables_that_are_used_and_no_others():
    assert {name for name, _, _ in variables_used()} == set(example_env())


def test_no_secret_has_a_default():
    example = example_env()
    for name, kind, _ in variables_used():
        if name in SECRETS:
            assert kind == "?", name
            assert example[name] == "", name


def test_what_looks_like_a_secret_is_known_as_one():
    looking = {name for name in example_env() if any(word in name for word in ("PASSWORD", "SECRET", "KEY"))}
    assert looking == SECRETS


def test_defaults_are_what_the_example_says():
    example = example_env()
    for name, kind, default in variables_used():
        if kind == "-":
            assert default == example[name], name


@pytest.mark.parametrize("name", sorted(SECRETS | {"VLM_MODEL", "VLM_ENGINE_ARGS"}))
def test_it_does_not_start_without(name):
    with pytest.raises(VariableMissingError, match=f"^{name}$"):
        compose_file({**filled_env(), name: ""})


def test_it_starts_without_what_is_optional():
    needed = {name for name, kind, _ in variables_used() if kind == "?"}

    started = compose_file({name: value for name, value in filled_env().items() if name in needed})
    assert started["services"].keys() == compose_file(filled_env())["services"].keys()


@pytest.mark.parametrize("text", ["${A:-{}}", "${A:-a$b}", "${A}", "$A", "${A-b}"])
def test_forms_of_variables_that_are_not_understood_are_not_overlooked(text):
    with pytest.raises(ValueError, match="not known here"):
        interpolated(f"before {text} after", {"A": "b"})


def test_secrets_are_where_they_are_needed_and_on_no_command_line():
    allowed = {
        "postgres": {"POSTGRES_PASSWORD"},
        "redis": {"REDIS_PASSWORD"},
        "s3": {"S3_ACCESS_KEY", "S3_SECRET_KEY"},
        "vllm": {"EXTERNAL_VLLM_API_KEY"},
    }
    holding = compose_file({name: f"<{name}>" for name in example_env()})["services"]
    for service, names in allowed.items():
        assert {name for name in SECRETS if f"<{name}>" in json.dumps(holding[service])} == names, service
    # Other users of a machine can read command lines.
    for service, each in holding.items():
        assert not any(f"<{name}>" in json.dumps(each.get("command")) for name in SECRETS), service


# ------------------------------------------------------------------------------------------ users, health, GPUs, volumes


@pytest.mark.parametrize("name", NAMES)
def test_nothing_runs_as_root(services, name):
    user = str(services[name]["user"]).split(":")[0]
    assert user not in ("", "0", "root")


@pytest.mark.parametrize("name", NAMES)
def test_every_service_says_how_it_is_or_ends(services, name):
    if name in ONE_TIME:
        assert "healthcheck" not in services[name]
        assert services[name]["restart"] in ("no", "on-failure")
    else:
        assert services[name]["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
        assert services[name]["restart"] == "unless-stopped"


@pytest.mark.parametrize("name", NAMES)
def test_only_those_that_are_said_to_have_a_gpu_reserve_one(services, name):
    devices = services[name].get("deploy", {}).get("resources", {}).get("reservations", {}).get("devices", [])
    if name in GPU_SERVICES:
        assert devices == [{"driver": "nvidia", "count": "1", "capabilities": ["gpu"]}]
        assert services[name]["init"] is True
        assert services[name]["shm_size"]
    else:
        assert devices == []


def test_only_with_its_profile_is_there_a_server_beside_the_gpu_worker(services):
    assert {name for name in NAMES if services[name].get("profiles")} == {"vllm"}


def test_the_table_at_the_top_tells_where_the_gpus_are():
    lines = [
        line.removeprefix("#") for line in COMPOSE_FILE.read_text().splitlines() if line.startswith("#   ")
    ]
    start = next(number for number, line in enumerate(lines) if line.split()[0] == "service")
    saying, told = "", {}
    for line in lines[start + 1 :]:
        if not line.startswith("   " + " " * 20):
            saying = line[:22].strip()
        if line.split()[-1] in ("yes", "no"):
            told[saying] = line.split()[-1]
    named = {name.strip(): answer for names, answer in told.items() for name in names.split(",")}
    assert {name for name, answer in named.items() if answer == "yes"} == GPU_SERVICES
    airflow = {name for name in NAMES if name.startswith("airflow-")}
    assert set(named) - {"airflow-*"} | airflow == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_volumes_are_declared_and_folders_are_there(services, name):
    for mount in services[name].get("volumes", []):
        source = mount.split(":")[0]
        if source.startswith("."):
            assert (REPOSITORY / source).is_dir(), source
            assert mount.endswith(":ro"), "what is this machine's is for reading"
        else:
            assert source in AS_IT_IS["volumes"]


def test_no_volume_is_declared_in_vain():
    used = {
        mount.split(":")[0] for each in AS_IT_IS["services"].values() for mount in each.get("volumes", [])
    }
    assert set(AS_IT_IS["volumes"]) == {source for source in used if not source.startswith(".")}


def test_what_is_waited_for_is_there_and_says_so(services):
    for name in NAMES:
        for other, how in services[name].get("depends_on", {}).items():
            expected = "service_completed_successfully" if other in ONE_TIME else "service_healthy"
            assert how == {"condition": expected}, (name, other)


def test_the_migration_comes_before_all_that_is_airflow_and_the_api_server_before_the_workers(services):
    def before(name: str) -> set[str]:
        return {other for each in services[name].get("depends_on", {}) for other in {each} | before(each)}

    for name in set(AIRFLOW) - ONE_TIME:
        assert {"airflow-init", "postgres", "redis"} <= before(name), name
    assert "airflow-apiserver" in before("worker") & before("gpu-worker")
    assert before("s3-bucket") == {"s3"}
