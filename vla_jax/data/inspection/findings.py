"""Findings of an inspection: what looks wrong in a data set, in sentences."""

import unicodedata
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import numpy as np

from vla_jax.data.inspection.survey import FieldSurvey, Survey
from vla_jax.data.moments import std

NEAR_CONSTANT = 1e-4  # max - min below which a dimension carries no signal
CLIPPED = 0.05  # share of values equal to the minimum or maximum from which they look clipped
RATE_ERROR = 0.05  # relative difference of the timestamps' rate and the stated one
NUM_LISTED = 6  # names in a sentence

Level = Literal["problem", "note"]


class Finding(NamedTuple):
    """One observation; a problem spoils a training, a note may be intended."""

    level: Level
    kind: str  # short name, such as "frozen frames"
    text: str


def findings(survey: Survey) -> list[Finding]:
    """Returns all findings, the problems first."""
    checks = (
        _unreadable, _lengths, _values, _action_dims, _grippers, _frames, _times, _tasks, _copies,
        _fields,
    )  # fmt: skip
    found = [finding for check in checks for finding in check(survey)]
    return sorted(found, key=lambda finding: finding.level != "problem")


def tasks_of(survey: Survey) -> dict[str, int]:
    """Returns text -> number of episodes that begin with it, the most frequent first."""
    counts: dict[str, int] = {}
    for episode in survey.episodes:
        counts[episode.task] = counts.get(episode.task, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: -item[1]))


def _unreadable(survey: Survey) -> Iterator[Finding]:
    if bad := survey.unreadable:
        index, sentence = next(iter(bad.items()))
        text = f"{_episodes(list(bad))} left out. Episode {index}: {sentence}"
        yield Finding("problem", "unreadable episodes", text)


def _lengths(survey: Survey) -> Iterator[Finding]:
    different = [e for e in survey.episodes if e.length != e.stated_length]
    if different:
        first = different[0]
        text = (
            f"other lengths than the index states in {_episodes([e.name for e in different])}: "
            f"{first.name} has {first.length} steps, not {first.stated_length}."
        )
        yield Finding("problem", "contradicting lengths", text)
    short = [e.name for e in survey.episodes if e.length <= 1]
    if short:
        text = f"a single step or none, no movement to learn from, in {_episodes(short)}."
        yield Finding("problem", "length-1 episodes", text)


def _values(survey: Survey) -> Iterator[Finding]:
    for key, moments in survey.columns.items():
        if moments.num_bad.any():
            dims = _bracketed(np.flatnonzero(moments.num_bad), len(moments.num_bad))
            text = f"{key}{dims} has {moments.num_bad.sum()} values that are NaN or infinite."
            yield Finding("problem", "NaN or infinity", text)
    described = {key for keys in survey.fields.columns.values() for key in keys}
    for key, moments in survey.columns.items():
        if key in described or not moments.count.any() or moments.count.max() < 2:
            continue
        spread = (moments.high - moments.low).max()
        if spread < NEAR_CONSTANT:
            text = f"column {key} is {'near-' * bool(spread)}constant ({moments.mean.flat[0]:.6g})."
            yield Finding("note", "constant column", text)


def _action_dims(survey: Survey) -> Iterator[Finding]:
    for name in ("action", "proprio"):
        if name in survey.statistics:
            field = survey.statistics[name]
            grippers = _gripper_dims(survey) if name == "action" else set()
            for d in range(len(field.names)):
                yield from _one_dim(name, field, d, is_gripper=d in grippers)


def _one_dim(name: str, field: FieldSurvey, d: int, *, is_gripper: bool) -> Iterator[Finding]:
    """Yields what is wrong with the values of dimension d."""
    m = field.moments
    count, low, high = m.count[d], m.low[d], m.high[d]
    label = _label(name, field, d)
    if count < 2:
        return
    if high - low < NEAR_CONSTANT:
        kind = "constant dimension" if high == low else "near-constant dimension"
        text = f"{label} stays within {high - low:.1e} of {low:.6g} (std {std(m)[d]:.1e})."
        yield Finding("problem", kind, f"{text} Normalised, it would be noise: leave it out.")
        return
    shares = m.num_low[d] / count, m.num_high[d] / count
    is_binary = m.num_low[d] + m.num_high[d] == count
    if is_gripper:
        return
    if is_binary and count > 4:
        text = f"{label} takes two values only, {low:.6g} and {high:.6g}: a gripper or a flag?"
        yield Finding("note", "two values", text)
        return
    ends = [
        f"{100 * share:.0f} % at the {end} {value:.6g}"
        for share, end, value in zip(shares, ("minimum", "maximum"), (low, high), strict=True)
        if share >= CLIPPED and share * count >= 5
    ]
    if ends:
        yield Finding("note", "clipped values", f"{label} has {' and '.join(ends)}.")


def _grippers(survey: Survey) -> Iterator[Finding]:
    field = survey.statistics.get("action")
    if field is None:
        return
    if survey.fields.grippers is None:
        text = (
            "the data set does not say which numbers of the action are grippers; declare them with "
            "--dataset.grippers and --dataset.gripper-range, or name the --dataset.robot."
        )
        yield Finding("problem", "grippers", text)
    for d in sorted(_gripper_dims(survey)):
        closed, opened = survey.fields.gripper_range
        low, high = sorted((closed, opened))
        found = field.moments.low[d], field.moments.high[d]
        tolerance = 1e-3 * (high - low)
        label = f"gripper {_label('action', field, d)}"
        if found[0] < low - tolerance or found[1] > high + tolerance:
            text = (
                f"{label} is assumed to be {closed:g} closed … {opened:g} open, got values from "
                f"{found[0]:.6g} to {found[1]:.6g}; declare its range."
            )
            yield Finding("problem", "gripper range", text)
        elif found[0] < found[1] < (low + high) / 2 or found[1] > found[0] >= (low + high) / 2:
            text = (
                f"{label} is assumed to be {closed:g} closed … {opened:g} open, but it has values "
                f"from {found[0]:.6g} to {found[1]:.6g} only; declare its range."
            )
            yield Finding("problem", "gripper range", text)


