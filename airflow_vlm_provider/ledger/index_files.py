"""A folder of immutable files whose union is an index: any number of tasks add to it at once, and none waits.

Invariants:

- The index is the union of the folder's files. No file ever changes; to add is to create one more.
- Files are merged by creating one with all that they hold, and deleting them only then. Whatever was added is in
  some file at every moment. A merger that is killed in between leaves it in two, which a union does not mind.
- Readers list until a listing shows nothing that they have not tried to read. What vanished meanwhile, or was
  missed by a listing that a merge overtook, is in a file that the next listing shows.
- A name ends with the hash of its file's content. What does not fit its name is torn: it is reported, left out and
  never deleted. Mergers of the same files write the same file, so that many at once don't multiply the index.
- Only files of similar size are merged, so that what is large is not written again for every little that is added,
  and the number of files grows with the logarithm of the index.
- Merging is no duty: where it fails, the index is as good as before, and only slower to read.
"""

from __future__ import annotations

import hashlib
import logging
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence, Sized
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from airflow_vlm_provider.errors import VLMError
from airflow_vlm_provider.ledger.manifest import Files

log = logging.getLogger(__name__)

MAX_FILES = 16
THREADS = 32
MAX_FILE_BYTES = 1024 * 1024 * 1024
# Merging stops short of what could not be read any more.
MAX_MERGED_BYTES = MAX_FILE_BYTES // 4
# The next larger file joins a merge when it is at most so many times as large as all the smaller ones together.
SIMILAR = 2
_NAME = re.compile(r"(?P<time>[0-9]{20})-(?P<hash>[0-9a-f]{32})\..+")

T = TypeVar("T", bound=Sized)


@dataclass(frozen=True)
class _File(Generic[T]):
    size: int
    content: T


