"""What changed since a commit, and what that costs: said before the first request."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from airflow_vlm_provider.ledger.canonical import canonical
from airflow_vlm_provider.ledger.manifest import Manifest

# What people call them.
_WORDS = {
    "system_prompt": "prompt",
    "input_template": "prompt",
    "prompt": "prompt",
    "user_prompt": "prompt",
    "schema": "schema",
    "model": "model",
    "revision": "model",
    "max_pixels": "preprocessing",
    "preprocessing": "preprocessing",
}


@dataclass(frozen=True, slots=True)
class Changes:
    """What differs between two sets of parameters.

    :param asking: Names of parameters that decide what is asked.
    :param other: Names of those that only decide what is made of the answers.
    """

    asking: tuple[str, ...]
    other: tuple[str, ...]


def changes(before: Mapping[str, Any], now: Mapping[str, Any], *, asking: Iterable[str]) -> Changes:
    """Compare parameters as manifests hold them.

    :param asking: Names of the step's parameters that decide what is asked. All of the engine's do, and of the
        media's all but ``roots``.
    """
    decisive = {("step", name) for name in asking}
    decisive |= {("engine", name) for each in (before, now) for name in each.get("engine", {})}
    decisive |= {
        ("media", name) for each in (before, now) for name in each.get("media", {}) if name != "roots"
    }
    asked: list[str] = []
    other: list[str] = []
    for group in ("step", "engine", "media", "output"):
        old, new = before.get(group) or {}, now.get(group) or {}
        for name in sorted({*old, *new}):
            if canonical(old.get(name)) != canonical(new.get(name)):
                (asked if (group, name) in decisive else other).append(name)
    return Changes(tuple(asked), tuple(other))


def say_changes(committed: Iterable[Manifest], now: Mapping[str, Any], *, asking: Iterable[str]) -> list[str]:
    """One sentence for each way in which shards were committed with other parameters than today's.

    :param committed: Last commits of the shards that are about to be done again.
    :param now: The parameters of this run.
    """
    asking = frozenset(asking)
    found: dict[Changes, list[int]] = {}
    for manifest in committed:
        if manifest.parameters:
            change = changes(manifest.parameters, now, asking=asking)
            samples = found.setdefault(change, [0, 0])
            samples[0] += 1
            samples[1] += manifest.counts.rows_in - manifest.counts.skipped
    return [_sentence(change, *counts) for change, counts in found.items() if change.asking or change.other]


def _sentence(change: Changes, shards: int, samples: int) -> str:
    since = f"Since the last commit of {shards:,} {'shard' if shards == 1 else 'shards'}"
    if change.asking:
        return (
            f"{since}, what is asked changed: {_named(change.asking)}. It touches {samples:,} samples, which are "
            "asked about again as far as no journal has their answers."
        )
    return (
        f"{since}, only what is made of the answers changed: {_named(change.other)}. It touches {samples:,} samples, "
        "whose stored answers are read again without asking."
    )


def _named(names: tuple[str, ...]) -> str:
    return ", ".join(f"the {_WORDS[name]} ({name})" if name in _WORDS else name for name in names)
