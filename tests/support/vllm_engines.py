"""Asking the engine of a worker's vLLM server, where a fake one says what it was asked."""

from __future__ import annotations

import asyncio
import time

from airflow_vlm_provider.types import Answer, Request

TEXTS = [f"question {number}" for number in range(30)]


def question(text):
    return Request(system=None, parts=(text,))


async def ask_all(engine, texts):
    """Ask all at once, and return what became of each: its answer's text, or the exception."""
    answers = await asyncio.gather(*(engine.ask(question(text)) for text in texts), return_exceptions=True)
    return [each.choices[0].text.partition(": ")[2] if isinstance(each, Answer) else each for each in answers]


async def until(check):
    """Wait until something is true, while others go on."""
    deadline = time.monotonic() + 40
    while not check():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)
