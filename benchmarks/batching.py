"""What batches are worth in the transformers engine: ``python benchmarks/batching.py``.

Tiny models with random weights caption pictures on the CPU, in batches and one at a time, in turns within one process
and with as many torch threads. With models this small, what is compared is nearly all that a batch saves on a CPU:
the work that costs the same for one row as for eight. Greedy captions have to be the same both ways.

For several candidates, there is also a loop that calls ``generate`` once for every candidate of every picture, as
Data-Juicer's captioning operator does, with the same models, processors and sampling.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dataset import ROOT, picture
from harness import machine

sys.path.insert(0, str(ROOT))
from airflow_vlm_provider.engines.transformers import TransformersEngine
from airflow_vlm_provider.types import Answer, Media, Request
from tests.support.tiny_captioners import tiny_blip2
from tests.support.tiny_models import tiny_qwen

GOAL = 2.5
PICTURES = 64
SIZE = 224  # pixels
MAX_TOKENS = 24
CANDIDATES = 4
PROMPT = "Describe this image."
MODELS: dict[str, Callable[[Path], Path]] = {"BLIP-2": tiny_blip2, "Qwen2.5-VL": tiny_qwen}


@dataclass(frozen=True)
class Run:
    seconds: float
    cpu_seconds: float
    said: list[list[str]]


def timed(work: Callable[[Sequence[bytes]], list[list[str]]], data: Sequence[bytes]) -> Run:
    start, cpu = time.perf_counter(), time.process_time()
    said = work(data)
    return Run(time.perf_counter() - start, time.process_time() - cpu, said)


def requests(data: Sequence[bytes], *, n: int) -> list[Request]:
    sampling = {"max_tokens": MAX_TOKENS, **({"temperature": 1.0, "seed": 1} if n > 1 else {})}
    return [
        Request(
            system=None,
            parts=(Media("image", "image/jpeg", jpeg, f"{number}.jpg"), PROMPT),
            sampling=sampling,
            n=n,
            completion=PROMPT,
        )
        for number, jpeg in enumerate(data)
    ]


async def measure(checkpoint: str, data: Sequence[bytes], *, batch: int, n: int) -> Run:
    """Caption all pictures with an engine that is open already."""
    async with TransformersEngine(model=checkpoint, device="cpu", gpu_batch_size=batch) as engine:
        await engine.ask(requests(data[:1], n=n)[0])
        start, cpu = time.perf_counter(), time.process_time()
        answers: list[Answer] = await asyncio.gather(*map(engine.ask, requests(data, n=n)))
        seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    return Run(seconds, cpu_seconds, [[choice.text for choice in answer.choices] for answer in answers])


class CandidateByCandidate:
    """A model that looks at the picture and reads the prompt anew for every candidate."""

    def __init__(self, checkpoint: str) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.processor = AutoProcessor.from_pretrained(checkpoint)
        self.model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()

    def __call__(self, data: Sequence[bytes]) -> list[list[str]]:
        import torch
        from PIL import Image

        said = []
        for jpeg in data:
            inputs = self.processor(
                images=[Image.open(io.BytesIO(jpeg)).convert("RGB")],
                text=[self.prompt()],
                return_tensors="pt",
            )
            options: dict[str, Any] = {
                "max_new_tokens": MAX_TOKENS,
                "do_sample": True,
                "num_beams": 1,
                "top_k": 0,
            }
            with torch.inference_mode():
                tokens = [self.model.generate(**inputs, **options) for _ in range(CANDIDATES)]
            said.append([self.processor.batch_decode(each, skip_special_tokens=True)[0] for each in tokens])
        return said

    def prompt(self) -> str:
        if not getattr(self.processor, "chat_template", None):
            return PROMPT
        content = [{"type": "image"}, {"type": "text", "text": PROMPT}]
        rendered: str = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        return rendered


def compare(name: str, first: list[Run], second: list[Run], *, goal: float | None = None) -> None:
    """Print how many times faster the second is, from the medians."""
    slow, fast = (statistics.median(run.seconds for run in runs) for runs in (first, second))
    cpu = [statistics.median(run.cpu_seconds for run in runs) for runs in (first, second)]
    ratios = [one.seconds / other.seconds for one, other in zip(first, second, strict=True)]
    verdict = "" if goal is None else f"; goal {goal}: {'met' if slow / fast >= goal else 'missed'}"
    print(
        f"{name}: {PICTURES / slow:.1f} -> {PICTURES / fast:.1f} pictures/s, {slow / fast:.2f} times "
        f"(rounds {min(ratios):.2f} to {max(ratios):.2f}), CPU {cpu[0]:.2f} -> {cpu[1]:.2f} s{verdict}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="medians are printed (default: 5)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads, for all (default: 1)")
    parser.add_argument("--batch", type=int, default=8, help="pictures in a batch (default: 8)")
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(options.threads)
    data = [picture(number, SIZE, SIZE // 2) for number in range(PICTURES)]
    print(f"{machine()}, {options.threads} torch thread(s), {options.rounds} rounds")
    same = True
    with tempfile.TemporaryDirectory() as folder:
        for name, make in MODELS.items():
            checkpoint = str(make(Path(folder) / name))
            loop = CandidateByCandidate(checkpoint)
            loop(data[:1])
            alone, together, looped, candidates = [], [], [], []
            for _ in range(options.rounds):
                alone.append(asyncio.run(measure(checkpoint, data, batch=1, n=1)))
                together.append(asyncio.run(measure(checkpoint, data, batch=options.batch, n=1)))
                looped.append(timed(loop, data))
                batch = options.batch * CANDIDATES
                candidates.append(asyncio.run(measure(checkpoint, data, batch=batch, n=CANDIDATES)))
            compare(f"{name}, one at a time -> batches of {options.batch}", alone, together, goal=GOAL)
            compare(
                f"{name}, {CANDIDATES} candidates, a loop over generate -> one request", looped, candidates
            )
            equal = sum(one == other for one, other in zip(alone[0].said, together[0].said, strict=True))
            print(
                f"{name}: {equal} of {PICTURES} greedy captions equal, {len({*map(tuple, alone[0].said)})} distinct"
            )
            same = same and equal == PICTURES
    return 0 if same else 1


if __name__ == "__main__":
    sys.exit(main())
