"""Plans: which shards each mapped task takes, kept beside the ledger so that XCom carries only where to look.

A plan is one file below ``_vlm/_plans/``: JSON Lines, compressed with Zstandard, one line for each group with the
names of its shards. It is named after the SHA-256 of its lines, so that the same groups are the same file, whoever
writes it and however often, and a reader notices when it is not what it was.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.ledger.manifest import Files

PLANS_FOLDER = "_vlm/_plans"
MAX_PLAN_BYTES = 256 * 1024 * 1024
# In Airflow's UI a longer one would push everything else out of sight.
LABEL_NAME_CHARS = 60

_REFERENCE = re.compile(
    rf"(?P<root>.+?://.*?)(?P<name>{PLANS_FOLDER}/[0-9a-f]{{32}}\.jsonl\.zst)#(?P<number>[0-9]+) (?P<label>.*)",
    re.DOTALL,
)


@dataclass(frozen=True, slots=True)
class PlanReference:
    """Names one group of a plan; as text, ``<root><name>#<number> <label>``.

    No shard's name looks like that: it has no empty component, as the ``//`` of a URI makes one.

    :param root: URI of the place that the plan is kept in, with a trailing slash.
    :param name: The plan's name in it.
    :param number: The group's number, from 0.
    :param label: The group in a few words, for people.
    """

    root: str
    name: str
    number: int
    label: str

    def __str__(self) -> str:
        return f"{self.root}{self.name}#{self.number} {self.label}"


def parse(text: str) -> PlanReference | None:
    """Read a reference's text back, without looking at the plan; None when it is none."""
    match = _REFERENCE.fullmatch(text)
    if match is None:
        return None
    return PlanReference(match["root"], match["name"], int(match["number"]), match["label"])


def label(names: Sequence[str]) -> str:
    """A group in a few words: its first shard, and how many more there are."""
    if not names:
        return "nothing"
    first = names[0] if len(names[0]) <= LABEL_NAME_CHARS else "..." + names[0][3 - LABEL_NAME_CHARS :]
    return f"{first} and {len(names) - 1} more" if len(names) > 1 else first


def save_plan(files: Files, groups: Sequence[Sequence[str]]) -> str:
    """Write a plan, also when it is there already: it then counts as new to whoever clears old ones away.

    :return: Its name, which is the same for the same groups.
    """
    import zstandard

    lines = "".join(json.dumps(list(group), ensure_ascii=False) + "\n" for group in groups).encode()
    name = f"{PLANS_FOLDER}/{_digest(lines)}.jsonl.zst"
    with files.create(name) as stream:
        stream.write(zstandard.ZstdCompressor(write_checksum=True).compress(lines))
    return name


def load_group(files: Files, name: str, number: int) -> list[str]:
    """Read the names of one group's shards.

    :param name: What :func:`save_plan` returned.
    :param number: The group's number, from 0.
    :raises FileNotFoundError: there is no such plan.
    :raises ConfigError: it is damaged, or has no such group.
    """
    import zstandard

    data = files.read(name, max_bytes=MAX_PLAN_BYTES)
    try:
        lines = zstandard.ZstdDecompressor().decompress(data)
    except zstandard.ZstdError:
        lines = b""
    if _digest(lines) != name.removeprefix(f"{PLANS_FOLDER}/").partition(".")[0]:
        raise ConfigError(
            f"The plan {name} is damaged. Clear the task that planned: it writes the plan again."
        )
    groups = lines.splitlines()
    if number >= len(groups):
        raise ConfigError(f"The plan {name} has {len(groups)} groups, and so no group number {number}.")
    names: list[str] = json.loads(groups[number])
    return names


def _digest(lines: bytes) -> str:
    return hashlib.sha256(lines).hexdigest()[:32]
