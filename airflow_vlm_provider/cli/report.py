"""The ledger in words, and as JSON."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from airflow_vlm_provider.ledger.history import Commit, History, Segment
    from airflow_vlm_provider.ledger.manifest import Counts, Manifest
    from airflow_vlm_provider.ledger.prune import Pruned

# A prompt is longer than a line.
VALUE_CHARS = 100
_COLUMNS = (
    *("shard", "step", "rows", "ok", "cached", "skipped", "failed", "requests", "tokens"),
    *("usd", "segments", "bytes", "model", "finished"),
)


class Overview:
    """All shards of a destination.

    :param commits: Consumed once, by whatever is asked for.
    """

    def __init__(self, destination: str, commits: Iterable[Commit]) -> None:
        self._destination = destination
        self._commits = commits

    def table(self) -> tuple[list[dict[str, str]], list[str]]:
        """A row for each shard and step, rows with the sums of each step, and sentences about what can't be read."""
        rows, totals, problems = [], _Totals(), []
        for commit in self._commits:
            totals.add(commit)
            if commit.manifest is None:
                problems.append(f"{commit.place.shard} ({commit.place.step}): {commit.problem}")
            rows.append(_row(*commit.place, *_cells(commit)))
        for step, (shards, counts) in totals.by_step.items():
            rows.append(_row(_number(shards, "shard"), step, *_count_cells(counts)))
        return rows, problems

    def to_json(self) -> dict[str, Any]:
        """The same as JSON values."""
        shards, totals = [], _Totals()
        for commit in self._commits:
            totals.add(commit)
            shards.append(
                {
                    **commit.place._asdict(),
                    "commit": None if commit.manifest is None else _commit_json(commit.manifest),
                    "problem": commit.problem,
                    "segments": commit.segments,
                    "journal_bytes": commit.journal_size,
                }
            )
        sums = {step: {"shards": count, **asdict(counts)} for step, (count, counts) in totals.by_step.items()}
        return {"destination": self._destination, "shards": shards, "totals": sums}


class _Totals:
    """Sums by step, of what is committed."""

    def __init__(self) -> None:
        self.by_step: dict[str, tuple[int, Counts]] = {}

    def add(self, commit: Commit) -> None:
        if commit.manifest is None:
            return
        counts = commit.manifest.counts
        shards, before = self.by_step.get(commit.place.step, (0, None))
        self.by_step[commit.place.step] = (shards + 1, counts if before is None else before + counts)


def shard_lines(
    destination: str, shard: str, steps: Sequence[History], *, verbose: bool = False
) -> Iterator[str]:
    """One shard's history in words."""
    yield f"{shard} in {destination}"
    for history in steps:
        commit, manifest = history.commit, history.commit.manifest
        yield ""
        yield commit.place.step
        if manifest is None:
            yield f"  {'commit':<12}{commit.problem}"
        else:
            for name, text in _manifest_lines(manifest, verbose=verbose):
                yield f"  {name:<12}{text}"
        yield f"  {'journal':<12}{_number(commit.segments, 'segment')}, {_number(commit.journal_size, 'byte')}"
        for segment in history.segments:
            yield f"    {_segment_line(segment)}"
        failed = sum(history.kinds.values())
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in history.kinds.items())
        yield f"  {'dead letters':<12} {failed:,}{': ' if kinds else ''}{kinds}"
        for letter in history.letters:
            yield f"    {_letter_line(letter)}"
        if failed > len(history.letters):
            yield f"    and {failed - len(history.letters):,} more in _vlm/{shard}/{commit.place.step}/errors.jsonl"


def shard_json(destination: str, shard: str, steps: Sequence[History]) -> dict[str, Any]:
    """One shard's history as JSON values."""
    return {
        "destination": destination,
        "shard": shard,
        "steps": [
            {
                "step": each.commit.place.step,
                "manifest": None if each.commit.manifest is None else each.commit.manifest.to_json(),
                "problem": each.commit.problem,
                "segments": [asdict(segment) for segment in each.segments],
                "dead_letters": dict(each.kinds),
                "first_dead_letters": list(each.letters),
            }
            for each in steps
        ],
    }


def pruned_lines(destination: str, pruned: Pruned, *, dry_run: bool, verbose: bool) -> Iterator[str]:
    """What a pruning did, in words."""
    if verbose:
        for each in pruned.removed:
            yield (
                f"{each.place.shard} ({each.place.step}): {_number(len(each.segments), 'segment')}, "
                f"{_number(each.size, 'byte')}"
            )
            yield from (f"  {name}" for name in each.segments)
        yield from pruned.plans
    yield from pruned.kept
    yield (
        f"{'Would remove' if dry_run else 'Removed'} {_number(pruned.segments, 'journal segment')} "
        f"({_number(pruned.size, 'byte')}) of {_number(len(pruned.removed), 'shard')}, and "
        f"{_number(len(pruned.plans), 'plan')} ({_number(pruned.plans_size, 'byte')}), from {destination}"
    )


