"""What several integration tests share: models that are made once, a worker with a fake vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.local_engines import Generate
from tests.support.tiny_models import tiny_qwen, tiny_qwen3_vl
from tests.support.vllm_workers import VLLMWorker, vllm_worker


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny Qwen2.5-VL."""
    return str(tiny_qwen(tmp_path_factory.mktemp("models") / "tiny"))


@pytest.fixture(scope="session")
def tiny_qwen3(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The folder of a tiny Qwen3-VL."""
    return str(tiny_qwen3_vl(tmp_path_factory.mktemp("models") / "tiny-qwen3"))


@pytest.fixture
def generate(monkeypatch: pytest.MonkeyPatch) -> Generate:
    return Generate(monkeypatch)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """So small a model gains nothing by a second thread, and loses much when the cores are busy."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VLLMWorker]:
    """A worker with a fake vLLM, of which nothing may be left."""
    with vllm_worker(tmp_path, monkeypatch) as made:
        yield made