def _frames(survey: Survey) -> Iterator[Finding]:
    for key, samples in survey.samples.items():
        frames = sum(len(s.steps) for s in samples)
        for kind, counts in (
            ("black frames", [s.num_black for s in samples]),
            ("frames of one colour", [s.num_uniform for s in samples]),
        ):
            names = [s.episode for s, count in zip(samples, counts, strict=True) if count]
            if names:
                text = f"{key}: {sum(counts)} of {frames} sampled frames, in {_episodes(names)}."
                yield Finding("problem", kind, text)
        stuck = [s for s in samples if s.frozen and not s.num_black and not s.num_uniform]
        if stuck:
            first, last = stuck[0].frozen or (0, 0)
            text = (
                f"{key}: the picture does not change in {_episodes([s.episode for s in stuck])}; "
                f"in {stuck[0].episode} from step {first} to {last}."
            )
            yield Finding("problem", "frozen frames", text)


def _times(survey: Survey) -> Iterator[Finding]:
    fps, episodes = survey.raw.fps, survey.episodes
    checks = (
        ("NaN or infinity", "timestamps that are NaN or infinite", "num_bad_times"),
        ("timestamps", "steps at which time does not increase", "num_repeated"),
        ("dropped frames", "gaps of at least 1.5 steps between timestamps", "num_gaps"),
    )
    for kind, what, field in checks:
        bad = [e for e in episodes if getattr(e, field)]
        if bad:
            total = sum(getattr(e, field) for e in bad)
            yield Finding(
                "problem", kind, f"{total} {what}, in {_episodes([e.name for e in bad])}."
            )
    steps = [e.step for e in episodes if e.step > 0]
    if fps is None:
        yield Finding("note", "frame rate", "the data set states no rate (fps).")
    elif steps and abs(1 / np.median(steps) / fps - 1) > RATE_ERROR:
        rate = 1 / np.median(steps)
        text = f"the timestamps advance at {rate:.4g} Hz, the data set states {fps:g} Hz."
        yield Finding("problem", "frame rate", text)


def _tasks(survey: Survey) -> Iterator[Finding]:
    tasks = tasks_of(survey)
    without = [e.name for e in survey.episodes if not e.task.strip()]
    if without:
        yield Finding("problem", "no task", f"no instruction in {_episodes(without)}.")
    groups: dict[str, list[str]] = {}
    for task in tasks:
        groups.setdefault(_canonical(task), []).append(task)
    for group in groups.values():
        if len(group) > 1:
            text = (
                f"these differ in case, spaces or Unicode form only: {', '.join(map(repr, group))}."
            )
            yield Finding("problem", "texts nearly equal", text)
    odd = [task for task in tasks if unicodedata.normalize("NFC", task) != task]
    if odd:
        text = f"{len(odd)} texts are not in Unicode's form NFC, such as {odd[0]!r}."
        yield Finding("note", "Unicode form", text)
    changing = [e.name for e in survey.episodes if e.num_tasks > 1]
    if changing:
        yield Finding("note", "changing task", f"the text changes within {_episodes(changing)}.")


def _copies(survey: Survey) -> Iterator[Finding]:
    first_with: dict[str, str] = {}
    pairs = [
        (first, episode.name)
        for episode in survey.episodes
        if episode.actions
        and (first := first_with.setdefault(episode.actions, episode.name)) != episode.name
    ]
    if pairs:
        first, second = pairs[0]
        text = (
            f"the actions of an earlier episode are repeated in "
            f"{_episodes([name for _, name in pairs])}: {second} has those of {first}."
        )
        yield Finding("note", "repeated episodes", text)


def _fields(survey: Survey) -> Iterator[Finding]:
    if "action" not in survey.fields.columns:
        text = "the reader finds no column that is the action; name it by options."
        yield Finding("problem", "no action", text)
    unnamed = [key for key in survey.raw.images if key not in survey.fields.cameras.values()]
    if unnamed:
        yield Finding(
            "note", "unnamed cameras", f"no field reads the cameras {', '.join(unnamed)}."
        )


def _gripper_dims(survey: Survey) -> set[int]:
    field = survey.statistics.get("action")
    size = len(field.names) if field else 0
    return {d % size for d in survey.fields.grippers or () if -size <= d < size}


def _label(name: str, field: FieldSurvey, d: int) -> str:
    """Returns "action[6] (gripper)", or "action[6]" if that is the dimension's name too."""
    label = f"{name}[{d}]"
    return label if field.names[d] == label else f"{label} ({field.names[d]})"


def _canonical(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split()).rstrip(".")


def _episodes(names: Sequence[object]) -> str:
    """Returns "episode 3", or "5 episodes (1, 2, 7, …)"."""
    if len(names) == 1:
        return f"episode {names[0]}"
    listed = ", ".join(map(str, names[:NUM_LISTED])) + (", …" if len(names) > NUM_LISTED else "")
    return f"{len(names)} episodes ({listed})"


def _bracketed(dims: np.ndarray, size: int) -> str:
    """Returns dimensions as "[2, 5]", "" for the only one of a column."""
    return "" if size == 1 else str(dims[:NUM_LISTED].tolist())
