"""What is made of a vLLM server's last words, as real servers said them."""

from __future__ import annotations

import signal

import pytest

from airflow_vlm_provider.engines.vllm_last_words import QUOTED_LINES, is_lasting, quote, remedy, said_of_exit

# vLLM 0.32, abbreviated where marked by dots.
WORDS = {
    "unknown argument": "api_server.py: error: unrecognized arguments: --no-such-thing=3",
    "wrong value": "main.py serve: error: argument --dtype: invalid choice: 'x' (choose from 'auto', ...)",
    "no such folder": "huggingface_hub.errors.HFValidationError: Repo id must be in the form 'repo_name' or ...",
    "no such model, offline": (
        "huggingface_hub.errors.LocalEntryNotFoundError: Cannot find an appropriate cached snapshot folder for the "
        "specified revision on the local disk and outgoing traffic has been disabled. ..."
    ),
    "too long": (
        "pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig\n  Value error, "
        "User-specified max_model_len (10000000) is greater than the derived max_model_len ..."
    ),
    "vllm is not installed": "/usr/bin/python: No module named vllm",
    "no command": "/no/such/vllm: No such file or directory",
    "not executable": "/etc/passwd: Permission denied",
}
PASSING = {
    "memory": "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB.",
    "memory of others": (
        "ValueError: Free memory on device cuda:0 (3.9/79.2 GiB) on startup is less than desired GPU memory "
        "utilization (0.92, 72.9 GiB). ..."
    ),
    "network": (
        "huggingface_hub.errors.LocalEntryNotFoundError: An error happened while trying to locate the files on the "
        "Hub and we cannot find the appropriate snapshot folder ... Please check your internet connection and try again."
    ),
    "disk": "OSError: [Errno 28] No space left on device: 'model.safetensors'",
    "port": "OSError: [Errno 98] Address already in use",
    "device": "RuntimeError: CUDA error: an illegal memory access was encountered",
    "nothing": "",
}


@pytest.mark.parametrize("name", WORDS)
def test_what_only_the_author_can_mend_is_told(name):
    assert is_lasting(["INFO: something", *WORDS[name].split("\n"), "    For further information visit ..."])


@pytest.mark.parametrize("name", PASSING)
def test_what_may_pass_is_no_fault_of_the_authors(name):
    assert not is_lasting(["INFO: something", *PASSING[name].split("\n")])


def test_what_is_only_remarked_is_not_why_it_ended():
    assert not is_lasting(["(EngineCore pid=2) WARNING 11-20 14:50:04 [x.py:1] ValueError: no tuned kernel"])
    assert is_lasting(["(EngineCore pid=2) ERROR 11-20 14:50:04 [x.py:1] ValueError: no such kernel"])


def test_where_there_is_no_vllm_the_queue_is_named_and_else_nothing():
    without = [
        WORDS["vllm is not installed"],
        WORDS["no command"],
        "ModuleNotFoundError: No module named 'vllm'",
        "(ModuleNotFoundError: No module named 'vllm')",
    ]
    for line in without:
        assert "[vlm] gpu_queue" in str(remedy(["a line", line, "another"])), line
    others = [*WORDS.values(), *PASSING.values(), "ModuleNotFoundError: No module named 'vllm._C'"]
    for words in set(others) - set(without):
        assert remedy(words.split("\n")) is None, words


ENGINE_FAILED = """\
(APIServer pid=1) INFO 11-20 14:50:05 [base.py:280] Multi-modal warmup completed in 0.273s
(EngineCore pid=2) ERROR 11-20 14:51:26 [core.py:999] EngineCore failed to start.
(EngineCore pid=2) ERROR 11-20 14:51:26 [core.py:999] Traceback (most recent call last):
(EngineCore pid=2) ERROR 11-20 14:51:26 [core.py:999]   File "/x/core.py", line 1, in run
(EngineCore pid=2) ERROR 11-20 14:51:26 [core.py:999]     engine = EngineCoreProc()
(EngineCore pid=2) ERROR 11-20 14:51:26 [core.py:999]              ^^^^^^^^^^^^^^^^
(EngineCore pid=2) ERROR 11-20 14:51:26 [core.py:999] ValueError: To serve at least one request, more is needed.
""".splitlines()
FRAMES = [
    '  File "/x/entry.py", line 232, in main',
    "    uvloop.run(run_server(args))",
    "           ^^^^^^^^^",
] * 40
API_FAILED = [
    "Traceback (most recent call last):",
    *FRAMES,
    "RuntimeError: Engine core initialization failed. See root cause above.",
]


def test_the_root_is_quoted_however_long_ago_it_was_said():
    assert quote([*ENGINE_FAILED, *API_FAILED]) == [
        "Multi-modal warmup completed in 0.273s",
        "EngineCore failed to start.",
        "ValueError: To serve at least one request, more is needed.",
        "RuntimeError: Engine core initialization failed. See root cause above.",
    ]
    noise = [f"line {number}" for number in range(300)]
    quoted = quote([*ENGINE_FAILED, *noise, *API_FAILED])
    assert quoted[0] == "ValueError: To serve at least one request, more is needed."
    assert quoted[-2:] == [
        "line 299",
        "RuntimeError: Engine core initialization failed. See root cause above.",
    ]
    assert len(quoted) == QUOTED_LINES


def test_a_quotation_is_short():
    assert quote(["x" * 5000]) == ["x" * 400]
    assert quote(["same"] * 500 + ["", " "]) == ["same"]
    assert quote([]) == []


@pytest.mark.parametrize(
    ("status", "ready", "said"),
    [
        (2, False, "vLLM ended with status 2 before it was ready"),
        (0, True, "vLLM ended with status 0"),
        (-signal.SIGKILL, True, "vLLM was ended by SIGKILL (often the kernel's, for lack of memory)"),
        (-signal.SIGSEGV, False, "vLLM was ended by SIGSEGV before it was ready"),
        (-40, True, "vLLM was ended by signal 40"),
    ],
)
def test_how_it_ended_is_said_in_words(status, ready, said):
    assert said_of_exit(status, ready=ready) == said
