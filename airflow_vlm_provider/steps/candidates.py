"""Several candidates of one caption: drawn by one request, and one of them kept, or all.

Invariants:

- All candidates come from one request (``n``). What is missing because it was useless is one more request.
- What is kept depends on the answers and on nothing else, so that reruns agree.
"""

from __future__ import annotations

import hashlib
import random
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from airflow_vlm_provider.errors import ConfigError, SampleError
from airflow_vlm_provider.steps.sampling import asked_again
from airflow_vlm_provider.types import Answer, Choice, Request

KEEP_CANDIDATE_MODES = ("random_any", "similar_one_simhash", "all")

BITS = 512
"""Of a simhash: of the usual 64, so many differ by chance that short texts can't be told apart by them."""

_WORD = re.compile(r"\w+")


@dataclass(frozen=True)
class Candidates:
    """How many captions are drawn, and which are kept.

    :param number: How many are drawn by one request.
    :param mode: ``random_any`` keeps one, drawn by the request's key; ``similar_one_simhash`` the one most similar to
        the text that there was, the first of several; ``all`` keeps all.
    :param try_num: How often it is asked at most until there are as many usable ones as are kept.
    :param read: From an answer's choice to its caption; raises SampleError where it is useless.
    :raises ConfigError: a parameter is wrong.
    """

    number: int
    mode: str
    try_num: int
    read: Callable[[Choice], str]

    def __post_init__(self) -> None:
        for name, value in {"caption_num": self.number, "try_num": self.try_num}.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name} is {value!r}; give a whole number from 1 on.")
        if self.mode not in KEEP_CANDIDATE_MODES:
            known = ", ".join(map(repr, KEEP_CANDIDATE_MODES))
            raise ConfigError(f"keep_candidate_mode is {self.mode!r}; give one of {known}.")

    @property
    def kept(self) -> int:
        """How many captions :meth:`draw` returns."""
        return self.number if self.mode == "all" else 1

    def check_sampling(self, sampling: Mapping[str, Any]) -> None:
        """Refuse sampling that draws the same candidate again and again.

        :raises ConfigError: it does.
        """
        if self.number > 1 and sampling.get("temperature") == 0:
            raise ConfigError(
                f"caption_num={self.number} with temperature 0 would draw the same caption {self.number} times. Raise "
                "temperature in sampling_params (1.0 is the default then), or set caption_num=1."
            )

    def draw(
        self, request: Request, *, text: str, media: str | None
    ) -> Generator[Sequence[Request], Sequence[Answer], list[str]]:
        """Ask, and return the captions that are kept.

        :param request: What to ask; its ``n`` and ``note`` are set here.
        :param text: The text that there was about the medium, without special tokens.
        :param media: The medium's reference, for the dead letter.
        :raises SampleError: Thrown from the generator: too few of the answers are usable, for the last one's reason.
        """
        usable: list[str] = []
        number = self.number
        for attempt in range(self.try_num):
            asking = replace(
                request,
                n=number,
                sampling=asked_again(request.sampling, attempt),
                note=self._note(text) if number > 1 else None,
            )
            try:
                (answer,) = yield [asking]
            except SampleError as error:
                # An engine knows of no names, and a summary shows no media.
                error.media = error.media or media
                raise
            fault: SampleError | None = None
            for choice in answer.choices[:number] or (Choice("", "other"),):
                try:
                    usable.append(self.read(choice))
                except SampleError as error:
                    fault = fault or error
            if len(usable) >= self.kept:
                return self._keep(usable, text=text, key=answer.key)
            number = self.kept - len(usable)
        fault = fault or SampleError(
            "empty_answer", "The endpoint sent fewer candidates than it was asked for."
        )
        tries = f"{self.try_num} {'try' if self.try_num == 1 else 'tries'}"
        message = f"{len(usable)} of {self.kept} captions in {tries}: {fault.message}"
        raise SampleError(
            fault.kind,
            message,
            media=media,
            attempts=self.try_num,
            keys=(answer.key,) if answer.key else (),
        )

    def _keep(self, usable: list[str], *, text: str, key: str) -> list[str]:
        if self.mode == "all" or len(usable) == 1:
            return usable
        if self.mode == "random_any":
            return [random.Random(key).choice(usable)]
        away = distances(text, usable)
        return [usable[away.index(min(away))]]

    def _note(self, text: str) -> Callable[[Answer], Mapping[str, Any]]:
        return lambda answer: {"distances": distances(text, [choice.text for choice in answer.choices])}


def distances(text: str, captions: Sequence[str]) -> list[int]:
    """How far captions are from a text: bits in which their simhashes differ, 0 to 512; by chance it is about half.

    512 stands where there is nothing to compare, so that a text without words is equally far from all.
    """
    own = _simhash(text)
    hashes = [_simhash(caption) for caption in captions]
    return [BITS if own is None or each is None else own.distance(each) for each in hashes]


def _simhash(text: str) -> Any:
    # numpy comes with it.
    from simhash import Simhash

    features = _features(text)
    return Simhash(features, f=BITS, hashfunc=_digest) if features else None


def _digest(feature: bytes) -> bytes:
    return hashlib.blake2b(feature, digest_size=BITS // 8).digest()


def _features(text: str) -> dict[str, int]:
    """What a simhash is made of, and how often it is there.

    Words, and the pairs of letters in them, so that the forms of a word are alike and texts of one word can be
    compared. In scripts that write a word with a few signs, and don't set words apart, signs are the words.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    features: Counter[str] = Counter()
    for word in _WORD.findall(text) or text.split():
        wide = any(unicodedata.east_asian_width(letter) in "WF" for letter in word)
        features.update(f"{each} " for each in (word if wide else [word]))
        features.update(word[i : i + 2] for i in range(len(word) - 1))
    return dict(features)
