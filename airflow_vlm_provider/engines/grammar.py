"""Answers that satisfy a JSON schema: in every step, tokens that would leave the grammar are ruled out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from airflow_vlm_provider.engines.decoding import Rows
from airflow_vlm_provider.errors import ConfigError

# xgrammar lets through what no JSON document may hold: control characters in strings of bounded length
# (mlc-ai/xgrammar#800) and some byte sequences that are no UTF-8. After these bytes, only these may follow.
_FOLLOWING = {0xE0: range(0xA0, 0xC0), 0xED: range(0x80, 0xA0), 0xF0: range(0x90, 0xC0)}
_FORBIDDEN = re.compile(rb"[\x00-\x1f]|\xe0[\x80-\x9f]|\xed[\xa0-\xbf]|\xf0[\x80-\x8f]")


class Grammars:
    """Compiles JSON schemas for one model, each once.

    :param tokenizer: The model's tokenizer.
    :param vocabulary: How many logits the model computes, which is often more than the tokenizer has tokens.
    :param eos_ids: Tokens that end an answer.
    :raises ConfigError: xgrammar does not know this kind of tokenizer.
    """

    def __init__(self, tokenizer: Any, *, vocabulary: int, eos_ids: Collection[int]) -> None:
        import xgrammar

        try:
            info = xgrammar.TokenizerInfo.from_huggingface(
                tokenizer, vocab_size=vocabulary, stop_token_ids=sorted(eos_ids)
            )
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"xgrammar can't work with the model's tokenizer: {error}") from error
        self.vocabulary = vocabulary
        self._compiler = xgrammar.GrammarCompiler(info)
        ends = frozenset(eos_ids)
        special = _special_ids(tokenizer) - ends
        spellings = info.decoded_vocab
        # To xgrammar a special token is its own spelling, which a string may hold; but decoding drops it. What ends
        # an answer, which can be a line's end, it lets through only there.
        self._allowed = _bitmask(
            spellings,
            lambda token, spelling: (
                token in ends or (token not in special and not _FORBIDDEN.search(spelling))
            ),
        )
        self._narrowed: dict[int, Any] = {}
        for byte, following in _FOLLOWING.items():
            narrowed = self._allowed & _bitmask(spellings, _begins_with(bytes(following)))
            cut = (token for token, spelling in enumerate(spellings) if spelling.endswith(bytes([byte])))
            self._narrowed.update(dict.fromkeys(cut, narrowed))

    def compile(self, schema: Mapping[str, Any]) -> Any:
        """The grammar of a schema's documents, in one line and without free whitespace.

        :raises ConfigError: the schema is invalid or needs what xgrammar can't express.
        """
        try:
            # A model that may write as much whitespace as it likes can go on doing so until max_tokens.
            return self._compiler.compile_json_schema(json.dumps(schema), any_whitespace=False)
        except (RuntimeError, ValueError, TypeError) as error:
            raise ConfigError(f"The JSON schema can't be made a grammar: {error}") from error

    def allowed_after(self, tokens: Sequence[int]) -> Any:
        """The bitmask of tokens that may follow in any JSON document."""
        return self._narrowed.get(tokens[-1], self._allowed) if tokens else self._allowed


def writes_json(tokenizer: Any) -> bool:
    """Whether a JSON document can be said in a tokenizer's tokens: some know no braces, or no capital letters."""
    document = '{"Key": ["a-b", 1.5, null]}'
    tokens = tokenizer(document, add_special_tokens=False)["input_ids"]
    said: str = tokenizer.decode(tokens, clean_up_tokenization_spaces=False)
    return said == document


def _bitmask(spellings: Sequence[bytes], allow: Callable[[int, bytes], bool]) -> Any:
    """One bit for each token, in words of 32, as xgrammar has it."""
    import numpy
    import torch

    bits = numpy.zeros((len(spellings) + 31) // 32 * 32, dtype=bool)
    bits[: len(spellings)] = [allow(token, spelling) for token, spelling in enumerate(spellings)]
    return torch.from_numpy(numpy.packbits(bits, bitorder="little").view(numpy.int32).copy())


def _begins_with(first_bytes: bytes) -> Callable[[int, bytes], bool]:
    return lambda _, spelling: spelling[:1] in first_bytes


def _special_ids(tokenizer: Any) -> set[int]:
    added = getattr(tokenizer, "added_tokens_decoder", {})
    return {*tokenizer.all_special_ids, *(token_id for token_id, token in added.items() if token.special)}


class GrammarMask:
    """Rules out what would leave a row's grammar; a logits processor for one ``generate`` call.

    :param grammars: Where the grammars were compiled.
    :param compiled: One for each row; None leaves the row free.
    :param rows: What the rows have generated so far.
    """

    def __init__(self, grammars: Grammars, compiled: Sequence[Any | None], rows: Rows) -> None:
        import xgrammar

        self._grammars = grammars
        self._matchers = {
            row: xgrammar.GrammarMatcher(grammar)
            for row, grammar in enumerate(compiled)
            if grammar is not None
        }
        self._accepted = dict.fromkeys(self._matchers, 0)
        self._bitmask = xgrammar.allocate_token_bitmask(len(compiled), grammars.vocabulary)
        self._rows = rows

    def __call__(self, _input_ids: Any, scores: Any) -> Any:
        import xgrammar

        active = [row for row in self._matchers if not self._rows.ended(row)]
        if not active:
            return scores
        for row in active:
            tokens, matcher = self._rows.tokens[row], self._matchers[row]
            for token in tokens[self._accepted[row] :]:
                # Only logits that are no numbers get a token past the mask.
                if not matcher.accept_token(token):
                    raise RuntimeError(f"the model chose token {token}, which was ruled out")
            self._accepted[row] = len(tokens)
            matcher.fill_next_token_bitmask(self._bitmask, row)
            self._bitmask[row] &= self._grammars.allowed_after(tokens)
        # xgrammar has kernels for these two; the way over the CPU costs little beside a forward pass.
        device = scores.device if scores.device.type in ("cpu", "cuda") else "cpu"
        masked = scores.to(device)
        xgrammar.apply_token_bitmask_inplace(masked, self._bitmask.to(device), indices=active)
        return masked.to(scores.device)
