"""How tokens are picked and when a row ends, row by row: the rows of a batch belong to different requests.

:class:`RowSampler` and :class:`Rows` take part in transformers' ``generate`` as a logits processor and a stopping
criterion. It asks no more of those than to be callable.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.types import FinishReason, Request

DEFAULT_MAX_TOKENS = 256


@dataclass(frozen=True)
class Decoding:
    """A request's sampling parameters, checked and complete. Requests with equal ones can share a batch.

    :param temperature: 0 is greedy: always the likeliest token.
    :param top_p: Keep the likeliest tokens that together have this probability; 1 keeps all.
    :param top_k: Keep so many of the likeliest tokens; 0 keeps all.
    :param min_p: Keep tokens that are at least so likely, measured by the likeliest; 0 keeps all.
    :param repetition_penalty: None leaves the checkpoint's own.
    :param max_tokens: How many tokens each answer has at most.
    :param stop: Strings that end an answer and are not part of it.
    :param sequences: How many answers to generate: 1 when greedy, because all would be the same.
    """

    temperature: float
    top_p: float
    top_k: int
    min_p: float
    repetition_penalty: float | None
    max_tokens: int
    stop: tuple[str, ...]
    sequences: int

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @classmethod
    def of(cls, request: Request) -> Decoding:
        """Read and check a request's parameters.

        :raises ConfigError: one is unknown, or its value is out of range.
        """
        given = {name: value for name, value in request.sampling.items() if value is not None}
        temperature = _number(given, "temperature", default=0.0, low=0.0)
        stop = given.pop("stop", ())
        stop = (stop,) if isinstance(stop, str) else stop
        if not isinstance(stop, (list, tuple)) or not all(isinstance(text, str) and text for text in stop):
            raise ConfigError(
                f"Sampling parameter stop={stop!r} must be a string, or several, none of them empty"
            )
        limit = "max_completion_tokens" if "max_completion_tokens" in given else "max_tokens"
        decoding = cls(
            temperature=temperature,
            top_p=_number(given, "top_p", default=1.0, low=0.0, high=1.0),
            top_k=_integer(given, "top_k", default=0, low=-1),
            min_p=_number(given, "min_p", default=0.0, low=0.0, high=1.0),
            repetition_penalty=_number(given, "repetition_penalty", default=0.0, low=0.0) or None,
            max_tokens=_integer(given, limit, default=DEFAULT_MAX_TOKENS, low=1),
            stop=tuple(stop),
            sequences=request.n if temperature else 1,
        )
        given.pop("seed", None)
        if given:
            raise ConfigError(
                f"Sampling parameter {sorted(given)[0]!r} is unknown to the transformers engine; it takes "
                "temperature, top_p, top_k, min_p, repetition_penalty, max_tokens, stop and seed"
            )
        return decoding


def seed_of(request: Request) -> int:
    """The request's seed; without one, another every time.

    :raises ConfigError: it is no whole number.
    """
    seed = request.sampling.get("seed")
    if seed is None:
        return secrets.randbits(63)
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise ConfigError(f"Sampling parameter seed={seed!r} must be a whole number")
    return seed % 2**63


def _number(
    given: dict[str, Any], name: str, *, default: float, low: float, high: float = float("inf")
) -> float:
    value = given.pop(name, default)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        bounds = f"from {low:g} to {high:g}" if high != float("inf") else f"of at least {low:g}"
        raise ConfigError(f"Sampling parameter {name}={value!r} must be a number {bounds}")
    return float(value)


def _integer(given: dict[str, Any], name: str, *, default: int, low: int) -> int:
    value = given.pop(name, default)
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ConfigError(f"Sampling parameter {name}={value!r} must be a whole number of at least {low}")
    return value


class Rows:
    """What each row of a running batch has generated so far; a stopping criterion.

    :param count: How many rows there are.
    :param eos_ids: Tokens that end an answer.
    :param stop: Strings that end an answer.
    :param decode: Makes text of tokens.
    :param abandoned: Whether nobody waits for a row's answer any more.
    """

    def __init__(
        self,
        count: int,
        *,
        eos_ids: Collection[int],
        stop: Sequence[str],
        decode: Callable[[Sequence[int]], str],
        abandoned: Callable[[int], bool],
    ) -> None:
        self.tokens: list[list[int]] = [[] for _ in range(count)]
        self._ended: list[FinishReason | None] = [None] * count
        self._eos_ids = frozenset(eos_ids)
        self._stop = tuple(stop)
        self._decode = decode
        self._abandoned = abandoned

    def __call__(self, input_ids: Any, _scores: Any, **_: Any) -> Any:
        """Take note of the newest tokens and tell which rows have ended."""
        import torch

        for row, token in enumerate(input_ids[:, -1].tolist()):
            if not self.ended(row):
                self.tokens[row].append(token)
                self._ended[row] = self._verdict(row, token)
        return torch.tensor([self.ended(row) for row in range(len(self.tokens))], device=input_ids.device)

    def _verdict(self, row: int, token: int) -> FinishReason | None:
        if token in self._eos_ids:
            return "stop"
        if self._stop and self._stop_at(self._text(row)) is not None:
            return "stop"
        return "other" if self._abandoned(row) else None

    def ended(self, row: int) -> bool:
        return self._ended[row] is not None

    def finish_reason(self, row: int) -> FinishReason:
        """How the row ended, once ``generate`` is done."""
        return self._ended[row] or "length"

    def answer(self, row: int) -> str:
        """The row's text, without what ended it."""
        text = self._text(row)
        return text[: self._stop_at(text)]

    def _text(self, row: int) -> str:
        tokens = self.tokens[row]
        return self._decode(tokens[:-1] if tokens and tokens[-1] in self._eos_ids else tokens)

    def _stop_at(self, text: str) -> int | None:
        places = [place for place in map(text.find, self._stop) if place >= 0]
        return min(places) if places else None