class IndexFiles(Generic[T]):
    """The files of one index. Safe to use from several threads, and by any number of processes, at once.

    :param folder: Where they are, below the root of ``files``.
    :param suffix: What their names end with, the dot included.
    :param decode: Makes a content of a file's bytes. Raises ``ValueError``, ``KeyError`` or ``TypeError`` for what it
        does not understand.
    :param encode: The opposite, the same bytes for the same content.
    :param union: Makes one content of several.
    """

    def __init__(
        self,
        files: Files,
        *,
        folder: str,
        suffix: str,
        decode: Callable[[bytes], T],
        encode: Callable[[T], bytes],
        union: Callable[[Sequence[T]], T],
    ) -> None:
        self._files = files
        self._folder = folder
        self._suffix = suffix
        self._decode = decode
        self._encode = encode
        self._union = union
        self._lock = threading.Lock()
        self._added: dict[str, _File[T]] = {}

    def add(self, content: T) -> None:
        """Create a file. Every so often, those that this object has created are merged."""
        added = self._create(content, time.time_ns())
        with self._lock:
            self._added.update(added)
            mine, self._added = self._added, {}
            if len(mine) <= MAX_FILES:
                self._added, mine = mine, {}
        if mine:
            mine = self._merge_similar(mine, self._union)
            with self._lock:
                # What could not be merged is not tried again with every file that is added.
                self._added.update(mine if len(mine) <= MAX_FILES else {})

    def load(self) -> list[T]:
        """Read the whole index: the contents of all sound files.

        :raises PermissionError: access is denied.
        :raises ConnectionError: the storage can't be reached.
        """
        return [file.content for file in self._read().values()]

    def merge(
        self,
        *,
        max_files: int = MAX_FILES,
        union: Callable[[Sequence[T]], T] | None = None,
        rewrite: Callable[[T], bool] | None = None,
    ) -> list[T]:
        """Read the whole index, and merge files when there are more than ``max_files``.

        :param union: Used instead of the index's own, to leave something out.
        :param rewrite: Tells which contents go through ``union`` in any case.
        :return: The contents of the files that there are then.
        :raises PermissionError: access is denied; not for a merge that fails, which is only logged.
        :raises ConnectionError: the storage can't be reached; likewise.
        """
        union = union or self._union
        files = self._read()
        if rewrite is not None:
            for name, file in list(files.items()):
                if rewrite(file.content):
                    del files[name]
                    files.update(self._replace({name: file}, union))
        if len(files) > max_files:
            files = self._merge_similar(files, union)
        return [file.content for file in files.values()]

    def _merge_similar(
        self, files: Mapping[str, _File[T]], union: Callable[[Sequence[T]], T]
    ) -> dict[str, _File[T]]:
        left = dict(files)
        try:
            for names in similar({name: file.size for name, file in files.items()}):
                merged = self._replace({name: files[name] for name in names}, union)
                for name in names:
                    del left[name]
                left.update(merged)
        except (VLMError, OSError) as error:
            log.warning(
                "The files of %s could not be merged, which only costs time: %s",
                self._root + self._folder,
                error,
            )
        return left

    def _replace(
        self, files: Mapping[str, _File[T]], union: Callable[[Sequence[T]], T]
    ) -> dict[str, _File[T]]:
        """Create one file of several, and delete these."""
        # Where deleting is denied, merging would only add to the files: better to know it before.
        self._files.delete(f"{self._folder}/nothing")
        content = union([file.content for file in files.values()])
        # A time of its own would make every merger's file another; and in order, it is listed after those merged.
        latest = max(int(match["time"]) for match in map(self._match, files) if match)
        created = self._create(content, latest + 1) if len(content) else {}
        self._in_parallel(self._files.delete, files)
        return created

    def _create(self, content: T, when: int) -> dict[str, _File[T]]:
        data = self._encode(content)
        name = f"{self._folder}/{when:020d}-{_hash(data)}{self._suffix}"
        with self._files.create(name) as stream:
            stream.write(data)
        return {name: _File(len(data), content)}

    def _read(self) -> dict[str, _File[T]]:
        tried: set[str] = set()
        sound: dict[str, _File[T]] = {}
        while listed := {
            info.name: info.size for info in self._files.list(self._folder) if info.name not in tried
        }:
            tried.update(listed)
            fresh = [name for name, size in listed.items() if self._is_readable(name, size)]
            read = self._in_parallel(self._read_one, fresh)
            sound.update((name, file) for name, file in zip(fresh, read, strict=True) if file is not None)
        return sound

    def _read_one(self, name: str) -> _File[T] | None:
        try:
            data = self._files.read(name, max_bytes=MAX_FILE_BYTES)
        except FileNotFoundError:
            return None
        except OSError as error:
            # Of the package's own errors, that which is an OSError too says that it went while it was read. All others
            # are the storage's, which does not mean that nothing is known.
            if isinstance(error, VLMError):
                return None
            raise
        try:
            match = self._match(name)
            if match is None or match["hash"] != _hash(data):
                raise ValueError("its content does not fit its name")
            return _File(len(data), self._decode(data))
        except (ValueError, KeyError, TypeError) as error:
            log.warning("%s%s is left out of the index: %s", self._root, name, error)
            return None

    def _is_readable(self, name: str, size: int) -> bool:
        if size > MAX_FILE_BYTES:
            log.warning(
                "%s%s is left out of the index: it has %d bytes, which no file of it has",
                self._root,
                name,
                size,
            )
        return size <= MAX_FILE_BYTES

    def _match(self, name: str) -> re.Match[str] | None:
        return _NAME.fullmatch(name.removeprefix(f"{self._folder}/"))

    def _in_parallel(self, function: Callable[[str], Any], names: Iterable[str]) -> list[Any]:
        with ThreadPoolExecutor(THREADS, thread_name_prefix="vlm-index") as threads:
            return list(threads.map(function, names))

    @property
    def _root(self) -> str:
        return getattr(self._files, "uri", "")


def similar(sizes: Mapping[str, int]) -> list[list[str]]:
    """Group names by size, such that it pays to merge each group; what had better stay alone is in none."""
    groups: list[list[str]] = [[]]
    total = 0
    for size, name in sorted((size, name) for name, size in sizes.items()):
        if total and (size > SIMILAR * total or total + size > MAX_MERGED_BYTES):
            groups.append([])
            total = 0
        groups[-1].append(name)
        total += size
    return [group for group in groups if len(group) > 1]


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:32]
