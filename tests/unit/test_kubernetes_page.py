"""What docs/kubernetes.md says in YAML and Python, checked without a cluster."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shlex
from typing import Any

import pytest
import yaml
from airflow.cli import cli_parser
from airflow.configuration import conf
from airflow.models import Connection

from airflow_vlm_provider.hooks.settings import parse_settings
from tests.support.compose import REPOSITORY, compose_file
from tests.unit.test_dockerfile import folders

PAGE = (REPOSITORY / "docs" / "kubernetes.md").read_text()
BLOCKS = re.findall(r"^```(yaml|python|)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
PARSED = [each for kind, text in BLOCKS if kind == "yaml" for each in yaml.safe_load_all(text)]
MANIFESTS = {(each["kind"], each["metadata"]["name"]): each for each in PARSED if "kind" in each}
VALUES = [each for each in PARSED if "kind" not in each]
WORKLOADS = {name: each for (kind, name), each in MANIFESTS.items() if kind in ("Deployment", "StatefulSet")}
PODS = {name: each["spec"]["template"] for name, each in WORKLOADS.items()}


def container(name: str) -> dict[str, Any]:
    (found,) = PODS[name]["spec"]["containers"]
    return dict(found)


def test_there_is_something_on_it():
    assert {kind for kind, _ in MANIFESTS} == {
        "Secret",
        "PersistentVolumeClaim",
        "Deployment",
        "Service",
        "NetworkPolicy",
        "StatefulSet",
    }
    assert {each["executor"] for each in VALUES} == {"KubernetesExecutor", "CeleryExecutor"}
    assert len(BLOCKS) == PAGE.count("```") // 2, "a block is neither YAML nor Python nor a command"


def test_python_imports_what_is_there_and_can_be_run():
    for kind, text in BLOCKS:
        if kind == "python":
            tree = ast.parse(text)
            modules = [
                each.module for each in ast.walk(tree) if isinstance(each, ast.ImportFrom) and each.module
            ]
            assert all(importlib.util.find_spec(each) for each in modules if each.startswith("airflow")), (
                modules
            )
            if importlib.util.find_spec("kubernetes"):
                exec(compile(tree, "docs/kubernetes.md", "exec"), {})


@pytest.mark.parametrize("name", sorted(PODS))
def test_pods_are_chosen_by_their_own_labels_and_run_as_the_images_user(name):
    labels, spec = PODS[name]["metadata"]["labels"], PODS[name]["spec"]
    assert WORKLOADS[name]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert MANIFESTS["Service", name]["spec"]["selector"].items() <= labels.items()
    user, group = compose_file()["services"]["gpu-worker"]["user"].split(":")
    context = spec["securityContext"]
    assert (context["runAsUser"], context["runAsGroup"], context["runAsNonRoot"]) == (
        int(user),
        int(group),
        True,
    )
    # A Service named "vllm" would set VLLM_PORT in every pod of the namespace.
    assert spec["enableServiceLinks"] is False


@pytest.mark.parametrize("name", sorted(PODS))
def test_pods_ask_for_a_gpu_and_mount_what_they_have(name):
    resources = container(name)["resources"]
    assert resources["requests"]["nvidia.com/gpu"] == resources["limits"]["nvidia.com/gpu"]
    volumes = {each["name"] for each in PODS[name]["spec"].get("volumes", [])}
    volumes |= {each["metadata"]["name"] for each in WORKLOADS[name]["spec"].get("volumeClaimTemplates", [])}
    assert {each["name"] for each in container(name)["volumeMounts"]} == volumes
    paths = {each["mountPath"] for each in container(name)["volumeMounts"]}
    assert paths - {"/dev/shm"} <= folders("gpu")
    for each in PODS[name]["spec"].get("volumes", []):
        if claim := each.get("persistentVolumeClaim"):
            assert ("PersistentVolumeClaim", claim["claimName"]) in MANIFESTS


def test_images_are_those_that_compose_builds():
    tags = {each["image"] for each in compose_file()["services"].values() if "build" in each}
    assert {container(name)["image"].removeprefix("registry.example.com/") for name in PODS} <= tags
    for values in VALUES:
        image = values["images"]["airflow"]
        assert f"{image['repository'].removeprefix('registry.example.com/')}:{image['tag']}" in tags
        assert values["airflowVersion"] == values["defaultAirflowTag"] == image["tag"]


def test_ports_names_and_keys_lead_from_the_connection_to_vllm():
    secret = MANIFESTS["Secret", "vlm-connections"]["stringData"]
    fields = json.loads(secret["AIRFLOW_CONN_VLM_DEFAULT"])
    found = Connection(conn_id="vlm_default", **fields)
    settings, _ = parse_settings("vlm_default", host=found.host, extra=found.extra)
    service = MANIFESTS["Service", "vllm"]
    assert (
        settings.base_url == f"http://{service['metadata']['name']}:{service['spec']['ports'][0]['port']}/v1"
    )
    assert settings.engine == "openai"
    assert settings.model == container("vllm")["args"][0]
    assert found.password == MANIFESTS["Secret", "vllm"]["stringData"]["VLLM_API_KEY"]
    named = {each["name"]: each["containerPort"] for each in container("vllm")["ports"]}
    assert f"--port={named['http']}" in container("vllm")["args"]
    assert service["spec"]["ports"][0]["targetPort"] in named
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container("vllm")[probe]["httpGet"] == {"path": "/health", "port": "http"}
    policy = MANIFESTS["NetworkPolicy", "vllm"]["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= PODS["vllm"]["metadata"]["labels"].items()
    assert policy["ingress"][0]["ports"][0]["port"] in named


def test_every_secret_that_is_read_is_made_or_told_to_the_chart():
    made = {name for kind, name in MANIFESTS if kind == "Secret"}
    (celery,) = (each for each in VALUES if each["executor"] == "CeleryExecutor")
    made |= {value for key, value in {**celery, **celery["data"]}.items() if key.endswith("SecretName")}
    read = set(re.findall(r"secretKeyRef:\s+name: (\S+)", PAGE)) | set(
        re.findall(r"secretRef:\s+name: (\S+)", PAGE)
    )
    assert read <= made
    assert read


def test_vllm_has_the_hubs_token_wherever_it_runs():
    for name in PODS:
        read = [MANIFESTS.get(("Secret", each["secretRef"]["name"])) for each in container(name)["envFrom"]]
        assert any("HF_TOKEN" in secret["stringData"] for secret in read if secret), name


def test_the_pool_has_a_slot_for_each_place_of_the_workers():
    (command,) = (shlex.split(text) for kind, text in BLOCKS if not kind)
    assert command[0] == "kubectl"
    words = command[command.index("--") + 1 :]
    made = cli_parser.get_parser().parse_args(words[1:])
    worker = WORKLOADS["airflow-gpu-worker"]["spec"]
    (places,) = (
        int(each.partition("=")[2])
        for each in container("airflow-gpu-worker")["args"]
        if each.startswith("--concurrency")
    )
    assert (words[0], made.subcommand) == ("airflow", "set")
    assert int(made.slots) == places * worker["replicas"]
    # Where DAGs are parsed, which is where it is read.
    (values,) = (each for each in VALUES if each["executor"] == "CeleryExecutor")
    told = {each["name"]: each["value"] for each in values["env"]}
    assert told["AIRFLOW__VLM__GPU_POOL"] == made.pool
    own = {each["name"]: each.get("value") for each in container("airflow-gpu-worker")["env"]}
    assert told.items() <= own.items()


def test_airflow_knows_the_workers_settings_and_its_command():
    worker = container("airflow-gpu-worker")
    known = conf.configuration_description
    celery = importlib.util.find_spec("airflow.providers.celery") is not None
    environment = {each["name"]: each.get("value") for each in worker["env"]}
    for name in environment:
        section, option = name.removeprefix("AIRFLOW__").lower().split("__")
        assert option in known.get(section, {}).get("options", {}) or (section == "celery" and not celery), (
            name
        )
    queue = next(each.partition("=")[2] for each in worker["args"] if each.startswith("--queues"))
    assert environment["AIRFLOW__VLM__GPU_QUEUE"] == queue
    for values in VALUES:
        for each in values.get("env", []):
            section, option = each["name"].removeprefix("AIRFLOW__").lower().split("__")
            assert option in known[section]["options"], each["name"]
    if not celery:
        pytest.skip(
            "apache-airflow-providers-celery is not installed here: Airflow does not know its commands"
        )
    assert worker["command"][0] == "airflow"
    parsed = cli_parser.get_parser().parse_args([*worker["command"][1:], *worker["args"]])
    assert (parsed.queues, parsed.concurrency) == (queue, 4)
    assert (
        f"--destination {parsed.celery_hostname.replace('%h', '$(hostname)')}"
        in worker["livenessProbe"]["exec"]["command"][-1]
    )
