"""What outputs are called, as far as names tell, and which shards' outputs would overwrite one another.

A shard that is written in full keeps its name, and no two shards have the same. A sidecar has its shard's stem: those
of ``a.tar`` and ``a.tar.gz`` would both be ``a.parquet``, and so is the output of a shard of that very name.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.shards.formats import FORMATS, shard_format, shard_stem
from airflow_vlm_provider.shards.sidecar import sidecar_name


def check_output_names(shards: Iterable[str], *, output: str | None) -> None:
    """
    Refuse shards whose outputs would have the same name.

    :param shards: Names of shards that are all to be done.
    :param output: ``full``, ``sidecar``, or None for what suits each shard.
    :raises ConfigError: There are two such shards.
    """
    by_output: dict[str, str] = {}
    for name in sorted(set(shards)):
        other = by_output.setdefault(output_name(name, output), name)
        if other != name:
            raise one_output(name, other, output)


def output_name(shard: str, output: str | None) -> str:
    """The name of a shard's output."""
    # A Parquet shard's sidecar has the shard's own name, so what it embeds makes no difference.
    is_sidecar = output == "sidecar" or (output is None and shard_format(shard).always_embeds)
    return sidecar_name(shard) if is_sidecar else shard


def rivals(shard: str, output: str | None) -> Iterator[str]:
    """The names, with suffixes in lower case, of other shards whose outputs would have the name of this one's."""
    mine = output_name(shard, output)
    for suffix in (suffix for form in FORMATS for suffix in form.suffixes):
        name = shard_stem(shard) + suffix
        if name != shard and output_name(name, output) == mine:
            yield name


def one_output(one: str, other: str, output: str | None) -> ConfigError:
    """Say that two shards would have one output."""
    first, second = sorted((one, other))
    return ConfigError(
        f"The outputs of the shards {first!r} and {second!r} would be one file: {output_name(one, output)!r}. If one "
        "of them is no shard, leave it out (shards=..., or pattern='*.tar' of the plan); otherwise set output='full', so "
        "that each is written under its own name, or move one to a source of its own."
    )
