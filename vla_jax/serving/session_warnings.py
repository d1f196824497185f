"""Warnings about requests that are valid, but with which a policy with memory acts wrongly.

Scripts written for policies without memory ask for a chunk of actions every few frames, and do not
say where an episode ends. Nothing fails then; the success rate drops. The server cannot know the
intention, so that it serves such requests, and says so in the reply and in its log.
"""

from typing import NamedTuple

MAX_PERIODS = 3.0  # control periods between two frames without a warning
MAX_LENGTHS = 1.5  # episode lengths of the training without a warning


class Expected(NamedTuple):
    """Requests as the policy was trained for; None = not known, and no warning."""

    control_hz: float | None = None  # frames per second of the training data
    episode_length: int | None = None  # steps of the longest episode of the training


NOTHING_KNOWN = Expected()


class Seen(NamedTuple):
    """One request of a session."""

    age: int  # steps of the episode before this request
    num_frames: int  # frames of this request
    starts: bool  # this request begins an episode
    seconds: float | None  # s since the session's last request; None = there was none
    prompt: str | None  # of this request; None = that of the episode
    episode_prompt: str | None  # of the episode before this request


def warnings_of(expected: Expected, seen: Seen) -> tuple[str, ...]:
    """Returns the warnings about a request, one sentence each; () if it is as expected.

    Args:
      expected: of the policy.
      seen: the request.
    """
    if seen.starts:
        return ()
    found = (_skipped(expected, seen), _other_prompt(seen), _too_long(expected, seen))
    return tuple(sentence for sentence in found if sentence)


def _skipped(expected: Expected, seen: Seen) -> str:
    if expected.control_hz is None or seen.seconds is None:
        return ""
    periods = seen.seconds * expected.control_hz / seen.num_frames
    if periods <= MAX_PERIODS:
        return ""
    return (
        f"step {seen.age}: {seen.seconds:.2f} s since the last request are {periods:.0f} control "
        f"periods of the training ({expected.control_hz:g} Hz) per frame; send every frame, one per"
        " request or the missed ones as `frames` (openpi's scripts: --replan-steps 1)."
    )


def _other_prompt(seen: Seen) -> str:
    if seen.prompt is None or seen.episode_prompt in (None, seen.prompt):
        return ""
    return (
        f"step {seen.age}: the prompt changed without reset, so that the memory of the episode goes"
        " on under the new instruction; send reset: true if a new episode begins."
    )


def _too_long(expected: Expected, seen: Seen) -> str:
    length = expected.episode_length
    if length is None or not seen.age <= MAX_LENGTHS * length < seen.age + seen.num_frames:
        return ""  # said once in an episode
    return (
        f"step {seen.age}: the longest episode of the training has {length} steps; send reset: true"
        " at the first frame of every trial, also with the same prompt."
    )
