"""Media that lie in a Parquet file's columns, and the references that stand for them in rows.

A column embeds media when it holds bytes, or Hugging Face's ``struct<bytes, path>``, or lists of either. Where a
struct has a path and no bytes, the path refers to a medium outside. Whether bytes are a picture does not matter here:
a reference that nobody looks up costs nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import TYPE_CHECKING, Any

from airflow_vlm_provider.errors import SampleError
from airflow_vlm_provider.shards.arrow_types import is_bytes, is_list, is_text
from airflow_vlm_provider.shards.image_formats import image_format

if TYPE_CHECKING:
    import pyarrow as pa


@dataclass(frozen=True, slots=True)
class _Medium:
    """A medium in a column.

    :param data: Its bytes, an Arrow scalar; None when only a path was given.
    :param place: Tells it from the sample's others: the column and its place there.
    """

    data: Any
    path: str | None
    place: str

    def read(self) -> bytes:
        data: bytes = self.data.as_py()
        return data

    @property
    def size(self) -> int:
        return len(self.data.as_buffer())


class EmbeddedMedia(Mapping[str, bytes]):
    """The media of a sample by reference; their bytes are only copied out of Arrow's memory when they are asked for."""

    def __init__(self, media: dict[str, _Medium]) -> None:
        self._media = media

    def __getitem__(self, reference: str) -> bytes:
        return self._media[reference].read()

    def __contains__(self, reference: object) -> bool:
        return reference in self._media

    def __iter__(self) -> Iterator[str]:
        return iter(self._media)

    def __len__(self) -> int:
        return len(self._media)

    @property
    def size(self) -> int:
        """Bytes of all media together."""
        return sum(medium.size for medium in self._media.values())

    def restored(self, value: Any, kind: pa.DataType) -> Any:
        """
        Return what stands in a column for references, which a step may have put together anew.

        :raises ValueError: The column holds bytes alone, and a reference is none of this sample's.
        """
        if isinstance(value, list | tuple) and is_list(kind):
            return [self.restored(each, kind.value_type) for each in value]
        if not isinstance(value, str):
            return value
        medium = self._media.get(value)
        if not is_bytes(kind):
            return {
                "bytes": medium.data.as_py() if medium else None,
                "path": medium.path if medium else value,
            }
        if medium is None:
            raise ValueError(f"{value!r} names no medium of this sample, and the column holds media itself.")
        return medium.read()


def may_hold_media(kind: pa.DataType) -> bool:
    """Whether a column of the type holds media, or at least bytes."""
    return is_bytes(kind) or is_file_struct(kind) or (is_list(kind) and bool(may_hold_media(kind.value_type)))


def is_file_struct(kind: pa.DataType) -> bool:
    """Whether a type is Hugging Face's for images, audio and video: bytes, or a path, or both."""
    import pyarrow as pa

    if not pa.types.is_struct(kind) or kind.num_fields != 2:
        return False
    types = {kind.field(i).name: kind.field(i).type for i in range(2)}
    if types.keys() != {"bytes", "path"}:
        return False
    # Where no file is embedded at all, whoever wrote the table may not have known of what type the bytes would be.
    return (is_bytes(types["bytes"]) or pa.types.is_null(types["bytes"])) and is_text(types["path"])


def media_of(columns: Mapping[str, pa.Scalar]) -> tuple[dict[str, Any], EmbeddedMedia]:
    """
    Return a row's values for the columns that embed media, and the media.

    A medium is called by its path where no other of the sample has the same, else by its column and place there.
    """
    trees = {
        name: _tree(scalar, (f"{name}/{place}" for place in count())) for name, scalar in columns.items()
    }
    paths = Counter(medium.path for tree in trees.values() for medium in _media_in(tree) if medium.path)
    embedded: dict[str, _Medium] = {}

    def refer(tree: Any) -> Any:
        if isinstance(tree, list):
            return [refer(each) for each in tree]
        if tree is None or tree.data is None:
            return tree and tree.path
        reference: str = tree.path if paths[tree.path] == 1 else tree.place
        while reference in embedded or (reference != tree.path and paths[reference]):
            reference += "'"
        embedded[reference] = tree
        return reference

    return {name: refer(tree) for name, tree in trees.items()}, EmbeddedMedia(embedded)


def looks_like_media(data: bytes) -> bool:
    """Whether bytes begin like a picture, a video or another medium that is known by its beginning."""
    try:
        image_format(data)
    except SampleError as error:
        return error.kind == "media_unsupported"
    return True


def first_bytes(array: pa.Array) -> bytes | None:
    """The first value that is not null of a column of bytes, or of lists of such."""
    for scalar in array:
        for medium in _media_in(_tree(scalar, iter(lambda: "", None))):
            if medium.data is not None:
                return medium.read()
    return None


def _tree(scalar: pa.Scalar, places: Iterator[str]) -> Any:
    """A column's value as lists of media, in its own shape."""
    if is_list(scalar.type):
        return [_tree(each, places) for each in scalar.values] if scalar.is_valid else None
    place = next(places)
    if not scalar.is_valid:
        return None
    if is_bytes(scalar.type):
        return _Medium(scalar, None, place)
    data, path = scalar["bytes"], _text(scalar["path"])
    return _Medium(data if data.is_valid else None, path, place) if data.is_valid or path else None


def _text(scalar: pa.Scalar) -> str | None:
    try:
        return scalar.as_py() or None
    except UnicodeDecodeError:
        return None


def _media_in(tree: Any) -> Iterator[_Medium]:
    if isinstance(tree, list):
        for each in tree:
            yield from _media_in(each)
    elif tree is not None:
        yield tree
