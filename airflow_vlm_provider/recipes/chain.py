"""A recipe's steps one after another: what each reads and where it writes.

The last step writes to the destination itself, so that nothing else is there but the result. Each step before it
writes below ``<destination>/_steps/<step>``: names that begin with an underscore are no data, so whoever takes the
destination for a source finds the result alone, while a step that is given that folder for its source finds shards.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from airflow_vlm_provider.recipes.places import folder_of
from airflow_vlm_provider.recipes.recipe import RecipeStep

STEPS_FOLDER = "_steps"


class ChainedStep(NamedTuple):
    """A step and where it stands among the others.

    :param parameters: ``source``, ``destination``, ``media_roots``, ``reuse_from`` and ``output`` of its operator.
    """

    step: RecipeStep
    parameters: Mapping[str, Any]


def chain(
    steps: Sequence[RecipeStep],
    *,
    source: str,
    destination: str,
    media_roots: Sequence[str] | None = None,
    reuse_from: Sequence[str] = (),
    output: str | None = None,
) -> Iterator[ChainedStep]:
    """Yield the steps, each reading what the one before it wrote.

    :param source: Where the first step's shards are.
    :param destination: Where the last step writes.
    :param media_roots: Where media may be; None allows only what lies where the first step's shards are.
    :param reuse_from: Further destinations of whole chains whose answers count as known.
    :param output: How the last step writes. Those before it write rows in full: a sidecar is nothing to read on from.
    """
    reads = source
    for number, step in enumerate(steps):
        last = number == len(steps) - 1
        # Not by their numbers: a step that is put before them would make strangers of all that follow.
        own = _step_folder(destination, step)
        writes = destination if last else own
        # What was the last step has another after it, or the other way round, when a recipe was changed: its answers
        # are then where it wrote as such.
        known = [own if last else destination]
        for each in reuse_from:
            known += [each, _step_folder(each, step)]
        roots = media_roots
        if roots is None and number > 0:
            # References in rows are relative to the shards that the author has, and that is where media are.
            roots = [folder_of(source)]
        yield ChainedStep(
            step,
            {
                "source": reads,
                "destination": writes,
                "media_roots": None if roots is None else list(roots),
                "reuse_from": known,
                "output": output if last else "full",
            },
        )
        reads = f"{own}/"


def _step_folder(destination: str, step: RecipeStep) -> str:
    """Where a step writes that is not the last."""
    below = f"{STEPS_FOLDER}/{step.name}"
    if not destination.endswith(("}}", "%}")):
        return f"{destination.rstrip('/')}/{below}"
    # What it becomes may end with a slash, and two of them are another place in an object store.
    return f"{{% set place %}}{destination}{{% endset %}}{{{{ place.rstrip('/') }}}}/{below}"
