from __future__ import annotations

import dataclasses
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from airflow_vlm_provider.errors import ConfigError, NoVideoError, SampleError
from airflow_vlm_provider.types import Answer, Media, Request
from tests.support.local_engines import TAGS_SCHEMA, answers_of, ask_all, picture, texts, with_engine, work_of
from tests.support.tiny_captioners import (
    tiny_blip,
    tiny_blip2,
    tiny_florence2,
    tiny_git,
    tiny_instructblip,
)
from tests.support.tiny_models import changed_copy, tiny_qwen

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]

MAKERS: dict[str, Callable[[Path], Path]] = {
    "blip": tiny_blip,
    "blip2-opt": tiny_blip2,
    "blip2-t5": lambda folder: tiny_blip2(folder, language_model="t5"),
    "instructblip": tiny_instructblip,
    "git": tiny_git,
    "florence2": tiny_florence2,
    # A model that would follow a conversation, had it been taught to.
    "qwen-base": lambda folder: tiny_qwen(folder, chat_template=None),
}
# Their tokens can spell any JSON document, and their answers may begin with any token.
CONSTRAINED = ("blip2-opt", "blip2-t5", "instructblip", "qwen-base")
FREE = ("blip", "git", "florence2")
every_family = pytest.mark.parametrize("family", MAKERS)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("captioners")
    return {family: str(make(folder / family)) for family, make in MAKERS.items()}


def caption(number: int, completion: str | None = "a photo of", **changes: Any) -> Request:
    """A request about a picture of its own size."""
    sampling = {"max_tokens": 12, **changes.pop("sampling", {})}
    return Request(
        system="You write captions.",
        parts=(picture(number, side=30 + 25 * (number % 5)), "Describe this image."),
        completion=completion,
        sampling=sampling,
        **changes,
    )


@every_family
def test_answers_in_a_batch_are_those_that_each_request_gets_alone(models, family, generate):
    prompts = ["a photo of", "", "question: what is it? answer:", "a photo of"]
    requests = [caption(number, prompts[number % 4]) for number in range(12)]

    async def test(engine):
        together = await ask_all(engine, requests)
        sizes, generate.sizes = generate.sizes, []
        return together, sizes, [await engine.ask(each) for each in requests]

    together, sizes, alone = with_engine(models[family], test, gpu_batch_size=12)
    assert together == alone
    # Where the size of a picture is that of its prompt, only pictures of one size go together.
    assert max(sizes) == (2 if family == "qwen-base" else 6)
    assert len({texts(answer)[0] for answer in alone}) > 6
    assert {answer.choices[0].finish_reason for answer in alone} <= {"stop", "length"}


