"""saturate, through ``pump()``, which its documentation calls the front door.

``Fixed`` is its documented way to ask for a known number of requests in flight. ``--adaptive`` leaves it to
``Auto()``, its default, which has to find that number out first; runs of seconds show that at its worst.
Everything else stands at its defaults: ``prepare_workers`` and larger flushes were no faster here.
"""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

from client import MODEL, arguments, measured, messages, rows
from saturate import Auto, Fixed, pump, read_output


def to_request(row: dict[str, Any]) -> dict[str, Any]:
    data = Path(row["images"][0]).read_bytes()
    url = f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
    return {"model": MODEL, "messages": messages(url)}


def parse(row: dict[str, Any], response: dict[str, Any]) -> dict[str, Any]:
    return {**row, "tags": json.loads(response["choices"][0]["message"]["content"])["tags"]}


def main() -> None:
    options = arguments()
    todo = rows(options.data, options.images)
    with measured() as figures:
        pump(
            todo,
            to_request,
            parse,
            endpoint=options.base_url,
            output=str(options.out / "tags"),
            window=Auto() if options.adaptive else Fixed(options.in_flight),
            id_key="id",
        )
    done = read_output(str(options.out / "tags"))
    figures.write(options.result, tagged=sum(bool(row["tags"]) for _, row in done))


if __name__ == "__main__":
    main()
