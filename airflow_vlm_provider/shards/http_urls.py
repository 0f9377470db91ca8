"""HTTP URLs in one spelling, so that two that mean the same place look the same to a comparison."""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote, unquote, urlsplit

from airflow_vlm_provider.errors import SampleError

_PORTS = {"http": 80, "https": 443}
_HOST = re.compile(r"[a-z0-9_]([a-z0-9._-]*[a-z0-9_])?|[0-9a-f:.]+")
# What stands for itself in a path and a query; the percent sign too, for it may encode already.
_SAFE = "/%:@!$&'()*+,;=~-._?"
_MAX_DECODINGS = 4


@dataclass(frozen=True, slots=True)
class HttpUrl:
    """
    An absolute http or https URL without user, password and fragment.

    :param host: Lower case, ASCII, without the brackets of IPv6.
    :param path: From the first ``/`` on, percent-encoded, without ``.`` and ``..``.
    :param query: What follows the ``?``; empty when there is none.
    """

    scheme: str
    host: str
    port: int
    path: str
    query: str = ""

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def target(self) -> str:
        return f"{self.path}?{self.query}" if self.query else self.path

    def __str__(self) -> str:
        return f"{self.scheme}://{self.authority}{self.target}"


def parse_url(text: str) -> HttpUrl:
    """
    Read a URL, refusing what different readers take for different places.

    :raises SampleError: ``media_refused``
    """
    # urlsplit silently drops line ends and tabs, and browsers take a backslash for a slash.
    if "\\" in text or any(ord(character) < 32 or ord(character) == 127 for character in text):
        raise _refused("it has a backslash or a control character")
    try:
        parts = urlsplit(text)
        host, port = parts.hostname or "", parts.port
        if not host.isascii():
            host = host.encode("idna").decode("ascii").lower()
        path, query = quote(_normalised(parts.path), safe=_SAFE), quote(parts.query, safe=_SAFE)
    except ValueError as error:
        raise _refused(f"it can't be read ({error})") from error
    if parts.scheme not in _PORTS:
        raise _refused(f"its scheme is {parts.scheme!r}, not http or https")
    if "@" in parts.netloc:
        raise _refused("it holds a user name or a password")
    host = host.removesuffix(".")
    if not _HOST.fullmatch(host):
        raise _refused("its host is missing or malformed")
    return HttpUrl(parts.scheme, host, _PORTS[parts.scheme] if port is None else port, path, query)


def _normalised(path: str) -> str:
    segments: list[str] = []
    for segment in path.removeprefix("/").split("/"):
        if segment == "..":
            if not segments:
                raise ValueError("'..' leads above the host's root")
            segments.pop()
        elif segment != ".":
            if _hides_dots(segment):
                raise ValueError("it hides '..' or NUL behind an encoding")
            segments.append(segment)
    if path.rpartition("/")[2] in (".", ".."):
        segments.append("")
    return "/" + "/".join(segments)


def _hides_dots(segment: str) -> bool:
    """Tell whether a server that decodes once more, splits after decoding or drops ``;parameters`` sees '..'."""
    for _ in range(_MAX_DECODINGS):
        if "\0" in segment or ".." in (part.partition(";")[0] for part in re.split(r"[/\\]", segment)):
            return True
        decoded = unquote(segment)
        if decoded == segment:
            return False
        segment = decoded
    return True


def _refused(reason: str) -> SampleError:
    return SampleError("media_refused", f"The URL is refused: {reason}.")
