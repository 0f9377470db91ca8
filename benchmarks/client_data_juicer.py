"""Data-Juicer's ``image_tagging_vlm_mapper`` through its own executor, configured as a recipe would.

The system prompt is the other clients', because the endpoint answers in JSON when it is asked for JSON.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from client import MODEL, SYSTEM, arguments, measured, rows
from data_juicer.config import init_configs
from data_juicer.core.executor import DefaultExecutor


def tagged_rows(output: Path) -> int:
    """How many rows have a tag: the mapper writes an empty list where a request failed."""
    lines = output.read_text(encoding="utf-8").splitlines()
    return sum(any(json.loads(line)["__dj__meta__"]["image_tags"]) for line in lines)


def executor(todo: list[dict[str, Any]], folder: Path, base_url: str, processes: int) -> DefaultExecutor:
    """Data-Juicer ready to tag ``todo``, with its files below ``folder``."""
    folder.mkdir()
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in todo), encoding="utf-8")
    mapper = {
        "api_or_hf_model": MODEL,
        "is_api_model": True,
        "system_prompt": SYSTEM,
        "model_params": {"base_url": base_url, "api_key": "stub"},
        "num_proc": processes,
        "accelerator": "cpu",
    }
    recipe = {
        "project_name": "benchmark",
        "dataset_path": str(source),
        "export_path": str(folder / "tags.jsonl"),
        "work_dir": str(folder / "work"),
        "keep_stats_in_res_ds": True,  # else the tags go to a file beside the rows
        "np": processes,
        "process": [{"image_tagging_vlm_mapper": mapper}],
    }
    config = folder / "recipe.yaml"
    config.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    return DefaultExecutor(init_configs(["--config", str(config)]))


def main() -> None:
    options = arguments()
    todo = rows(options.data, options.images)
    # Most of its imports happen in its first run; so few images should not have to bear them.
    executor(todo[:2], options.out / "warm-up", options.base_url, options.processes).run()
    warm = executor(todo, options.out / "measured", options.base_url, options.processes)
    with measured() as figures:
        warm.run()
    figures.write(options.result, tagged=tagged_rows(options.out / "measured" / "tags.jsonl"))


if __name__ == "__main__":
    main()
