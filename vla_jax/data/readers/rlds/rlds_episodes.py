"""Episodes of an RLDS data set, read on access from their records."""

import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple, NoReturn

import numpy as np

from vla_jax.data.raw import Feature, Lazy, RawEpisode
from vla_jax.data.readers.rlds.record_files import RECORD_FORMATS
from vla_jax.data.readers.rlds.record_index import RecordIndex
from vla_jax.data.readers.rlds.rlds_layout import Split, Version
from vla_jax.data.readers.rlds.rlds_values import (
    bytes_spans,
    decode_image,
    decode_text,
    decode_values,
    image_size,
    object_array,
)
from vla_jax.data.readers.rlds.tf_example import Span, Values, parse_example
from vla_jax.data.readers.rlds.tf_features import STEPS, TfFeature
from vla_jax.data.still_images import StillImages

MAX_PARSED = 512  # records: about 100 bytes for every image of theirs
_VALUES, _LENGTHS = "ragged_flat_values", "ragged_row_lengths_"
_INSTRUCTION = re.compile(r"(?:.*/)?(natural_language_|language_)?instruction(_\d)?")


class _Contents(NamedTuple):
    """Places of the values in the record of one episode."""

    features: Mapping[str, Values]
    spans: dict[str, list[Span]]  # camera -> ranges of encoded images, filled on access


class _Record(NamedTuple):
    """The record of one episode, parsed but not decoded."""

    episode: int
    data: memoryview
    contents: _Contents


class LazyTexts(Sequence[str]):
    """Texts of known number, read when one is indexed."""

    def __init__(self, length: int, read: Callable[[], Sequence[str]]) -> None:
        """Stores the arguments.

        Args:
          length: number of texts.
          read: returns them; must be picklable.
        """
        self._length = length
        self._read = read

    def __len__(self) -> int:
        """Returns the number of texts."""
        return self._length

    def __getitem__(self, index: Any) -> Any:
        """Returns a text, or a list of those of a slice."""
        return self._read()[index]

    def __iter__(self) -> Iterator[str]:
        """Iterates over the texts; reads once."""
        return iter(self._read())


