"""The yardstick: what anyone would write by hand. AsyncOpenAI, a fixed number in flight, one line per answer.

No retries, no record of failures, nothing to resume from.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from client import MODEL, arguments, measured, messages, rows
from openai import AsyncOpenAI


async def tag(base_url: str, todo: Iterator[dict[str, Any]], in_flight: int, output: Path) -> None:
    with output.open("w", encoding="utf-8") as lines:
        async with AsyncOpenAI(base_url=base_url, api_key="stub", max_retries=0) as client:

            async def worker() -> None:
                for row in todo:
                    data = Path(row["images"][0]).read_bytes()  # noqa: ASYNC240 - as one would write it
                    url = f"data:image/jpeg;base64,{base64.b64encode(data).decode()}"
                    answer = await client.chat.completions.create(model=MODEL, messages=messages(url))
                    tags = json.loads(answer.choices[0].message.content)["tags"]
                    lines.write(json.dumps({**row, "tags": tags}) + "\n")

            await asyncio.gather(*(worker() for _ in range(in_flight)))


def main() -> None:
    options = arguments()
    todo = rows(options.data, options.images)
    output = options.out / "tags.jsonl"
    with measured() as figures:
        asyncio.run(tag(options.base_url, iter(todo), options.in_flight, output))
    lines = output.read_text(encoding="utf-8").splitlines()
    figures.write(options.result, tagged=sum(bool(json.loads(line)["tags"]) for line in lines))


if __name__ == "__main__":
    main()
