from __future__ import annotations

import asyncio
import dataclasses
import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from airflow_vlm_provider.engines.transformers import TransformersEngine
from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.types import Answer, MediaRef
from tests.support.local_engines import (
    answers_of,
    request,
    with_engine,
)
from tests.support.tiny_models import changed_copy, tiny_qwen

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("one_thread")]


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


def test_a_checkpoint_without_a_chat_template_can_only_go_on_with_a_text(tmp_path):
    untuned = str(tiny_qwen(tmp_path / "model", chat_template=None))
    asked = dataclasses.replace(request(), completion="A picture of")
    refused, answered = answers_of(untuned, [request(), asked])
    assert isinstance(refused, ConfigError)
    assert "chat_template.jinja" in str(refused)
    assert isinstance(answered, Answer)


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


def test_media_have_to_be_loaded(tiny):
    (error,) = answers_of(tiny, [dataclasses.replace(request(), parts=(MediaRef("image", "a.png"),))])
    assert isinstance(error, ConfigError)


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
