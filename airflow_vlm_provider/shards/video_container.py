"""Opening a video: what is read as one, and how its errors are told apart.

Invariants:

- A file makes the decoder open nothing else, no file and no URL: playlists, concat scripts, session descriptions and
  the like are no videos here, whatever they are called. Only :data:`CONTAINERS` are read, by content.
- What is larger than :data:`~airflow_vlm_provider.shards.images.MAX_DECODED_PIXELS` is refused by its header.
- libav's own log stays off, as PyAV leaves it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from airflow_vlm_provider.errors import ConfigError, SampleError, TransientError
from airflow_vlm_provider.shards.image_formats import image_format
from airflow_vlm_provider.shards.images import MAX_DECODED_PIXELS
from airflow_vlm_provider.shards.stores import ObjectChangedError
from airflow_vlm_provider.shards.video_files import PositionReader, VideoFile

if TYPE_CHECKING:
    from av.container import InputContainer
    from av.video.codeccontext import VideoCodecContext
    from av.video.stream import VideoStream

# libav's names of containers that hold everything themselves. Not among them: hls, dash, concat, sdp, imf, image2 and
# all others that lead elsewhere, and raw streams, which have no times.
CONTAINERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,flv,ogg,asf,gif,apng"
_CONTAINERS_SHOWN = "MP4, MOV, MKV, WebM, AVI, MPEG-TS, MPEG, FLV, Ogg, WMV, GIF"
# Of every decoder, as pictures may be larger than the header says.
LIMITS = {"max_pixels": str(MAX_DECODED_PIXELS)}
# Bytes that libav asks for at once.
_BUFFER_BYTES = 128 * 1024
_FEW_BYTES = 64
_SHOWN_CHARS = 200
# More than any encoder of pictures takes.
_LONGEST_SIDE = 65_500


def import_av() -> Any:
    """
    Return PyAV.

    :raises ConfigError: it is not installed.
    """
    try:
        import av
    except ImportError as error:
        raise ConfigError(
            "Videos are decoded by PyAV, which is not installed. Install it on the workers: "
            "pip install 'airflow-provider-vlm[video]'"
        ) from error
    return av


@contextlib.contextmanager
def open_video(file: VideoFile) -> Iterator[tuple[InputContainer, VideoStream]]:
    """
    Open a video and choose what is looked at: the main video stream, never a cover picture.

    Errors of libav, in the body too, become the sample's; those of the file do not.

    :raises SampleError: ``media_corrupt``, ``media_unsupported`` or ``media_too_large``.
    :raises TransientError: the file was written to since it was hashed, or could not be read.
    :raises ConfigError: PyAV is not installed.
    """
    av = import_av()
    reader = file.reader()
    try:
        container = _open(av, file, reader, **LIMITS)
        try:
            with _libav_errors(av, reader):
                stream = _main_stream(container)
                _check_header(av, file, stream.codec_context)
                stream.codec_context.options = dict(LIMITS)
                yield container, stream
                if reader.failed is not None:
                    # libav may have taken it for the end.
                    raise reader.failed
        finally:
            container.close()
    except SampleError:
        # Perhaps only because it was written to.
        _check(file)
        raise
    except ObjectChangedError as error:
        raise TransientError(str(error)) from error
    _check(file)


def _check(file: VideoFile) -> None:
    try:
        file.check()
    except ObjectChangedError as error:
        raise TransientError(str(error)) from error


def seconds(time: int | None, base: Fraction | None) -> float | None:
    """Return a time of a stream in seconds; None when it has none."""
    return None if time is None or base is None else float(time * base)


def _open(av: Any, file: VideoFile, reader: PositionReader, **options: str) -> InputContainer:
    with _libav_errors(av, reader):
        try:
            container: InputContainer = av.open(
                reader,
                mode="r",
                buffer_size=_BUFFER_BYTES,
                # Damaged titles are no reason to refuse pictures.
                metadata_errors="replace",
                # Three locks, as each leaves something open to some demuxer that the others don't.
                options={"format_whitelist": CONTAINERS, "protocol_whitelist": "none", **options},
                io_open=_refuse_to_open,
            )
        except (av.error.InvalidDataError, av.error.ArgumentError) as error:
            if reader.failed is None:
                raise _no_video(av, file, error) from error
            raise
    return container


def _refuse_to_open(url: str, _flags: int, _options: dict[str, str]) -> Any:
    raise SampleError(
        "media_refused", f"The video refers to another file, {url[:_SHOWN_CHARS]!r}, which is not read."
    )


def _check_header(av: Any, file: VideoFile, codec: VideoCodecContext) -> None:
    """Refuse a video whose header says that it is too large."""
    check_size(codec.width, codec.height)
    if codec.width and codec.height:
        return
    # What is beyond the limit is not told. Without the limit, nothing must be decoded to find it out.
    container = _open(av, file, file.reader(), skip_frame="all")
    try:
        codec = _main_stream(container).codec_context
        check_size(codec.width, codec.height)
    finally:
        container.close()
    raise SampleError(
        "media_corrupt", "The video does not say how large it is, or more than any decoder takes."
    )


def _main_stream(container: InputContainer) -> VideoStream:
    streams = [stream for stream in container.streams.video if not _is_cover(stream)]
    if not streams:
        raise SampleError("media_unsupported", "The file has no pictures, only sound or the like.")
    best = container.streams.best("video")
    stream = next((each for each in streams if best is not None and each.index == best.index), streams[0])
    if stream.codec_context is None:
        raise SampleError(
            "media_unsupported",
            "The video's codec is unknown to the decoder; convert it to H.264, for example.",
        )
    return stream


def _is_cover(stream: VideoStream) -> bool:
    return bool(stream.disposition & type(stream.disposition).attached_pic)


def check_size(width: int, height: int) -> None:
    """
    Refuse what would take too much memory.

    :raises SampleError: ``media_too_large``
    """
    if width * height > MAX_DECODED_PIXELS or max(width, height) > _LONGEST_SIDE:
        raise SampleError(
            "media_too_large",
            f"The video has {width} x {height} pixels; at most {MAX_DECODED_PIXELS:,} are decoded, and "
            f"{_LONGEST_SIDE:,} on a side. Shrink it first.",
        )


@contextlib.contextmanager
def _libav_errors(av: Any, reader: PositionReader) -> Iterator[None]:
    """Tell what is the video's fault from what is not."""
    try:
        yield
    except MemoryError as error:
        raise SampleError("media_too_large", "The video is too large to decode: out of memory.") from error
    except ObjectChangedError:
        raise
    except (av.error.FFmpegError, OSError) as error:
        if reader.failed is not None:
            raise TransientError(f"The video could not be read this time: {reader.failed}") from error
        if not isinstance(error, av.error.FFmpegError):
            raise
        if isinstance(
            error, (LookupError, NotImplementedError, av.error.LookupError, av.error.PatchWelcomeError)
        ):
            raise SampleError(
                "media_unsupported", f"The video can't be decoded here: {_reason(error)}."
            ) from error
        raise SampleError("media_corrupt", f"The video can't be decoded: {_reason(error)}.") from error


def _no_video(av: Any, file: VideoFile, error: Exception) -> SampleError:
    """Say what a file is that libav did not open."""
    if not file.size:
        return SampleError("media_corrupt", "The video's file is empty.")
    start = file.read(_FEW_BYTES, 0)
    if isinstance(error, av.error.ArgumentError):
        # The answer to a container that is known, but not among those that are allowed.
        with contextlib.suppress(SampleError):
            picture = image_format(start)
            return SampleError("media_unsupported", f"The file is no video, but a picture: {picture}.")
        return SampleError(
            "media_unsupported", f"The file is no video of a kind that is read: {_CONTAINERS_SHOWN}."
        )
    if start[4:8] == b"ftyp":
        return SampleError(
            "media_corrupt", "The video can't be opened: its index is missing, as if it were cut short."
        )
    return SampleError("media_corrupt", "The file is no video, or its beginning is damaged.")


def _reason(error: Exception) -> str:
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__)[:200]
