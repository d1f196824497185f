"""Videos of episodes as MP4 files for browsers: frames with the instruction below them.

Needs the extra `data` (PyAV, Pillow).
"""

import os
import pathlib
import re
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from vla_jax.files import replacing

HOLD = 8  # repetitions of the last frame, labelled with the result
_BAR, _INK, _FAINT = (24, 26, 31), (245, 246, 248), (166, 172, 184)
# Blue and vermilion: colour-blind safe (Okabe and Ito 2008).
_VERDICTS = {True: ("success", (0, 114, 178)), False: ("failure", (213, 94, 0))}


def file_name(seed: int, task: str, success: bool) -> str:
    """Returns the name of an episode's video: `<seed>_<task>_<success|failure>.mp4`."""
    plain = re.sub(r"\W+", "-", task).strip("-") or "episode"
    return f"{seed}_{plain}_{_VERDICTS[success][0]}.mp4"


def caption(
    frames: Sequence[np.ndarray], lines: Sequence[str], success: bool | None = None
) -> list[np.ndarray]:
    """Returns the frames with a bar of text below, and the result at the end.

    Args:
      frames: images `[h, w, 3]` uint8 of one size, at least one.
      lines: text; the first line in large type, the others in small type; long lines are wrapped.
      success: result of the episode; adds `HOLD` frames labelled with it. None adds no frames.

    Returns:
      Frames `[h + bar, w, 3]` uint8.
    """
    bar = _bar(frames[0].shape[1], lines)
    captioned = [np.concatenate([frame, bar]) for frame in frames]
    if success is None:
        return captioned
    return captioned + [np.concatenate([_judged(frames[-1], success), bar])] * HOLD


def write_mp4(path: str | os.PathLike[str], frames: Sequence[np.ndarray], fps: float) -> None:
    """Writes a video (H.264, yuv420p, index at the front) atomically.

    Args:
      path: file to write; its folder is created if missing.
      frames: images `[h, w, 3]` uint8 of one size; odd sizes are padded by one pixel.
      fps: frames per second.

    Raises:
      ValueError: no frames.
      ImportError: PyAV is missing.
    """
    if not len(frames):
        raise ValueError(f"frames of {path} must be at least one frame, got none.")
    av, path = _import_av(), pathlib.Path(path)
    options = {"movflags": "+faststart"}
    with (
        replacing(path) as part,
        av.open(str(part), "w", format="mp4", options=options) as container,
    ):
        stream: Any = container.add_stream("libx264", Fraction(fps).limit_denominator(1000))
        stream.height, stream.width = (size + size % 2 for size in frames[0].shape[:2])
        stream.pix_fmt = "yuv420p"
        # Without "mbtree", whose assembly gives other bytes for the same frames in some runs.
        stream.options = {"crf": "20", "preset": "veryfast", "mbtree": "0"}
        for frame in frames:
            video_frame = av.VideoFrame.from_ndarray(_even(frame), format="rgb24")
            container.mux(stream.encode(video_frame))
        container.mux(stream.encode(None))


def check_packages() -> None:
    """Checks that the packages for videos are installed, before any episode runs.

    Raises:
      ImportError: PyAV or Pillow is missing; the message names the extra.
    """
    _import_av()
    _import_pillow()


def _even(frame: np.ndarray) -> np.ndarray:
    """Returns the frame padded to even sizes, which yuv420p needs."""
    height, width = frame.shape[:2]
    return np.ascontiguousarray(np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), "edge"))


def _judged(frame: np.ndarray, success: bool) -> np.ndarray:
    """Returns the frame with a coloured border and the result in its corner."""
    image_module, draw_module, font_module = _import_pillow()
    word, colour = _VERDICTS[success]
    image = image_module.fromarray(frame)
    draw, font = draw_module.Draw(image), font_module.load_default(_text_size(image.width))
    border, margin = max(2, image.width // 64), image.width // 32
    draw.rectangle((0, 0, image.width - 1, image.height - 1), outline=colour, width=border)
    right, bottom = font.getlength(word) + 2 * margin, _text_size(image.width) + 2 * margin
    draw.rectangle((0, 0, right, bottom), fill=colour)
    draw.text((margin, bottom / 2), word, fill=_INK, font=font, anchor="lm")
    return np.asarray(image)


def _bar(width: int, lines: Sequence[str]) -> np.ndarray:
    """Returns text on a dark background `[bar, w, 3]`, of the height it needs."""
    image_module, draw_module, font_module = _import_pillow()
    size, margin = _text_size(width), width // 32
    fonts = [font_module.load_default(s) for s in (size, max(8, round(0.72 * size)))]
    rows = [
        (row, fonts[i > 0], _FAINT if i else _INK)
        for i, line in enumerate(lines)
        for row in _wrap(line, fonts[i > 0], width - 2 * margin)
    ]
    heights = [round(1.3 * font.size) for _, font, _ in rows]
    image = image_module.new("RGB", (width, sum(heights) + 2 * margin), _BAR)
    draw, y = draw_module.Draw(image), margin
    for (row, font, ink), height in zip(rows, heights, strict=True):
        draw.text((margin, y), row, fill=ink, font=font)
        y += height
    return np.asarray(image)


def _text_size(width: int) -> int:
    return max(10, width // 18)


def _wrap(line: str, font: Any, width: int) -> list[str]:
    rows = [""]
    for word in line.split():
        longer = f"{rows[-1]} {word}".strip()
        if rows[-1] and font.getlength(longer) > width:
            rows.append(word)
        else:
            rows[-1] = longer
    return rows


def _import_av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError(
            "videos need PyAV; run pip install 'vla-jax[data]', or use --num-videos 0."
        ) from error
    return av


def _import_pillow() -> Any:
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError as error:
        raise ImportError(
            "videos need Pillow; run pip install 'vla-jax[data]', or use --num-videos 0."
        ) from error
    return Image, ImageDraw, ImageFont
