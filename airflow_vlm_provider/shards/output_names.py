"""What outputs are called, as far as names tell, and which shards' outputs would overwrite one another.

A shard that is written in full keeps its name, and no two shards have the same. A sidecar has its shard's stem: those
of ``a.tar`` and ``a.tar.gz`` would both be ``a.parquet``, and so is the output of a shard of that very name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.shards.formats import FORMATS, shard_format, shard_stem
from airflow_vlm_provider.shards.sidecar import sidecar_name

if TYPE_CHECKING:
    from airflow_vlm_provider.shards.stores import Store


def check_output_names(source: Store, shards: Iterable[str], *, output: str | None) -> None:
    """
    Refuse shards whose outputs would have the name of another shard's, whoever takes that one through the step.

    Blocks on the store. Other shards are looked for by suffixes in lower case.

    :param source: Where the shards are.
    :param shards: Names of the shards that are to be done.
    :param output: ``full``, ``sidecar``, or None for what suits each shard.
    :raises ConfigError: There are two such shards.
    """
    names = set(shards)
    by_output: dict[str, str] = {}
    for name in sorted(names):
        other = by_output.setdefault(_output_name(name, output), name)
        if other != name:
            raise _clash(source, name, other, output)
    rivals = {rival: name for name in names for rival in _rivals(name, output)}
    for rival, found in source.stat_many(sorted(rivals)):
        if found is not None:
            raise _clash(source, rivals[rival], rival, output)


def _output_name(shard: str, output: str | None) -> str:
    # A Parquet shard's sidecar has the shard's own name, so what it embeds makes no difference.
    is_sidecar = output == "sidecar" or (output is None and shard_format(shard).always_embeds)
    return sidecar_name(shard) if is_sidecar else shard


def _rivals(shard: str, output: str | None) -> Iterator[str]:
    """The names of other shards whose outputs would have the name of this one's."""
    mine = _output_name(shard, output)
    for suffix in (suffix for form in FORMATS for suffix in form.suffixes):
        name = shard_stem(shard) + suffix
        if name != shard and _output_name(name, output) == mine:
            yield name


def _clash(source: Store, one: str, other: str, output: str | None) -> ConfigError:
    first, second = sorted((one, other))
    return ConfigError(
        f"The outputs of {first!r} and {second!r}, both below {source.uri}, would be one file: "
        f"{_output_name(one, output)!r}. Set output='full', so that each is written under its own name, or move one of "
        "them to a source of its own, or rename it."
    )
