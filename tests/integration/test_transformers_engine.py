from __future__ import annotations

import asyncio
import dataclasses
import io
import json
import logging
import random
import shutil
import sys
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from PIL import Image

from airflow_vlm_provider.engines.transformers import TransformersEngine
from airflow_vlm_provider.errors import ConfigError, EngineError, SampleError
from airflow_vlm_provider.steps import prompts
from airflow_vlm_provider.types import Answer, Media, MediaRef, Request
from demo.drawings import Drawing, draw
from tests.support.tiny_models import changed_copy, tiny_qwen

pytestmark = pytest.mark.integration

DEMO_MODEL = Path(__file__).parents[2] / "demo" / "model"
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
SCHEMAS = {
    "bounded strings": TAGS_SCHEMA,
    "pattern": {
        "type": "object",
        "properties": {"tag": {"type": "string", "pattern": "^[a-z]{1,9}(-[a-z]{1,9}){0,2}$"}},
        "required": ["tag"],
        "additionalProperties": False,
    },
    "mixed": {
        "type": "object",
        "properties": {
            "kind": {"enum": ["photo", "line\ndrawing", "3d"]},
            "people": {"type": "integer", "minimum": 0, "maximum": 99},
            "outdoors": {"type": "boolean"},
            "place": {
                "type": "object",
                "properties": {"name": {"type": "string", "maxLength": 5}},
                "required": ["name"],
                "additionalProperties": False,
            },
        },
        "required": ["kind", "people", "outdoors", "place"],
        "additionalProperties": False,
    },
}
WORDS_SCHEMA = {
    "type": "object",
    "properties": {
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 30}, "minItems": 5, "maxItems": 10}
    },
    "required": ["tags"],
    "additionalProperties": False,
}
# No model can end before so many numbers are written.
ENDLESS_SCHEMA = {"type": "array", "items": {"type": "integer"}, "minItems": 1900}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So small a model gains nothing by a second thread, and loses much when the cores are busy."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(tiny_qwen(tmp_path_factory.mktemp("models") / "tiny"))


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
            size = kwargs["input_ids"].shape[0] * kwargs["num_return_sequences"]
            self.sizes.append(size)
            self.before(size, kwargs)
            output = real(model, **kwargs)
            self.lengths.append(output.shape[1] - kwargs["input_ids"].shape[1])
            return output

        monkeypatch.setattr(GenerationMixin, "generate", generate)


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch) -> Generate:
    return Generate(monkeypatch)


# Batches.


def test_answers_in_a_batch_are_those_that_each_request_gets_alone(tiny, generate):
    requests = [
        dataclasses.replace(
            request(seed, "word " * (7 * seed % 11)), schema=TAGS_SCHEMA if seed % 3 else None
        )
        for seed in range(8)
    ]
    requests[4] = dataclasses.replace(
        requests[4], system=None, parts=(picture(40), "and", picture(41, side=40))
    )

    async def test(engine):
        return await ask_all(engine, requests), [await engine.ask(each) for each in requests]

    together, alone = with_engine(tiny, test, gpu_batch_size=8)
    assert generate.sizes == [8] + [1] * 8
    assert together == alone
    assert len({texts(answer)[0] for answer in alone}) == 8
    assert len({answer.usage.prompt_tokens for answer in alone}) > 4


def test_text_alone_needs_no_picture(tiny):
    answers = answers_of(
        tiny, [Request(system=None, parts=("Hello",), sampling={"max_tokens": 3}), request()]
    )
    assert [type(answer) for answer in answers] == [Answer, Answer]


