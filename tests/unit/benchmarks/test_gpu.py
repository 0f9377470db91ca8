from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu_model import SEVEN_B, SPECIAL_TOKENS, TINY, end_token, make_config, make_folder, words

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


def run(script: str, *options: str, path: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / script), *options],
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("status", [None, 9], ids=["no nvidia-smi", "no driver"])
def test_without_a_gpu_there_is_nothing_to_measure_and_nothing_wrong(tmp_path, status):
    if status is not None:
        script = tmp_path / "nvidia-smi"
        script.write_text(f"#!/bin/sh\necho couldn\\'t communicate\nexit {status}\n")
        script.chmod(0o755)
    done = run("gpu.py", path=f"{tmp_path}:/usr/bin:/bin" if status else str(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("There is no NVIDIA GPU here")


def test_a_comparison_that_cannot_be_made_is_a_failure_that_says_why(tmp_path):
    done = run("gpu.py", "--tiny", "--only=vllm", f"--vllm-python={tmp_path}/python", path=os.environ["PATH"])
    assert done.returncode == 1
    assert f"vllm: not run: {tmp_path}/python can't be run: No such file or directory" in done.stdout


def test_the_shape_has_as_many_weights_as_the_published_model():
    import torch
    from transformers import Qwen2_5_VLForConditionalGeneration

    config = make_config(SEVEN_B, {token: SEVEN_B.words + n for n, token in enumerate(SPECIAL_TOKENS)})
    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration(config)
    assert sum(each.numel() for each in model.parameters()) == 8_292_166_656


def test_a_question_of_so_many_words_is_as_many_tokens(tmp_path):
    from transformers import AutoProcessor

    folder = make_folder(TINY, tmp_path / "model")
    tokenizer = AutoProcessor.from_pretrained(folder).tokenizer
    assert len(tokenizer) == TINY.words + len(SPECIAL_TOKENS)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") == end_token(folder)
    # The first word has no space before it, and is spelt.
    tokens = [tokenizer(f" {words(50, seed, TINY)}").input_ids for seed in range(5)]
    assert [len(each) for each in tokens] == [50] * 5
    assert len({tuple(each) for each in tokens}) == 5
