"""Reports of the engine, for metrics and for the files of sessions."""

from collections.abc import Callable
from typing import Any, NamedTuple

from vla_jax.acting.agent import AgentState
from vla_jax.serving.sessions import Session


class Observer(NamedTuple):
    """Functions that are called with what happens, from the engine's thread."""

    ticked: Callable[[int, float], None]  # (rows of the batch, s on the device)
    ended: Callable[[str, int], None]  # (why a session ended, frames of its episode)
    # (key, session, row [1, ...]) of a named session after each request, before its reply
    saved: Callable[[str, Session, AgentState], None] | None = None
    removed: Callable[[str], None] | None = None  # (key) of a named session that has ended


def _nothing(*_: Any) -> None:
    pass


NO_OBSERVER = Observer(_nothing, _nothing)
