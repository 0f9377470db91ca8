"""What a shard operator's ``shards`` stands for: names, or a reference to a group of names in a plan."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.ledger.plans import label, load_group, parse

if TYPE_CHECKING:
    from airflow_vlm_provider.shards.stores import Store


def resolve_shards(
    shards: str | Sequence[str] | None, *, open_store: Callable[[str], Store]
) -> list[str] | None:
    """Return the names of the shards, reading the plan where they are references to one.

    :param shards: One name or reference, or a list of them; None stands for all shards, and stays.
    :param open_store: Opens the store at a URI.
    :raises ConfigError: a plan is gone or damaged.
    """
    if shards is None:
        return None
    names: list[str] = []
    for each in [shards] if isinstance(shards, str) else shards:
        reference = parse(each)
        if reference is None:
            names.append(each)
            continue
        try:
            names += load_group(open_store(reference.root), reference.name, reference.number)
        except FileNotFoundError as error:
            raise ConfigError(
                f"The plan {reference.root}{reference.name} is gone. Clear the task that planned, and not only the "
                "ones mapped over it: it writes the plan again."
            ) from error
    return names


def shards_label(shards: str | Sequence[str]) -> str:
    """The shards in a few words, without looking at a plan."""
    each = [shards] if isinstance(shards, str) else list(shards)
    reference = parse(each[0]) if len(each) == 1 else None
    return label(each) if reference is None else reference.label
