from __future__ import annotations

import json
import random
from typing import Any

import jsonschema
import pytest

from airflow_vlm_provider.engines.decoding import Rows
from airflow_vlm_provider.engines.grammar import GrammarMask, Grammars
from airflow_vlm_provider.errors import ConfigError
from tests.support.tiny_models import PADDED_VOCABULARY, tiny_tokenizer

WORD = {"type": "string", "minLength": 12, "maxLength": 16}
BOUNDED = {"type": "array", "items": WORD, "minItems": 1, "maxItems": 2}
FREE = {
    "type": "object",
    "properties": {"a": {"type": "string"}, "b": {"type": "string", "pattern": "^[^x]{3,6}$"}},
    "required": ["a", "b"],
    "additionalProperties": False,
}


class Speaker:
    """Stands for a model: says what it likes best of what it is allowed to say."""

    def __init__(self) -> None:
        self.tokenizer = tiny_tokenizer()
        self.eos = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.grammars = Grammars(self.tokenizer, vocabulary=PADDED_VOCABULARY, eos_ids=[self.eos])

    def single_byte(self, byte: int) -> int:
        from tokenizers import pre_tokenizers

        # The alphabet spells the printable bytes as themselves and the others, in order, from U+0100 on.
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        spelling = (
            chr(byte)
            if byte in printable
            else chr(256 + [b for b in range(256) if b not in printable].index(byte))
        )
        assert spelling in pre_tokenizers.ByteLevel.alphabet()
        return int(self.tokenizer.convert_tokens_to_ids(spelling))

    def say(
        self, schemas: list[Any], likes: list[list[int]], *, seed: int = 0, steps: int = 400
    ) -> list[str]:
        """One row for each schema; ``likes`` are the tokens that each step, in turn, would rather choose."""
        import torch

        rng = random.Random(seed)
        rows = Rows(
            len(schemas),
            eos_ids=[self.eos],
            stop=(),
            decode=lambda tokens: self.tokenizer.decode(tokens, skip_special_tokens=True),
            abandoned=lambda row: False,
        )
        compiled = [None if schema is None else self.grammars.compile(schema) for schema in schemas]
        mask = GrammarMask(self.grammars, compiled, rows)
        ids = torch.zeros((len(schemas), 1), dtype=torch.long)
        for step in range(steps):
            scores = torch.tensor([[rng.random() for _ in range(PADDED_VOCABULARY)] for _ in schemas])
            for token in likes[step % len(likes)] if likes else ():
                scores[:, token] += 10
            # An answer has to come to its end; JSON's own strings end with a quote.
            scores[:, self.single_byte(ord('"'))] += 20 if step > 40 else 0
            drawn = mask(ids, scores).argmax(-1)
            ids = torch.cat([ids, drawn[:, None]], dim=1)
            if bool(rows(ids, None).all()):
                break
        return [rows.answer(row) if rows.ended(row) else "unended" for row in range(len(schemas))]


@pytest.fixture(scope="module")
def speaker() -> Speaker:
    return Speaker()


def check(text: str, schema: Any) -> None:
    jsonschema.validate(json.loads(text), schema)
    assert "\n" not in text
    assert "\N{REPLACEMENT CHARACTER}" not in text


@pytest.mark.parametrize("schema", [BOUNDED, FREE], ids=["bounded", "free"])
def test_whatever_a_model_likes_its_answer_satisfies_the_schema(speaker, schema):
    special = sorted(speaker.tokenizer.added_tokens_decoder)
    surrogate, overlong, astray = (
        [[speaker.single_byte(byte)] for byte in sequence]
        for sequence in (b"\xed\xa0\x80", b"\xe0\x80\x80", b"\xf0\x80\x80\x80")
    )
    texts = {token: speaker.tokenizer.decode([token]) for token in range(len(speaker.tokenizer))}
    control = [[token for token, text in texts.items() if any(character < " " for character in text)]]
    assert " \t" in {texts[token] for token in control[0]}
    beyond = [list(range(len(speaker.tokenizer), PADDED_VOCABULARY))]
    space = [[speaker.single_byte(ord(" ")), speaker.single_byte(ord("\n"))]]
    for likes in ([special], surrogate, overlong, astray, control, beyond, space):
        for seed in range(3):
            (text,) = speaker.say([schema], likes, seed=seed)
            check(text, schema)


def test_text_beyond_ascii_is_still_allowed(speaker):
    letters = "हिन्दी한글\N{GRINNING FACE}é"
    likes = [[speaker.single_byte(byte)] for byte in letters.encode()]
    # The opening of the document comes first: what is liked in each step is one byte late.
    (text,) = speaker.say([WORD], [[speaker.single_byte(ord('"'))], *likes])
    assert json.loads(text).startswith(letters)


def test_rows_have_grammars_of_their_own_or_none(speaker):
    free, bounded, other = speaker.say([None, BOUNDED, FREE], [], steps=300)
    check(bounded, BOUNDED)
    check(other, FREE)
    assert not free.startswith(("{", "["))


def test_a_model_that_goes_past_the_mask_is_noticed(speaker):
    import torch

    rows = Rows(1, eos_ids=[speaker.eos], stop=(), decode=str, abandoned=lambda row: False)
    mask = GrammarMask(speaker.grammars, [speaker.grammars.compile(BOUNDED)], rows)
    ids = torch.zeros((1, 1), dtype=torch.long)
    mask(ids, torch.full((1, PADDED_VOCABULARY), float("nan")))
    rows(torch.tensor([[0, speaker.single_byte(ord("x"))]]), None)
    with pytest.raises(RuntimeError, match="ruled out"):
        mask(ids, torch.zeros((1, PADDED_VOCABULARY)))


@pytest.mark.parametrize("schema", [{"type": "nonsense"}, {"$ref": "#/nowhere"}, {"type": object()}])
def test_a_schema_that_makes_no_grammar_is_told(speaker, schema):
    with pytest.raises(ConfigError, match="schema"):
        speaker.grammars.compile(schema)