def test_usage_counts_prompts_without_padding_and_every_generated_token(tiny):
    short, long = request(1, max_tokens=5), request(1, "word " * 40, max_tokens=5)
    wide = dataclasses.replace(short, n=3, sampling={"max_tokens": 5, "temperature": 1.0, "seed": 3})
    short_answer, long_answer, wide_answer = answers_of(tiny, [short, long, wide])
    assert short_answer.usage.requests == 1
    assert long_answer.usage.prompt_tokens - short_answer.usage.prompt_tokens >= 40
    assert wide_answer.usage.prompt_tokens == short_answer.usage.prompt_tokens
    assert short_answer.usage.completion_tokens == 5
    assert wide_answer.usage.completion_tokens == 15
    assert [choice.finish_reason for choice in wide_answer.choices] == ["length"] * 3


def test_an_answer_names_the_model_as_it_was_given(tiny):
    (answer,) = answers_of(tiny, [request()])
    assert answer.model == tiny


def test_the_demo_model_tags_and_captions_what_it_sees():
    drawings = [draw(random.Random(1000 + number)) for number in range(12)]

    def ask(drawing: Drawing, system: str, text: str, schema: Any = None) -> Request:
        media = Media(kind="image", mime="image/png", data=drawing.encode(), ref="drawing.png")
        return Request(system=system, parts=(media, text), schema=schema, sampling={"max_tokens": 64})

    requests = [
        *(ask(drawing, prompts.TAGGING_SYSTEM, prompts.TAGGING_INPUT) for drawing in drawings),
        *(ask(drawing, prompts.TAGGING_SYSTEM, prompts.TAGGING_INPUT, WORDS_SCHEMA) for drawing in drawings),
        *(ask(drawing, prompts.CAPTIONING_SYSTEM, prompts.CAPTIONING_INPUT) for drawing in drawings),
    ]
    said = [texts(answer)[0] for answer in answers_of(str(DEMO_MODEL), requests, dtype="auto")]
    tags = [json.loads(text)["tags"] for text in said[:24]]
    assert tags[:12] == [drawing.tags for drawing in drawings]
    assert tags[12:] == [drawing.tags for drawing in drawings]
    assert said[24:] == [drawing.caption for drawing in drawings]


# Sampling.


def test_candidates_are_drawn_in_one_batch_and_count_as_places(tiny, generate):
    requests = [request(seed, n=3, temperature=1.0, seed=seed) for seed in range(4)]
    answers = answers_of(tiny, requests, gpu_batch_size=6)
    assert generate.sizes == [6, 6]
    assert all(len(set(texts(answer))) == 3 for answer in answers)


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


# Schemas.


@pytest.mark.parametrize("name", SCHEMAS)
def test_what_a_model_without_any_sense_says_satisfies_the_schema(tiny, name):
    schema = SCHEMAS[name]
    requests = [
        request(seed, n=4, schema=schema, temperature=1.5, seed=seed, max_tokens=160) for seed in range(6)
    ] + [request(seed, schema=schema, max_tokens=160) for seed in range(6)]
    answers = answers_of(tiny, requests, gpu_batch_size=24)
    said = [choice for answer in answers for choice in answer.choices]
    assert len(said) == 30
    assert {choice.finish_reason for choice in said} == {"stop"}
    for choice in said:
        jsonschema.validate(json.loads(choice.text), schema)
    assert len({choice.text for choice in said}) > 10


def test_schema_and_no_schema_mix_in_a_batch(tiny, generate):
    names = list(SCHEMAS)
    requests = [
        request(seed, schema=None if seed % 4 == 3 else SCHEMAS[names[seed % 4]], max_tokens=160)
        for seed in range(8)
    ]
    answers = answers_of(tiny, requests, gpu_batch_size=8)
    assert generate.sizes == [8]
    for seed, answer in enumerate(answers):
        if seed % 4 == 3:
            with pytest.raises(json.JSONDecodeError):
                json.loads(texts(answer)[0])
        else:
            jsonschema.validate(json.loads(texts(answer)[0]), SCHEMAS[names[seed % 4]])


def test_an_answer_cut_by_max_tokens_says_so(tiny):
    (answer,) = answers_of(tiny, [request(schema=TAGS_SCHEMA, max_tokens=12)])
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].text.startswith('{"tags": [')