class RowSampler:
    """Draws each row's next token with random numbers of its request's own; a logits processor, the last one.

    A request's seed then decides its answer whatever shares the batch with it. The drawn token is left as the only
    possible one, so that ``generate``'s own sampling has nothing to decide.

    :param decoding: How to draw.
    :param seeds: One for each request.
    """

    def __init__(self, decoding: Decoding, seeds: Sequence[int]) -> None:
        from transformers import MinPLogitsWarper, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

        self._warpers: list[Callable[[Any, Any], Any]] = [TemperatureLogitsWarper(decoding.temperature)]
        if decoding.top_k > 0:
            self._warpers.append(TopKLogitsWarper(decoding.top_k))
        if decoding.top_p < 1:
            self._warpers.append(TopPLogitsWarper(decoding.top_p))
        if decoding.min_p > 0:
            self._warpers.append(MinPLogitsWarper(decoding.min_p))
        self._sequences = decoding.sequences
        self._seeds = seeds
        self._generators: list[Any] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        import torch

        if not self._generators:
            self._generators = [torch.Generator(scores.device).manual_seed(seed) for seed in self._seeds]
        for warp in self._warpers:
            scores = warp(input_ids, scores)
        # Dividing by exponential noise and taking the greatest draws from the distribution, like Gumbel's trick.
        noise = torch.empty_like(scores)
        for request, generator in enumerate(self._generators):
            first = request * self._sequences
            noise[first : first + self._sequences].exponential_(generator=generator)
        drawn = (scores.softmax(-1) / noise).argmax(-1, keepdim=True)
        return torch.full_like(scores, float("-inf")).scatter_(-1, drawn, 0.0)


def generation_options(decoding: Decoding) -> Mapping[str, Any]:
    """What ``generate`` itself has to know; picking tokens is :class:`RowSampler`'s."""
    options: dict[str, Any] = {
        "max_new_tokens": decoding.max_tokens,
        "do_sample": not decoding.greedy,
        "num_return_sequences": decoding.sequences,
    }
    if not decoding.greedy:
        options["top_k"] = 0
    if decoding.repetition_penalty is not None:
        options["repetition_penalty"] = decoding.repetition_penalty
    return options
