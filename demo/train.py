"""Make the demo model: a Qwen2.5-VL of about 1.9 million parameters, taught on drawn pictures, still and moving.

``python demo/train.py --out demo/model`` draws its own pictures, trains on the CPU and writes a model folder that
transformers and vLLM load like any other. Seeds are fixed. What it takes is told in ``demo/model/README.md``.

First the vision tower alone learns to tell colours, shapes, sizes and backgrounds, through linear heads that are
thrown away afterwards: without that, the whole model rests for a long time where it guesses the shape. Then the
whole model learns to answer. The same two steps follow for what moves: the tower learns to tell in which way a shape
goes from one frame to the next, then the whole model learns to caption moving pictures and, in turn with them, still
ones, so that it forgets nothing. ``--begin FOLDER`` goes on from a model that knows still pictures.

In a batch all pictures have the same grid and all questions the same words, so that everything before the picture is
computed once per batch, as an engine's prefix cache does it.
"""

from __future__ import annotations

import argparse
import math
import shutil
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import AutoModelForImageTextToText, Qwen2_5_VLForConditionalGeneration, Qwen2_5_VLProcessor
from transformers.cache_utils import DynamicCache
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from demo.blank_model import HIDDEN, make_model, make_processor
from demo.drawings import BACKGROUNDS, COLOURS
from demo.lessons import ATTRIBUTES, MERGE, PATCH, Batch, Lessons, Question, Stage

HINTS = "hints.pt"


def attend_in_batches(model: Qwen2_5_VLForConditionalGeneration, patches: int) -> None:
    """Let the vision tower attend to all pictures of one batch at once; by itself it does one picture at a time."""

    def forward(self: Any, hidden_states: torch.Tensor, position_embeddings: Any, **_: Any) -> torch.Tensor:
        total = hidden_states.shape[0]
        qkv = self.qkv(hidden_states).reshape(total, 3, self.num_heads, self.head_dim)
        query, key, value = qkv.unbind(1)
        query, key = modeling_qwen2_5_vl.apply_rotary_pos_emb_vision(query, key, *position_embeddings)
        query, key, value = (
            x.reshape(-1, patches, self.num_heads, self.head_dim).transpose(1, 2) for x in (query, key, value)
        )
        out = functional.scaled_dot_product_attention(query, key, value)
        return self.proj(out.transpose(1, 2).reshape(total, -1))

    for block in model.model.visual.blocks:
        block.attn.forward = forward.__get__(block.attn)


def embed_by_matrix(model: Qwen2_5_VLForConditionalGeneration) -> None:
    """Embed patches by the one matrix product that a convolution without overlap is; a CPU is faster at that."""
    embedding = model.model.visual.patch_embed

    def forward(pixels: torch.Tensor) -> torch.Tensor:
        return functional.linear(pixels, embedding.proj.weight.flatten(1))

    embedding.forward = forward


