"""Answers that satisfy a JSON schema: in every step, tokens that would leave the grammar are ruled out."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from airflow_vlm_provider.engines.decoding import Rows
from airflow_vlm_provider.errors import ConfigError


class Grammars:
    """Compiles JSON schemas for one model, each once.

    :param tokenizer: The model's tokenizer.
    :param vocabulary: How many logits the model computes, which is often more than the tokenizer has tokens.
    :param eos_ids: Tokens that end an answer.
    :raises ConfigError: xgrammar can't be imported, or does not know this kind of tokenizer.
    """

    def __init__(self, tokenizer: Any, *, vocabulary: int, eos_ids: Collection[int]) -> None:
        import xgrammar

        special = _special_ids(tokenizer)
        try:
            info = xgrammar.TokenizerInfo.from_huggingface(
                tokenizer, vocab_size=vocabulary, stop_token_ids=sorted(eos_ids)
            )
        except (RuntimeError, ValueError) as error:
            raise ConfigError(f"xgrammar can't work with the model's tokenizer: {error}") from error
        self.vocabulary = vocabulary
        self._compiler = xgrammar.GrammarCompiler(info)
        self.allowed = xgrammar.allocate_token_bitmask(1, vocabulary)[0]
        for token, spelling in enumerate(info.decoded_vocab):
            # To xgrammar a special token is its own spelling, which a string may hold; but decoding drops it. And
            # strings of bounded length may hold control characters to it (mlc-ai/xgrammar#800), which JSON forbids.
            if token not in eos_ids and (token in special or any(byte < 0x20 for byte in spelling)):
                self.allowed[token // 32] &= ~(1 << token % 32) if token % 32 < 31 else 0x7FFFFFFF

    def compile(self, schema: Mapping[str, Any]) -> Any:
        """The grammar of a schema's documents, in one line and without free whitespace.

        :raises ConfigError: the schema is invalid or needs what xgrammar can't express.
        """
        try:
            # A model that may write as much whitespace as it likes can go on doing so until max_tokens.
            return self._compiler.compile_json_schema(json.dumps(schema), any_whitespace=False)
        except (RuntimeError, ValueError, TypeError) as error:
            raise ConfigError(f"The JSON schema can't be made a grammar: {error}") from error


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

        self._allowed = grammars.allowed
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

        for row, matcher in self._matchers.items():
            if self._rows.ended(row):
                continue
            for token in self._rows.tokens[row][self._accepted[row] :]:
                # Only logits that are no numbers get a token past the mask.
                if not matcher.accept_token(token):
                    raise RuntimeError(f"the model chose token {token}, which was ruled out")
                self._accepted[row] += 1
            matcher.fill_next_token_bitmask(self._bitmask, row)
            self._bitmask[row] &= self._allowed
        active = [row for row in self._matchers if not self._rows.ended(row)]
        if not active:
            return scores
        # xgrammar has kernels for these two; the way over the CPU costs little beside a forward pass.
        device = scores.device if scores.device.type in ("cpu", "cuda") else "cpu"
        masked = scores.to(device)
        xgrammar.apply_token_bitmask_inplace(masked, self._bitmask.to(device), indices=active)
        return masked.to(scores.device)
