"""Where media may come from: what a reference in a dataset means, and whether it stays below the allowed roots.

A dataset is data from somewhere else; its references must not reach what its author could not. Roots are the word
of the DAG's author:

==================================  ==========================================================================
root                                allows
==================================  ==========================================================================
``s3://bucket/prefix/``             the objects below the prefix, up to the slash: not ``s3://bucket/prefix2/``
``gs://bucket/prefix/``             the same, and so for every scheme that a store can have
``/data/pics`` or ``file:///...``   the files below the folder; symbolic links only to within the roots
``https://host/path/``              URLs below the path on this very host and port, also at a private address
``https://`` or ``http://``         URLs of any host at a public address
==================================  ==========================================================================

Loopback is reached only by a root that spells it (``localhost``, ``127.0.0.1``), link-local addresses by none.

References are taken literally, as stores take names: a ``%`` in a path or an S3 key stands for itself. In a
``file://`` URI it may stand for itself or encode; both readings have to stay below the roots. ``..`` is resolved
before anything is looked up and may lead to anywhere below the roots.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import unquote

from airflow_vlm_provider.errors import ConfigError, SampleError
from airflow_vlm_provider.shards.addresses import Reach, address_refusal, parse_address
from airflow_vlm_provider.shards.http_urls import HttpUrl, parse_url
from airflow_vlm_provider.shards.stores import is_same_authority, split_uri

MAX_REFERENCE_CHARS = 8192
_SHOWN_CHARS = 200
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):(//)?")


@dataclass(frozen=True, slots=True)
class StoredMedia:
    """An object or a file.

    :param root: URI of the root's store, with a trailing slash.
    :param name: Name below the root.
    """

    root: str
    name: str

    def __str__(self) -> str:
        return self.root + self.name


@dataclass(frozen=True, slots=True)
class _StoreRoot:
    """``prefixes`` are what a path must begin with: the root as written and, if links lead there, as it really is.

    ``authority`` is the bucket, behind the connection if the root names one.
    """

    uri: str
    scheme: str
    authority: str
    prefixes: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _HttpRoot:
    """``url`` is None for an open root: any host of the scheme."""

    scheme: str
    url: HttpUrl | None
    reach: Reach


class MediaRoots:
    """The places below which media references may resolve.

    :param roots: See the module's table.
    :raises ConfigError: a root is malformed, or leads to a link-local address.
    """

    def __init__(self, roots: Sequence[str]) -> None:
        self._stores: list[_StoreRoot] = []
        self._http: list[_HttpRoot] = []
        for root in roots:
            if re.match("https?://", root, re.IGNORECASE):
                self._http.append(_http_root(root))
            else:
                self._stores.append(_store_root(root))
        # A reference to a store without a root is outside; one of another scheme is not understood at all.
        self._schemes = {"s3", "file", *(root.scheme for root in self._stores)}
        # A root that names a host says more about it than one that allows any.
        self._http.sort(key=lambda root: root.url is None)
        self._shown = ", ".join(shown(root) for root in roots[:3]) + (", ..." if len(roots) > 3 else "")

    @property
    def store_uris(self) -> list[str]:
        """The roots that are stores, normalised."""
        return [root.uri for root in self._stores]

    @property
    def allow_http(self) -> bool:
        return bool(self._http)

    def places(self, ref: str, *, source: str, folder: str = "") -> list[StoredMedia | HttpUrl]:
        """
        Say where a reference may be found, in the order in which to look.

        A relative reference is looked for beside the shard, then in the folder of the same name below each root (a
        shard that one step wrote elsewhere keeps its name, and its images stay where they were), then below each
        root itself.

        :param ref: The reference as it stands in the row.
        :param source: URI of where the shards are, with a trailing slash.
        :param folder: The shard's folder below the source, without slashes at its ends; empty for the source itself.
        :raises SampleError: ``media_refused``: it is malformed or leads out of every root.
        """
        _check(ref)
        scheme = _SCHEME.match(ref)
        if scheme is None:
            found = (
                self._relative(ref, source, folder)
                if not ref.startswith("/")
                else [self._stored("file", "", ref)]
            )
        elif scheme[1].lower() in ("http", "https") and scheme[2]:
            url = parse_url(ref)
            self.reach(url)
            return [url]
        elif scheme[2] and scheme[1].lower() in self._schemes:
            found = self._absolute(scheme[1].lower(), ref[scheme.end() :])
        else:
            raise SampleError(
                "media_refused",
                f"{shown(ref)} is refused: of schemes, only s3://, file://, https://, http:// and those of the "
                "media_roots are read. "
                "If this is a file's name with a colon in it, write ./ before it.",
            )
        if found and None not in found:
            return [place for place in found if place is not None]
        raise self._outside(shown(ref))

    def reach(self, url: HttpUrl) -> Reach:
        """
        Say how near a URL may come.

        :raises SampleError: ``media_refused``: no root allows it.
        """
        for root in self._http:
            if root.scheme == url.scheme if root.url is None else _is_below(url, root.url):
                return root.reach
        raise self._outside(shown(str(url)))

    def behind_link(self, place: StoredMedia) -> StoredMedia | None:
        """Return the same file below another root, when a symbolic link leads out of one root into another."""
        if not place.root.startswith("file://"):
            return None
        real = os.path.realpath(str(place).removeprefix("file://"))
        target = self._stored("file", "", real)
        return None if target is None or target == place else target

    def _relative(self, ref: str, source: str, folder: str) -> list[StoredMedia | HttpUrl | None]:
        places: dict[StoredMedia | HttpUrl, None] = {}
        below = f"{folder}/{ref}" if folder else ref
        looks = [
            (source, below),
            *((uri, below) for uri in self.store_uris),
            *((uri, ref) for uri in self.store_uris),
        ]
        for uri, name in looks:
            scheme, authority, path = split_uri(uri)
            place = self._stored(scheme, authority, f"{path.removesuffix('/')}/{name}" if path else name)
            if place is not None:
                places[place] = None
        for base in (root.url for root in self._http if root.url is not None):
            # A name that a store can have and a URL can't is no reason not to look in the stores.
            with contextlib.suppress(SampleError):
                url = parse_url(f"{base}{ref}")
                if _is_below(url, base):
                    places[url] = None
        return list(places)

    def _absolute(self, scheme: str, rest: str) -> list[StoredMedia | HttpUrl | None]:
        authority, slash, path = rest.partition("/")
        if scheme != "file":
            # Which connection is used is not for a dataset to say; nor has it to spell out passwords.
            if "@" in authority and authority not in {root.authority for root in self._stores}:
                return []
            return [self._stored(scheme, authority, path)]
        if authority.lower() not in ("", "localhost") or not slash:
            return []
        decoded = unquote(path)
        _check(decoded)
        return [self._stored("file", "", "/" + reading) for reading in dict.fromkeys((path, decoded))]

    def _stored(self, scheme: str, authority: str, path: str) -> StoredMedia | None:
        resolved = _without_dots(path, keep_empty=scheme != "file")
        if resolved is None:
            return None
        for root, prefix in self._prefixes():
            same = root.scheme == scheme and is_same_authority(root.authority, authority)
            if same and resolved.startswith(prefix):
                name = resolved.removeprefix(prefix)
                return StoredMedia(root.uri, name) if name else None
        return None

    def _prefixes(self) -> Iterator[tuple[_StoreRoot, str]]:
        for root in self._stores:
            for prefix in root.prefixes:
                yield root, prefix

    def _outside(self, what: str) -> SampleError:
        return SampleError(
            "media_refused",
            f"{what} is not below any allowed root ({self._shown}). "
            "If the dataset may read it, add its folder, prefix or host to media_roots.",
        )


def shown(ref: str) -> str:
    """Quote a reference for a message, without what may be a secret: user, password and query of a URL."""
    text = ref[: _SHOWN_CHARS * 2]
    if "://" in text:
        text = re.sub(r"(?<=://)[^/?#]*@", "***@", text)
        if not text.lower().startswith(("s3:", "file:")):
            text = re.sub(r"[?#].*", "?...", text, flags=re.DOTALL)
    return repr(text if len(text) <= _SHOWN_CHARS else text[:_SHOWN_CHARS] + "...")


def _check(ref: str) -> None:
    if not ref.strip():
        raise SampleError("media_refused", "The reference is empty; it must name a file, an object or a URL.")
    if len(ref) > MAX_REFERENCE_CHARS:
        raise SampleError(
            "media_refused",
            f"The reference has {len(ref)} characters; at most {MAX_REFERENCE_CHARS} are read. "
            f"It begins with {shown(ref[:40])}: it must name a picture, not hold one.",
        )
    if "\0" in ref or "\\" in ref:
        raise SampleError(
            "media_refused", f"{shown(ref)} is refused: it has a NUL or a backslash; write '/'."
        )


def _without_dots(path: str, *, keep_empty: bool) -> str | None:
    """
    Resolve ``.`` and ``..`` without looking at any file.

    :param keep_empty: An empty component is part of an object's key, but means nothing in a file's path.
    :return: The path without a leading slash; None when it leads above its own top.
    """
    parts: list[str] = []
    for part in path.split("/"):
        if part == "..":
            if not parts:
                return None
            parts.pop()
        elif part != "." and (part or keep_empty):
            parts.append(part)
    return "/".join(parts)


def _store_root(root: str) -> _StoreRoot:
    scheme, authority, path = split_uri(root)
    if scheme != "file":
        prefix = path.rstrip("/") + "/" if path.rstrip("/") else ""
        return _StoreRoot(f"{scheme}://{authority}/{prefix}", scheme, authority, (prefix,))
    # A leading slash less, to compare with what _without_dots returns.
    prefixes = [f"{folder.strip('/')}/".removeprefix("/") for folder in (path, os.path.realpath(path))]
    return _StoreRoot(f"file:///{prefixes[0]}", scheme, authority, tuple(dict.fromkeys(prefixes)))


def _http_root(root: str) -> _HttpRoot:
    scheme = root.partition(":")[0].lower()
    if root.partition("://")[2] == "":
        return _HttpRoot(scheme, None, "public")
    try:
        url = parse_url(root if root.endswith("/") else root + "/")
    except SampleError as error:
        raise ConfigError(f"media_roots: {shown(root)}: {error.message}") from error
    if url.query:
        raise ConfigError(f"media_roots: {shown(root)} has a query; give a root that ends with a path.")
    address = parse_address(url.host)
    if address is None:
        return _HttpRoot(scheme, url, "loopback" if url.host == "localhost" else "private")
    refusal = address_refusal(str(address), "loopback")
    if refusal is not None:
        raise ConfigError(f"media_roots: {shown(root)} is never read: its address is {refusal}. Remove it.")
    return _HttpRoot(scheme, url, "loopback" if address.is_loopback else "private")


def _is_below(url: HttpUrl, root: HttpUrl) -> bool:
    return (url.scheme, url.host, url.port) == (root.scheme, root.host, root.port) and url.path.startswith(
        root.path
    )
