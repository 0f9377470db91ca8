"""Ask the demo model about fresh drawings, and count exact answers.

``python demo/evaluate.py --count 500`` goes the whole way that a user goes: image file, processor, chat template,
``generate``. It exits with 1 where fewer than 95 of 100 tag lists or captions are exactly right.
"""

from __future__ import annotations

import argparse
import io
import json
import random
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from airflow_vlm_provider.steps import prompts
from demo.drawings import Drawing, draw

THRESHOLD = 0.95
ATTRIBUTES = ("colour", "shape", "size", "background")
# Training takes its drawings from seeds 0, 1 and 2.
SEED = 20260000


def ask(
    model: Any,
    processor: Any,
    images: list[Image.Image],
    *,
    system: str | None,
    text: str,
    max_new_tokens: int = 64,
) -> list[str]:
    """Put one question to every picture; greedy, as the model's own generation config says."""
    content = [{"type": "image"}, {"type": "text", "text": text}]
    messages = [{"role": "user", "content": content}]
    if system is not None:
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    inputs = processor(
        text=[prompt] * len(images), images=images, padding=True, padding_side="left", return_tensors="pt"
    )
    with torch.inference_mode():
        answered = model.generate(**inputs, max_new_tokens=max_new_tokens)
    return processor.batch_decode(answered[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def evaluate(model: Any, processor: Any, *, count: int, seed: int, batch: int = 50) -> dict[str, float]:
    """Share of exact answers, of tags and of captions, and of each attribute within the tags."""
    rng = random.Random(seed)
    right: Counter[str] = Counter()
    for first in range(0, count, batch):
        drawings = [draw(rng) for _ in range(min(batch, count - first))]
        images = [sent(drawing, rng) for drawing in drawings]
        tagged = ask(model, processor, images, system=prompts.TAGGING_SYSTEM, text=prompts.TAGGING_INPUT)
        captioned = ask(
            model, processor, images, system=prompts.CAPTIONING_SYSTEM, text=prompts.CAPTIONING_INPUT
        )
        for drawing, tags, caption in zip(drawings, tagged, captioned, strict=True):
            expected = json.dumps({"tags": drawing.tags})
            right["tags"] += tags == expected
            right["caption"] += caption == drawing.caption
            for place, attribute in enumerate(ATTRIBUTES):
                right[attribute] += read_tags(tags)[place : place + 1] == [drawing.tags[place]]
            for wanted, got in ((expected, tags), (drawing.caption, caption)):
                if got != wanted:
                    print(f"wrong: {got}\n  not: {wanted}  ({drawing.image.width} x {drawing.image.height})")
    return {name: right[name] / count for name in ("tags", "caption", *ATTRIBUTES)}


def sent(drawing: Drawing, rng: random.Random) -> Image.Image:
    """The picture as it arrives: half of them as PNG, half as JPEG."""
    image_format = rng.choice(("PNG", "JPEG"))
    return Image.open(io.BytesIO(drawing.encode(image_format))).convert("RGB")


def read_tags(answer: str) -> list[str]:
    try:
        tags = json.loads(answer)["tags"]
    except (ValueError, KeyError, TypeError):
        return []
    return tags if isinstance(tags, list) else []


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=Path(__file__).resolve().parent / "model")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()

    processor = AutoProcessor.from_pretrained(args.model)
    model = AutoModelForImageTextToText.from_pretrained(args.model).eval()
    started = time.monotonic()
    shares = evaluate(model, processor, count=args.count, seed=args.seed)
    seconds = time.monotonic() - started
    print(f"{args.count} drawings from seed {args.seed}, {model.dtype}, {seconds:.0f} s")
    for name, share in shares.items():
        print(f"{name:12}{share:8.2%}")
    return 0 if min(shares["tags"], shares["caption"]) >= THRESHOLD else 1


if __name__ == "__main__":
    sys.exit(main())
