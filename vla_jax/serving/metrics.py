"""Metrics of a server in Prometheus' text format."""

from collections.abc import Callable
from typing import Any, NamedTuple

from vla_jax.serving.sessions import SessionBook

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
_ROWS = (1, 2, 4, 8, 16, 32, 64)
_STEPS = (1, 10, 30, 100, 300, 1000, 3000, 10_000)


class Metrics(NamedTuple):
    """Counters, histograms and gauges of one server."""

    seconds: Any  # histogram by stage: queue, device, total
    rows: Any  # histogram of the rows of a tick
    requests: Any  # counter by outcome: served, repeated, refused
    refused: Any  # counter by reason
    ended: Any  # counter of ended sessions by why
    steps: Any  # histogram of the frames of an episode
    connections: Any  # gauge
    text: Callable[[], bytes]  # all of them as text


def make_metrics(book: SessionBook, info: dict[str, str]) -> Metrics:
    """Returns the metrics of a server, in a registry of their own.

    Args:
      book: of the sessions, which are counted when the text is made.
      info: labels that say what is served.

    Raises:
      ImportError: prometheus-client is missing.
    """
    try:
        from prometheus_client import (
            CollectorRegistry,
            Counter,
            Gauge,
            Histogram,
            Info,
            generate_latest,
        )
    except ImportError as error:
        raise ImportError(
            "the server needs prometheus-client; run pip install 'vla-jax[serve]'."
        ) from error
    registry = CollectorRegistry()
    prefix: dict[str, Any] = {"namespace": "vla_serve", "registry": registry}
    Info("policy", "Policy that is served.", **prefix).info(info)
    sessions = Gauge("sessions", "Live sessions.", ["kind"], **prefix)
    for kind, cls in (("named", str), ("anonymous", int)):
        sessions.labels(kind).set_function(
            lambda cls=cls: sum(isinstance(key, cls) for key in list(book.live))
        )
    return Metrics(
        Histogram("step_seconds", "Time of a step.", ["stage"], buckets=_SECONDS, **prefix),
        Histogram("batch_rows", "Sessions that step together.", buckets=_ROWS, **prefix),
        Counter("requests", "Requests.", ["outcome"], **prefix),
        Counter("refused", "Refused requests.", ["reason"], **prefix),
        Counter("sessions_ended", "Ended sessions.", ["why"], **prefix),
        Histogram("episode_steps", "Frames of an episode.", buckets=_STEPS, **prefix),
        Gauge("connections", "Open connections.", **prefix),
        lambda: generate_latest(registry),
    )
