"""What batches are worth in the transformers engine on a GPU; started by ``gpu.py``, in a process of its own.

A model of the wanted shape is made with random weights, on the device, written to a folder and loaded from there by the
engine, as any checkpoint is. The same pictures are then captioned one at a time and in batches, in turns.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dataset import ROOT, picture
from gpu_model import SEVEN_B, TINY, make_folder

sys.path.insert(0, str(ROOT))
from airflow_vlm_provider.engines.transformers import TransformersEngine
from airflow_vlm_provider.types import Media, Request

PROMPT = "Describe this image."


@dataclass(frozen=True)
class Result:
    """What ``gpu.py`` reads; rates in pictures a second, of the median round.

    :param equal: Pictures of which both ways said the same.
    :param tokens: Of all captions of one round, in batches.
    """

    alone: float
    together: float
    equal: int
    tokens: int


def write_weights(folder: Path, device: str) -> None:
    """Give the model in a folder random weights."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig.from_pretrained(folder)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        torch.manual_seed(0)
        with torch.device(device):
            model = Qwen2_5_VLForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(before)
    model.save_pretrained(folder)
    del model
    if device != "cpu":
        torch.cuda.empty_cache()


async def caption(
    model: Path, pictures: Sequence[bytes], *, batch: int, tokens: int, device: str
) -> tuple[float, list[str], int]:
    """Caption all pictures with an engine that is open already: seconds, texts and tokens."""
    requests = [
        Request(
            system=None,
            parts=(Media("image", "image/jpeg", jpeg, f"{number}.jpg"), PROMPT),
            sampling={"max_tokens": tokens},
        )
        for number, jpeg in enumerate(pictures)
    ]
    async with TransformersEngine(model=str(model), device=device, gpu_batch_size=batch) as engine:
        # A whole batch first: the first one of a size pays for what is made once.
        await asyncio.gather(*map(engine.ask, requests[:batch]))
        begun = time.perf_counter()
        answers = await asyncio.gather(*map(engine.ask, requests))
        seconds = time.perf_counter() - begun
    said = [answer.choices[0].text for answer in answers]
    return seconds, said, sum(answer.usage.completion_tokens for answer in answers)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--folder", type=Path, required=True, help="empty, for the model")
    parser.add_argument("--result", type=Path, required=True)
    for name in ("pictures", "pixels", "tokens", "batch", "rounds"):
        parser.add_argument(f"--{name}", type=int, required=True)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    device = "cpu" if options.tiny else "cuda"
    if device == "cuda" and not torch.cuda.is_available():
        raise SystemExit(f"torch {torch.__version__} of this Python sees no GPU")
    model = make_folder(TINY if options.tiny else SEVEN_B, options.folder)
    write_weights(model, device)
    pictures = [picture(number, options.pixels, options.pixels // 2) for number in range(options.pictures)]
    alone, together = [], []
    for _ in range(options.rounds):
        for batch, runs in ((1, alone), (options.batch, together)):
            runs.append(
                asyncio.run(caption(model, pictures, batch=batch, tokens=options.tokens, device=device))
            )
            print(f"batch {batch}: {runs[-1][0]:.2f} s", flush=True)
    result = Result(
        alone=len(pictures) / statistics.median(seconds for seconds, _, _ in alone),
        together=len(pictures) / statistics.median(seconds for seconds, _, _ in together),
        equal=sum(one == other for one, other in zip(alone[0][1], together[0][1], strict=True)),
        tokens=together[0][2],
    )
    options.result.write_text(json.dumps(asdict(result)), encoding="utf-8")


if __name__ == "__main__":
    main()
