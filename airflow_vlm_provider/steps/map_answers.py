"""From an answer to what a row's field takes, or to the reason why it is of no use."""

from __future__ import annotations

from typing import Any

from airflow_vlm_provider.errors import SampleError
from airflow_vlm_provider.steps.captions import is_loop, is_refusal
from airflow_vlm_provider.steps.functions import authors_code
from airflow_vlm_provider.steps.rows import excerpt
from airflow_vlm_provider.steps.structured import StructuredOutput
from airflow_vlm_provider.types import Choice

READER_VERSION = 1
"""Raised whenever an answer may be read otherwise than before."""


def read_answer(choice: Choice, output: StructuredOutput | None) -> Any:
    """The text of an answer, or the values of the model that it has to fit.

    What repeats itself and was not cut is left alone: it may be what a picture says.

    :raises SampleError: ``refused``, ``repetitive``, ``cut_short``, ``empty_answer`` or ``unparsable``.
    """
    text = choice.text.strip()
    said = f" It said: {excerpt(text)}." if text else ""
    if choice.finish_reason == "refusal":
        raise SampleError("refused", f"The model declined to answer.{said}")
    cut = choice.finish_reason == "length"
    unfit: SampleError | None = None
    if output is not None:
        try:
            with authors_code():
                return output.read(text, complete=not cut)
        except SampleError as error:
            unfit = error
    if is_refusal(text):
        raise SampleError("refused", f"The model declined to answer.{said}")
    if cut and is_loop(text):
        raise SampleError("repetitive", f"The answer repeats itself without end.{said}")
    if cut:
        raise SampleError("cut_short", f"The answer was cut for its length: raise max_tokens.{said}")
    if not text:
        raise SampleError("empty_answer", "The answer is empty.")
    if unfit is not None:
        raise SampleError(unfit.kind, f"{unfit.message}{said}")
    return text
