"""What fsspec's file systems say of their files, and what goes wrong with them, in the words of the stores' contract.

They have a common interface, but each has names of its own for when a file was changed and errors of its own.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from typing import Any

from airflow_vlm_provider.errors import VLMError
from airflow_vlm_provider.shards.stores import InvalidNameError, NotARegularFileError, ObjectInfo, StoreError

# What tells two versions of a file apart, the surest first. A file system has the same of them in every entry.
_VERSION_KEYS = ("etag", "ETag", "e_tag", "md5", "md5Hash", "generation", "version_id", "VersionId")
_TIME_KEYS = (
    "mtime",
    "LastModified",
    "last_modified",
    "modified",
    "updated",
    "modify",
    "modificationTime",
    # Last: elsewhere it stays when a file is written again. In memory, which has nothing else, it doesn't.
    "created",
)
# Seconds since 1970 reach this in the year 5138; what is more is milliseconds, as Hadoop counts.
_LATEST_S = 1e11
_CHARS = 500


def object_info(name: str, entry: Mapping[str, Any], uri: str) -> ObjectInfo:
    """
    Make the contract's entry of fsspec's.

    :param entry: What ``info`` or ``ls`` return of the file.
    :param uri: The file's URI, for messages.
    :raises IsADirectoryError: It is a directory's.
    :raises NotARegularFileError: It is that of a link, a device, ...; links could lead out of the root.
    :raises StoreError: It does not tell what it must.
    """
    if entry["type"] == "directory":
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), uri)
    if entry["type"] != "file" or entry.get("islink"):
        raise NotARegularFileError(f"{uri} is a link or a special file; only regular files are read.")
    version = next((entry[key] for key in _VERSION_KEYS if entry.get(key) is not None), None)
    modified = next((_seconds(entry[key]) for key in _TIME_KEYS if entry.get(key) is not None), 0.0)
    if (version is None and not modified) or entry.get("size") is None:
        raise StoreError(
            f"{uri}: its file system says neither an ETag nor a time, or no size, so that a changed file could not be "
            "told from an unchanged one. Keep data elsewhere."
        )
    size = int(entry["size"])
    # Azure's listing has the same ETag without the quotation marks.
    mark = repr(modified) if version is None else str(version).strip('"')
    return ObjectInfo(name=name, size=size, identity=f"{mark}-{size}", modified=modified)


def _seconds(value: Any) -> float:
    """Read a time in any of the forms in which file systems give one; 0.0 when it is none."""
    if isinstance(value, str):
        try:
            # Python 3.10 knows no "Z".
            value = float(value) if value.isdigit() else datetime.fromisoformat(value.replace("Z", "+00:00"))
        except ValueError:
            return 0.0
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=timezone.utc)).timestamp()
    if isinstance(value, int | float):
        return value / 1000 if value > _LATEST_S else float(value)
    return 0.0


@contextlib.contextmanager
def fsspec_errors(uri: str) -> Iterator[None]:
    """Raise what the contract of stores says in place of a file system's errors."""
    try:
        yield
    except (VLMError, FileNotFoundError, PermissionError, IsADirectoryError, ConnectionError):
        raise
    except NotADirectoryError as error:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), uri) from error
    except Exception as error:
        raise _contract_error(error, uri) from error


def _contract_error(error: Exception, uri: str) -> Exception:
    status = _status(error)
    # A URL's query may hold a signature that gives access.
    said = re.sub(r"\?[^\s'\"<>]+", "?...", f"{type(error).__name__}: {error}")[:_CHARS]
    if isinstance(error, OSError) and error.errno in (errno.ENAMETOOLONG, errno.ELOOP):
        return InvalidNameError(f"{uri} cannot be an object: {error.strerror}.")
    if status == 404:
        return FileNotFoundError(errno.ENOENT, "No such object", uri)
    if status in (401, 403):
        return PermissionError(
            errno.EACCES, f"Access is denied ({said}); check what the connection's identity may do", uri
        )
    if status == 429 or status >= 500 or isinstance(error, TimeoutError) or _is_about_connections(error):
        return ConnectionError(f"{uri}: the storage could not be reached: {said}")
    return StoreError(f"{uri}: {said}")


def _status(error: Exception) -> int:
    """The HTTP status that an error is about; 0 when it is about none."""
    for key in ("status", "status_code", "code"):
        value = getattr(error, key, None)
        if str(value).isdigit():
            return int(str(value))
    # Google's file system has no other form for it.
    return 403 if isinstance(error, OSError) and str(error).startswith("Forbidden") else 0


def _is_about_connections(error: Exception) -> bool:
    """
    Whether an error is a library's own class for a connection that failed.

    The libraries below file systems have nothing else in common than how they name these (aiohttp's ClientError and
    its kin, requests' ConnectionError, Azure's ServiceRequestError, paramiko's SSHException, asyncio's TimeoutError).
    """
    names = {each.__name__ for each in type(error).__mro__}
    return bool(
        names
        & {
            "ClientConnectionError",
            "ClientPayloadError",
            "ConnectionError",
            "ProxyError",
            "ServiceRequestError",
            "ServiceResponseError",
            "IncompleteReadError",
            "SSHException",
            "TransportError",
            "TimeoutError",
            "EOFError",
        }
    )
