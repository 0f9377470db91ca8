"""The benchmarks' pictures and shards: made here, the same bytes every time, kept in ``.bench/``.

A picture is coarse noise under shapes under fine noise, because a JPEG's size (and with it the cost of reading,
encoding and sending it) depends on how busy the picture is: at 448 pixels it comes to about 41 KB here.
"""

from __future__ import annotations

import json
import random
import shutil
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / ".bench"
VERSION = 1  # raise it when the bytes change, so that nobody measures with old ones


def picture(number: int, size: int, grain: int) -> bytes:
    """One JPEG, decided by ``number`` alone.

    :param size: Width and height in pixels.
    :param grain: Width and height in cells of the fine noise.
    """
    from PIL import Image, ImageDraw

    dice = random.Random(number)
    image = Image.frombytes("RGB", (7, 7), dice.randbytes(7 * 7 * 3))
    image = image.resize((size, size), Image.Resampling.BICUBIC)
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        left, right = sorted(dice.sample(range(size), 2))
        top, bottom = sorted(dice.sample(range(size), 2))
        shape = dice.choice((draw.ellipse, draw.rectangle))
        shape((left, top, right, bottom), fill=tuple(dice.randbytes(3)))
    noise = Image.frombytes("RGB", (grain, grain), dice.randbytes(grain * grain * 3))
    image = Image.blend(image, noise.resize((size, size), Image.Resampling.BILINEAR), 0.25)
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return buffer.getvalue()


def dataset(*, rows: int, shards: int = 1, size: int = 448) -> Path:
    """A folder of ``rows`` distinct pictures and of ``shards`` JSONL files that name them, made if missing.

    :return: The folder; ``part-00000.jsonl`` and so on in it, the pictures below ``images/``.
    """
    folder = BENCH / "data" / f"v{VERSION}-{rows}x{size}-in-{shards}"
    if folder.exists():
        return folder
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    (part / "images").mkdir(parents=True)
    for shard in range(shards):
        lines = []
        for number in range(shard, rows, shards):
            name = f"images/{number:06d}.jpg"
            (part / name).write_bytes(picture(number, size, size // 2))
            row = {"id": f"{number:06d}", "text": "<__dj__image> <|__dj__eoc|>", "images": [name]}
            lines.append(json.dumps(row) + "\n")
        (part / f"part-{shard:05d}.jsonl").write_text("".join(lines), encoding="utf-8")
    part.rename(folder)
    return folder
