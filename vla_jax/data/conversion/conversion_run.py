"""Conversion of a raw data set to LeRobot v3.0: resumable, by several processes.

The files grow in `DST.tmp`, which gets its name at the end. Its `conversion.json` holds what they
depend on: the same conversion continues after the parts that are finished, another one is refused.
"""

import concurrent.futures
import functools
import json
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from vla_jax import workers
from vla_jax.config import differences
from vla_jax.data.conversion.conversion_parts import (
    SHIFT,
    TASKS,
    EpisodePart,
    facts_path,
    make_parts,
    table_path,
    write_part,
)
from vla_jax.data.conversion.conversion_plan import Plan, to_json
from vla_jax.data.raw import RawDataset
from vla_jax.data.readers.lerobot import layout, shards, stats
from vla_jax.data.readers.lerobot.episode_rows import (
    index_columns,
    position_row,
    stats_row,
    write_rows,
)
from vla_jax.data.readers.lerobot.features import features_json, write_description
from vla_jax.data.readers.lerobot.stored_fields import write_fields
from vla_jax.data.readers.lerobot.writer import hold_name, replace, require_packages
from vla_jax.files import delete_folder, read_json, write_json


class Converted(NamedTuple):
    """Result of a conversion."""

    root: pathlib.Path
    num_episodes: int
    num_frames: int
    num_shifted: int  # episodes with timestamps that differ from steps / fps by over half a step
    bad: dict[int, str]  # index in the source of an episode left out -> sentence


def convert(
    raw: RawDataset,
    root: pathlib.Path,
    plan: Plan,
    *,
    num_workers: int = 0,
    skip_bad: bool = False,
    overwrite: bool = False,
    show: Callable[[int, str], None] = lambda completed, text: None,
) -> Converted:
    """Writes a data set; the result does not depend on `num_workers` or on interruptions.

    Args:
      raw: the source.
      root: folder to create.
      plan: names and types, from `make_plan`.
      num_workers: processes that encode; 0 encodes in this one.
      skip_bad: leave out episodes that cannot be read, instead of an error.
      overwrite: replace an existing data set, and an unfinished conversion of something else.
      show: called after every part with the number of frames converted and a text.

    Raises:
      FileExistsError: `root` exists.
      BlockingIOError: another process is writing it.
      ValueError: an episode cannot be read; `root.tmp` holds another conversion; no episodes.
      OSError: the disk is full.
      RuntimeError: a process was killed.
      ImportError: pyarrow or PyAV is missing.
    """
    if root.exists() and not overwrite:
        raise FileExistsError(f"data set {root} exists; choose another folder or --overwrite.")
    require_packages()
    partial = root.with_name(root.name + ".tmp")
    root.parent.mkdir(parents=True, exist_ok=True)
    with hold_name(root):
        settings = {"fingerprint": raw.fingerprint, "plan": to_json(plan), "skip_bad": skip_bad}
        _prepare(partial, json.loads(json.dumps(settings)), overwrite=overwrite)
        parts = make_parts(np.asarray(raw.lengths))
        todo = [part for part in parts if not facts_path(partial, part.index).exists()]
        frames = {part.index: int(raw.lengths[list(part.episodes)].sum()) for part in parts}
        done = sum(frames.values()) - sum(frames[part.index] for part in todo)
        num_bad = 0
        write = functools.partial(write_part, partial, raw, plan, skip_bad=skip_bad)
        for part, bad in _finished(write, todo, num_workers):
            done, num_bad = done + frames[part.index], num_bad + bad
            show(done, f"{num_bad} episodes left out" if num_bad else "")
        return _finish(root, partial, parts, plan)


def _prepare(partial: pathlib.Path, settings: dict[str, Any], *, overwrite: bool) -> None:
    """Makes the folder of the conversion, or checks that it belongs to the same one."""
    path = partial / "conversion.json"
    if path.is_file():
        changed = differences(read_json(path, "settings of a conversion"), settings)
        if changed and not overwrite:
            raise ValueError(
                f"{partial} holds an unfinished conversion with other settings: "
                f"{'; '.join(changed)[:500]}; finish it with those, delete it, or --overwrite."
            )
        if not changed:
            return
    elif partial.exists() and not overwrite:
        raise FileExistsError(f"{partial} is in the way; delete it, or --overwrite.")
    delete_folder(partial)
    write_json(path, settings)


