"""Where a recipe's dataset is, and where its result goes."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from airflow_vlm_provider.recipes.recipe import Ignored
from airflow_vlm_provider.recipes.secrets import misplaced

Report = Callable[[str, str], None]

# Endings of what Data-Juicer reads or writes, and no shard can have.
_OTHER_FORMATS = (".json", ".csv", ".tsv", ".txt", ".md", ".pdf", ".docx", ".xlsx", ".arrow")
_TEMPLATE = re.compile(r"\{\{|\{%")
_CONFIG_FIELDS = frozenset({"type", "path", "source", "weight"})
_S3_FIELDS = frozenset(
    {"aws_access_key_id", "aws_secret_access_key", "aws_session_token", "aws_region", "endpoint_url"}
)
_GIVE = "leave it out, and give recipe_task_group() a source"


def source_of(
    settings: Mapping[str, Any], folder: Path, *, report: Report, ignore: Callable[[Ignored], None]
) -> str | None:
    """The dataset's place; None when the recipe names none, or a wrong one.

    :param settings: The recipe's settings.
    :param folder: What a relative path is relative to.
    :param report: Told of each problem: its place and a sentence.
    :param ignore: Told of what is ignored.
    """
    path, dataset = settings.get("dataset_path"), settings.get("dataset")
    if path:
        if dataset:
            ignore(Ignored("dataset", "dataset_path comes first, as it does in Data-Juicer"))
        return _one_path(path, "dataset_path", folder, report=report, split=True)
    return _of_configs(dataset, folder, report=report, ignore=ignore) if dataset else None


def destination_of(
    settings: Mapping[str, Any], folder: Path, *, report: Report, ignore: Callable[[Ignored], None]
) -> str | None:
    """The result's place; None when the recipe names none, or a wrong one.

    What Data-Juicer takes for a file's name is the name of a folder here: ``out/result.jsonl`` is ``out/result``.
    """
    from airflow_vlm_provider.shards.formats import is_shard, shard_stem

    path = settings.get("export_path")
    if not path:
        return None
    place = _one_path(path, "export_path", folder, report=report)
    if place is None or place.endswith("/"):
        return place
    stem = shard_stem(place) if is_shard(place) else place
    for suffix in _OTHER_FORMATS:
        stem = stem.removesuffix(suffix) if stem == place else stem
    if stem != place:
        reason = "a folder of shards is written, each in its input's format"
        ignore(Ignored("export_path", f"the suffix {place[len(stem) :]!r}: {reason}"))
    return stem


def folder_of(source: str) -> str:
    """The folder that a source's shards are in: the source itself, unless its name is that of one shard."""
    from airflow_vlm_provider.shards.formats import is_shard

    parent, slash, name = source.rpartition("/")
    return parent + slash if slash and is_shard(name) and not _TEMPLATE.search(name) else source


def _of_configs(
    dataset: Any, folder: Path, *, report: Report, ignore: Callable[[Ignored], None]
) -> str | None:
    configs = dataset.get("configs") if isinstance(dataset, Mapping) else None
    if not isinstance(configs, list) or not configs or not all(isinstance(each, Mapping) for each in configs):
        report("dataset", f"it must be a mapping with a list 'configs' that holds one dataset; or {_GIVE}.")
        return None
    if unknown := sorted(str(name) for name in dataset if name not in ("configs", "max_sample_num")):
        report("dataset", f"{', '.join(unknown)}: not known; 'configs' and 'max_sample_num' are.")
    if dataset.get("max_sample_num") is not None:
        report(
            "dataset.max_sample_num",
            "datasets are done whole. Remove it; recipe_task_group(pattern=...) chooses among the shards.",
        )
    if len(configs) > 1:
        report(
            "dataset.configs",
            f"there are {len(configs)} datasets, and a recipe is run over one. Make a task group for each: remove the "
            "others here, or give recipe_task_group() a source.",
        )
        return None
    return _of_config(configs[0], "dataset.configs[0]", folder, report=report, ignore=ignore)


def _of_config(
    config: Mapping[str, Any],
    place: str,
    folder: Path,
    *,
    report: Report,
    ignore: Callable[[Ignored], None],
) -> str | None:
    kind, source = config.get("type", "local"), config.get("source")
    if kind not in ("local", "remote") or (kind == "remote" and source != "s3"):
        report(
            place,
            f"type {kind!r}{'' if source is None else f' with source {source!r}'} can't be read. Those that can are "
            f"'local', and 'remote' with source 's3'; for shards in other stores, {_GIVE} such as gs://bucket/prefix.",
        )
        return None
    remote = kind == "remote"
    for name, value in config.items():
        if name in _S3_FIELDS and remote:
            if value and name != "aws_region":
                report(
                    f"{place}.{name}",
                    "it belongs in an Airflow connection. Remove it, and name the connection by aws_conn_id.",
                )
            elif value:
                ignore(Ignored(f"{place}.{name}", "the connection aws_conn_id says it"))
        elif name == "weight":
            ignore(Ignored(f"{place}.weight", "there is one dataset, and all of it is taken"))
        elif name not in _CONFIG_FIELDS:
            report(f"{place}.{name}", "not known; 'type', 'path', 'source' and 'weight' are.")
    path = config.get("path")
    if not path:
        report(f"{place}.path", "it is missing: the file or folder that the shards are in.")
        return None
    if remote and not (isinstance(path, str) and path.startswith("s3://")):
        report(f"{place}.path", "it must begin with s3:// where the source is 's3'.")
        return None
    return _one_path(path, f"{place}.path", folder, report=report)


def _one_path(given: Any, place: str, folder: Path, *, report: Report, split: bool = False) -> str | None:
    """A single path or URI, a relative path made absolute."""
    if not isinstance(given, str):
        report(place, f"it must be one path or URI, not a {type(given).__name__}.")
        return None
    path = given
    if any(misplaced(path, place)):
        report(place, "it holds a password or key. Put that in an Airflow connection, and remove it here.")
        return None
    if split and not _TEMPLATE.search(path):
        try:
            words = shlex.split(path)
        except ValueError:
            words = [path]
        if len(words) != 1:
            report(
                place,
                f"{path!r} names several datasets, or weights, and a recipe is run over one dataset, whole. Give one "
                "path, in quotes of its own if it has spaces, or give recipe_task_group() a source.",
            )
            return None
        path = words[0]
    if place != "export_path" and path.lower().endswith(_OTHER_FORMATS):
        from airflow_vlm_provider.shards.formats import FORMATS

        formats = ", ".join(suffix for each in FORMATS for suffix in each.suffixes)
        report(
            place, f"{path!r} is no shard: those end in {formats}. Convert it, or name a folder of shards."
        )
        return None
    if "://" in path or _TEMPLATE.match(path):
        return path
    # normpath() takes a trailing slash away, which says that it is a folder.
    absolute = os.path.normpath(folder / path)
    return f"{absolute}/" if path.endswith("/") and absolute != "/" else absolute
