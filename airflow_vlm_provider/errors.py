"""The failure taxonomy: what went wrong decides what happens next, so each kind is a class of its own.

===================  =======================================  ==========================================
class                whose fault                              what happens
===================  =======================================  ==========================================
:class:`SampleError`     the sample's own                         dead letter; the shard goes on
:class:`TransientError`  nobody's: 429, 5xx, timeouts, resets     asked again with backoff, then dead letter
:class:`EngineError`     the engine's: down, crashed, no memory   the task fails and Airflow retries it
:class:`ShardError`      the shard's: truncated, corrupt           the task fails; no shorter shard is written
:class:`ConfigError`     the author's: key, model, parameter      the task fails at once, without retries
===================  =======================================  ==========================================

No message may hold a secret: they are logged, and written to ``errors.jsonl`` and XCom.
"""

from __future__ import annotations

import copyreg
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from airflow_vlm_provider.types import Looked


class VLMError(Exception):
    """Base of everything that this package raises on purpose."""


# What failed like this fails again for as long as the media, the row and the parameters stay the same.
LASTING_KINDS = frozenset(
    {
        "malformed_row",
        "media_missing",
        "media_corrupt",
        "media_refused",
        "media_too_large",
        "media_unsupported",
    }
)
# What the model itself said no to, or said nothing useful about: asking again may end otherwise, and costs.
ANSWERED_KINDS = frozenset({"unparsable", "refused", "rejected", "empty_answer", "cut_short", "repetitive"})


class SampleError(VLMError):
    """A sample failed for its own sake: it becomes a dead letter and the shard goes on.

    :param kind: Short machine-readable reason, words joined by underscores: ``malformed_row``,
        ``media_missing``, ``media_corrupt``, ``media_too_large``, ``media_refused``, ``unparsable``,
        ``refused``, ``rejected``, ``empty_answer``, ``cut_short``, ``repetitive``, ``transient``...
    :param message: A sentence for a person.
    :param media: The media reference at fault, as it stands in the row; None when it was none in particular.
    :param attempts: How often the engine was asked before giving up; 0 when it never was.
    :param keys: The keys of the answers that it failed for, where a step knows them; without them, all that was asked
        about ``media`` counts as being at fault, and is what is asked again for it.

    What loads media sets ``looked`` to where it looked for the medium at fault, so that a run can tell later
    whether the reason still holds.
    """

    looked: Looked

    def __init__(
        self,
        kind: str,
        message: str,
        *,
        media: str | None = None,
        attempts: int = 0,
        keys: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message
        self.media = media
        self.attempts = attempts
        self.keys = tuple(keys)
        self.looked = ()

    def __reduce__(self) -> tuple[Any, ...]:
        # An exception is copied by calling its class with its message, which is not what this one is made of.
        return copyreg.__newobj__, (type(self), *self.args), self.__dict__  # type: ignore[attr-defined]


class TransientError(SampleError):
    """The engine could not answer this time, and still could not after every retry.

    A single sample that ends like this is a dead letter of kind ``transient``, asked again by the next run;
    the runner turns an unbroken series of them into an :class:`EngineError`.
    """

    def __init__(self, message: str, *, media: str | None = None, attempts: int = 0) -> None:
        super().__init__("transient", message, media=media, attempts=attempts)


class NoVideoError(VLMError):
    """The engine was sent a video, and its model takes none: the frames have to be sent as images.

    Raised once, or a few times at once: from then on the engine's ``takes_video`` is False.

    :param attempts: How many requests were sent to find out.
    """

    def __init__(self, message: str, *, attempts: int = 0) -> None:
        super().__init__(message)
        self.attempts = attempts


class EngineError(VLMError):
    """The engine is gone or out of memory: nothing more can be answered in this attempt."""


class ShardError(VLMError):
    """A shard cannot be read to its end: it is truncated or corrupt as a whole, not just in single rows.

    Nothing is written for it. The message says what is wrong and what to do about the file.
    """


class ConfigError(VLMError, ValueError):
    """Something that only the DAG's author or the deployment's administrator can mend.

    The message names the parameter or connection, its value (never a secret) and the remedy.
    """