def _finished(
    write: Callable[[EpisodePart], int], parts: Sequence[EpisodePart], num_workers: int
) -> Iterator[tuple[EpisodePart, int]]:
    """Writes parts; yields each when it is finished, and its number of episodes left out."""
    if num_workers < 1:
        yield from ((part, write(part)) for part in parts)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        min(num_workers, max(len(parts), 1)), workers.CONTEXT
    )
    try:
        futures = {pool.submit(write, part): part for part in parts}
        for future in concurrent.futures.as_completed(futures):
            yield futures[future], future.result()
    except concurrent.futures.process.BrokenProcessPool as error:
        raise RuntimeError(
            "a process of the conversion was killed, perhaps for lack of memory; run the same "
            "command again to continue, with fewer --num-workers."
        ) from error
    except BaseException:  # the conversion ends early
        workers.kill_all()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _finish(
    root: pathlib.Path, partial: pathlib.Path, parts: Sequence[EpisodePart], plan: Plan
) -> Converted:
    """Numbers the episodes of all parts, writes the metadata, and renames the folder."""
    for name in ("data", "meta"):  # of an attempt that was interrupted here
        delete_folder(partial / name)
    tasks: dict[str, int] = {}
    totals: list[dict[str, Any]] = []
    bad: dict[int, str] = {}
    num_episodes = num_frames = num_shifted = 0
    for part in parts:
        facts = read_json(facts_path(partial, part.index), "a part of a conversion")
        bad |= {int(index): sentence for index, sentence in facts["bad"].items()}
        if not facts["rows"]:
            continue
        num_shifted += sum(row.pop(SHIFT) * plan.fps > 0.5 for row in facts["rows"])
        rows = _number(partial, part.index, facts["rows"], tasks, num_episodes, num_frames, plan)
        write_rows(partial, part.index, rows)
        indices = {key: stats.total_stats(rows, key) for key in layout.INDEX_KEYS}
        totals.append(_totals_row(facts["totals"] | indices))
        num_episodes += len(rows)
        num_frames = rows[-1]["dataset_to_index"]
    if not num_episodes:
        raise ValueError(
            f"no episode can be converted: {next(iter(bad.values()), 'the data set has none')}"
        )
    keys = (*plan.columns, *plan.cameras, *layout.INDEX_KEYS)
    write_description(
        partial,
        features_json(plan.features, plan.image_features, plan.fps),
        list(tasks),
        {key: stats.total_stats(totals, key) for key in keys if f"stats/{key}/mean" in totals[0]},
        num_episodes=num_episodes,
        num_frames=num_frames,
        fps=plan.fps,
        robot_type=plan.fields.robot or "unknown",
    )
    write_fields(partial, plan.fields)
    shutil.rmtree(partial / "parts")
    os.remove(partial / "conversion.json")
    replace(root, partial)
    return Converted(root, num_episodes, num_frames, num_shifted, bad)


def _totals_row(totals: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Returns the statistics of a part in the form of an episode's row."""
    return {
        f"stats/{key}/{name}": v for key, values in totals.items() for name, v in values.items()
    }


def _number(
    root: pathlib.Path,
    part: int,
    rows: Sequence[dict[str, Any]],
    tasks: dict[str, int],
    first_episode: int,
    first_frame: int,
    plan: Plan,
) -> list[dict[str, Any]]:
    """Writes the final Parquet file of a part; returns the rows of its episodes.

    Args:
      root: folder of the conversion.
      part: number of the part.
      rows: its episodes, from `write_part`.
      tasks: text -> index; new texts are added.
      first_episode: episodes in all parts before it.
      first_frame: frames in all parts before it.
      plan: names and types.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = root / layout.DATA_PATH.format(**shards.place(part))
    path.parent.mkdir(parents=True, exist_ok=True)
    numbered, writer = [], None
    with pq.ParquetFile(table_path(root, part)) as source:
        for place, row in enumerate(rows):
            table = source.read_row_group(place)
            texts = table[TASKS].to_pylist()
            task_index = np.array([tasks.setdefault(text, len(tasks)) for text in texts])
            index = first_episode + place
            added = index_columns(index, first_frame, task_index, plan.fps)
            table = table.drop_columns([TASKS])
            for key, values in added.items():
                table = table.append_column(key, pa.array(values))
            writer = writer or pq.ParquetWriter(path, table.schema, compression="snappy")
            writer.write_table(table)
            distinct = list(dict.fromkeys(texts))
            position = position_row(index, first_frame, row["length"], distinct, part, part)
            numbered.append(position | row | stats_row(stats.column_stats(added)))
            first_frame += row["length"]
    if writer:
        writer.close()
    return numbered