class RldsEpisodes:
    """Reads the episodes of some splits; each thread keeps its last record.

    Can be pickled and shared by threads. The data of a record is checked when a process reads it
    first. The places of values in the last `MAX_PARSED` records are kept, so that a batch of
    several cameras parses each of its records once.
    """

    def __init__(
        self,
        version: Version,
        splits: Sequence[Split],
        indices: Sequence[RecordIndex],
        steps: Mapping[str, TfFeature],
        rest: Mapping[str, TfFeature],
        fps: float | None,
    ) -> None:
        """Stores the arguments; reads nothing.

        Args:
          version: description of the data set.
          splits: the splits, in order.
          indices: index of each split.
          steps: features of a step.
          rest: features of an episode.
          fps: steps per second, Hz; None if unknown.
        """
        self.version, self.splits, self.steps, self.rest = version, splits, steps, rest
        self.indices, self.fps = indices, fps
        self.lengths = np.concatenate([index.lengths for index in indices])
        self._starts = np.cumsum([0, *(len(index.lengths) for index in indices)])
        self._columns = column_types(steps)
        self._cameras = [key for key, feature in steps.items() if feature.is_camera]
        self._instruction_keys = _instruction_keys(steps, rest)
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state without what this process has read."""
        forgotten = ("_local", "_checked", "_parsed", "_lock")
        return {k: v for k, v in self.__dict__.items() if k not in forgotten}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restores the state."""
        self.__dict__.update(state)
        self._forget()

    def _forget(self) -> None:
        self._local = threading.local()
        self._checked: set[int] = set()
        self._parsed: OrderedDict[int, _Contents] = OrderedDict()
        self._lock = threading.Lock()

    def episode(self, episode: int) -> RawEpisode:
        """Returns the raw view of an episode; reads nothing."""
        length = int(self.lengths[episode])
        split = int(np.searchsorted(self._starts, episode, "right")) - 1
        return RawEpisode(
            f"{self.splits[split].name}/{episode - self._starts[split]}",
            Lazy(list(self._columns), partial(self._column, episode)),
            Lazy(self._cameras, partial(self._images, episode)),
            LazyTexts(length, partial(self._instructions, episode)),
            np.arange(length) / (self.fps or 1.0),
        )

    def metadata(self) -> Sequence[Mapping[str, np.ndarray]]:
        """Returns, for every episode, its features outside the steps, read on access."""
        keys = list(self.rest)
        return [Lazy(keys, partial(self._metadata, e)) for e in range(len(self.lengths))]

    def _metadata(self, episode: int, key: str) -> np.ndarray:
        feature = self.rest[key]
        if feature.outer:  # a sequence: values of all its elements
            return self._decode(episode, key, key, feature._replace(outer=()), None)
        return self._decode(episode, key, key, feature, 1)[0]

    def _column(self, episode: int, column: str) -> np.ndarray:
        """Returns a column `[T, ...]`; of ragged values all `[n, ...]`."""
        length = int(self.lengths[episode])
        key, _, part = column.rpartition("/")
        if part.startswith(_LENGTHS) and key in self.steps:
            feature = TfFeature("number", "int64", ())
            expected = length if part == f"{_LENGTHS}0" else None
            return self._decode(episode, f"{STEPS}/{column}", column, feature, expected)
        if part == _VALUES and key in self.steps:
            inner = self.steps[key].outer
            fixed = inner[len(inner) - inner[::-1].index(-1) :]  # behind the last ragged axis
            feature = self.steps[key]
            size = int(np.prod(fixed, dtype=np.int64))
            flat = self._decode(episode, f"{STEPS}/{column}", column, feature, None)
            return flat.reshape(len(flat) // max(size, 1), *fixed, *flat.shape[1:])
        feature = self.steps[column]
        size = int(np.prod(feature.outer, dtype=np.int64))
        stored = f"{STEPS}/{column}" + "/value" * feature.is_dynamic
        flat = self._decode(episode, stored, column, feature, length * size)
        if feature.is_dynamic:
            flat = self._restored(episode, column, feature, flat)
        return flat.reshape(length, *feature.outer, *flat.shape[1:]) if feature.outer else flat

    def _restored(
        self, episode: int, column: str, feature: TfFeature, flat: np.ndarray
    ) -> np.ndarray:
        """Returns arrays with the shapes that are stored under a key of their own."""
        shape = TfFeature("number", "int32", (len(feature.shape),))
        shapes = self._decode(
            episode, f"{STEPS}/{column}/shape", f"{column}/shape", shape, len(flat)
        )
        for array, sizes in zip(flat, shapes, strict=True):
            if np.any(sizes < 0) or np.prod(sizes.astype(object)) != array.size:
                self._refuse(episode, column, f"has {array.size} values for the shape {sizes}")
        return object_array([a.reshape(sizes) for a, sizes in zip(flat, shapes, strict=True)])

    def _images(self, episode: int, key: str) -> StillImages:
        """Returns the images of a camera; their size is that of the first if it is not fixed."""
        length, (height, width, _) = int(self.lengths[episode]), self.steps[key].shape
        if -1 in (height, width) and length:
            record = self._record(episode)
            start, stop = self._image_spans(record, key)[0]
            try:
                height, width = image_size(record.data[start:stop])
            except ValueError as error:
                self._refuse(episode, key, str(error), error)
        size = max(height, 0), max(width, 0)
        return StillImages(length, size, partial(self._load, episode, key, size))

    def _load(self, episode: int, key: str, size: tuple[int, int], steps: np.ndarray) -> np.ndarray:
        """Decodes images `[n, h, w, 3]` of one camera."""
        record = self._record(episode)
        spans = self._image_spans(record, key)
        feature = self.steps[key]._replace(shape=(*size, 3))
        images = np.empty((len(steps), *size, 3), np.uint8)
        for place, step in enumerate(steps):
            start, stop = spans[step]
            try:
                images[place] = decode_image(record.data[start:stop], feature)
            except ValueError as error:
                self._refuse(episode, key, f"{error} at step {step}", error)
        return images

    def _image_spans(self, record: _Record, key: str) -> list[Span]:
        """Returns the ranges of all images of a camera in the record."""
        if key not in record.contents.spans:
            length = int(self.lengths[record.episode])
            values = record.contents.features.get(f"{STEPS}/{key}")
            try:
                spans = bytes_spans(record.data, values, length)
            except ValueError as error:
                self._refuse(record.episode, key, str(error), error)
            record.contents.spans[key] = spans
        return record.contents.spans[key]

    def _instructions(self, episode: int) -> list[str]:
        """Returns the texts of the first key that has any; empty ones if there is none."""
        length = int(self.lengths[episode])
        for key in self._instruction_keys:
            if key in self.rest:
                texts = [str(self._metadata(episode, key))] * length
            else:
                values = self._column(episode, key)
                is_text = values.dtype.kind == "U"
                texts = values.tolist() if is_text else [_from_codes(each) for each in values]
            if any(texts):
                return texts
        return [""] * length

    def _decode(
        self, episode: int, stored: str, key: str, feature: TfFeature, count: int | None
    ) -> np.ndarray:
        record = self._record(episode)
        try:
            return decode_values(record.data, record.contents.features.get(stored), feature, count)
        except ValueError as error:
            self._refuse(episode, key, str(error), error)

    def _record(self, episode: int) -> _Record:
        """Returns the parsed record of an episode; the one that the thread read last is kept."""
        last = getattr(self._local, "record", None)
        if last is not None and last.episode == episode:
            return last
        self._local.record = last = None  # free the old record first
        split = int(np.searchsorted(self._starts, episode, "right")) - 1
        index, within = self.indices[split], episode - self._starts[split]
        path = self.splits[split].paths[index.shards[within]]
        read = RECORD_FORMATS[self.version.file_format].read
        data = read(path, int(index.positions[within]), episode not in self._checked)
        self._local.record = _Record(episode, data, self._contents(episode, data))
        self._checked.add(episode)
        return self._local.record

    def _contents(self, episode: int, data: memoryview) -> _Contents:
        """Returns the places of an episode's values, parsed unless they are kept."""
        with self._lock:
            contents = self._parsed.get(episode)
        if contents is None:
            try:
                contents = _Contents(parse_example(data), {})
            except ValueError as error:
                self._refuse(episode, "the record", f"is no tf.train.Example ({error})", error)
        with self._lock:
            self._parsed[episode] = contents
            self._parsed.move_to_end(episode)
            if len(self._parsed) > MAX_PARSED:
                self._parsed.popitem(last=False)
        return contents

    def _refuse(
        self, episode: int, key: str, problem: str, error: Exception | None = None
    ) -> NoReturn:
        split = int(np.searchsorted(self._starts, episode, "right")) - 1
        index, within = self.indices[split], episode - self._starts[split]
        path = self.splits[split].paths[index.shards[within]]
        name = f"{self.splits[split].name}/{within}"
        raise ValueError(
            f"{path}: {key} of episode {name} {problem}; write the data set again, or leave the "
            "episode out."
        ) from error


def column_types(steps: Mapping[str, TfFeature]) -> dict[str, Feature]:
    """Returns the types of the columns of an episode; cameras are left out."""
    types = {}
    for key, feature in steps.items():
        dtype = "str" if feature.kind == "text" else "object" if feature.varies else feature.dtype
        shape = () if feature.varies else feature.shape
        if feature.is_camera:
            continue
        if not feature.is_ragged:
            types[key] = Feature(dtype, (*feature.outer, *shape))
            continue
        fixed = feature.outer[len(feature.outer) - feature.outer[::-1].index(-1) :]
        types[f"{key}/{_VALUES}"] = Feature(dtype, (-1, *fixed, *shape))
        for level in range(feature.outer.count(-1)):
            outer = () if level == 0 else (-1,)
            types[f"{key}/{_LENGTHS}{level}"] = Feature("int64", outer)
    return types


def _instruction_keys(steps: Mapping[str, TfFeature], rest: Mapping[str, TfFeature]) -> list[str]:
    """Returns the keys of instructions: of the step, of its observation, of the episode."""
    found = [
        key
        for key, feature in steps.items()
        if _INSTRUCTION.fullmatch(key) and not feature.outer and _is_instruction(feature)
    ]
    found.sort(key=lambda key: (key.count("/"), not key.rpartition("/")[2].startswith("l"), key))
    texts = [key for key, feature in rest.items() if feature.kind == "text" and not feature.outer]
    return found + [key for key in texts if _INSTRUCTION.fullmatch(key)]


def _is_instruction(feature: TfFeature) -> bool:
    """Returns True for a text, or a list of character codes as in Language-Table."""
    is_codes = feature.kind == "number" and feature.dtype in ("int32", "uint8")
    is_text = feature.kind == "text" and not feature.shape
    return is_text or (is_codes and len(feature.shape) == 1)


def _from_codes(codes: np.ndarray) -> str:
    return decode_text(codes.astype(np.uint8).tobytes()).rstrip("\0")
