"""Requests on their way through the engine, and their results."""

import concurrent.futures
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from vla_jax.acting.agent import AgentState
from vla_jax.serving.requests import Request
from vla_jax.serving.sessions import Admitted, Key, Session, StoredReply
from vla_jax.serving.table import Frame


class Served(NamedTuple):
    """Result of a request."""

    reply: StoredReply
    key: Key  # of the session
    repeated: bool  # stored reply to a request that was served before
    queue_ms: float  # from the arrival until its first tick
    infer_ms: float  # of the last tick, until the result was on the host
    warnings: tuple[str, ...] = ()  # sentences about a request that training did not have


@dataclass(eq=False)
class Waiting:
    """A request under way, or a function to run between two ticks; only the engine changes it."""

    keys: frozenset[Key]
    future: concurrent.futures.Future
    run: Callable[[], Any] | None = None  # None for a request
    request: Request = Request(())
    frames: Sequence[Frame] = ()
    words: np.ndarray | None = None
    connection: int = 0
    arrived: float = field(default_factory=time.perf_counter)
    begun: float = 0.0
    position: int = 0  # frames stepped so far
    start: Admitted | None = None
    before: Session | None = None  # the same session; None if it has begun with this request
    evicted: tuple[Key, Session] | None = None  # the session that gave way to it on a full server
    warnings: tuple[str, ...] = ()
    row: AgentState | None = None  # of the table before, where a stepped frame may be undone
