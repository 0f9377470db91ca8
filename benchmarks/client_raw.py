"""The ceiling of the set-up itself: bytes down a socket and back, with no HTTP library and nothing parsed.

When this one stays clear of the ideal rate, the endpoint or the machine holds every client back, and the
other rows of the table say less than they seem to.
"""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from client import MODEL, arguments, measured, messages, rows


async def tag(base_url: str, todo: Iterator[dict[str, Any]], in_flight: int) -> list[bytes]:
    url = urlsplit(base_url)
    before, after = json.dumps({"model": MODEL, "messages": messages("data:image/jpeg;base64,@")}).split("@")
    head = f"POST {url.path}/chat/completions HTTP/1.1\r\nHost: {url.netloc}\r\nContent-Length: "
    answers: list[bytes] = []

    async def worker() -> None:
        reader, writer = await asyncio.open_connection(url.hostname, url.port)
        for row in todo:
            image = base64.b64encode(Path(row["images"][0]).read_bytes())  # noqa: ASYNC240 - as fast as can be
            length = len(before) + len(image) + len(after)
            writer.write(b"".join((f"{head}{length}\r\n\r\n{before}".encode(), image, after.encode())))
            answer = await reader.readuntil(b"\r\n\r\n")
            length = int(answer.lower().partition(b"content-length:")[2].split(maxsplit=1)[0])
            answers.append(await reader.readexactly(length))
        writer.close()

    await asyncio.gather(*(worker() for _ in range(in_flight)))
    return answers


def main() -> None:
    options = arguments()
    todo = rows(options.data, options.images)
    with measured() as figures:
        answers = asyncio.run(tag(options.base_url, iter(todo), options.in_flight))
    figures.write(options.result, tagged=sum(b"tags" in answer for answer in answers))


if __name__ == "__main__":
    main()
