"""Ask the demo model about fresh drawings, still and moving, and count exact answers.

``python demo/evaluate.py --count 500`` goes the whole way that a user goes: image or MP4 file, processor, chat
template, ``generate``. With ``--base-url`` a running OpenAI-compatible server is asked instead. It exits with 1 where
fewer than 95 of 100 answers to any of the questions are exactly right.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import random
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from airflow_vlm_provider.steps import prompts
from demo.drawings import Drawing, draw
from demo.moving import MovingDrawing, decode, draw_moving

THRESHOLD = 0.95
ATTRIBUTES = ("colour", "shape", "size", "background", "motion")
# Training takes its drawings from the first few seeds.
SEED = 20260000
BATCH = 50
MAX_NEW_TOKENS = 64
# Frames a second of what is drawn, and of what the model gets: as when a video is sampled.
DRAWN_FPS, SENT_FPS = 8.0, 2.0

Ask = Callable[[str, str, Sequence[bytes]], list[str]]
"""Puts one question (system prompt, text) to every image or video file; gives the answers."""


def ask_transformers(folder: Path) -> Ask:
    """Ask a model in this process, through transformers; greedy, as its own generation config says."""
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()

    def ask(system: str, text: str, files: Sequence[bytes]) -> list[str]:
        kind = "video" if is_video(files[0]) else "image"
        messages = [
            {"role": "system", "content": [{"type": "text", "text": system}]},
            {"role": "user", "content": [{"type": kind}, {"type": "text", "text": text}]},
        ]
        prompt = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        media: dict[str, Any]
        if kind == "image":
            media = {"images": [Image.open(io.BytesIO(file)).convert("RGB") for file in files]}
        else:
            videos = [decode(file) for file in files]
            metadata = [{"total_num_frames": len(frames), "fps": SENT_FPS} for frames in videos]
            media = {"videos": videos, "video_metadata": metadata, "do_sample_frames": False}
        inputs = processor(
            text=[prompt] * len(files), padding=True, padding_side="left", return_tensors="pt", **media
        )
        with torch.inference_mode():
            answered = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS)
        return list(
            processor.batch_decode(answered[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        )

    return ask


def ask_server(base_url: str, served_as: str) -> Ask:
    """Ask a server that speaks OpenAI's protocol, 8 questions at a time."""
    import httpx

    def ask_one(system: str, text: str, file: bytes) -> str:
        kind, mime = ("video", "video/mp4") if is_video(file) else ("image", "image/png")
        url = f"data:{mime};base64,{base64.b64encode(file).decode()}"
        content = [{"type": f"{kind}_url", f"{kind}_url": {"url": url}}, {"type": "text", "text": text}]
        response = httpx.post(
            f"{base_url}/chat/completions",
            json={
                "model": served_as,
                "messages": [{"role": "system", "content": system}, {"role": "user", "content": content}],
                "temperature": 0,
                "max_tokens": MAX_NEW_TOKENS,
            },
            timeout=300,
        )
        if response.is_error:
            raise RuntimeError(f"{response.status_code}: {response.text}")
        return str(response.json()["choices"][0]["message"]["content"])

    def ask(system: str, text: str, files: Sequence[bytes]) -> list[str]:
        with ThreadPoolExecutor(8) as pool:
            return list(pool.map(lambda file: ask_one(system, text, file), files))

    return ask


def is_video(file: bytes) -> bool:
    return file[4:8] == b"ftyp"


def evaluate_still(ask: Ask, *, count: int, seed: int) -> dict[str, float]:
    """Share of exact answers, of tags and of captions, and of each attribute within the tags."""
    rng = random.Random(seed)
    drawings = [draw(rng) for _ in range(count)]
    # Half of them as PNG, half as JPEG.
    files = [drawing.encode(rng.choice(("PNG", "JPEG"))) for drawing in drawings]
    tagged = in_batches(ask, prompts.TAGGING_SYSTEM, prompts.TAGGING_INPUT, files)
    captioned = in_batches(ask, prompts.CAPTIONING_SYSTEM, prompts.CAPTIONING_INPUT, files)
    shares = {
        "tags": exact(tagged, [json.dumps({"tags": drawing.tags}) for drawing in drawings], drawings),
        "caption": exact(captioned, [drawing.caption for drawing in drawings], drawings),
    }
    for place, attribute in enumerate(ATTRIBUTES[:4]):
        right = [
            read_tags(tags)[place : place + 1] == [drawing.tags[place]]
            for drawing, tags in zip(drawings, tagged, strict=True)
        ]
        shares[attribute] = sum(right) / count
    return shares


def evaluate_moving(ask: Ask, *, count: int, seed: int) -> dict[str, float]:
    """Share of exact captions of moving drawings, and of each attribute within them."""
    rng = random.Random(seed)
    drawings = [draw_moving(rng, fps=DRAWN_FPS) for _ in range(count)]
    files = [drawing.sampled(SENT_FPS).encode(crf=rng.randint(15, 28)) for drawing in drawings]
    captioned = in_batches(ask, prompts.VIDEO_CAPTIONING_SYSTEM, prompts.VIDEO_CAPTIONING_INPUT, files)
    shares = {"video": exact(captioned, [drawing.caption for drawing in drawings], drawings)}
    for attribute in ATTRIBUTES:
        right = [
            f" {getattr(drawing, attribute)} " in caption
            for drawing, caption in zip(drawings, captioned, strict=True)
        ]
        shares[f"video {attribute}"] = sum(right) / count
    return shares


def in_batches(ask: Ask, system: str, text: str, files: Sequence[bytes]) -> list[str]:
    return [
        answer
        for first in range(0, len(files), BATCH)
        for answer in ask(system, text, files[first : first + BATCH])
    ]


def exact(
    answers: Sequence[str], wanted: Sequence[str], drawings: Sequence[Drawing | MovingDrawing]
) -> float:
    """Share of the answers that are right character by character; prints the others."""
    for answer, right, drawing in zip(answers, wanted, drawings, strict=True):
        if answer != right:
            width, height = drawing.image.size if isinstance(drawing, Drawing) else drawing.frames[0].size
            print(f"wrong: {answer}\n  not: {right}  ({width} x {height})")
    return sum(answer == right for answer, right in zip(answers, wanted, strict=True)) / len(wanted)


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
    parser.add_argument("--base-url", help="ask this server, such as http://127.0.0.1:8000/v1")
    parser.add_argument("--served-as", default="demo", help="the model's name at that server")
    parser.add_argument("--count", type=int, default=500)
    parser.add_argument("--seed", type=int, default=SEED)
    args = parser.parse_args()

    ask = ask_server(args.base_url, args.served_as) if args.base_url else ask_transformers(args.model)
    started = time.monotonic()
    shares = evaluate_still(ask, count=args.count, seed=args.seed)
    shares |= evaluate_moving(ask, count=args.count, seed=args.seed)
    seconds = time.monotonic() - started
    print(f"{args.count} still and as many moving drawings from seed {args.seed}, {seconds:.0f} s")
    for name, share in shares.items():
        print(f"{name:18}{share:8.2%}")
    return 0 if min(shares["tags"], shares["caption"], shares["video"]) >= THRESHOLD else 1


if __name__ == "__main__":
    sys.exit(main())