def test_a_schema_that_makes_no_grammar_is_the_authors_fault(tiny):
    bad, good = answers_of(tiny, [request(schema={"type": "nonsense"}), request()])
    assert isinstance(bad, ConfigError)
    assert isinstance(good, Answer)


# Faults.


def corrupt() -> Request:
    media = picture(1)
    broken = dataclasses.replace(media, data=media.data[: len(media.data) // 2])
    return dataclasses.replace(request(), parts=(broken, "What?"))


def sliver() -> Request:
    """A picture so narrow that Qwen's processor refuses it."""
    buffer = io.BytesIO()
    Image.new("RGB", (2000, 2)).save(buffer, "PNG")
    return dataclasses.replace(
        request(), parts=(Media("image", "image/png", buffer.getvalue(), "s.png"), "What?")
    )


@pytest.mark.parametrize(
    ("bad", "kind", "says"),
    [
        (corrupt(), "media_corrupt", "decoded"),
        (sliver(), "rejected", "aspect ratio"),
        (request(text="word " * 3000), "rejected", "2048"),
        (request(text="<|image_pad|>"), "rejected", "image_pad"),
    ],
)
def test_a_bad_sample_fails_alone(tiny, bad, kind, says):
    good = [request(seed) for seed in range(7)]

    async def test(engine):
        return await ask_all(engine, [*good[:3], bad, *good[3:]]), await ask_all(engine, good)

    answers, expected = with_engine(tiny, test)
    failed = answers.pop(3)
    assert isinstance(failed, SampleError)
    assert failed.kind == kind
    assert says in failed.message
    assert answers == expected


def test_a_sample_that_breaks_the_forward_pass_fails_alone(tiny, generate):
    poison = request(99)

    def before(size, inputs):
        if (inputs["image_grid_thw"] == inputs["image_grid_thw"].max()).sum() and poison_pixels(inputs):
            raise IndexError("index out of range in self")

    marker: list[Any] = []

    def poison_pixels(inputs):
        import torch

        return any(torch.equal(row, marker[0]) for row in inputs["pixel_values"])

    async def test(engine):
        generate.before = lambda size, inputs: marker.append(inputs["pixel_values"][0].clone())
        await engine.ask(poison)
        generate.before = before
        return await ask_all(engine, [request(1), request(2), poison, request(3)])

    answers = with_engine(tiny, test)
    assert [type(answer) for answer in answers] == [Answer, Answer, SampleError, Answer]
    assert answers[2].kind == "rejected"


@pytest.mark.parametrize(
    "error",
    [
        lambda: __import__("torch").OutOfMemoryError("Allocation on device 0 would exceed allowed memory"),
        lambda: RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        lambda: RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_halves_the_batch_for_good(tiny, generate, error):
    def before(size, inputs):
        if size > 3:
            raise error()

    requests = [request(seed) for seed in range(8)]

    async def test(engine):
        whole = await ask_all(engine, requests)
        generate.before, generate.sizes = before, []
        halved = await ask_all(engine, requests)
        first, generate.sizes = generate.sizes, []
        return whole, halved, first, await ask_all(engine, requests)

    whole, halved, first, again = with_engine(tiny, test, gpu_batch_size=8)
    assert first == [8, 4, 2, 2, 2, 2]
    assert generate.sizes == [2, 2, 2, 2]
    assert whole == halved == again


def test_the_memory_of_a_failed_batch_is_free_when_its_halves_run(tiny, generate):
    import torch

    taken: list[weakref.ref[Any]] = []
    alive: list[bool] = []

    def before(size, inputs):
        alive.append(any(ref() is not None for ref in taken))
        taken.extend(weakref.ref(value) for value in inputs.values() if isinstance(value, torch.Tensor))
        # The precision of the inputs is not the model's, so that moving them makes a copy, as it does on a GPU.
        taken[:] = [ref for ref in taken if ref() is not None and ref().dtype == torch.bfloat16]
        if size > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")

    generate.before = before
    answers = answers_of(tiny, [request(seed) for seed in range(4)], gpu_batch_size=4, dtype="bfloat16")
    assert [type(answer) for answer in answers] == [Answer] * 4
    assert generate.sizes == [4, 2, 1, 1, 1, 1]
    assert alive == [False] * 6


def test_a_sample_that_is_too_large_even_alone_becomes_a_dead_letter(tiny, generate):
    import torch

    def before(size, inputs):
        if inputs["input_ids"].shape[1] > 200:
            raise torch.OutOfMemoryError("CUDA out of memory")

    generate.before = before
    answers = answers_of(tiny, [request(1), request(2, "word " * 200), request(3)])
    assert [type(answer) for answer in answers] == [Answer, SampleError, Answer]
    assert answers[1].kind == "media_too_large"
    assert "max_pixels" in answers[1].message


def test_a_lost_device_ends_the_engine(tiny, generate):
    def before(size, inputs):
        raise RuntimeError("CUDA error: device-side assert triggered")

    async def test(engine):
        generate.before = before
        first = await ask_all(engine, [request(1), request(2)])
        generate.before = lambda size, inputs: None
        return [*first, *await ask_all(engine, [request(3)])]

    errors = with_engine(tiny, test)
    assert [type(error) for error in errors] == [EngineError] * 3
    assert len(generate.sizes) == 1


# Ends.


def test_a_cancelled_request_stops_generating_and_its_neighbour_is_answered(tiny, generate):
    started, cancelled = threading.Event(), threading.Event()
    neighbour = request(1, schema=TAGS_SCHEMA, max_tokens=500)

    async def test(engine):
        expected = await engine.ask(neighbour)
        generate.before = lambda size, inputs: (started.set(), cancelled.wait(60))
        generate.sizes, generate.lengths = [], []
        endless = asyncio.create_task(engine.ask(request(2, schema=ENDLESS_SCHEMA, max_tokens=500)))
        asking = asyncio.create_task(engine.ask(neighbour))
        assert await asyncio.to_thread(started.wait, 60)
        endless.cancel()
        await asyncio.wait([endless])
        cancelled.set()
        return expected, await asking

    expected, answer = with_engine(tiny, test)
    assert answer == expected
    assert generate.sizes == [2]
    assert generate.lengths == [answer.usage.completion_tokens]


def test_leaving_the_engine_stops_what_runs_and_ends_its_threads(tiny, generate):
    before = set(threading.enumerate())
    started = threading.Event()
    generate.before = lambda size, inputs: started.set()

    async def test(engine):
        tasks = [
            asyncio.create_task(engine.ask(request(seed, schema=ENDLESS_SCHEMA, max_tokens=1800)))
            for seed in range(20)
        ]
        assert await asyncio.to_thread(started.wait, 60)
        return tasks

    async def main():
        async with TransformersEngine(model=tiny, device="cpu") as engine:
            tasks = await test(engine)
        return await asyncio.gather(*tasks, return_exceptions=True)

    errors = asyncio.run(main())
    assert {type(error) for error in errors} == {EngineError}
    assert len(generate.lengths) == 1
    assert generate.lengths[0] < 1800
    for thread in set(threading.enumerate()) - before:
        if thread.name.startswith("vlm-"):
            thread.join(60)
            assert not thread.is_alive()


def test_asking_outside_the_context_is_refused(tiny):
    with pytest.raises(EngineError):
        asyncio.run(TransformersEngine(model=tiny).ask(request()))


# Checkpoints.


def open_engine(model: str, **kwargs: Any) -> None:
    async def nothing(engine: TransformersEngine) -> None:
        pass

    with_engine(model, nothing, **kwargs)


def test_a_missing_folder_is_named():
    with pytest.raises(ConfigError, match="model='/no/such/folder' is no folder"):
        open_engine("/no/such/folder")


def test_a_model_that_is_nowhere_is_named_with_the_reason(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(
        ConfigError, match=r"model='some/model' is neither a folder nor .* HF_HUB_OFFLINE is set"
    ):
        open_engine("some/model")


def test_a_text_model_is_refused(tiny, tmp_path):
    from transformers import Qwen2Config

    shutil.copytree(tiny, tmp_path / "text")
    Qwen2Config(hidden_size=64).save_pretrained(tmp_path / "text")
    with pytest.raises(ConfigError, match="image-text-to-text"):
        open_engine(str(tmp_path / "text"))


def test_a_checkpoint_without_a_chat_template_is_refused_with_the_remedy(tmp_path):
    with pytest.raises(ConfigError, match=r"chat_template\.jinja"):
        open_engine(str(tiny_qwen(tmp_path / "model", chat_template=None)))


def test_a_chat_template_that_refuses_the_conversation_is_the_authors_fault(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "strict")
    (tmp_path / "strict" / "chat_template.jinja").write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    )
    (error,) = answers_of(str(tmp_path / "strict"), [request()])
    assert isinstance(error, ConfigError)
    assert "no system" in str(error)


def test_code_in_a_checkpoint_is_not_run_unless_allowed(tiny, tmp_path):
    remote = changed_copy(
        Path(tiny),
        tmp_path / "remote",
        model_type="homemade",
        auto_map={"AutoConfig": "code.Config", "AutoModelForImageTextToText": "code.Model"},
    )
    (remote / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
    with pytest.raises(ConfigError, match="trust_remote_code=True"):
        open_engine(str(remote))
    assert not (tmp_path / "ran").exists()


def test_damaged_weights_are_told(tiny, tmp_path):
    shutil.copytree(tiny, tmp_path / "damaged")
    weights = tmp_path / "damaged" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="could not be loaded: SafetensorError"):
        open_engine(str(tmp_path / "damaged"))


@pytest.mark.parametrize("library", ["torch", "transformers", "xgrammar"])
def test_a_missing_library_is_named_with_the_remedy(tiny, monkeypatch, library):
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ConfigError, match=rf"{library}.*pip install 'airflow-provider-vlm\[transformers\]'"):
        open_engine(tiny)


@pytest.mark.parametrize("kwargs", [{"device": "cuda:99"}, {"device": "toaster"}, {"dtype": "float13"}])
def test_a_wrong_device_or_precision_is_named(tiny, kwargs):
    async def main():
        async with TransformersEngine(model=tiny, **kwargs):
            pass

    with pytest.raises(ConfigError, match=next(iter(kwargs))):
        asyncio.run(main())


def test_media_have_to_be_loaded_images(tiny):
    refs = [
        dataclasses.replace(request(), parts=(MediaRef("image", "a.png"),)),
        dataclasses.replace(request(), parts=(Media("video", "video/mp4", b"", "a.mp4"),)),
    ]
    assert [type(answer) for answer in answers_of(tiny, refs)] == [ConfigError, ConfigError]


def test_parameters_hold_what_decides_answers_and_no_secret():
    engine = TransformersEngine(
        model="some/model",
        revision="v1",
        dtype="bfloat16",
        gpu_batch_size=3,
        device="cuda:0",
        model_params={"token": "hf_secret", "attn_implementation": "sdpa", "variant": "fp16"},
    )
    parameters = engine.parameters()
    assert json.loads(json.dumps(parameters)) == parameters
    assert parameters["model_params"] == {"variant": "fp16"}
    assert "hf_secret" not in str(parameters)
    other = TransformersEngine(
        model="some/model", revision="v1", dtype="bfloat16", model_params={"variant": "fp16"}
    )
    assert other.parameters() == parameters
    assert engine.concurrency == 6
