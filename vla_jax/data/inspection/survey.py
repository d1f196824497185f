"""One pass over the episodes of a raw data set, and what is kept of it.

Episodes are read one at a time; what is kept grows with their number and texts only.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from vla_jax.data.dataset import digest
from vla_jax.data.inspection.frame_samples import FrameSamples, sample_frames
from vla_jax.data.moments import Moments, merge_moments, moments_of
from vla_jax.data.quantile_sketch import QuantileSketch, add, empty
from vla_jax.data.raw import Feature, RawDataset
from vla_jax.data.readers.field_columns import field_column, field_names, parse_key
from vla_jax.data.readers.fields import FieldMap

MAX_DIMS = 256  # a column of more numbers per step is described by the statistics of all of them
GAP = 1.5  # steps; timestamps that are farther apart have a gap between them


class FieldSurvey(NamedTuple):
    """Statistics of an action, proprio or other field of D numbers."""

    names: tuple[str, ...]  # [D]
    moments: Moments
    sketch: QuantileSketch


class Curve(NamedTuple):
    """Actions of one episode, for a plot."""

    episode: str
    seconds: np.ndarray  # [T]
    values: np.ndarray  # [T, D]


class EpisodeFacts(NamedTuple):
    """Facts that are kept of one episode."""

    name: str
    length: int  # steps found
    stated_length: int  # steps that the data set's index states
    task: str  # text of the first step
    num_tasks: int  # distinct texts
    step: float  # median distance of its timestamps, s; NaN if there are fewer than two
    num_repeated: int  # steps at which time does not increase
    num_gaps: int  # distances of timestamps of at least `GAP` steps
    num_bad_times: int  # timestamps that are NaN or infinite
    actions: str  # hash of the actions, "" for fewer than two steps


class Survey(NamedTuple):
    """Result of a pass over the episodes of a data set."""

    raw: RawDataset
    fields: FieldMap
    episodes: tuple[EpisodeFacts, ...]  # those that could be read
    unreadable: Mapping[int, str]  # index of an episode that could not be read -> sentence
    # column of numbers of a fixed shape -> [D], or [1] if it has over `MAX_DIMS`
    columns: Mapping[str, Moments]
    statistics: Mapping[str, FieldSurvey]  # field -> statistics
    curve: Curve | None  # of an episode of median length
    samples: Mapping[str, tuple[FrameSamples, ...]]  # camera's key -> sampled episodes


class _Values(NamedTuple):
    """Numbers and frames of one episode."""

    facts: EpisodeFacts
    columns: Mapping[str, Moments]
    fields: Mapping[str, np.ndarray]  # field -> [T, D]
    samples: Mapping[str, FrameSamples]
    seconds: np.ndarray  # [T]


def survey(
    raw: RawDataset,
    fields: FieldMap,
    *,
    num_episodes: int | None = None,
    num_sampled: int = 8,
    num_frames: int = 12,
    show: Callable[[int, str], None] = lambda completed, text: None,
) -> Survey:
    """Reads episodes and returns what they hold.

    Args:
      raw: the data set.
      fields: what the reader assumes; the statistics of its columns have quantiles.
      num_episodes: episodes to read, at equal distances; None means all.
      num_sampled: episodes of which frames are decoded, at equal distances among those.
      num_frames: frames to decode per camera in each of them.
      show: called after every episode with the number of them and a text.

    Raises:
      ImportError: a package of the extra `data` is missing.
      ValueError: the fields name columns that the data set lacks; no episode can be read.
    """
    for keys in fields.columns.values():
        field_names(raw.columns, keys)  # unknown columns are an error before any episode is read
    count = len(raw.lengths)
    indices = _spread(range(count), count if num_episodes is None else num_episodes)
    sampled = set(_spread(indices, num_sampled))
    lengths = np.asarray(raw.lengths)[indices]
    shown = indices[int(np.argmin(np.abs(lengths - np.median(lengths))))] if indices else None
    episodes: list[EpisodeFacts] = []
    unreadable: dict[int, str] = {}
    columns: dict[str, Moments] = {}
    statistics: dict[str, FieldSurvey] = {}
    samples: dict[str, list[FrameSamples]] = {key: [] for key in raw.images}
    curve = None
    for done, index in enumerate(indices, 1):
        try:
            values = _read(raw, index, fields, num_frames if index in sampled else 0)
        except ImportError:
            raise
        except Exception as error:  # whatever a damaged file raises is counted and shown
            unreadable[index] = " ".join(str(error).split()) or type(error).__name__
        else:
            episodes.append(values.facts)
            columns = _merged_columns(columns, values.columns)
            statistics = _merged_fields(raw, fields, statistics, values.fields)
            for key, frames in values.samples.items():
                samples[key].append(frames)
            if index == shown and "action" in values.fields:
                curve = Curve(values.facts.name, values.seconds, values.fields["action"])
        show(done, f"{len(unreadable)} unreadable" if unreadable else "")
    if unreadable and not episodes:
        raise ValueError(
            f"none of the {len(indices)} episodes of {raw.path} can be read: "
            f"{next(iter(unreadable.values()))}"
        )
    taken = {key: tuple(frames) for key, frames in samples.items()}
    return Survey(raw, fields, tuple(episodes), unreadable, columns, statistics, curve, taken)


def _merged_columns(known: Mapping[str, Moments], new: Mapping[str, Moments]) -> dict[str, Moments]:
    return {
        key: merge_moments(known[key], moments) if key in known else moments
        for key, moments in new.items()
    }


def _merged_fields(
    raw: RawDataset,
    fields: FieldMap,
    known: Mapping[str, FieldSurvey],
    new: Mapping[str, np.ndarray],
) -> dict[str, FieldSurvey]:
    merged = {}
    for name, values in new.items():
        names = field_names(raw.columns, fields.columns[name])
        blank = FieldSurvey(names, moments_of(values[:0]), empty(values.shape[1]))
        before = known.get(name, blank)
        moments = merge_moments(before.moments, moments_of(values))
        merged[name] = FieldSurvey(names, moments, add(before.sketch, values))
    return merged


def _read(raw: RawDataset, index: int, fields: FieldMap, num_frames: int) -> _Values:
    """Reads the numbers of an episode, and `num_frames` frames of each camera."""
    episode = raw.episodes[index]
    used = {parse_key(key, raw.columns)[0] for keys in fields.columns.values() for key in keys}
    columns: dict[str, np.ndarray] = {}
    moments: dict[str, Moments] = {}
    for key, feature in raw.columns.items():
        if feature.dtype not in ("str", "object"):  # objects: arrays of varying shape
            values = np.asarray(episode.columns[key])
            moments[key] = moments_of(_rows(values, feature))
            if key in used:
                columns[key] = values
    numbers = {name: field_column(columns, keys) for name, keys in fields.columns.items()}
    cameras = raw.images if num_frames else ()
    seconds = np.asarray(episode.timestamps, np.float64)
    texts = dict.fromkeys(episode.instructions)
    action = numbers.get("action", np.zeros((0, 0)))
    samples = {key: sample_frames(episode.name, episode.images[key], num_frames) for key in cameras}
    length = len(action) if "action" in numbers else len(seconds)
    return _Values(
        EpisodeFacts(
            episode.name,
            length,
            int(raw.lengths[index]),
            next(iter(texts), ""),
            len(texts),
            *_time_facts(seconds, raw.fps),
            digest(action) if len(action) > 1 else "",
        ),
        moments,
        numbers,
        samples,
        seconds,
    )


def _rows(values: np.ndarray, feature: Feature) -> np.ndarray:
    """Returns a column as rows: of its numbers per step, or of one if they are many or vary."""
    is_small = -1 not in feature.shape and 0 < np.prod(feature.shape) <= MAX_DIMS
    return values.reshape(len(values), -1) if is_small and len(values) else values.reshape(-1, 1)


def _time_facts(seconds: np.ndarray, fps: float | None) -> tuple[float, int, int, int]:
    """Returns `step`, `num_repeated`, `num_gaps` and `num_bad_times` of `EpisodeFacts`."""
    finite = seconds[np.isfinite(seconds)]
    distances = np.diff(finite)
    step = float(np.median(distances)) if len(distances) else np.nan
    expected = 1 / fps if fps else step
    gaps = int((distances >= GAP * expected).sum()) if expected > 0 else 0
    return step, int((distances <= 0).sum()), gaps, len(seconds) - len(finite)


def _spread(items: Sequence[int], count: int) -> list[int]:
    """Returns `count` of the items, or all, at equal distances and in order."""
    if count >= len(items):
        return list(items)
    return [items[i] for i in np.linspace(0, len(items) - 1, count).round().astype(int)]
