"""The media of a request: recalled or fetched, for its key; made ready, when it is to be sent; and taken down."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from airflow_vlm_provider.errors import LASTING_KINDS, ConfigError, SampleError, TransientError
from airflow_vlm_provider.types import (
    Answer,
    Choice,
    Media,
    MediaRef,
    Part,
    Probe,
    Request,
    Sample,
    SourceMedia,
)

if TYPE_CHECKING:
    from airflow_vlm_provider.answering import Answering
    from airflow_vlm_provider.ledger.keys import RequestKeys
    from airflow_vlm_provider.ledger.media_memory import MediaMemory, MediaRecorder
    from airflow_vlm_provider.shards.media import MediaLoader


@dataclasses.dataclass(frozen=True)
class ShardMedia:
    """What is needed for the media of one shard's samples.

    :param shard: The shard's name.
    :param keys: Makes requests' keys.
    :param answering: Tells what need not be sent, and whether a video can be.
    :param remembered: What is known of the media from the shard's last commit.
    :param recorder: Takes down what media there are now.
    """

    shard: str
    loader: MediaLoader
    keys: RequestKeys
    answering: Answering
    remembered: MediaMemory
    recorder: MediaRecorder


class VideoFiles:
    """The files of one sample's videos: large, and often asked about several times. For any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._fetching: dict[str, threading.Lock] = {}
        self._files: dict[str, SourceMedia] = {}

    def fetch(self, ref: str, fetch: Callable[[], SourceMedia]) -> SourceMedia:
        """The file of a reference, fetched unless it was before.

        :raises SampleError: it can't be.
        """
        with self._lock:
            fetching = self._fetching.setdefault(ref, threading.Lock())
        with fetching:
            if ref not in self._files:
                self._files[ref] = fetch()
            return self._files[ref]


class Loading:
    """The media of one request on their way, and the key that they make with it.

    :param videos: The files of the sample's videos.
    """

    def __init__(
        self, media: ShardMedia, sample: Sample, request: Request | Probe, videos: VideoFiles
    ) -> None:
        self._media = media
        self._sample = sample
        self._request = request
        self._videos = videos
        self._refs = [part for part in request.parts if isinstance(part, MediaRef)]
        self._recalled: dict[MediaRef, Any] = {}
        self._sources: dict[MediaRef, SourceMedia] = {}
        self._failed: tuple[MediaRef, SampleError] | None = None
        self.key = ""
        self.ready: Request | None = None

    def recall(self) -> bool:
        """Make the key from what is remembered of the media; False when some have to be fetched for it.

        :raises SampleError: it is remembered that one of them can't be loaded.
        """
        for ref in self._refs:
            if not isinstance(ref.ref, str) or ref.ref in self._sample.embedded:
                return False
            found = self._media.remembered.recall(ref.ref)
            if found is None:
                return False
            self._recalled[ref] = found
            if found.error is not None:
                raise SampleError(found.error["kind"], found.error["message"], media=ref.ref)
        self._make_key()
        return True

    def load(self) -> None:
        """Fetch what is not remembered, make the key and, if it will be asked for, the request. Blocks.

        :raises SampleError: one of the media can't be loaded.
        """
        for ref in self._refs:
            if not isinstance(ref.ref, str) or ref not in self._recalled:
                self._fetch(ref)
        self._make_key()
        if isinstance(self._request, Request) and not self._media.answering.knows(self.key):
            self.make_ready()

    @property
    def is_ready(self) -> bool:
        """Whether the request can be sent as it was made ready."""
        if self.ready is None:
            return False
        sends_video = any(isinstance(part, Media) and part.kind == "video" for part in self.ready.parts)
        return not sends_video or self._media.answering.takes_video

    def make_ready(self) -> None:
        """Make the request as it is sent, fetching what was only remembered so far. Blocks.

        :raises SampleError: one of the media can't be loaded.
        :raises ConfigError: a video has to be sent as such, and the engine takes none.
        """
        assert isinstance(self._request, Request)
        self._fetch_all()
        parts: list[Part] = []
        for part in self._request.parts:
            parts += self._prepare(part) if isinstance(part, MediaRef) else (part,)
        self.ready = dataclasses.replace(self._request, parts=tuple(parts))

    def probe(self) -> Answer:
        """Look at the file itself. Blocks.

        :raises SampleError: it can't be loaded.
        """
        self._fetch_all()
        (ref,) = self._refs
        with self._blamed(ref):
            facts = self._media.loader.probe(self._sources[ref])
        return Answer((Choice(json.dumps(facts, sort_keys=True)),), model="")

    def record(self) -> None:
        """Note for the next run what media there were."""
        for ref in self._refs:
            if not isinstance(ref.ref, str) or ref.ref in self._sample.embedded:
                continue
            if self._failed is not None and self._failed[0] == ref:
                error = self._failed[1]
                if error.kind in LASTING_KINDS:
                    looked = self._sources[ref].looked if ref in self._sources else error.looked
                    said = {"kind": error.kind, "message": error.message}
                    self._media.recorder.add(ref.ref, looked, error=said)
            elif ref in self._sources:
                source = self._sources[ref]
                self._media.recorder.add(ref.ref, source.looked, digest=source.digest)
            elif ref in self._recalled:
                found = self._recalled[ref]
                self._media.recorder.add(ref.ref, found.looked, digest=found.digest, error=found.error)

    def _make_key(self) -> None:
        digests = [
            self._sources[ref].digest if ref in self._sources else self._recalled[ref].digest
            for ref in self._refs
        ]
        if isinstance(self._request, Probe):
            self.key = self._media.keys.of_probe(*digests)
        else:
            self.key = self._media.keys.of(self._request, digests)

    def _fetch_all(self) -> None:
        for ref in self._refs:
            if ref not in self._sources:
                self._fetch(ref)

    def _fetch(self, ref: MediaRef) -> None:
        def fetch() -> SourceMedia:
            return self._media.loader.fetch(ref, shard=self._media.shard, embedded=self._sample.embedded)

        with self._blamed(ref):
            source = self._videos.fetch(ref.ref, fetch) if ref.kind == "video" else fetch()
        found = self._recalled.pop(ref, None)
        self._sources[ref] = source
        if found is not None and found.digest != source.digest:
            # Replaced since it was listed: an answer about it must not be filed under the old one's key.
            raise TransientError(f"{ref.ref} was replaced while the shard was worked on.", media=ref.ref)

    def _prepare(self, ref: MediaRef) -> Sequence[Part]:
        transport = None if ref.frames is None else ref.frames.transport
        takes_video = self._media.answering.takes_video
        if transport == "video" and not takes_video:
            raise ConfigError(
                "The model takes no videos. Set transport='frames' to send their frames as images, or 'auto'."
            )
        with self._blamed(ref):
            return self._media.loader.prepare(
                self._sources[ref], frames=ref.frames, as_video=takes_video and transport != "frames"
            )

    @contextlib.contextmanager
    def _blamed(self, ref: MediaRef) -> Iterator[None]:
        """Note which medium it was that failed."""
        try:
            yield
        except SampleError as error:
            self._failed = (ref, error)
            raise