def pruned_json(destination: str, pruned: Pruned, *, dry_run: bool) -> dict[str, Any]:
    """What a pruning did, as JSON values."""
    return {
        "destination": destination,
        "dry_run": dry_run,
        "segments": pruned.segments,
        "bytes": pruned.size,
        "shards": [
            {**each.place._asdict(), "segments": list(each.segments), "bytes": each.size}
            for each in pruned.removed
        ],
        "plans": pruned.plans,
        "plan_bytes": pruned.plans_size,
        "left_as_they_are": pruned.kept,
    }


def _row(*cells: str) -> dict[str, str]:
    return dict(itertools.zip_longest(_COLUMNS, cells, fillvalue=""))


def _cells(commit: Commit) -> list[str]:
    journal = [f"{commit.segments:,}", f"{commit.journal_size:,}"]
    if commit.manifest is None:
        return [*[""] * 8, *journal, "", ""]
    manifest = commit.manifest
    return [*_count_cells(manifest.counts), *journal, manifest.model, manifest.finished_at[:19]]


def _count_cells(counts: Counts) -> list[str]:
    numbers = (
        *(counts.rows_in, counts.ok, counts.cached, counts.skipped, counts.failed, counts.requests),
        counts.prompt_tokens + counts.completion_tokens,
    )
    return [*(f"{number:,}" for number in numbers), _dollars(counts.cost_usd)]


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _dollars(cost: float | None) -> str:
    return "" if cost is None else f"{cost:.4f}"


def _commit_json(manifest: Manifest) -> dict[str, Any]:
    """A manifest without what is the same in thousands of them."""
    return {key: value for key, value in manifest.to_json().items() if key not in ("parameters", "journal")}


def _manifest_lines(manifest: Manifest, *, verbose: bool) -> Iterator[tuple[str, str]]:
    counts, by = manifest.counts, manifest.written_by
    yield "committed", f"{manifest.finished_at}, begun {manifest.started_at}"
    if by:
        yield "by", f"{_writer(by)}, version {manifest.provider_version}"
    yield "input", str(manifest.input.get("uri"))
    yield "output", str(manifest.output.get("uri"))
    yield (
        "rows",
        f"{counts.rows_in:,} in, {counts.rows_out:,} out: {counts.ok:,} ok, {counts.cached:,} cached, "
        f"{counts.skipped:,} skipped, {counts.failed:,} failed",
    )
    cost = "" if counts.cost_usd is None else f", {_dollars(counts.cost_usd)} US dollars"
    yield (
        "asked",
        f"{_number(counts.requests, 'request')}, {counts.prompt_tokens:,} prompt and {counts.completion_tokens:,} completion "
        f"tokens{cost}",
    )
    yield "model", manifest.model
    for group, values in manifest.parameters.items():
        for name, value in values.items():
            text = json.dumps(value, ensure_ascii=False)
            yield group, f"{name} = {text if verbose else shortened(text)}"


def shortened(text: str) -> str:
    """A value's text, as far as it fits a line."""
    return text if len(text) <= VALUE_CHARS else f"{text[: VALUE_CHARS - 3]}..."


def _writer(by: Mapping[str, Any]) -> str:
    task = f"task {by.get('task_id')}"
    if by.get("map_index", -1) != -1:
        task += f" [{by['map_index']}]"
    return f"DAG {by.get('dag_id')}, run {by.get('run_id')}, {task}, try {by.get('try_number')}"


def _segment_line(segment: Segment) -> str:
    header, modified = segment.header, segment.modified
    answers = segment.problem if segment.answers is None else _number(segment.answers, "answer")
    created = header.get("created") or (
        datetime.fromtimestamp(modified, timezone.utc).isoformat(timespec="seconds")
        if modified
        else "unknown"
    )
    by = header.get("written_by")
    return ", ".join(
        (
            segment.name,
            _number(segment.size, "byte"),
            str(answers),
            f"written {created}",
            *([f"by {_writer(by)}"] if by else []),
            *([] if segment.referred else ["not in the manifest"]),
        )
    )


def _letter_line(letter: Mapping[str, Any]) -> str:
    media = f" {letter['media']}" if letter["media"] else ""
    times = f"{_number(letter['attempts'], 'attempt')}, first {letter['first']}, last {letter['last']}"
    return (
        f"row {letter['row']} (line {letter['line']}), {letter['kind']}{media}: {letter['message']} ({times})"
    )
