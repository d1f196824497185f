"""Tables of an inspected data set for a terminal."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

NUM_TASKS = 12  # rows of the table of tasks
_TEXTS = ("name", "dtype", "field")  # columns that are aligned to the left
STATISTICS = ("min", "q01", "mean", "q99", "max", "std")


def tables(report: Mapping[str, Any]) -> RenderableType:
    """Returns the tables of an inspection (`inspection_json.to_json`), one above the other."""
    parts: list[RenderableType] = [
        _pairs(report["path"], summary(report)),
        *(table for table in (_cameras(report), _columns(report), _tasks(report)) if table.rows),
        *(_statistics(name, stats["dims"]) for name, stats in report["statistics"].items()),
        _pairs("The reader assumes", assumptions(report)),
        *_findings(report),
    ]
    return Group(*parts)


def summary(report: Mapping[str, Any]) -> dict[str, str]:
    """Returns label -> text: what the data set is and how large."""
    episodes, size = report["episodes"], report["size"]
    read = episodes["read"] + episodes["unreadable"]
    files = [
        f"{use['files']} {suffix or 'without suffix'} {file_size(use['bytes'])}"
        for suffix, use in list(size["files"].items())[:4]
    ]
    sampled = "" if read == episodes["total"] else f", {read} of them inspected"
    return {
        "format": f"{report['kind']} {report['version']}".strip(),
        "on disk": f"{file_size(size['bytes'])} ({', '.join(files)})",
        "episodes": f"{episodes['total']}{sampled}",
        "frames": f"{episodes['frames']}{duration(episodes['seconds'])}",
        "steps per episode": f"{number(episodes['shortest'])} … {number(episodes['longest'])}, "
        f"median {number(episodes['median'])}",
        "rate": f"{number(report['fps'])} Hz" if report["fps"] else "not stated",
        "tasks": str(len(report["tasks"])),
    }


def assumptions(report: Mapping[str, Any]) -> dict[str, str]:
    """Returns label -> text: the fields that a training would read."""
    assumed = report["assumed"]
    dims = report["statistics"].get("action", {"dims": ()})["dims"]
    indices = sorted(i % max(len(dims), 1) for i in assumed["grippers"] or ())
    grippers = [f"action[{i}]" for i in indices]
    ends = assumed["gripper_range"]
    rate = assumed["fps_of_timestamps"]
    return {
        **{field: key for field, key in assumed["cameras"].items()},
        **{field: " + ".join(keys) for field, keys in assumed["columns"].items()},
        "grippers": f"{', '.join(grippers)}: {number(ends['closed'])} closed, "
        f"{number(ends['opened'])} open"
        if grippers
        else ("not declared" if assumed["grippers"] is None else "none"),
        "images": "upside down, to be rotated" if assumed["rotate_images"] else "upright",
        "robot": assumed["robot"] or "generic",
        "rate": f"{number(assumed['fps'])} Hz stated, {number(rate)} Hz by the timestamps"
        if assumed["fps"]
        else "not stated",
    }


def number(value: float | None) -> str:
    """Returns a number with four significant digits, "–" for none."""
    return "–" if value is None else f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}"


def file_size(num_bytes: float) -> str:
    """Returns a size such as "3.2 MB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"


def duration(seconds: float | None) -> str:
    """Returns a duration such as ", 1 h 23 min", "" if it is unknown."""
    if seconds is None:
        return ""
    if seconds < 120:
        return f", {seconds:.3g} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f", {hours} h {minutes} min" if hours else f", {minutes} min"


def column_range(column: Mapping[str, Any]) -> str:
    """Returns the smallest and largest value of a column, "" for texts."""
    ends = [column.get(name) for name in ("min", "max")]
    flat = [end if isinstance(end, list) else [end] for end in ends]
    known = [[value for value in end if value is not None] for end in flat]
    return f"{number(min(known[0]))} … {number(max(known[1]))}" if all(known) else ""


def _pairs(title: str, rows: Mapping[str, str]) -> Table:
    table = Table(title=escape(title), show_header=False, title_justify="left")
    for label, text in rows.items():
        table.add_row(escape(label), escape(text))
    return table


def _cameras(report: Mapping[str, Any]) -> Table:
    table = _table("Cameras", "camera", "field", "height x width", "brightness")
    for key, camera in report["cameras"].items():
        size = "x".join(map(str, camera["shape"][:2]))
        level = "–" if camera["brightness"] is None else f"{camera['brightness']:.0f} of 255"
        table.add_row(escape(key), camera["field"] or "–", size, level)
    return table


def _columns(report: Mapping[str, Any]) -> Table:
    table = _table("Columns", "column", "dtype", "shape", "values")
    for key, column in report["columns"].items():
        shape = "x".join(map(str, column["shape"])) or "1"
        table.add_row(escape(key), column["dtype"], shape, column_range(column))
    return table


def _tasks(report: Mapping[str, Any]) -> Table:
    table = _table("Tasks", "text", "episodes")
    tasks = list(report["tasks"].items())
    for text, count in tasks[:NUM_TASKS]:
        table.add_row(escape(text) or "(none)", str(count))
    if len(tasks) > NUM_TASKS:
        rest = sum(count for _, count in tasks[NUM_TASKS:])
        table.add_row(f"{len(tasks) - NUM_TASKS} others", str(rest))
    return table


def _statistics(name: str, dims: list[Mapping[str, Any]]) -> Table:
    table = _table(f"{name}, {len(dims)} dimensions", "", "name", *STATISTICS)
    for i, dim in enumerate(dims):
        table.add_row(str(i), escape(dim["name"]), *(number(dim[key]) for key in STATISTICS))
    return table


def _findings(report: Mapping[str, Any]) -> Iterator[Text]:
    if not report["findings"]:
        yield Text("Nothing looks wrong.", style="bold green")
    for finding in report["findings"]:
        style = "bold red" if finding["level"] == "problem" else "bold yellow"
        head = Text(f"{finding['level']}: {finding['kind']}: ", style=style)
        yield head.append(finding["text"], style="not bold default")


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 or column in _TEXTS else "right")
    return table
