"""What belongs in a connection and not in a recipe, told without quoting it: recipes lie in repositories."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

_NAMES = re.compile(
    r"^base_url$|api_?key|access_?key|private_?key|secret|passw|authorization|credential|bearer|headers"
    r"|(^|_)token$|auth_token|session_token",
    re.IGNORECASE,
)
# Names that the above would take for secrets, and that count or mark something.
_HARMLESS = re.compile(r"(max|min|special|image|video|audio|eoc|pad|bos|eos|unk|mask)_token$", re.IGNORECASE)
_IN_URL = re.compile(
    r"://[^/\s?#]*:[^/\s?#]*@|[?&](api[-_]?key|key|token|access_token|sig|signature)=", re.IGNORECASE
)


def misplaced(value: Any, place: str) -> Iterator[str]:
    """Yield where in a value secrets and addresses stand, as far as names and URLs tell; what is empty is none.

    :param value: A JSON value.
    :param place: Where the value stands itself.
    """
    if isinstance(value, Mapping):
        for name, each in value.items():
            below = f"{place}.{name}"
            if each and is_misplaced(str(name)):
                yield below
            else:
                yield from misplaced(each, below)
    elif isinstance(value, list):
        for index, each in enumerate(value):
            yield from misplaced(each, f"{place}[{index}]")
    elif isinstance(value, str) and _IN_URL.search(value):
        yield place


def is_misplaced(name: str) -> bool:
    """Whether what has this name belongs in a connection."""
    return bool(_NAMES.search(name)) and not _HARMLESS.search(name)
