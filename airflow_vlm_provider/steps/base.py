"""The contract of a step.

A step does no I/O. For every sample it is a generator: it yields the requests that it wants answered (all of one
``yield`` may be answered at the same time), receives their answers in the same order, may yield again (a second
try, a summary of the first answers), and finally returns a :class:`~airflow_vlm_provider.types.Result`::

    def process(self, sample):
        (answer,) = yield [Request(system=None, parts=(MediaRef("image", sample.row["images"][0]), "What is it?"))]
        return Result(rows=({**sample.row, "caption": answer.choices[0].text},))

Whoever drives the generator decides where answers come from: an engine, a journal, or a test's list.
A :class:`~airflow_vlm_provider.types.Probe` among the requests asks no model, but what a video file is like.
A sample that can't be done raises :class:`~airflow_vlm_provider.errors.SampleError`. Where a request can't be answered
for the sample's own sake, this is thrown into the generator; of requests that are yielded as
:class:`~airflow_vlm_provider.types.Independent`, it comes back in the place of the answer.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any, Protocol

from airflow_vlm_provider.types import Answer, Probe, Request, Result, Sample

StepRun = Generator[Sequence[Request | Probe], Sequence[Answer], Result]


class Step(Protocol):
    """What is asked of the model and what is made of its answer."""

    name: str
    """Names the step's folder in the ledger; letters, digits, ``-`` and ``_``."""

    asking: frozenset[str]
    """Names of the :meth:`parameters` that decide what is asked. When only others changed, the answers that are
    there already serve again."""

    def parameters(self) -> Mapping[str, Any]:
        """Everything that decides what the step asks and writes, as JSON values: part of the fingerprint."""

    def generated(self) -> Mapping[str, Any]:
        """The fields that the step writes, each with the JSON schema of its values, for formats that have types.

        Values may always be null. Of an object that may have other properties too, those of the step's.
        """

    def process(self, sample: Sample) -> StepRun:
        """Take one sample from row to rows.

        :raises SampleError: thrown from the generator when this sample can't be done.
        """
