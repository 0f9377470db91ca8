from __future__ import annotations

import subprocess
import sys

import pytest

from airflow_vlm_provider.engines.decoding import DEFAULT_MAX_TOKENS, Decoding, Rows, RowSampler, seed_of
from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.types import Request


def decoding(n: int = 1, **sampling: object) -> Decoding:
    return Decoding.of(Request(system=None, parts=("?",), sampling=sampling, n=n))


@pytest.mark.parametrize(
    "sampling", [{}, {"temperature": 0}, {"temperature": 0.0, "top_p": 0.9}, {"temperature": None}]
)
def test_without_a_temperature_decoding_is_greedy_and_candidates_are_one(sampling):
    made = decoding(n=5, **sampling)
    assert made.greedy
    assert made.sequences == 1
    assert made.max_tokens == DEFAULT_MAX_TOKENS


def test_parameters_are_taken_as_given():
    made = decoding(
        3, temperature=0.5, top_p=0.9, top_k=7, max_tokens=9, stop="\n", seed=4, repetition_penalty=1.1
    )
    assert (made.temperature, made.top_p, made.top_k, made.max_tokens) == (0.5, 0.9, 7, 9)
    assert (made.stop, made.repetition_penalty, made.sequences) == (("\n",), 1.1, 3)
    assert decoding(max_completion_tokens=5).max_tokens == 5


def test_requests_that_differ_only_in_their_seed_can_share_a_batch():
    assert decoding(temperature=1, seed=1) == decoding(temperature=1, seed=2)
    assert hash(decoding(stop=["a"])) == hash(decoding(stop=("a",)))
    assert decoding(temperature=1) != decoding(temperature=0.9)


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": -1},
        {"temperature": "hot"},
        {"temperature": float("nan")},
        {"top_p": 1.5},
        {"top_k": 2.5},
        {"max_tokens": 0},
        {"max_tokens": True},
        {"stop": [""]},
        {"stop": 3},
        {"logit_bias": {}},
    ],
)
def test_a_wrong_parameter_is_named(sampling):
    with pytest.raises(ConfigError, match=next(iter(sampling))):
        decoding(**sampling)


@pytest.mark.parametrize("seed", ["1", 1.5, True])
def test_a_seed_is_a_whole_number(seed):
    with pytest.raises(ConfigError, match="seed"):
        seed_of(Request(system=None, parts=(), sampling={"seed": seed}))


def test_without_a_seed_every_draw_is_another():
    request = Request(system=None, parts=())
    assert seed_of(request) != seed_of(request)


def steps(rows: Rows, *columns: list[int]) -> list[list[bool]]:
    import torch

    ids = torch.zeros((len(columns[0]), 2), dtype=torch.long)
    ended = []
    for column in columns:
        ids = torch.cat([ids, torch.tensor(column)[:, None]], dim=1)
        ended.append(rows(ids, None).tolist())
    return ended


def make_rows(count: int, *, stop: tuple[str, ...] = (), abandoned: set[int] = frozenset()) -> Rows:  # type: ignore[assignment]
    return Rows(
        count,
        eos_ids={0},
        stop=stop,
        decode=lambda tokens: "".join(map(chr, tokens)),
        abandoned=lambda row: row in abandoned,
    )


def test_a_row_ends_at_its_end_token_and_pads_after_it_do_not_count():
    rows = make_rows(2)
    assert steps(rows, [65, 66], [0, 67], [0, 68]) == [[False, False], [True, False], [True, False]]
    assert [rows.answer(0), rows.finish_reason(0), rows.tokens[0]] == ["A", "stop", [65, 0]]
    assert [rows.answer(1), rows.finish_reason(1), rows.tokens[1]] == ["BCD", "length", [66, 67, 68]]


def test_a_stop_string_ends_a_row_and_is_not_part_of_the_answer():
    rows = make_rows(1, stop=("CD", "X"))
    assert steps(rows, [66], [67], [68], [69]) == [[False], [False], [True], [True]]
    assert [rows.answer(0), rows.finish_reason(0), rows.tokens[0]] == ["B", "stop", [66, 67, 68]]


def test_an_abandoned_row_ends_at_once():
    rows = make_rows(2, abandoned={1})
    assert steps(rows, [66, 66]) == [[False, True]]
    assert rows.finish_reason(1) == "other"


def draws(logits: list[float], count: int, **sampling: object) -> list[int]:
    """What one row draws, over and over."""
    import torch

    sampler = RowSampler(decoding(temperature=sampling.pop("temperature", 1.0), **sampling), [7])
    return [int(sampler(None, torch.tensor([logits])).argmax()) for _ in range(count)]


def test_tokens_are_drawn_as_often_as_they_are_likely():
    import math

    drawn = draws([math.log(0.6), math.log(0.3), math.log(0.1), -math.inf], 4000)
    # Five standard deviations of the most uncertain share are 0.04.
    assert [drawn.count(token) / 4000 for token in range(4)] == pytest.approx([0.6, 0.3, 0.1, 0], abs=0.04)
    assert drawn.count(3) == 0


@pytest.mark.parametrize("sampling", [{"top_k": 1}, {"top_p": 0.5}, {"min_p": 0.9}, {"temperature": 0.01}])
def test_narrowing_parameters_narrow(sampling):
    logits = [1.0, 2.0, 0.0, -1.0]
    assert set(draws(logits, 200)) == {0, 1, 2, 3}
    assert set(draws(logits, 200, **sampling)) == {1}


def test_a_requests_draws_do_not_depend_on_its_neighbours():
    import torch

    logits = torch.zeros(6, 50)
    settings = decoding(2, temperature=1.0)
    alone, crowded = RowSampler(settings, [5]), RowSampler(settings, [4, 5, 6])
    for _ in range(10):
        mine = alone(None, logits[:2]).argmax(-1).tolist()
        assert crowded(None, logits).argmax(-1).tolist()[2:4] == mine


def test_importing_the_engine_imports_nothing_heavy():
    code = (
        "import sys, airflow_vlm_provider.engines.transformers\n"
        "print(sorted({'torch', 'transformers', 'xgrammar', 'PIL', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
