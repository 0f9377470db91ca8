"""Moving drawings: the same seed gives the same frames, and the shape does what the caption says."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from PIL import Image

from demo.drawings import BACKGROUNDS, COLOURS, SHAPES, SIZES
from demo.moving import MovingDrawing, decode, draw_moving

# y points down.
CHANGES = {
    "moves left": (-1, 0),
    "moves right": (1, 0),
    "moves up": (0, -1),
    "moves down": (0, 1),
    "stays still": (0, 0),
}


def box(frame: Image.Image, drawing: MovingDrawing) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what is nearer to the shape's colour than to the background's."""
    pixels = np.asarray(frame, dtype=float)
    far = [
        ((pixels - names[name]) ** 2).sum(axis=2)
        for names, name in ((COLOURS, drawing.colour), (BACKGROUNDS, drawing.background))
    ]
    found = Image.fromarray(far[0] < far[1]).getbbox()
    assert found is not None
    return found


def moves(drawing: MovingDrawing, frames: list[Image.Image]) -> set[tuple[int, int]]:
    """The signs of the changes of x and y, from frame to frame; a pixel of noise or rounding is no change."""
    corners = [box(frame, drawing)[:2] for frame in frames]

    def sign(change: int) -> int:
        return (change > 1) - (change < -1)

    return {(sign(x1 - x0), sign(y1 - y0)) for (x0, y0), (x1, y1) in itertools.pairwise(corners)}


def test_the_caption_says_what_was_asked_for():
    drawing = draw_moving(
        random.Random(1), colour="red", shape="circle", size="small", background="white", motion="moves left"
    )

    assert drawing.caption == "A small red circle moves left on a white background."


def test_the_same_seed_gives_the_same_frames_and_the_same_file():
    def drawn(seed: int) -> tuple[list[bytes], bytes]:
        drawing = draw_moving(random.Random(seed), side=96, seconds=1)
        return [frame.tobytes() for frame in drawing.frames], drawing.encode()

    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)


def test_everything_is_drawn_by_lot_when_nothing_is_given():
    rng = random.Random(0)
    drawings = [draw_moving(rng, seconds=1, fps=1) for _ in range(300)]

    assert {d.colour for d in drawings} == set(COLOURS)
    assert {d.shape for d in drawings} == set(SHAPES)
    assert {d.size for d in drawings} == set(SIZES)
    assert {d.background for d in drawings} == set(BACKGROUNDS)
    assert {d.motion for d in drawings} == set(CHANGES)
    assert {d.frames[0].width > d.frames[0].height for d in drawings} == {True, False}
    assert all(side % 2 == 0 for d in drawings for side in d.frames[0].size)


@pytest.mark.parametrize("motion", CHANGES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("seed", range(3))
def test_the_shape_moves_as_the_caption_says_in_every_frame(motion, size, seed):
    drawing = draw_moving(
        random.Random(seed),
        colour="blue",
        background="white",
        shape="square",
        motion=motion,
        size=size,
        side=160,
        fps=2,
    )

    assert moves(drawing, list(drawing.frames)) == {CHANGES[motion]}


@pytest.mark.parametrize("motion", CHANGES)
def test_the_shape_is_wholly_there_in_every_frame(motion):
    for seed in range(8):
        drawing = draw_moving(
            random.Random(seed), colour="blue", background="white", shape="square", motion=motion, fps=2
        )
        boxes = [box(frame, drawing) for frame in drawing.frames]
        widths = [right - left for left, _, right, _ in boxes]
        heights = [bottom - top for _, top, _, bottom in boxes]
        assert max(widths + heights) - min(widths + heights) <= 1


def test_a_still_shape_gives_equal_frames():
    drawing = draw_moving(random.Random(2), motion="stays still", side=96)

    assert len({frame.tobytes() for frame in drawing.frames}) == 1


@pytest.mark.parametrize(("seconds", "fps", "frames"), [(4.0, 8.0, 32), (2.5, 2.0, 5), (0.1, 1.0, 1)])
def test_it_lasts_as_long_as_was_asked_for(seconds, fps, frames):
    drawing = draw_moving(random.Random(0), side=96, seconds=seconds, fps=fps)

    assert (len(drawing.frames), drawing.fps) == (frames, fps)


def test_sampling_takes_frames_at_even_distances_from_the_first_on():
    drawing = draw_moving(random.Random(0), motion="moves left", side=160, seconds=4, fps=8)
    sampled = drawing.sampled(2)

    assert (sampled.frames, sampled.fps) == (drawing.frames[::4], 2)
    assert sampled.caption == drawing.caption


@pytest.mark.parametrize("motion", CHANGES)
def test_an_encoded_drawing_keeps_its_frames_its_rate_and_its_motion(motion, tmp_path):
    import av

    drawing = draw_moving(
        random.Random(9), colour="blue", background="white", shape="square", motion=motion, fps=2
    )
    data = drawing.encode()
    (tmp_path / "a.mp4").write_bytes(data)

    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.pix_fmt, stream.average_rate) == ("h264", "yuv420p", 2)
        assert stream.frames == len(drawing.frames) == 8
        assert container.duration / av.time_base == pytest.approx(4.0)
    frames = decode(data)
    assert {frame.size for frame in frames} == {drawing.frames[0].size}
    assert moves(drawing, frames) == {CHANGES[motion]}


def test_more_loss_gives_smaller_files():
    drawing = draw_moving(random.Random(3), fps=2)

    assert len(drawing.encode(crf=35)) < len(drawing.encode(crf=10))


@pytest.mark.parametrize(
    "wrong",
    [{"colour": "mauve"}, {"shape": "blob"}, {"size": "huge"}, {"background": "sky"}, {"motion": "hops"}],
)
def test_unknown_attribute_is_refused(wrong):
    with pytest.raises(KeyError, match=next(iter(wrong.values()))):
        draw_moving(random.Random(0), **wrong)
