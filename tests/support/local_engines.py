"""The transformers engine with small models: how tests ask it, and how they look inside ``generate``."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from airflow_vlm_provider.engines.transformers import TransformersEngine
from airflow_vlm_provider.types import Answer, Media, Request
from demo.drawings import draw

TAGS_SCHEMA = {
    "type": "object",
    "properties": {
        "tags": {
            "type": "array",
            "items": {"type": "string", "minLength": 1, "maxLength": 8},
            "minItems": 1,
            "maxItems": 3,
        }
    },
    "required": ["tags"],
    "additionalProperties": False,
}
# No model can end before so many numbers are written.
ENDLESS_SCHEMA = {"type": "array", "items": {"type": "integer"}, "minItems": 1900}


def picture(seed: int, *, side: int | None = None) -> Media:
    drawing = draw(random.Random(seed), side=side)
    return Media(kind="image", mime="image/png", data=drawing.encode(), ref=f"{seed}.png")


def request(
    number: int = 0, text: str = "What?", *, schema: Any = None, n: int = 1, **sampling: Any
) -> Request:
    """A request with a picture of its own size."""
    return Request(
        system="You tag images.",
        parts=(picture(number, side=30 + 25 * (number % 5)), text),
        schema=schema,
        sampling={"max_tokens": 24, **sampling},
        n=n,
    )


def with_engine(
    model: str, test: Callable[[TransformersEngine], Coroutine[Any, Any, Any]], **kwargs: Any
) -> Any:
    async def main() -> Any:
        async with TransformersEngine(model=model, device="cpu", **kwargs) as engine:
            return await test(engine)

    return asyncio.run(main())


async def ask_all(engine: TransformersEngine, requests: Sequence[Request]) -> list[Any]:
    return await asyncio.gather(*map(engine.ask, requests), return_exceptions=True)


def answers_of(model: str, requests: Sequence[Request], **kwargs: Any) -> list[Any]:
    return with_engine(model, lambda engine: ask_all(engine, requests), **kwargs)


def texts(answer: Answer) -> list[str]:
    return [choice.text for choice in answer.choices]


class Generate:
    """Stands in for ``generate``: notes how many answers each batch has, and can fail before the real one runs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from transformers import GenerationMixin

        self.sizes: list[int] = []
        self.lengths: list[int] = []
        self.before: Callable[[int, dict[str, Any]], None] = lambda size, inputs: None
        real = GenerationMixin.generate

        def generate(model: Any, **kwargs: Any) -> Any:
            (rows,) = kwargs["stopping_criteria"]
            size = len(rows.tokens)
            self.sizes.append(size)
            self.before(size, kwargs)
            output = real(model, **kwargs)
            self.lengths.append(max(len(tokens) for tokens in rows.tokens))
            return output

        monkeypatch.setattr(GenerationMixin, "generate", generate)


def work_of(model: str, requests: Sequence[Request]) -> list[Counter[str]]:
    """What goes through the model's layers for each of the requests, asked one after another."""

    async def test(engine: TransformersEngine) -> list[Counter[str]]:
        done = []
        for asked in requests:
            with layers_at_work() as work:
                await engine.ask(asked)
            done.append(work)
        return done

    counted: list[Counter[str]] = with_engine(model, test)
    return counted


@contextmanager
def layers_at_work() -> Iterator[Counter[str]]:
    """Counts what goes through the models' layers: numbers that come out of each kind of layer."""
    from torch.nn.modules.module import register_module_forward_hook

    work: Counter[str] = Counter()

    def count(layer: Any, _inputs: Any, output: Any) -> None:
        name = type(layer).__name__
        if name in ("Linear", "Conv2d", "Conv3d"):
            work[name] += output.numel()

    handle = register_module_forward_hook(count)
    try:
        yield work
    finally:
        handle.remove()
