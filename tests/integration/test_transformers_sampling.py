from __future__ import annotations

import logging

import pytest

from airflow_vlm_provider.types import Request
from tests.support.local_engines import (
    answers_of,
    ask_all,
    request,
    texts,
    with_engine,
    work_of,
)

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]


def test_candidates_are_drawn_in_one_batch_and_count_as_places(tiny, generate):
    requests = [request(seed, n=3, temperature=1.0, seed=seed) for seed in range(4)]
    answers = answers_of(tiny, requests, gpu_batch_size=6)
    assert generate.sizes == [6, 6]
    assert all(len(set(texts(answer))) == 3 for answer in answers)


@pytest.mark.parametrize("checkpoint", ["tiny", "tiny_qwen3"])
def test_candidates_cost_one_reading_of_picture_and_prompt(tiny, tiny_qwen3, checkpoint):
    def asked(n: int) -> Request:
        return request(1, n=n, temperature=1.0, seed=1, max_tokens=1)

    one, four = work_of(tiny if checkpoint == "tiny" else tiny_qwen3, [asked(1), asked(4)])
    assert one == four
    assert one["Linear"] > 0
    assert one["Conv3d"] > 0


def test_greedy_candidates_are_generated_once(tiny, generate):
    (answer, single) = answers_of(tiny, [request(n=4), request()])
    assert texts(answer) == texts(single) * 4
    assert answer.usage == single.usage
    assert generate.sizes == [2]


def test_a_seed_decides_the_answer_whatever_shares_the_batch(tiny):
    asked = request(1, n=2, temperature=1.0, seed=11)
    others = [request(seed, "word " * seed, n=2, temperature=1.0, seed=seed) for seed in range(2, 5)]

    async def test(engine):
        alone = await engine.ask(asked)
        return (
            alone,
            *await ask_all(engine, [*others, asked]),
            await engine.ask(request(1, n=2, temperature=1.0, seed=12)),
        )

    alone, *_, crowded, reseeded = with_engine(tiny, test)
    assert alone == crowded
    assert not set(texts(alone)) & set(texts(reseeded))


def test_without_a_seed_each_answer_is_another(tiny):
    answers = answers_of(tiny, [request(1, temperature=1.0) for _ in range(3)])
    assert len({texts(answer)[0] for answer in answers}) == 3


def test_a_candidate_that_can_only_be_the_likeliest_is_the_greedy_one(tiny):
    greedy, narrow = answers_of(tiny, [request(3), request(3, temperature=0.8, top_k=1)])
    assert texts(greedy) == texts(narrow)


def test_a_penalty_keeps_tokens_from_coming_again(tiny):
    free, punished = answers_of(
        tiny, [request(3, max_tokens=200), request(3, max_tokens=200, repetition_penalty=1e6)]
    )
    assert len(set(texts(free)[0])) < len(set(texts(punished)[0]))


def test_a_stop_string_ends_the_answer_before_it(tiny):
    (free,) = answers_of(tiny, [request(2)])
    whole = texts(free)[0]
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    (stopped,) = answers_of(tiny, [request(2, stop=[stop, "never said"])])
    assert texts(stopped) == [whole[: whole.index(stop)]]
    assert stopped.choices[0].finish_reason == "stop"
    assert stopped.usage.completion_tokens < free.usage.completion_tokens


def test_neither_greedy_decoding_nor_sampling_draws_a_warning(tiny):
    from transformers.utils import logging as transformers_logging

    transformers_logging.warning_once.cache_clear()
    heard: list[str] = []
    ear = logging.Handler()
    ear.emit = lambda record: heard.append(record.getMessage())  # type: ignore[method-assign]
    library = logging.getLogger("transformers")
    library.addHandler(ear)
    try:
        answers_of(tiny, [request(), request(temperature=0.5, top_p=0.9, n=2)])
    finally:
        library.removeHandler(ear)
    flags = ("temperature", "top_p", "top_k", "do_sample", "pad_token_id", "generation flags")
    assert [message for message in heard if any(flag in message for flag in flags)] == []