def see(model: Qwen2_5_VLForConditionalGeneration, batch: Batch) -> torch.Tensor:
    """The visual tokens of a batch: (N, tokens, hidden)."""
    attend_in_batches(model, batch.grid[1] * batch.grid[2])
    grids = torch.tensor([batch.grid]).expand(len(batch.attributes), -1)
    seen = model.model.visual(batch.pixels, grid_thw=grids).pooler_output
    return seen.view(len(batch.attributes), math.prod(batch.grid) // MERGE**2, -1)


def answer_loss(
    model: Qwen2_5_VLForConditionalGeneration, question: Question, seen: torch.Tensor
) -> torch.Tensor:
    language, pictures = model.model.language_model, len(seen)
    start = question.prefix.shape[1]
    cache = DynamicCache(config=language.config)
    language(
        inputs_embeds=language.embed_tokens(question.prefix),
        position_ids=question.positions[..., :start],
        past_key_values=cache,
        use_cache=True,
    )
    cache.batch_repeat_interleave(pictures)
    embedded = language.embed_tokens(question.rest[:, seen.shape[1] : -1])
    hidden = language(
        inputs_embeds=torch.cat([seen, embedded], dim=1),
        position_ids=question.positions[..., start:-1].expand(-1, pictures, -1),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    targets = question.labels[:, 1:]
    learnt = targets != -100
    return functional.cross_entropy(model.lm_head(hidden[learnt]), targets[learnt])


class Hints(nn.Module):
    """What helps the vision tower to begin with, and is thrown away afterwards.

    Linear heads name the attributes from the visual tokens on which the shape lies; another one finds, half-way up
    the tower, which pixels belong to the shape in either frame, whatever the colours are.
    """

    def __init__(self, model: Qwen2_5_VLForConditionalGeneration) -> None:
        super().__init__()
        self.heads = nn.ModuleList(nn.Linear(HIDDEN, len(names)) for names in ATTRIBUTES.values())
        self.outline = nn.Linear(HIDDEN, 2 * (PATCH // 2) ** 2)
        self.half_way: torch.Tensor
        model.model.visual.blocks[1].register_forward_hook(lambda _, __, out: setattr(self, "half_way", out))

    def forward(
        self, seen: torch.Tensor, attributes: torch.Tensor, covered: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss of each attribute, and the outline's."""
        weights = covered.view(len(seen), seen.shape[1], -1).mean(dim=2) + 1e-3
        pooled = (seen * (weights / weights.sum(dim=1, keepdim=True))[..., None]).sum(dim=1)
        named = [
            functional.cross_entropy(head(pooled), attributes[:, i]) for i, head in enumerate(self.heads)
        ]
        return torch.stack(named), functional.mse_loss(self.outline(self.half_way), covered)


def coverage(processor: Qwen2_5_VLProcessor, batch: Batch) -> torch.Tensor:
    """How much of each pixel the shape covers, from 0 to 1, at half the resolution: (patches, 2 * 49)."""
    mean, std = (
        torch.tensor(x) for x in (processor.image_processor.image_mean, processor.image_processor.image_std)
    )
    shape, ground = (
        (torch.tensor(list(names.values())) / 255 - mean) / std for names in (COLOURS, BACKGROUNDS)
    )
    ground = ground[batch.attributes[:, 3]][:, None, :, None, None, None]
    way = shape[batch.attributes[:, 0]][:, None, :, None, None, None] - ground
    pixels = batch.pixels.view(len(batch.attributes), -1, 3, 2, PATCH, PATCH)
    covered = ((pixels - ground) * way).sum(2) / (way * way).sum(2)
    return functional.avg_pool2d(covered.clamp(0, 1).flatten(0, 1), 2).flatten(1)


def schedule(step: int, stage: Stage, warmup: int = 100) -> float:
    """Up and level; in the last stage down along a cosine in its second half."""
    if step < warmup:
        return (step + 1) / warmup
    half = max(stage.steps // 2, warmup)
    if step < half or not stage.questions:
        return 1.0
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * (step - half) / max(1, stage.steps - half)))


def save(model: Qwen2_5_VLForConditionalGeneration, processor: Qwen2_5_VLProcessor, out: Path) -> None:
    """Write the model beside its place and move the files in, so that a reader never sees half of them."""
    beside = out.with_name(out.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    copy = Qwen2_5_VLForConditionalGeneration(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = model.generation_config
    copy.to(torch.bfloat16).save_pretrained(beside)
    processor.save_pretrained(beside)
    AutoModelForImageTextToText.from_pretrained(beside)
    out.mkdir(parents=True, exist_ok=True)
    for file in beside.iterdir():
        file.replace(out / file.name)
    beside.rmdir()


def train(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    stages = [
        Stage(
            "close-up", steps=args.close_up_steps, batch=96, pictures=("close-up",), enough={"shape": 0.12}
        ),
        Stage("vision", steps=args.vision_steps, batch=48, enough={"shape": 0.12}),
        Stage("answers", steps=args.steps, batch=32, questions=True),
        Stage("motion", steps=args.motion_steps, batch=48, pictures=("pair",), enough={"motion": 0.25}),
        Stage(
            "moving",
            steps=args.moving_steps,
            batch=16,
            rate=7e-4,
            pictures=("still", "moving"),
            questions=True,
        ),
    ]
    processor = make_processor()
    model = make_model(processor.tokenizer)
    if args.begin is not None:
        begun = Qwen2_5_VLForConditionalGeneration.from_pretrained(args.begin, dtype=torch.float32)
        model.load_state_dict(begun.state_dict())
        stages = stages[-2:]
    embed_by_matrix(model)
    hints = Hints(model)
    if args.begin is not None and (args.begin / HINTS).exists():
        hints.load_state_dict(torch.load(args.begin / HINTS))
    total = sum(p.numel() for p in model.parameters())
    print(f"{total:,} parameters, vocabulary of {len(processor.tokenizer)}", flush=True)

    def save_checkpoint() -> None:
        save(model, processor, args.checkpoint)
        torch.save(hints.state_dict(), args.checkpoint / HINTS)

    save_checkpoint()
    started = time.monotonic()
    for number, stage in enumerate(stages):
        lessons = Lessons(processor, stage=stage, seed=args.seed + number)
        batches = iter(DataLoader(lessons, batch_size=None, num_workers=1, prefetch_factor=8))
        learning = model if stage.questions else model.model.visual
        weights = [*learning.parameters(), *hints.parameters()]
        optimizer = torch.optim.AdamW(weights, lr=stage.rate, weight_decay=0.01, betas=(0.9, 0.98))
        saved, losses = time.monotonic(), defaultdict[str, list[float]](list)
        for step in range(stage.steps):
            for group in optimizer.param_groups:
                group["lr"] = stage.rate * schedule(step, stage)
            batch = next(batches)
            seen = see(model, batch)
            attributes, outline = hints(seen, batch.attributes, coverage(processor, batch))
            answers = {name: answer_loss(model, question, seen) for name, question in batch.questions.items()}
            if stage.questions:
                loss = torch.stack(list(answers.values())).sum() + 0.1 * attributes.sum()
            else:
                loss = attributes.sum() + 20 * outline
            if "moving" in stage.pictures:
                # The language model's first guesses would undo what the tower knows of motion.
                loss = loss + attributes[-1] + 10 * outline
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()

            named = dict(zip(ATTRIBUTES, attributes, strict=True)) | answers | {"outline": outline}
            kind = f"{stage.pictures[step % len(stage.pictures)]} " if stage.questions else ""
            for name, value in named.items():
                losses[kind + name].append(value.item())
            if (step + 1) % 50 == 0:
                means = {name: statistics.mean(values) for name, values in losses.items()}
                report = " ".join(f"{name} {mean:.4f}" for name, mean in means.items())
                seconds = time.monotonic() - started
                print(f"{seconds:6.0f} s {stage.name} {step + 1}/{stage.steps} {report}", flush=True)
                if stage.enough and all(means[name] < least for name, least in stage.enough.items()):
                    break
                losses.clear()
            if time.monotonic() - saved > 180:
                save_checkpoint()
                saved = time.monotonic()
        save_checkpoint()
    save(model, processor, args.out)
    print(f"{time.monotonic() - started:.0f} s in all; saved to {args.out}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("demo/model"))
    parser.add_argument(
        "--checkpoint", type=Path, default=Path(".demo/checkpoint"), help="saved to every 3 minutes"
    )
    parser.add_argument(
        "--begin",
        type=Path,
        help="a model folder to go on from: only moving pictures are then new to it",
    )
    parser.add_argument("--close-up-steps", type=int, default=1500)
    parser.add_argument("--vision-steps", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--motion-steps", type=int, default=1000)
    parser.add_argument("--moving-steps", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    train(parser.parse_args())


if __name__ == "__main__":
    main()
