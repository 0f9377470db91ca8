"""What a run writes of one shard: it appears whole, at its commit, or it is dropped."""

from __future__ import annotations

import threading
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from airflow_vlm_provider.errors import ConfigError
from airflow_vlm_provider.shards.sidecar import SidecarWriter, sidecar_name
from airflow_vlm_provider.shards.stores import InvalidNameError

if TYPE_CHECKING:
    from airflow_vlm_provider.job import Job
    from airflow_vlm_provider.shards.formats import RowWriter, ShardReader


class DroppedError(Exception):
    """The output was dropped before it was to appear."""


class ShardOutput:
    """The output of one shard on its way. Safe to use from several threads at once.

    A commit that is stopped may still be at work in its thread. So whichever of :meth:`publish` and :meth:`drop` is
    called first decides, and the commit is told when it came too late: it would otherwise take the output that was
    there before for its own.

    :param shard: The shard's name.
    """

    def __init__(self, job: Job, shard: str) -> None:
        self._job = job
        self._shard = shard
        self._stack = ExitStack()
        self._decided = threading.Lock()
        self.name = shard
        """The output's name below the destination; final once it is open."""

    def open(self, reader: ShardReader) -> RowWriter:
        """Begin to write. Blocks.

        :raises ConfigError: The shard can't take what the step generates, or the output can't have its name.
        """
        job, generated = self._job, self._job.step.generated()
        sidecar = job.output == "sidecar" or (job.output is None and reader.embeds_media)
        if sidecar:
            self.name = sidecar_name(self._shard)
        try:
            stream = self._stack.enter_context(job.destination.create(self.name))
            return self._stack.enter_context(
                SidecarWriter(stream, generated=generated, shard=self._shard)
                if sidecar
                else reader.writer(stream, generated=generated)
            )
        except ConfigError as error:
            raise ConfigError(f"{job.source.uri}{self._shard}: {error}") from error
        except InvalidNameError as error:
            remedy = "Rename the shard, or set output='full'." if sidecar else "Rename the shard."
            raise ConfigError(f"{job.source.uri}{self._shard}: {error} {remedy}") from error

    def publish(self) -> str:
        """Make what was written visible. Blocks.

        :return: The identity of what is there then.
        :raises DroppedError: it was dropped before.
        """
        if not self._decided.acquire(blocking=False):
            raise DroppedError(f"The output of {self._shard} was dropped, because the run was stopped.")
        self._stack.close()
        # At once, because another attempt may replace it: what is there later may not be what was written here.
        return self._job.destination.stat(self.name).identity

    def drop(self, error: BaseException) -> None:
        """Drop what was written, unless it was to appear before.

        :param error: Why.
        """
        if self._decided.acquire(blocking=False):
            # The stores drop what was written when they see an exception, and that is quick.
            with suppress(BaseException):
                self._stack.__exit__(type(error), error, error.__traceback__)
