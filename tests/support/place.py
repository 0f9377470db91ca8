"""A source and a destination on disk, and runs of shards between them, without Airflow and without a model."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

from airflow_vlm_provider.runner import ShardRunner
from airflow_vlm_provider.shards.opening import open_store
from airflow_vlm_provider.shards.stores import ObjectInfo
from tests.support.fakes import CaptionStep, FakeMedia, ScriptedEngine


class Place:
    """A source and a destination in a temporary folder."""

    def __init__(self, root: Path) -> None:
        self.source_path, self.destination_path = root / "in", root / "out"
        self.source_path.mkdir()
        self.source = open_store(str(self.source_path))
        self.destination = open_store(str(self.destination_path))
        self.media = FakeMedia()

    def shard(self, name: str, rows: list[Any]) -> ObjectInfo:
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        (self.source_path / name).write_text("".join(line + "\n" for line in lines))
        return self.source.stat(name)

    def runner(self, engine: ScriptedEngine, step: CaptionStep | None = None, **options: Any) -> ShardRunner:
        return ShardRunner(
            step=step or CaptionStep(),
            engine=engine,
            source=self.source,
            destination=self.destination,
            media=self.media,  # type: ignore[arg-type]
            **options,
        )

    def run_what_is_left(self, engine: ScriptedEngine, *shards: ObjectInfo, **options: Any) -> list[Any]:
        """As a task does: what is committed is left alone; returns the manifests of the rest."""

        async def go() -> list[Any]:
            runner = self.runner(engine, **options)
            rest = [
                shard
                for shard, done in zip(shards, runner.all_committed(shards), strict=True)
                if done is None
            ]
            async with engine:
                return await runner.run_all(rest)

        return asyncio.run(go())

    def run(self, engine: ScriptedEngine, *shards: ObjectInfo, **options: Any) -> list[Any]:
        async def go() -> list[Any]:
            async with engine:
                return await self.runner(engine, **options).run_all(shards)

        return asyncio.run(go())

    def output(self, name: str = "a.jsonl") -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.destination_path / name).read_bytes().splitlines()]

    def errors(self, name: str = "a.jsonl") -> list[dict[str, Any]]:
        path = self.destination_path / "_vlm" / name / "caption" / "errors.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def committed_files(self) -> set[str]:
        """All files but what answers are kept in, which is there to outlive a run that failed."""
        return {name for name in self.files() if "/journal/" not in name and "_vlm/_index/" not in name}

    def files(self) -> set[str]:
        return {
            str(path.relative_to(self.destination_path))
            for path in self.destination_path.rglob("*")
            if path.is_file()
        }
