"""Language annotations and play episodes of one part of a CALVIN data set."""

import pathlib
from typing import Any, NamedTuple

import numpy as np

from vla_jax.data.readers.calvin import pickled_data
from vla_jax.data.readers.calvin.npz_frames import read_npy, to_array

ANNOTATIONS = "auto_lang_ann.npy"
PLAY = "ep_start_end_ids.npy"
MAX_BYTES = 2**30  # the annotations of ABCD have 40 MB
MAX_FRAME = 10**9
MAX_LENGTH = 10**6  # frames of one episode


class Spans(NamedTuple):
    """Episodes of one part of a data set."""

    name: str  # "segment" or "play"
    file: pathlib.Path  # where they are listed
    frames: np.ndarray  # [E, 2] int64, first and last frame
    instructions: tuple[str, ...]  # E texts


def annotation_file(folder: pathlib.Path) -> pathlib.Path | None:
    """Returns the file with the language annotations of a part; None if there is none.

    It is in `lang_annotations`, in the part's folder itself, or in another `lang_…` folder, whose
    name is that of a language model.
    """
    others = sorted(path for path in folder.glob("lang_*") if path.is_dir())
    for place in (folder / "lang_annotations", folder, *others):
        if (place / ANNOTATIONS).is_file():
            return place / ANNOTATIONS
    return None


def read_segments(file: pathlib.Path) -> Spans:
    """Returns the language segments, in the order of the annotations.

    The file is a pickle; nothing in it is executed (`pickled_data`).

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged, refers to anything but NumPy, or lacks a part.
    """
    kind, data = read_npy(file, MAX_BYTES)
    try:
        if kind.dtype != object:
            raise ValueError(f"expected a pickled dict, got an array of {kind.dtype}")
        (content,) = pickled_data.items(pickled_data.load(data))
        texts = pickled_data.items(_entry(content, "language", "ann"))
        spans = [pickled_data.items(s) for s in pickled_data.items(_entry(content, "info", "indx"))]
    except ValueError as error:
        raise ValueError(
            f"{file} must hold CALVIN's language annotations ({error}); restore the file."
        ) from error
    if len(texts) != len(spans):
        raise ValueError(
            f"{file}: language.ann and info.indx must have one entry per segment, got {len(texts)} "
            f"and {len(spans)}; restore the file."
        )
    texts = [_text(file, number, text) for number, text in enumerate(texts)]
    return Spans("segment", file, _check(file, "info.indx", spans), tuple(texts))


def read_play(file: pathlib.Path) -> Spans:
    """Returns the play episodes, in the order of the file, with empty instructions.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is damaged.
    """
    kind, data = read_npy(file, MAX_BYTES)
    try:
        rows = to_array(data, kind)
        if rows.ndim != 2 or rows.shape[1] != 2 or rows.dtype.kind not in "iu":
            raise ValueError(f"expected integers [N, 2], got {rows.dtype} {rows.shape}")
    except ValueError as error:
        raise ValueError(
            f"{file} must list first and last frames ({error}); restore it."
        ) from error
    return Spans("play", file, _check(file, "rows", rows.tolist()), ("",) * len(rows))


def _entry(content: Any, *keys: str) -> Any:
    for number, key in enumerate(keys):
        if not isinstance(content, dict) or key not in content:
            raise ValueError(f"the entry {'.'.join(keys[: number + 1])} is missing")
        content = content[key]
    return content


def _text(file: pathlib.Path, number: int, value: Any) -> str:
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if not isinstance(value, str) or not _is_unicode(value):
        raise ValueError(
            f"{file}: language.ann must hold a text for segment {number}, got {value!a:.60}; "
            "correct it."
        )
    return value


def _is_unicode(value: str) -> bool:
    return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)


def _check(file: pathlib.Path, place: str, spans: list[Any]) -> np.ndarray:
    """Returns first and last frames `[E, 2]`, checked."""
    for number, span in enumerate(spans):
        is_pair = len(span) == 2 and all(type(frame) is int for frame in span)
        if not is_pair or not 0 <= span[0] <= span[1] < min(MAX_FRAME, span[0] + MAX_LENGTH):
            raise ValueError(
                f"{file}: entry {number} of {place} must be (first, last) with 0 <= first <= last, "
                f"got {span!s:.60}; correct it or delete the entry."
            )
    return np.array(spans, np.int64).reshape(-1, 2)
