"""An inspection as one JSON object: the numbers of the terminal's tables and of the page."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from vla_jax.data.inspection.disk_usage import disk_usage, stated_version
from vla_jax.data.inspection.findings import findings, tasks_of
from vla_jax.data.inspection.survey import FieldSurvey, Survey
from vla_jax.data.moments import Moments, std
from vla_jax.data.quantile_sketch import quantiles

NUM_SENTENCES = 20  # errors of unreadable episodes that are kept word for word
MAX_LISTED = 64  # statistics of a column with more dimensions are those of all of them


def to_json(survey: Survey) -> dict[str, Any]:
    """Returns an inspection as JSON values; NaN and infinity are null."""
    raw = survey.raw
    usage = disk_usage(raw.path)
    report = {
        "path": str(raw.path),
        "kind": raw.kind,
        "version": stated_version(raw.path),
        "fps": raw.fps,
        "fingerprint": raw.fingerprint,
        "size": {
            "bytes": sum(u.num_bytes for u in usage.values()),
            "files": {s: {"files": u.num_files, "bytes": u.num_bytes} for s, u in usage.items()},
        },
        "episodes": _episodes(survey),
        "tasks": tasks_of(survey),
        "cameras": _cameras(survey),
        "columns": _columns(survey),
        "statistics": {name: _statistics(field) for name, field in survey.statistics.items()},
        "assumed": _assumed(survey),
        "findings": [finding._asdict() for finding in findings(survey)],
    }
    return _finite(report)


def _episodes(survey: Survey) -> dict[str, Any]:
    lengths = np.asarray(survey.raw.lengths)
    known = len(lengths) > 0
    return {
        "total": len(lengths),
        "read": len(survey.episodes),
        "unreadable": len(survey.unreadable),
        "errors": {str(i): s for i, s in list(survey.unreadable.items())[:NUM_SENTENCES]},
        "frames": int(lengths.sum()),
        "seconds": float(lengths.sum() / survey.raw.fps) if survey.raw.fps else None,
        "shortest": int(lengths.min()) if known else None,
        "median": float(np.median(lengths)) if known else None,
        "longest": int(lengths.max()) if known else None,
    }


def _cameras(survey: Survey) -> dict[str, Any]:
    fields = {key: field for field, key in survey.fields.cameras.items()}
    return {
        key: {
            "field": fields.get(key),
            "shape": list(feature.shape),
            "brightness": _mean([b for s in survey.samples[key] for b in s.brightness]),
            "sampled_frames": sum(len(s.steps) for s in survey.samples[key]),
        }
        for key, feature in survey.raw.images.items()
    }


def _columns(survey: Survey) -> dict[str, Any]:
    return {
        key: {
            "dtype": feature.dtype,
            "shape": list(feature.shape),
            "names": list(feature.names),
            **(_moments(survey.columns[key]) if key in survey.columns else {}),
        }
        for key, feature in survey.raw.columns.items()
    }


def _moments(m: Moments) -> dict[str, Any]:
    values = {"min": m.low, "max": m.high, "mean": m.mean, "std": std(m), "not_finite": m.num_bad}
    if len(m.count) > MAX_LISTED:
        total = max(int(m.count.sum()), 1)
        mean = (m.mean * m.count).sum() / total
        square = (m.square + m.count * (m.mean - mean) ** 2).sum() / total
        values = {
            "min": m.low.min(), "max": m.high.max(), "mean": mean, "std": math.sqrt(square),
            "not_finite": m.num_bad.sum(),
        }  # fmt: skip
    return {name: np.asarray(value).tolist() for name, value in values.items()}


def _statistics(field: FieldSurvey) -> dict[str, Any]:
    """Returns the statistics of every dimension, and the bound of their quantiles' ranks."""
    m = field.moments
    q01, q99 = quantiles(field.sketch, (0.01, 0.99))
    columns = {
        "min": m.low, "q01": q01, "mean": m.mean, "q99": q99, "max": m.high, "std": std(m),
        "at_min": m.num_low, "at_max": m.num_high, "count": m.count, "not_finite": m.num_bad,
    }  # fmt: skip
    dims = [
        {"name": name, **{key: value[d].item() for key, value in columns.items()}}
        for d, name in enumerate(field.names)
    ]
    error = field.sketch.error / max(int(m.count.max(initial=0)), 1)
    return {"dims": dims, "quantile_rank_error": error}


def _assumed(survey: Survey) -> dict[str, Any]:
    fields = survey.fields
    steps = [episode.step for episode in survey.episodes if episode.step > 0]
    return {
        "cameras": dict(fields.cameras),
        "columns": {name: list(keys) for name, keys in fields.columns.items()},
        "grippers": None if fields.grippers is None else list(fields.grippers),
        "gripper_range": fields.gripper_range._asdict(),
        "rotate_images": fields.rotate_images,
        "robot": fields.robot,
        "fps": survey.raw.fps,
        # without a stated rate timestamps count steps
        "fps_of_timestamps": float(1 / np.median(steps)) if steps and survey.raw.fps else None,
    }


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if len(values) else None


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value