def documented_caption(checkpoint: str, family: str, request: Request) -> str:
    """What the library's own documentation has one write for this kind of model, one picture at a time."""
    import torch
    from PIL import Image
    from transformers import AutoModelForImageTextToText, AutoProcessor

    processor = AutoProcessor.from_pretrained(checkpoint)
    model = AutoModelForImageTextToText.from_pretrained(checkpoint).eval()
    image = Image.open(io.BytesIO(request.parts[0].data)).convert("RGB")
    options: dict[str, Any] = {
        "max_new_tokens": request.sampling["max_tokens"],
        "num_beams": 1,
        "do_sample": False,
    }
    inputs = dict(processor(images=image, text=request.completion, return_tensors="pt"))
    if family == "git":
        # The prompt follows the first token, and none follows the prompt.
        ids = processor.tokenizer(request.completion, add_special_tokens=False)["input_ids"]
        inputs["input_ids"] = torch.tensor([[processor.tokenizer.cls_token_id, *ids]])
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    elif not request.completion and family in ("blip", "blip2-opt"):
        inputs = dict(processor(images=image, return_tensors="pt"))
    with torch.inference_mode():
        tokens = model.generate(**inputs, **options)[0].tolist()
    new = tokens[-request.sampling["max_tokens"] :]
    return processor.tokenizer.decode(new, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("family", [family for family in MAKERS if family != "qwen-base"])
@pytest.mark.parametrize("completion", ["", "a photo of"])
def test_answers_are_those_that_the_library_documents(models, family, completion):
    requests = [caption(number, completion) for number in range(4)]
    for asked, answer in zip(requests, answers_of(models[family], requests), strict=True):
        assert answer.choices[0].finish_reason == "length"
        assert texts(answer)[0] == documented_caption(models[family], family, asked)


@every_family
def test_the_prompt_decides_the_answer_and_is_no_part_of_it(models, family):
    prompt = "a red circle is a red circle"
    plain, prompted = answers_of(models[family], [caption(1, ""), caption(1, prompt)])
    assert texts(plain) != texts(prompted)
    assert "circle" not in texts(prompted)[0]
    assert prompted.usage.completion_tokens == plain.usage.completion_tokens == 12
    assert prompted.usage.prompt_tokens - plain.usage.prompt_tokens >= 7


@every_family
def test_other_pictures_get_other_answers(models, family):
    answers = answers_of(models[family], [caption(number) for number in range(6)])
    assert len({texts(answer)[0] for answer in answers}) >= 3


@every_family
def test_neither_system_prompt_nor_conversation_reach_a_model_that_knows_none(models, family):
    asked = caption(1)
    bare = dataclasses.replace(asked, system=None, parts=asked.parts[:1])
    first, second = answers_of(models[family], [asked, bare])
    assert first == second


@every_family
def test_an_answer_that_is_cut_says_so_and_one_that_ends_does_not(models, family):
    # Under strong sampling, some of so many answers end by themselves.
    requests = [
        caption(number, sampling={"temperature": 3.0, "seed": number, "max_tokens": 80})
        for number in range(16)
    ]
    # One at a time: in a batch, a row that has ended goes on with tokens that mean nothing.
    answers = answers_of(models[family], requests, gpu_batch_size=1)
    cut = {answer.choices[0].finish_reason == "length" for answer in answers}
    assert cut == {True, False}
    for answer in answers:
        assert (answer.choices[0].finish_reason == "length") == (answer.usage.completion_tokens == 80)


@every_family
def test_candidates_cost_one_look_and_one_reading(models, family):
    one, four = work_of(
        models[family],
        [caption(1, n=n, sampling={"temperature": 1.0, "seed": 1, "max_tokens": 1}) for n in (1, 4)],
    )
    assert one == four
    assert one["Conv2d"] + one["Conv3d"] > 0


@every_family
def test_a_seed_decides_candidates_whatever_shares_the_batch(models, family):
    sampling = {"temperature": 1.5, "seed": 7}
    asked = caption(1, n=4, sampling=sampling)
    others = [caption(number, n=4, sampling={**sampling, "seed": number}) for number in range(2, 5)]

    async def test(engine):
        return await engine.ask(asked), (await ask_all(engine, [*others, asked]))[-1]

    alone, crowded = with_engine(models[family], test, gpu_batch_size=16)
    assert alone == crowded
    assert len(set(texts(alone))) > 1


@every_family
def test_a_bad_request_fails_alone(models, family):
    whole = picture(1)
    broken = dataclasses.replace(whole, data=whole.data[: len(whole.data) // 2])
    good = caption(1)
    two, none, corrupt, before, after = answers_of(
        models[family],
        [
            dataclasses.replace(good, parts=(whole, picture(2))),
            dataclasses.replace(good, parts=("nothing to see",)),
            dataclasses.replace(good, parts=(broken,)),
            good,
            caption(1),
        ],
    )
    assert isinstance(before, Answer)
    assert before == after
    for failed in (two, none, corrupt):
        assert isinstance(failed, SampleError)
    assert (two.kind, none.kind, corrupt.kind) == ("rejected", "rejected", "media_corrupt")
    assert "not about 2 together" in two.message


@every_family
def test_a_step_that_needs_a_conversation_is_refused_with_the_remedy(models, family):
    (error,) = answers_of(models[family], [caption(1, None)])
    assert isinstance(error, ConfigError)
    assert "chat model" in str(error)


@every_family
def test_a_video_is_refused_before_it_is_sent_and_when_it_is(models, family):
    async def test(engine):
        request = dataclasses.replace(caption(1), parts=(Media("video", "video/mp4", b"...", "a.mp4"),))
        return engine.takes_video, (await ask_all(engine, [request]))[0]

    takes_video, error = with_engine(models[family], test)
    assert not takes_video
    assert isinstance(error, NoVideoError)


@pytest.mark.parametrize("family", CONSTRAINED)
def test_a_schema_is_kept_by_models_whose_tokens_can_say_it(models, family):
    requests = [
        caption(
            number, schema=TAGS_SCHEMA, n=2, sampling={"temperature": 1.5, "seed": number, "max_tokens": 100}
        )
        for number in range(4)
    ]
    choices = [choice for answer in answers_of(models[family], requests) for choice in answer.choices]
    assert len(choices) == 8
    for choice in choices:
        assert choice.finish_reason == "stop"
        jsonschema.validate(json.loads(choice.text), TAGS_SCHEMA)


@pytest.mark.parametrize("family", FREE)
def test_a_schema_leaves_models_free_whose_tokens_can_not_say_it(models, family):
    free, asked = answers_of(models[family], [caption(1), caption(1, schema=TAGS_SCHEMA)])
    assert free == asked


def test_a_task_of_florence_is_asked_in_its_own_words(models):
    task, words = answers_of(
        models["florence2"], [caption(1, "<CAPTION>"), caption(1, "What does the image describe?")]
    )
    assert task == words
    (error,) = answers_of(models["florence2"], [caption(1, "<CAPTION> and more")])
    assert isinstance(error, SampleError)
    assert "<CAPTION>" in error.message


@pytest.mark.parametrize("family", ["blip2-opt", "blip2-t5", "instructblip"])
def test_a_checkpoint_that_does_not_say_what_stands_for_a_picture_is_completed(models, family, tmp_path):
    old = changed_copy(Path(models[family]), tmp_path / "old", image_token_index=None)
    settings = old / "processor_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "num_query_tokens": None}))
    requests = [caption(number) for number in range(4)]
    assert [texts(a) for a in answers_of(str(old), requests)] == [
        texts(a) for a in answers_of(models[family], requests)
    ]


def test_a_token_that_stands_for_a_picture_is_put_where_the_processor_leaves_it_out(models):
    implied, placed = answers_of(
        models["qwen-base"], [caption(1, "a photo of"), caption(1, "<|image_pad|>a photo of")]
    )
    assert implied == placed
    assert isinstance(implied, Answer)
